"""Turns a signal, or a word of the supervisor or the user, into a wish that the loop grants between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from launch.jobs.attempt import StopFile

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether somebody asked the run to stop, and by which signal."""

    def __init__(self, file: StopFile | None) -> None:
        self.name: str | None = None
        self._file = file
        self.asked = False
        """Whether any process of this head was asked, as they learned with the last update."""
        self.agreed = False
        """Whether any process at all was, as all of them learned with the last update, or LTE's heads at a sync."""
        self.again = True
        """Whether the run is to go on some time: False when its user stopped it."""

    def __bool__(self) -> bool:
        if self.name is None and self._file is not None and self._file.asks():
            self.name = "its supervisor"
        return self.name is not None

    def ask(self, name: str, *, again: bool) -> None:
        """Note a wish of the user's."""
        self.name = self.name or name
        self.again = self.again and again

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; a second SIGINT ends the process at once, as an impatient user expects."""
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@contextmanager
def listening(file: StopFile | None = None) -> Iterator[StopRequest]:
    """Catch SIGTERM, SIGINT and SIGUSR1 for the length of a run, and look for the file."""
    request = StopRequest(file)
    before = {number: signal.signal(number, request.receive) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
