"""Exit codes and the last word of every command: one clear message for what the user can mend."""

import sys
from collections.abc import Callable

from parallel.checkpoint import is_disk_error
from relora.errors import ConfigError

DONE, FAILED, REFUSED, PREEMPTED = 0, 1, 2, 75


def run(command: Callable[[], int]) -> int:
    """Run a command; turn errors that the user can mend into a message and an exit code.

    Anything else keeps its traceback: it is a defect of ours.
    """
    from launch.guard import TrainingDiverged

    try:
        return command()
    except ConfigError as error:
        return _say(error, REFUSED)
    except TrainingDiverged as error:
        return _say(error, FAILED)
    except Exception as error:
        if not is_disk_error(error):
            raise
        return _say(f"{error}. Free some space or name another folder; checkpoints are untouched", REFUSED)


def _say(message: object, code: int) -> int:
    sys.stdout.flush()
    line = " ".join(str(message).split())  # other libraries' words may come in several lines
    print(f"error: {line}", file=sys.stderr)
    return code
