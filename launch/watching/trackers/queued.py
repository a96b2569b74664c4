"""A tracker that works aside, so that training never waits for it.

What is told waits in a queue of limited length for one thread; when the queue is full, because the tracker is stuck,
what comes is dropped. At the end the rest is waited for, but not for ever.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from types import TracebackType
from typing import Any

from launch.watching.trackers.tracker import Level, Pixels, Tracker

MOST_CALLS = 10_000
"""That wait; a record takes about a kilobyte."""


class QueuedTracker(Tracker):
    """Hands everything to another tracker, in order, in a thread of its own.

    Raises: what is no failure of the tracker, in the call that follows it.
    """

    def __init__(
        self, inner: Tracker, say: Callable[[str], None], *, finish_seconds: float, most: int = MOST_CALLS
    ) -> None:
        self.run_id, self.images = inner.run_id, inner.images
        self._inner, self._say, self._finish_seconds = inner, say, finish_seconds
        self._calls: Queue[Callable[[], None] | None] = Queue(most)
        self._first = _FirstError()
        self._dropped = 0
        self._thread = Thread(target=self._work, name="tracker", daemon=True)  # a stuck one must not keep the process
        self._thread.start()

    def log(self, record: Mapping[str, Any]) -> None:
        """Hand it on."""
        self._put(lambda: self._inner.log(record))

    def event(self, record: Mapping[str, Any]) -> None:
        """Hand it on."""
        self._put(lambda: self._inner.event(record))

    def figures(self, figures: Mapping[str, Path | Pixels]) -> None:
        """Hand them on."""
        self._put(lambda: self._inner.figures(figures))

    def matrix(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Hand it on."""
        self._put(lambda: self._inner.matrix(columns, rows))

    def checkpoint(self, folder: Path, step: int) -> None:
        """Hand it on."""
        self._put(lambda: self._inner.checkpoint(folder, step))

    def model(self, folder: Path) -> None:
        """Hand it on."""
        self._put(lambda: self._inner.model(folder))

    def alert(self, title: str, text: str, level: Level) -> None:
        """Hand it on."""
        self._put(lambda: self._inner.alert(title, text, level))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Hand it on."""
        self._put(lambda: self._inner.summary(values))

    def finish(self, exit_code: int = 0) -> None:
        """Wait for what is not told yet, and close the run; gives up after `finish_seconds`."""
        deadline = time.monotonic() + self._finish_seconds
        for call in (lambda: self._inner.finish(exit_code), None):
            with suppress(Full):  # it is stuck
                self._calls.put(call, timeout=max(0.0, deadline - time.monotonic()))
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._say(f"the tracker has not ended within {self._finish_seconds:g} s, and is left behind")
            self._inner.leave()
        self._first.throw()

    def _put(self, call: Callable[[], None]) -> None:
        self._first.throw()
        try:
            self._calls.put_nowait(call)
        except Full:
            if not self._dropped:
                self._say("the tracker does not keep up: what it cannot take is dropped; metrics.jsonl has everything")
            self._dropped += 1

    def _work(self) -> None:
        for call in iter(self._calls.get, None):
            with self._first:
                call()


class _FirstError(AbstractContextManager[None]):
    """Keeps the first error of the thread for the thread that trains."""

    def __init__(self) -> None:
        self._error: BaseException | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._error = self._error or error
        return True

    def throw(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
