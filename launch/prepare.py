"""`prepare`: turns text into token files ahead of time; `train` does the same when it finds none."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from continual.data import open_data
from continual.prepare import Progress
from launch import exits
from launch.config import load
from launch.training.course import Row, open_course
from launch.usage import asks_for_help
from launch.watching.console import Console, Track, make_console

_HELP = """\
usage: accrete prepare [data=OPTION] [data.key=value ...]

Tokenizes the sources of data.path into memory-mapped files under data.cache, in parallel, and prints what is there.
Started again after an interruption it goes on where it was. Takes the same words as `accrete train`, so the words of
a training command prepare its data:

  accrete prepare data.path='[books.jsonl,{path: code, weight: 2}]' data.tokenizer=bpe:16000 data.workers=8

docs/data.md tells about sources, tokenizers, mixtures and files."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command `prepare`; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if asks_for_help(words):
        print(_HELP)
        return exits.DONE
    return exits.run(lambda: _command(words))


def _command(words: Sequence[str]) -> int:
    config, console = load(words), make_console(enabled=True)
    with following(console) as progress:
        if config.continual is None:
            data = open_data(config.data, seed=config.run.seed, progress=progress)
            rows: list[Row] = data.describe()
            vocabulary: int | None = data.vocab_size
        else:
            course = open_course(config, progress)
            rows, vocabulary = course.rows, course.vocab_size
    show_data(console, rows)
    told = f"vocabulary of {vocabulary}; " if vocabulary is not None else ""
    console.info(f"{told}everything is under {config.data.cache}")
    return exits.DONE


@contextmanager
def following(console: Console) -> Iterator[Progress]:
    """What `open_data` reports its work to, shown as one bar for each task."""
    with ExitStack() as stack:
        shown: list[tuple[str, Track, int]] = []

        def progress(task: str, done: int, total: int) -> None:
            before = 0
            if shown and shown[-1][0] == task:
                _, track, before = shown.pop()
            else:
                stack.close()  # a terminal shows one bar at a time
                track = stack.enter_context(console.track(task, total))
            track.advance(done - before)
            shown.append((task, track, done))

        yield progress


def show_data(console: Console, rows: Sequence[dict[str, str | int | float]]) -> None:
    """Print what a run reads."""
    console.table("data", list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    sys.exit(main())
