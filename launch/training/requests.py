"""What a run is asked for while it trains: one file for each wish in `requests/` of its run folder.

Whoever may write there may ask; `accrete tell` does. The main process looks once a second, all processes hear of it
with the next update, and the loop grants it between two steps (launch/training/granting.py), then the file goes.
"""

import json
import time
from collections.abc import Iterable
from enum import Enum
from pathlib import Path

from launch.config import TrainConfig, load_stored
from parallel.files import write_atomically
from relora.errors import ConfigError

_LOOK_SECONDS = 1.0
"""Between two looks: on a shared file system each is a request to a server."""


class Wish(str, Enum):
    """What can be asked for."""

    checkpoint = "checkpoint"
    evaluate = "evaluate"
    restart = "restart"
    stop_after_cycle = "stop-after-cycle"
    stop = "stop"


MEANINGS = {
    Wish.checkpoint: "write a checkpoint now",
    Wish.evaluate: "measure the validation loss now",
    Wish.restart: "merge and begin a new cycle now; the restarts that are planned stay where they are",
    Wish.stop_after_cycle: "stop after the next restart, sync of LTE's heads, or end of a task",
    Wish.stop: "write a checkpoint, end with code 75, and let no supervisor start the run again",
}


def request(run_dir: Path, wish: Wish) -> None:
    """Ask a run for something; a run that does not train now hears of it when it goes on.

    Raises:
        ConfigError: there is no run, it is done, or has nothing of the kind.
    """
    config = load_stored(run_dir)
    summary = run_dir / "summary.json"
    if summary.exists() and json.loads(summary.read_text(encoding="utf-8")).get("status") == "done":
        raise ConfigError(f"{run_dir} is done, and hears no requests: its results are in summary.json and final/")
    reason = objection(config, wish)
    if reason is not None:
        raise ConfigError(f"{run_dir}: {reason}")
    folder = requests_in(run_dir)
    folder.mkdir(exist_ok=True)
    write_atomically(folder / wish.value, f"{time.time():.3f}\n")


def objection(config: TrainConfig, wish: Wish) -> str | None:
    """Why a run cannot do what it is asked for, whenever it is asked; None if it can."""
    if wish is Wish.restart and config.lte is not None:
        return "restart is for one model, and LTE's heads merge at their syncs: ask for stop-after-cycle or checkpoint"
    if wish is Wish.restart and config.relora is None:
        return "restart has no meaning with relora=none, which has one cycle: ask for checkpoint or stop"
    if wish is Wish.stop_after_cycle and config.relora is None and config.lte is None and config.continual is None:
        return "stop-after-cycle has no meaning without relora, lte and tasks: ask for stop"
    return None


def requests_in(run_dir: Path) -> Path:
    """Where a run's requests lie."""
    return run_dir / "requests"


def waiting(run_dir: Path) -> list[str]:
    """Names of the requests that have not been granted yet."""
    try:
        return sorted(path.name for path in requests_in(run_dir).iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return []


def take_back(run_dir: Path) -> list[str]:
    """Take away all that waits; returns its names."""
    names = waiting(run_dir)
    for name in names:
        (requests_in(run_dir) / name).unlink(missing_ok=True)
    return names


class Wishes:
    """What a run was asked for, as its processes know of it."""

    def __init__(self, run_dir: Path | None) -> None:
        self._run_dir = run_dir  # None on all processes but the main one
        self._next = 0.0
        self._names: list[str] = []
        self.heard: frozenset[Wish] = frozenset()
        """As all processes of this head learned with the last update."""
        self.agreed: frozenset[Wish] = frozenset()
        """As all processes have learned, with the last update or at the last sync of LTE's heads."""
        self.cycle_ended = False
        """Whether a cycle ended with the last step."""

    def names(self) -> list[str]:
        """What lay there, as of the last second; nothing on other processes."""
        if self._run_dir is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + _LOOK_SECONDS
            self._names = waiting(self._run_dir)
        return self._names

    def remove(self, name: str) -> None:
        """Take a request away, on the main process."""
        if self._run_dir is not None:
            (requests_in(self._run_dir) / name).unlink(missing_ok=True)
            self._names = [one for one in self._names if one != name]

    def granted(self, wish: Wish) -> None:
        """Take a wish away on this process."""
        self.heard, self.agreed = self.heard - {wish}, self.agreed - {wish}
        self.remove(wish.value)


def to_number(wishes: Iterable[Wish]) -> int:
    """A set of wishes as it travels between processes."""
    return sum(1 << place for place, wish in enumerate(Wish) if wish in wishes)


def from_number(number: float) -> frozenset[Wish]:
    """The set that `to_number` made a number of."""
    return frozenset(wish for place, wish in enumerate(Wish) if int(number) >> place & 1)
