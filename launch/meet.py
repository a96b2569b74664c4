"""`meet`: the meeting point of elastic heads; it needs no model, no GPU, and memory for a few syncs."""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from parallel.frames import TOKEN_VARIABLE
from parallel.meeting_server import MeetingServer

_REFUSED = 2  # launch/exits.py has all codes, and imports torch
_EPILOG = f"""\
The folder keeps the ledger of the training data: name the same one when the run goes on after all has stopped.
Heads are started with lte=elastic and lte.meeting=HOST:PORT, or, where they see the folder, lte.meeting=FOLDER.
The environment variable {TOKEN_VARIABLE} is a word that heads and meeting point must share; set it where strangers can
reach the port. docs/elastic.md tells more."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command `meet`; returns its exit code when the run is complete."""
    parser = argparse.ArgumentParser(
        prog="accrete meet",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the ledger is kept")
    parser.add_argument("--host", default="", help="address to listen on (default: all)")
    parser.add_argument("--port", type=int, default=29400, help="0: one that is free; the folder tells which")
    parser.add_argument("--name", help="what heads that are given the folder call this machine (default: its own name)")
    parser.add_argument("--keep-bytes", type=int, default=4 << 30, help="memory for syncs that late heads still need")
    words = parser.parse_args(argv)
    try:
        server = MeetingServer(
            words.folder, token=os.environ.get(TOKEN_VARIABLE, ""), keep_bytes=words.keep_bytes, say=_say
        )
        asyncio.run(server.serve(words.host or None, words.port, name=words.name))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _REFUSED
    except KeyboardInterrupt:
        _say("stopped; the ledger is on disk")
    return 0


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
