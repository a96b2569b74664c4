"""The console script: `accrete VERB ...` is `python -m launch.VERB ...`."""

import atexit
import gc
import importlib
import sys
from collections.abc import Sequence

from launch import exits

VERBS = {
    "train": "train a model",
    "submit": "start a run by torchrun, mpirun or SLURM, and again until it is done",
    "status": "how far runs are, by their folders and SLURM",
    "tell": "ask a running run for a checkpoint, a restart, a stop and others",
    "prepare": "turn text into token files",
    "evaluate": "validation loss of a trained model",
    "export": "write a checkpoint as a Hugging Face model or a PEFT adapter",
    "report": "draw one or several runs",
    "plan": "memory, FLOPs and traffic of a training command, before it runs",
    "meet": "the meeting point of elastic heads",
    "doctor": "what this machine has, and what will not work",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the rest of the line to a verb; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print("usage: accrete VERB ...\n")
        print("\n".join(f"  {verb:<10}{meaning}" for verb, meaning in VERBS.items()))
        print("\n`accrete VERB --help` tells more.")
        return exits.DONE if words else exits.REFUSED
    if words[0] not in VERBS:
        print(f"error: {words[0]!r} is not a verb: choose one of {', '.join(VERBS)}", file=sys.stderr)
        return exits.REFUSED
    try:
        verb = importlib.import_module(f"launch.{words[0]}")
        spare_imports()
        return int(verb.main(words[1:]))
    except SystemExit as finished:  # argparse's way to end after --help or a wrong word
        return int(finished.code or 0)


def spare_imports() -> None:
    """Let what is imported by now take no part in collections of garbage, of which DeepSpeed makes a dozen an engine.

    At the very end they do again: libraries such as Triton complain of what they find uncollected.
    """
    gc.freeze()
    atexit.register(gc.unfreeze)


if __name__ == "__main__":
    sys.exit(main())
