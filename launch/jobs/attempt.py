"""What a supervised run and launch/jobs/supervise.py tell each other: files in one folder for each attempt.

The folder is named by an environment variable; without it nothing here has an effect. The run writes why it ended,
since launchers end with codes of their own; the supervisor asks it to stop by a file, since launchers pass on signals
each in their own way, if at all. Processes but the first keep their output there.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from socket import gethostname

VARIABLE = "ACCRETE_ATTEMPT"
"""Names the folder of this attempt."""
_OUTCOME, _STOP = "outcome.json", "stop"
_LOOK_SECONDS = 1.0
"""Between two looks for the file that asks to stop: on a shared file system each is a request to a server."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Why an attempt ended, by its own words."""

    code: int
    """Of launch/exits.py."""
    reason: str = ""
    host: str | None = None
    """The machine of the process that was lost, if one was."""
    again: bool = True
    """Whether a stopped run wants to go on."""


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
