"""Exit codes and the last word of every command: one clear message for what the user can mend, from one process."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from launch.jobs.attempt import NodeTrouble, Outcome, note
from parallel.files import is_disk_error
from parallel.launchers import rank_in
from parallel.runtime import NotMet
from parallel.watchdog import Failure
from relora.errors import ConfigError

DONE, FAILED, REFUSED, PREEMPTED = 0, 1, 2, 75

_TURN_SECONDS = 3.0
"""How long the other processes leave the word to the main one before the processes have met."""


def run(command: Callable[[], int]) -> int:
    """Run a command; turn errors that the user can mend into a message and an exit code.

    Anything else keeps its traceback: it is a defect of ours. Once several processes have met, parallel/watchdog.py
    reports for all of them, and what is raised here is from before.
    """
    try:
        return command()
    except Exception as error:
        failure = explain(error)
        tell(None, failure)
        if failure.traceback:
            raise
        _wait_for_turn(failure.code)
        sys.stdout.flush()
        print(f"error: {failure.message}", file=sys.stderr)
        return failure.code


def tell(host: str | None, failure: Failure) -> None:
    """Let the supervisor know of a failure, and of the machine where it was seen to happen."""
    blamed = failure.host or (host if failure.observed else None)
    note(Outcome(code=failure.code, reason=failure.message, host=blamed, diverged=failure.step))


def explain(error: BaseException) -> Failure:
    """An exception as the user should hear of it."""
    from launch.training.guard import TrainingDiverged
    from parallel.meeting_line import MeetingLost

    line = " ".join(str(error).split())  # other libraries' words may come in several lines
    if isinstance(error, ConfigError):
        return Failure(message=line, code=REFUSED)
    if isinstance(error, (NodeTrouble, NotMet, TrainingDiverged)):
        host, step = getattr(error, "host", None), getattr(error, "step", None)
        return Failure(message=line, code=FAILED, host=host, step=step)
    if isinstance(error, MeetingLost):
        return Failure(message=line, code=PREEMPTED)
    if is_disk_error(error):
        advice = "Free some space or name another folder; checkpoints are untouched"
        return Failure(message=f"{line}. {advice}", code=REFUSED)
    return Failure(
        message=f"{type(error).__name__}: {line}" if line else type(error).__name__,
        code=FAILED,
        traceback="".join(traceback.format_exception(error)),
    )


def _wait_for_turn(code: int) -> None:
    """Let the main process say the same first, since a launcher ends the others as soon as it has ended."""
    if rank_in(os.environ) == 0:
        return
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(code))
    time.sleep(_TURN_SECONDS)
