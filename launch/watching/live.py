"""Many runs in one table: live on a terminal, printed again and again elsewhere, or once."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console as Terminal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch.watching.console import PlainConsole
from launch.watching.readings import amount, duration
from launch.watching.standing import Queue, RunReader, Standing, find_runs

_COLUMNS = ("run", "state", "step", "loss", "val", "tok/s", "left", "last event", "job")
_NUMBERS = {"step", "loss", "val", "tok/s", "left"}
_STYLES = {"training": "green", "done": "dim", "diverged": "red", "has not begun": "yellow"}


class Overview:
    """The runs in some folders, read anew whenever they are asked for; those that appear later are found, too."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders, self._queue = folders, Queue()
        self._readers: dict[Path, RunReader] = {}

    def rows(self) -> list[tuple[Standing, list[str]]]:
        """Each run with its cells.

        Raises:
            ConfigError: a run's configuration cannot be read.
        """
        runs = list(dict.fromkeys(run for folder in self._folders for run in find_runs(folder)))
        standings = [self._readers.setdefault(run, RunReader(run)).read() for run in runs]
        jobs = self._queue.told(one.number for one in standings if one.number is not None)
        return [(one, _cells(one, self._name(one.run), jobs)) for one in standings]

    def _name(self, run: Path) -> str:
        """As short as the folders that were given allow."""
        holders = [folder for folder in self._folders if folder != run and folder in run.parents]
        return str(run.relative_to(holders[0])) if len(self._folders) == 1 and holders else str(run)


def _cells(one: Standing, name: str, jobs: Mapping[str, Sequence[str]]) -> list[str]:
    loss = None if one.last is None else one.last.get("loss")
    state = one.state if len(one.state) < 20 else "?"
    asked = f", asked: {', '.join(one.asked)}" if one.asked else ""
    job = "" if one.number is None else jobs[one.number][0].partition(",")[0]
    return [
        name,
        state + asked,
        f"{one.step}/{one.total}" if one.total else str(one.step),
        "" if one.last is None else f"{math.nan if loss is None else loss:.4f}",
        "" if one.validation is None else f"{one.validation['val_loss'] or math.nan:.4f}",
        "" if one.tokens_per_second is None else amount(one.tokens_per_second),
        "" if one.seconds_left is None else duration(one.seconds_left),
        "" if one.event is None else f"{one.event['event']} at {one.event['step']}",
        job,
    ]


class _Screen(Protocol):
    def show(self, rows: Sequence[tuple[Standing, list[str]]]) -> None:
        """Show the runs as they are now."""


def show_once(folders: Sequence[Path], file: TextIO) -> None:
    """Print the table."""
    with _screen(file, live=False) as screen:
        screen.show(Overview(folders).rows())


def watch_runs(folders: Sequence[Path], file: TextIO, *, seconds: float, rounds: int | None = None) -> None:
    """Show runs until Ctrl-C.

    Args:
        seconds: between two looks.
        rounds: looks; None: for ever.
    """
    overview = Overview(folders)
    with _screen(file, live=True) as screen:
        done = 0
        while True:
            screen.show(overview.rows())
            done += 1
            if rounds is not None and done >= rounds:
                return
            time.sleep(seconds)


@contextmanager
def _screen(file: TextIO, *, live: bool) -> Iterator[_Screen]:
    terminal = Terminal(file=file, highlight=False, markup=False)
    if not terminal.is_terminal:
        yield _Plain(file)
    elif not live:
        yield _Rich(terminal.print)
    else:
        with Live(console=terminal, auto_refresh=False, vertical_overflow="visible") as drawn:
            yield _Rich(lambda table: drawn.update(table, refresh=True))


class _Plain:
    def __init__(self, file: TextIO) -> None:
        self._console = PlainConsole(file)

    def show(self, rows: Sequence[tuple[Standing, list[str]]]) -> None:
        """Print the table below the one before."""
        self._console.table(_title(rows), _COLUMNS, [cells for _, cells in rows])


class _Rich:
    def __init__(self, draw: Callable[[Table], None]) -> None:
        self._draw = draw

    def show(self, rows: Sequence[tuple[Standing, list[str]]]) -> None:
        """Draw the table in the place of the one before."""
        table = Table(title=_title(rows), title_justify="left", caption="Ctrl-C ends", caption_justify="left")
        for name in _COLUMNS:
            table.add_column(name, justify="right" if name in _NUMBERS else "left", overflow="fold")
        for standing, cells in rows:
            table.add_row(*(Text(cell) for cell in cells), style=_STYLES.get(standing.state))
        self._draw(table)


def _title(rows: Sequence[tuple[Standing, list[str]]]) -> str:
    training = sum(standing.state == "training" for standing, _ in rows)
    return f"{time.strftime('%H:%M:%S')}  {len(rows)} run{'s' if len(rows) != 1 else ''}, {training} training"
