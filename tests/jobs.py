"""Training jobs as processes of their own, forked from one that has imported everything: `FOLDER word word ...` a row.

Prints the process id of each job; its output goes to FOLDER/log. `wait FOLDER` prints the exit code.
"""

import os
import sys
import traceback
from pathlib import Path

import deepspeed  # noqa: F401  (seconds, once)

from launch import train


def begin(folder: Path, words: list[str]) -> int:
    """Fork a job; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        with (folder / "log").open("ab") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        code = train.main(words)
    except BaseException:  # noqa: BLE001  (told in the log)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Serve until the input ends."""
    jobs: dict[str, int] = {}
    for row in sys.stdin:
        first, *words = row.rstrip("\n").split("\t")
        if first == "wait":
            print(os.waitstatus_to_exitcode(os.waitpid(jobs.pop(words[0]), 0)[1]), flush=True)
        else:
            folder = Path(first)
            folder.mkdir(parents=True, exist_ok=True)
            jobs[first] = begin(folder, words)
            print(jobs[first], flush=True)


if __name__ == "__main__":
    main()
