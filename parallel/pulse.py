"""Whether a process's main thread gets on with what it does, as its other threads can see it.

Only while a step is expected to end is anything expected at all: a save, a validation or the data may take as long
as they take, and where processes wait for each other then, their collectives have time limits.
"""

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

_WAITING = ("/torch/distributed/", "/mpi4py/")
"""Code that a process waits in for others; one that waits for its GPU may wait for others, too, and cannot tell."""


class Pulse:
    """Set by the main thread, looked at by others."""

    def __init__(self) -> None:
        self._since: float | None = None
        self.told = False
        """Whether it was said that a step takes too long."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """For the length of a step."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def after(self, moment: float) -> None:
        """Count from then on: this process itself was stopped."""
        if self._since is not None:
            self._since = max(self._since, moment)

    def still(self, now: float) -> float:
        """Seconds since the step that is being made began; 0 between steps."""
        since = self._since
        return 0.0 if since is None else now - since


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the main thread is."""

    at: str
    """The innermost line of code."""
    stack: str
    """All lines that led there, outermost first."""
    waits: bool
    """Whether it waits for other processes."""


def place_of_main() -> Place:
    """Where this process's main thread is now; reads no file, since a disk may be what it waits for."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    lines = []
    while frame is not None:
        lines.append((frame.f_code.co_filename, f"line {frame.f_lineno} in {frame.f_code.co_name}"))
        frame = frame.f_back
    shown = [f"{path}, {line}" for path, line in lines]
    return Place(
        at=shown[0] if shown else "nowhere",
        stack="".join(f"  {line}\n" for line in reversed(shown)),
        waits=any(part in path for path, _ in lines[:4] for part in _WAITING),
    )


def gets_on(pulse: Pulse, seconds: float) -> bool:
    """Whether no step has taken longer; where the main thread is then is printed once."""
    still = pulse.still(time.monotonic())
    if still > seconds and not pulse.told:
        os.write(2, f"warning: a step has taken {still:.0f} s. This process is here:\n{place_of_main().stack}".encode())
    pulse.told = still > seconds
    return not pulse.told


def held_up_by(places: Mapping[int, str], waiting: set[int]) -> list[int]:
    """The processes that the others wait for: those that stand elsewhere than most, or that wait for nobody.

    Args:
        places: where each stands, by process rank.
        waiting: those that wait for others for certain.
    """
    there = [rank for rank in places if rank not in waiting]
    if waiting or len(there) < 2:
        return there
    ((most, count), *_) = Counter(places[rank] for rank in there).most_common(1)
    return [rank for rank in there if places[rank] != most] if 2 * count > len(there) else []
