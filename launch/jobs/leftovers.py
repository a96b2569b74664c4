"""The processes of an attempt on this machine, found by the variable that names its folder, which they all inherit.

Launchers start processes in sessions of their own, and may die before these. Linux only: elsewhere none are found.
"""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from launch.jobs.attempt import VARIABLE

_GRACE_SECONDS = 5.0
"""How long a process may go on after its launcher has ended: it may be writing its last words."""


def processes_of(folder: Path) -> dict[int, dict[str, str]]:
    """Process ids of an attempt, and their environments; all attempts' where the folder is that of the job."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        number = int(path.parent.name)
        try:
            rows = path.read_bytes().split(b"\0")
        except OSError:  # it ended, or it is another user's
            continue
        variables = dict(row.decode(errors="replace").partition("=")[::2] for row in rows)
        named = variables.get(VARIABLE)
        if number != os.getpid() and named and Path(named).is_relative_to(folder):
            found[number] = variables
    return found


def end_leftovers(folder: Path) -> list[int]:
    """Kill what an attempt has left behind on this machine; returns the process ids."""
    limit = time.monotonic() + _GRACE_SECONDS
    while (left := processes_of(folder)) and time.monotonic() < limit:
        time.sleep(0.1)
    for number in left:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    return list(left)
