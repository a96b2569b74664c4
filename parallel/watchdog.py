"""One failing process ends the run on all of them, soon, with one report.

Every process has a thread that holds a line to the main process, since the main thread may be stuck in a collective for
ever. A process that fails says why; one that is killed breaks its line; one that is stopped falls silent; one whose
launcher is gone says so; when processes wait in vain, each says where it is. The main process waits a moment for the
cause among the consequences, reports it, and all end by `os._exit`: half-written checkpoints are harmless, and
destructors of process groups may wait for the dead.
"""

import math
import os
import re
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from parallel.collectives import gather_objects
from parallel.launchers import has_agent
from parallel.lines import Line, open_lines
from parallel.pulse import Pulse, held_up_by, place_of_main
from parallel.runtime import Runtime

DEFAULT_SILENCE = 30.0
"""Seconds without a sign of life after which a process counts as lost."""
_SETTLE = 0.5
"""Seconds between a process's message and the report: the main process may be about to say the same."""
_PATIENCE = 3.0
"""Seconds that a broken collective waits for its cause to become known."""
_VERDICT = 8.0
"""Seconds that a failed process waits for the main process's report before it reports itself."""
_AGAIN = "All processes end; start the same command again, it goes on from the last checkpoint"

# What gloo and NCCL say when a peer is gone or late.
_BROKEN = re.compile(
    r"gloo/.*(connection|socket|broken pipe|timed out|timeout)|nccl.*(remote|system error|timeout)",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a process cannot go on."""

    message: str
    """One sentence or two for the user."""
    code: int = 1
    """Exit code of all processes."""
    traceback: str = ""
    """Shown before the message; empty for what the user can mend."""
    observed: bool = False
    """Whether the watchdog saw it, and the message names the process already."""
    consequence: bool = False
    """Whether another process's failure may be the cause."""
    at: str = ""
    """Where a process is that does not get on."""
    host: str | None = None
    """The machine to blame, if that is known and not the process's."""
    step: int | None = None
    """The step that it happened at, if its numbers are the reason."""


def watched(
    runtime: Runtime,
    *,
    explain: Callable[[BaseException], Failure],
    tell: Callable[[str, Failure], None] = lambda host, failure: None,
    silence_seconds: float = DEFAULT_SILENCE,
    pulse: Pulse | None = None,
    step_seconds: float = math.inf,
) -> AbstractContextManager[object]:
    """Watch over a run: an exception inside ends all processes, as the failure of any other process does.

    A single process is not watched: its exceptions pass.

    Args:
        explain: puts an exception into words.
        tell: hears of the report, with the host that it is about.
        pulse: of the main thread, whose steps may take `step_seconds`.

    Collectives: a broadcast and a gather at the start.

    Raises:
        NotMet: the processes cannot reach each other.
    """
    if runtime.world_size == 1:
        return nullcontext()
    hosts = gather_objects(runtime, socket.gethostname())
    lines = open_lines(runtime, seconds=silence_seconds)
    return Watchdog(runtime.process_rank, hosts, lines, explain, tell, silence_seconds, pulse or Pulse(), step_seconds)


def lost_peer(error: BaseException) -> bool:
    """Whether an exception means that a collective broke, since another process is gone or late."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _BROKEN.search(str(error)) is not None
    )


def _briefly(call: Callable[[], None]) -> None:
    """Call what may never return: the main thread may hold the lock of stdout, a disk may be gone."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(1.0)


class Watchdog:
    """A process's watchdog; in the main process it also decides what the failure was."""

    def __init__(
        self,
        rank: int,
        hosts: list[str],
        lines: dict[int, Line],
        explain: Callable[[BaseException], Failure],
        tell: Callable[[str, Failure], None],
        silence: float,
        pulse: Pulse,
        step_seconds: float,
    ) -> None:
        self._rank, self._hosts, self._lines, self._explain, self._silence = rank, hosts, lines, explain, silence
        self._tell, self._pulse, self._step_seconds = tell, pulse, step_seconds
        self._beat = min(1.0, silence / 4)
        self._parent = os.getppid() if has_agent(os.environ) else None
        self._failures: dict[int, Failure] = {}
        self._first = 0.0  # when the first of them came
        self._own: Failure | None = None  # set by the main thread
        self._wondered = False  # whether the others were asked where they are
        self._closing = False
        self._finished: set[int] = set()
        self._main_finished = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._bell, self._ring = socket.socketpair()
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._heard = dict.fromkeys(lines, time.monotonic())
        for peer, line in lines.items():
            self._selector.register(line.socket, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not (isinstance(error, SystemExit) and not error.code):
            self._fail(error)
        if self._rank != 0:
            for line in list(self._lines.values()):
                line.send(finished=True)
            # A launcher ends all processes soon after the first: let it be the main one, which writes.
            self._main_finished.wait()
        self._closing = True
        self._ring.send(b".")
        self._thread.join()
        if self._rank == 0:  # no longer watched: whoever hears this first hangs up, with no word of its own left to say
            for line in self._lines.values():
                line.send(finished=True)
            self._let_read(time.monotonic() + 1.0)
        for line in self._lines.values():
            line.socket.close()
        self._selector.close()
        self._bell.close()
        self._ring.close()

    def _fail(self, error: BaseException) -> NoReturn:
        """Leave the end of the process to the thread, which knows whether this is the cause or a consequence."""
        # A launcher that saw another process end sends a signal, which must not cut this short.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        failure = self._explain(error)
        if lost_peer(error):
            words = " ".join(str(error).split()).split(". ")[0]
            reason = "a collective broke, or took longer than its limit, and no process has said why"
            failure = Failure(message=f"{reason} ({words}). {_AGAIN}", consequence=True)
        self._own = failure
        self._ring.send(b".")
        self._thread.join(2 * _VERDICT)
        self._end(self._rank, failure)

    def _watch(self) -> None:
        sent = 0.0
        while not self._closing:
            before = time.monotonic()
            ready = self._selector.select(min(0.1, self._beat) if self._failures else self._beat)
            now = time.monotonic()
            if now - before > 2 * self._beat + 1:  # this process itself was stopped: the others may be well
                self._heard = dict.fromkeys(self._heard, now)
                self._pulse.after(now)
            for key, _ in ready:
                self._hear(key.data, now)
            if now - sent >= self._beat:
                sent = now
                for line in self._lines.values():
                    line.send()
            self._look(now)
            if self._failures:
                self._judge(now)

    def _hear(self, peer: int | None, now: float) -> None:
        if peer is None:
            self._bell.recv(1)
            return
        self._heard[peer] = now
        messages = self._lines[peer].receive()
        for message in messages or ():
            if "end" in message:
                self._leave(message["end"])
            if "where" in message:
                self._note(self._rank, self._still())
            if "failure" in message:
                self._note(peer, Failure(**message["failure"]))
            if "finished" in message:
                self._finished.add(peer)
        if messages is None or 0 in self._finished:
            self._hang_up(peer)
        if messages is None and peer not in self._finished:
            self._note(peer, self._seen(peer, "ended without a word (killed, out of memory, or crashed in a library)"))
        if 0 in self._finished:
            self._main_finished.set()

    def _look(self, now: float) -> None:
        """Notice what no message tells."""
        for peer in self._lines:
            if peer not in self._finished and now - self._heard[peer] > self._silence:
                reason = f"has been silent for {self._silence:g} s (stopped, or its machine or network is gone)"
                self._note(peer, self._seen(peer, reason))
        if self._own is not None:
            self._note(self._rank, self._own)
        if self._pulse.still(now) > self._step_seconds:
            self._note(self._rank, self._still())
        if self._parent is not None and os.getppid() != self._parent:
            self._note(self._rank, self._seen(self._rank, "has lost its launcher, which was killed or crashed"))

    def _note(self, process: int, failure: Failure) -> None:
        if not self._failures:
            self._first = time.monotonic()
        if process in self._failures and (failure.at or not self._failures[process].at):
            return
        self._failures[process] = failure  # its own words, after it had only been asked where it is
        if process == self._rank and self._rank != 0:
            for line in self._lines.values():
                line.send(failure=asdict(failure))
        if self._rank == 0 and (failure.consequence or failure.at) and not self._wondered:
            self._wondered = True
            for line in self._lines.values():
                line.send(where=True)
            self._note(0, self._still())

    def _judge(self, now: float) -> None:
        """End the run once its cause can be told."""
        causes = [rank for rank, failure in self._failures.items() if not failure.consequence and not failure.at]
        cause = next(iter(causes or self._failures))
        waited = now - self._first
        if self._rank == 0:
            failure = self._failures[cause]
            if failure.observed or waited > (_SETTLE if causes else _PATIENCE):
                self._end(*(cause, failure) if causes else self._held_up(cause))
        elif 0 in self._failures:  # the main process is gone: whoever is first on its machine speaks for all there
            neighbours = [rank for rank, host in enumerate(self._hosts) if host == self._hosts[self._rank] and rank]
            self._end(cause, self._failures[cause], speak=self._rank in (cause, neighbours[0]))
        elif 0 not in self._lines or waited > _VERDICT:
            self._end(cause, self._failures[cause])

    def _still(self) -> Failure:
        """Where this process is, whose main thread does not get on."""
        place = place_of_main()
        message = f"no step has ended for {self._step_seconds:g} s. {_AGAIN}"
        told = f"{self._name(self._rank)} is here, the innermost call last:\n{place.stack}"
        return Failure(message=message, consequence=place.waits, at=place.at, traceback=told)

    def _held_up(self, first: int) -> tuple[int, Failure]:
        """What to say when processes wait in vain and none has failed: who does not come, or where all are."""
        places = {rank: failure.at for rank, failure in self._failures.items() if failure.at}
        waiting = {rank for rank, failure in self._failures.items() if failure.consequence}
        late = held_up_by(places, waiting)
        if not late:
            there = "; ".join(f"process {rank} is at {places[rank]}" for rank in sorted(places)[:4])
            failure = self._failures[first]
            return first, replace(failure, message=f"{failure.message}. {there}" if there else failure.message)
        others = f", as do {len(late) - 1} others" if len(late) > 1 else ""
        reason = f"holds up the rest{others}: it is at {places[late[0]]}, and the rest wait for it. {_AGAIN}"
        alone = len({self._hosts[rank] for rank in late}) == 1
        failure = self._seen(late[0], reason) if alone else Failure(message=reason)
        return late[0], replace(failure, traceback=self._failures[late[0]].traceback)

    def _end(self, process: int, failure: Failure, *, speak: bool = True) -> NoReturn:
        if speak:
            os.write(2, self._report(process, failure).encode())
            _briefly(lambda: self._tell(self._hosts[process], failure))
        if self._rank == 0:
            for line in self._lines.values():
                line.send(end=failure.code)
            self._let_read(time.monotonic() + 1.0)
        self._leave(failure.code)

    def _let_read(self, deadline: float) -> None:
        """Give the others a moment to end: some launchers blame the first process that does, and kill the rest."""
        for line in self._lines.values():
            while (seconds := deadline - time.monotonic()) > 0:
                line.socket.settimeout(seconds)
                if line.receive() is None:
                    break

    def _leave(self, code: int) -> NoReturn:
        _briefly(sys.stdout.flush)
        os._exit(code)

    def _report(self, process: int, failure: Failure) -> str:
        own = self._failures.get(self._rank)
        if not failure.observed and not (self._rank == 0 and own is not None and own.message == failure.message):
            failure = replace(failure, message=f"{self._name(process)}: {failure.message}")
        end_of_bar = "\n" if sys.stderr.isatty() else ""
        return f"{end_of_bar}{failure.traceback}error: {' '.join(failure.message.split())}\n"

    def _seen(self, process: int, what: str) -> Failure:
        return Failure(message=f"{self._name(process)} {what}. {_AGAIN}", observed=True)

    def _name(self, process: int) -> str:
        return f"process {process} of {len(self._hosts)} on {self._hosts[process]}"

    def _hang_up(self, peer: int) -> None:
        line = self._lines.pop(peer)
        self._selector.unregister(line.socket)
        line.socket.close()
