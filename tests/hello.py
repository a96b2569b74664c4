"""What the real launchers start in the tests: meets the others, and says what it found; or fails before that."""

import os
import sys
import time

from launch import exits
from parallel.collectives import gather_objects
from parallel.launchers import announced, own_words
from parallel.runtime import start
from parallel.watchdog import watched
from relora.errors import ConfigError


def main() -> int:
    """Say hello, be refused, or wait for ever."""
    (what,) = own_words(sys.argv[1:])
    launcher = announced(os.environ).launcher
    if what == "refused":
        raise ConfigError("training.steps=-1 must not be negative")
    with start(timeout_seconds=60) as runtime, watched(runtime, explain=exits.explain):
        ranks = gather_objects(runtime, runtime.process_rank)
        sys.stdout.write(f"{launcher}: {runtime.process_rank} of {ranks}\n")  # one piece: the others write there too
        sys.stdout.flush()
        if what == "wait":
            time.sleep(60)
    return exits.DONE


if __name__ == "__main__":
    sys.exit(exits.run(main))
