"""What a run says while it works: a live bar on a terminal, plain lines elsewhere, nothing on other ranks.

Callers decide what is said; the words for values are in launch/watching/readings.py, and records have their own file.
"""

import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TextIO

from rich.console import Console as Terminal
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from launch.watching.readings import Readings, amount, cell, duration

_QUIET_SECONDS = 30.0  # a plain progress line comes at the latest after this time,
_QUIET_SHARE = 0.05  # or after this share of the work,
_BUSY_SECONDS = 1.0  # but never sooner than this after the one before


class Progress(Protocol):
    """The display of a training loop."""

    def update(self, step: int, record: Mapping[str, Any], cycle: int | None = None, cycles: int | None = None) -> None:
        """Show that `step` updates are done, the last in this cycle (counted from 0, shown from 1).

        A field that the record lacks keeps its last value.
        """


class Track(Protocol):
    """The display of work that is counted, such as tokenising."""

    def advance(self, count: int = 1) -> None:
        """Count more work as done."""


class Console(Protocol):
    """Where a run speaks."""

    def info(self, text: str) -> None:
        """Say one line."""

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Show rows; columns of numbers are aligned to the right."""

    def progress(self, total_steps: int, start_step: int = 0) -> AbstractContextManager[Progress]:
        """The display of a training loop."""

    def track(self, description: str, total: int | None = None) -> AbstractContextManager[Track]:
        """The display of counted work; `total` may be unknown."""


def make_console(enabled: bool = True, file: TextIO | None = None) -> Console:
    """A console on `file` (standard output) that suits its other end; a silent one unless enabled."""
    if not enabled:
        return SilentConsole()
    terminal = Terminal(file=file or sys.stdout, highlight=False, markup=False)
    return RichConsole(terminal) if terminal.is_terminal else PlainConsole(file or sys.stdout)


class SilentConsole:
    """Says nothing: for every rank but the first. It is its own display."""

    def info(self, text: str) -> None:
        """Say nothing."""

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Show nothing."""

    @contextmanager
    def progress(self, total_steps: int, start_step: int = 0) -> Iterator[Progress]:
        """A dark display."""
        yield self

    @contextmanager
    def track(self, description: str, total: int | None = None) -> Iterator[Track]:
        """A dark display."""
        yield self

    def update(self, step: int, record: Mapping[str, Any], cycle: int | None = None, cycles: int | None = None) -> None:
        """Show nothing."""

    def advance(self, count: int = 1) -> None:
        """Show nothing."""


class PlainConsole:
    """Single ASCII lines: for log files, pipes and batch jobs."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def info(self, text: str) -> None:
        """Say one line; other characters than ASCII are escaped, for the file may not take them."""
        print(text.encode("ascii", "backslashreplace").decode("ascii"), file=self._file, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Show rows in aligned columns, one line each."""
        values = [list(row) for row in rows]
        cells = [list(columns), *([cell(value) for value in row] for row in values)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
        numeric = _numeric(columns, values)
        self.info(title)
        for row in cells:
            aligned = (
                text.rjust(width) if right else text.ljust(width)
                for text, width, right in zip(row, widths, numeric, strict=True)
            )
            self.info("  " + "  ".join(aligned).rstrip())

    @contextmanager
    def progress(self, total_steps: int, start_step: int = 0) -> Iterator[Progress]:
        """A line now and then, and one for the last step."""
        yield _PlainProgress(self, Readings(total_steps, start_step))

    @contextmanager
    def track(self, description: str, total: int | None = None) -> Iterator[Track]:
        """A line now and then, and one at the end."""
        track = _PlainTrack(self, description, total)
        yield track
        track.close()


class _Pace:
    """When the next plain line is due."""

    def __init__(self) -> None:
        self._share, self._time = 0.0, -_QUIET_SECONDS

    def due(self, share: float, *, last: bool = False) -> bool:
        """Tell, and take it as said."""
        now = time.monotonic()
        waited, done = now - self._time, share - self._share
        due = last or waited >= _QUIET_SECONDS or (done >= _QUIET_SHARE and waited >= _BUSY_SECONDS)
        if due:
            self._share, self._time = share, now
        return due


class _PlainProgress:
    def __init__(self, console: PlainConsole, readings: Readings) -> None:
        self._console, self._readings, self._pace = console, readings, _Pace()

    def update(self, step: int, record: Mapping[str, Any], cycle: int | None = None, cycles: int | None = None) -> None:
        """Print a line when one is due."""
        readings = self._readings
        readings.update(step, record, cycle, cycles)
        if self._pace.due(readings.share, last=step >= readings.total):
            head = f"step {step}/{readings.total} ({readings.share:.0%})"
            self._console.info("  ".join([head, *readings.numbers(), f"left {readings.left}"]))


class _PlainTrack:
    def __init__(self, console: PlainConsole, description: str, total: int | None) -> None:
        self._console, self._description, self._total = console, description, total
        self._began, self._done, self._pace = time.monotonic(), 0, _Pace()
        self._pace.due(0.0)  # short work needs no line but its last

    def advance(self, count: int = 1) -> None:
        """Print a line when one is due."""
        self._done += count
        if self._pace.due(self._done / self._total if self._total else 0.0):
            self._say("")

    def close(self) -> None:
        """Print the last line."""
        self._say(f" in {duration(time.monotonic() - self._began)}")

    def _say(self, ending: str) -> None:
        of = f"/{amount(self._total)}" if self._total and not ending else ""
        self._console.info(f"{self._description}: {amount(self._done)}{of}{ending}")


class RichConsole:
    """A terminal with someone before it."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def info(self, text: str) -> None:
        """Say one line, above a bar if there is one."""
        self._terminal.print(Text(text))

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Draw a table."""
        values = [list(row) for row in rows]
        table = Table(title=Text(title), title_justify="left")
        for name, right in zip(columns, _numeric(columns, values), strict=True):
            table.add_column(Text(name), justify="right" if right else "left")
        for row in values:
            table.add_row(*(Text(cell(value)) for value in row))
        self._terminal.print(table)

    @contextmanager
    def progress(self, total_steps: int, start_step: int = 0) -> Iterator[Progress]:
        """A live bar with a line of numbers below it."""
        readings = Readings(total_steps, start_step)
        with _TwoLines(readings, self._terminal) as bars:
            yield _TrainingBar(bars, readings)

    @contextmanager
    def track(self, description: str, total: int | None = None) -> Iterator[Track]:
        """A live bar."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bars(*columns, console=self._terminal) as bars:
            yield _Bar(bars, bars.add_task(description, total=total))


class _Bar:
    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, count: int = 1) -> None:
        """Move the bar."""
        self._bars.advance(self._task, count)


class _TwoLines(Bars):
    """A bar above and the numbers below: both do not fit into the 80 columns of a terminal."""

    def __init__(self, readings: Readings, terminal: Terminal) -> None:
        self._readings = readings
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:3.0f}%  left {task.fields[left]}"),
        )
        super().__init__(*columns, console=terminal, expand=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        """What rich draws at each refresh."""
        yield from super().get_renderables()
        yield Text("  ".join(self._readings.numbers()))


class _TrainingBar:
    def __init__(self, bars: _TwoLines, readings: Readings) -> None:
        self._bars, self._readings = bars, readings
        self._task = bars.add_task("", total=readings.total, completed=readings.step, left=readings.left)

    def update(self, step: int, record: Mapping[str, Any], cycle: int | None = None, cycles: int | None = None) -> None:
        """Move the bar."""
        self._readings.update(step, record, cycle, cycles)
        self._bars.update(self._task, completed=step, left=self._readings.left)


def _numeric(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[bool]:
    return [
        any(row[column] is not None for row in rows)
        and all(row[column] is None or _is_number(row[column]) for row in rows)
        for column in range(len(columns))
    ]


def _is_number(value: object) -> bool:
    """Whether a cell is a number, or the text of one, maybe with its deviation in brackets."""
    if isinstance(value, str):
        return re.fullmatch(r"-?\d+\.\d+( \(\d+\.\d+\))?", value) is not None
    return isinstance(value, (int, float))
