"""`tell`: asks a running run for something, through its run folder; the run does it after the step it is at."""

import argparse
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from launch import exits
from launch.training.requests import MEANINGS, Wish, request, take_back, waiting
from launch.watching.records import read_records
from relora.errors import ConfigError

_LOOK_SECONDS = 0.2
_RECORD_SECONDS = 10.0
"""How long a request's end may be without its record: the run first takes the file away."""
_BACK = "nothing"


def main(argv: Sequence[str] | None = None) -> int:
    """The command `tell`; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="accrete tell",
        description=__doc__,
        epilog=_meanings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    parser.add_argument("what", metavar="WHAT", help="what to ask for, see below")
    parser.add_argument(
        "--wait", type=float, metavar="SECONDS", help="until it is done, or refused; exit code 1 if it is not"
    )
    words = parser.parse_args(argv)
    return exits.run(lambda: _command(words.run, words.what, words.wait))


def _command(run: Path, what: str, seconds: float | None) -> int:
    if what == _BACK:
        return _take_back(run)
    known = [wish.value for wish in Wish]
    if what not in known:
        raise ConfigError(f"{what!r} is nothing that a run can be asked for: choose {', '.join(known)} or {_BACK}")
    before = len(_answers(run))
    request(run, Wish(what))
    print(f"{run} is asked for: {what}")
    if seconds is None:
        print("a run that trains hears of it within a second, and does it after its step (with LTE, after a sync)")
        return exits.DONE
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if what not in waiting(run):
            return _tell_answer(run, what, before)
        time.sleep(_LOOK_SECONDS)
    print(f"nothing has happened within {seconds:g} s; the request waits: accrete status {run}", file=sys.stderr)
    return exits.FAILED


def _take_back(run: Path) -> int:
    names = take_back(run)
    print(f"taken back: {', '.join(names)}" if names else f"nothing waits in {run}")
    return exits.DONE


def _answers(run: Path) -> list[dict[str, object]]:
    path = run / "metrics.jsonl"
    return [one for one in read_records(path) if one.get("event") == "request"] if path.exists() else []


def _tell_answer(run: Path, what: str, before: int) -> int:
    """Say what became of the request, by the run's own record of it."""
    limit = time.monotonic() + _RECORD_SECONDS
    while time.monotonic() < limit:
        for answer in reversed(_answers(run)[before:]):
            if answer["wish"] == what:
                granted = bool(answer["granted"])
                why = "" if granted else f": {answer['reason']}"
                print(f"{what} {'granted' if granted else 'refused'} at step {answer['step']}{why}")
                return exits.DONE if granted else exits.FAILED
        time.sleep(_LOOK_SECONDS)
    print(f"{what} was taken back", file=sys.stderr)
    return exits.FAILED


def _meanings() -> str:
    rows = {**{wish.value: text for wish, text in MEANINGS.items()}, _BACK: "take back what has not been done yet"}
    return "what to ask for:\n" + "\n".join(
        textwrap.fill(f"  {name:<18}{text}", 100, subsequent_indent=" " * 20) for name, text in rows.items()
    )


if __name__ == "__main__":
    sys.exit(main())
