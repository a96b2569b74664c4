"""What a supervised run and launch/jobs/supervise.py tell each other: files in one folder for each attempt.

The folder is named by an environment variable; without it nothing here has an effect. The run writes why it ended,
since launchers end with codes of their own; the supervisor asks it to stop by a file, since launchers pass on signals
each in their own way, if at all. The first process touches a file as long as it gets on. The others keep their output
there.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from socket import gethostname

VARIABLE = "ACCRETE_ATTEMPT"
"""Names the folder of this attempt."""
_OUTCOME, _STOP, _HEARTBEAT = "outcome.json", "stop", "heartbeat"
_LOOK_SECONDS = 1.0
"""Between two looks for the file that asks to stop: on a shared file system each is a request to a server."""
_BEAT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Why an attempt ended, by its own words."""

    code: int
    """Of launch/exits.py."""
    reason: str = ""
    host: str | None = None
    """The machine of the process that was lost, or that alone had numbers that were not finite."""
    again: bool = True
    """Whether a stopped run wants to go on."""
    diverged: int | None = None
    """The step at which too many updates had been refused."""


class NodeTrouble(RuntimeError):
    """One machine cannot do what the others can, and had better be left out."""

    def __init__(self, host: str, message: str) -> None:
        super().__init__(message)
        self.host = host


def folder_of(environment: Mapping[str, str]) -> Path | None:
    """The folder of this process's attempt, if it is supervised."""
    return Path(environment[VARIABLE]) if environment.get(VARIABLE) else None


def note(outcome: Outcome) -> None:
    """Tell the supervisor, if there is one, why this attempt ends; the last word counts."""
    folder = folder_of(os.environ)
    if folder is None:
        return
    partial = folder / f".{_OUTCOME}.{gethostname()}.{os.getpid()}"
    try:
        partial.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
        partial.replace(folder / _OUTCOME)
    except OSError as error:  # the disk may be what the run ends for
        print(f"warning: {folder / _OUTCOME} cannot be written: {error}", file=sys.stderr)


def outcome_in(folder: Path) -> Outcome | None:
    """What the run has noted so far."""
    try:
        return Outcome(**json.loads((folder / _OUTCOME).read_text(encoding="utf-8")))
    except OSError:
        return None


def ask_to_stop(folder: Path) -> None:
    """Ask the run of an attempt to write a checkpoint and end."""
    (folder / _STOP).touch()


class StopFile:
    """Looks for the file that asks this run to stop."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        folder = folder_of(environment)
        self._path = None if folder is None else folder / _STOP
        self._next = 0.0

    def asks(self) -> bool:
        """Whether it was there, as of the last second."""
        if self._path is None or time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + _LOOK_SECONDS
        return self._path.exists()


@contextmanager
def beating(environment: Mapping[str, str], gets_on: Callable[[], bool]) -> Iterator[None]:
    """Have a thread touch a file every few seconds as long as this process gets on; for the first process."""
    folder, ended = folder_of(environment), threading.Event()

    def beat() -> None:
        while not ended.is_set():
            if folder is not None and gets_on():
                with suppress(OSError):
                    (folder / _HEARTBEAT).touch()
            ended.wait(_BEAT_SECONDS)

    if folder is not None:
        threading.Thread(target=beat, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


class Heartbeat:
    """The supervisor's view of that file."""

    def __init__(self, folder: Path) -> None:
        self._path, self._seen = folder / _HEARTBEAT, 0
        self._heard = self._next = time.monotonic()

    def silence(self) -> float:
        """Seconds since its last change, or since the beginning before the first one, by the clock of this machine."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _LOOK_SECONDS
            with suppress(OSError):
                seen = self._path.stat().st_mtime_ns
                if seen != self._seen:
                    self._seen, self._heard = seen, now
        return now - self._heard

    @property
    def begun(self) -> bool:
        """Whether it has been seen to change."""
        return bool(self._seen)


def keep_own_log(environment: Mapping[str, str], rank: int) -> None:
    """Send what this process and its libraries print to a file of its own; the first process keeps the launcher's."""
    folder = folder_of(environment)
    if folder is None or rank == 0:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    with (folder / f"rank_{rank:05d}.{gethostname()}.log").open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
