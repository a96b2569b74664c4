"""What a run tells a tracker while it works. The plain Tracker keeps it to itself; others are never in a run's way.

All of them name numbers alike: a step's by its keys, an event's as event/number.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.watching.trackers.config import Images

Pixels = NDArray[np.uint8]
"""A picture. Shapes: (height, width, 4)"""


class Level(str, Enum):
    """How urgent an alert is."""

    warning = "warning"
    failure = "failure"


class Tracker:
    """What a run tells about itself while it works; this one keeps it to itself."""

    run_id: str | None = None
    """The id to continue under; None if there is nothing to continue."""
    images: Images = Images.none
    """Which pictures are worth drawing for it."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take a step's record."""

    def event(self, record: Mapping[str, Any]) -> None:
        """Take an event's numbers, each named after its event."""

    def figures(self, figures: Mapping[str, Path | Pixels]) -> None:
        """Take pictures by name, drawn or as PNG files."""

    def matrix(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Take a stream's score matrix so far."""

    def checkpoint(self, folder: Path, step: int) -> None:
        """Hear of a checkpoint that is all on disk."""

    def model(self, folder: Path) -> None:
        """Hear of the final model."""

    def alert(self, title: str, text: str, level: Level) -> None:
        """Tell somebody who is not looking."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Take the run's final values."""

    def finish(self, exit_code: int = 0) -> None:
        """Close the run."""

    def leave(self) -> None:
        """Let go of what keeps `finish` waiting; called by another thread than the one that waits there."""


class Guard(AbstractContextManager[None]):
    """Keeps in what a tracker's package or the system under it raises, and tells of the first; an error of ours passes.

    Errors are known by the package that defines them, for not all of W&B's share a base class.
    """

    def __init__(self, say: Callable[[str], None], what: str, package: str) -> None:
        self._say, self._what, self._package = say, what, package
        self._told = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if kind is None or not (issubclass(kind, OSError) or kind.__module__.partition(".")[0] == self._package):
            return False
        if not self._told:
            self._say(f"{self._what}: {kind.__name__}: {' '.join(str(error).split())}")
        self._told = True
        return True


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The record's numbers; those that it lists for LTE's heads each under its head, as losses/head_0."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, (int, float)):
            found[key] = value
        elif isinstance(value, list) and all(isinstance(entry, float) for entry in value):
            heads = record.get("members") or range(len(value))
            found |= {f"{key}/head_{head}": entry for head, entry in zip(heads, value, strict=False)}
    return found


def event_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """An event's numbers but its step, as event/number, and those of LTE's heads as event/numbers/head_0."""
    return {f"{record['event']}/{key}": value for key, value in numbers_of(record).items() if key != "step"}
