"""Text to tokens on disk, once for each source, tokenizer and set of settings.

Each unit of work becomes a part, finished parts survive an interruption, and the whole is put in place by one
rename. The result does not depend on the number of processes.
"""

import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from continual.corpora import Corpus
from continual.documents import UnreadableError
from continual.folders import new_folder, only_one
from continual.pack import Counts, pack
from continual.parts import Part, Recipe, make_part, make_part_in_worker, start_worker
from relora.errors import ConfigError

FORMAT = 1
META = "meta.json"
POOL_BYTES = 64 << 20
"""Text from which on processes pay for their start, unless their number is set."""


class Progress(Protocol):
    """Watches work: called with what is done, how much of it so far, and how much there is."""

    def __call__(self, task: str, done: int, total: int) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A prepared source: folders `train` and `validation`, each a stream of tokens."""

    folder: Path
    label: str
    dtype: str
    """Of a token."""
    train: Counts
    validation: Counts


def prepare(
    corpus: Corpus, recipe: Recipe, cache: Path, *, key: str, workers: int = 1, progress: Progress | None = None
) -> Prepared:
    """The prepared source, made first if the cache does not have it.

    Raises: ConfigError that names `key` when the text cannot be read, or there is none.
    """
    facts = {
        "format": FORMAT,
        "text": corpus.fingerprint(),
        "tokenizer": recipe.encoder.fingerprint,
        "text_field": recipe.text_field,
        "validation_fraction": recipe.validation_fraction,
        "max_tokens": recipe.max_tokens,
    }
    name = blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()
    folder = cache / f"{re.sub(r'[^A-Za-z0-9]+', '_', corpus.label).strip('_')[:40]}-{name}"
    # A worker that runs the main script again would wait here for its parent, and the parent for it.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError("data is prepared while a worker imports the main script; guard it by __name__")
    if not folder.is_dir():
        with only_one(cache / "locks" / name):
            if not folder.is_dir():
                try:
                    _make(folder, corpus, recipe, facts, workers, progress)
                except UnreadableError as error:
                    raise ConfigError(f"{key}: {error}") from error
                except FileNotFoundError:  # without locks, another process may have finished and cleared up
                    if not folder.is_dir():
                        raise
    return read_prepared(folder)


def read_prepared(folder: Path) -> Prepared:
    """What a prepared folder holds."""
    meta = json.loads((folder / META).read_text())
    return Prepared(
        folder=folder,
        label=meta["source"],
        dtype=meta["dtype"],
        train=Counts(**meta["train"]),
        validation=Counts(**meta["validation"]),
    )


def _make(
    folder: Path,
    corpus: Corpus,
    recipe: Recipe,
    facts: dict[str, Any],
    workers: int,
    progress: Progress | None,
) -> None:
    aside = folder.with_name(f"{folder.name}.parts")
    aside.mkdir(parents=True, exist_ok=True)
    watch = progress or _unwatched
    units = corpus.units(recipe.text_field)
    parts = [Part(unit=unit, stem=aside / f"{number:06d}") for number, unit in enumerate(units)]
    parts = _make_parts(parts, recipe, workers, partial(watch, f"tokenizing {corpus.label}"))
    with new_folder(folder, within=aside) as private:
        packing = partial(watch, f"packing {corpus.label}")
        streams = pack(parts, private, recipe, corpus.label, lambda done: packing(done, len(parts)))
        meta = {"source": corpus.label, **facts, "vocab_size": recipe.encoder.vocab_size}
        meta |= {"dtype": recipe.encoder.dtype.name} | {name: asdict(counts) for name, counts in streams.items()}
        (private / META).write_text(json.dumps(meta, indent=2) + "\n")
    shutil.rmtree(aside, ignore_errors=True)


def _make_parts(parts: list[Part], recipe: Recipe, workers: int, watch: Callable[[int, int], None]) -> list[Part]:
    """Make the parts that are not there yet, in waves where a limit may end the work early; returns those made."""
    done, total, tokens = 0, sum(part.unit.size for part in parts), 0
    workers = workers or _workers_for(total)
    wave = max(1, len(parts) if recipe.max_tokens is None else workers)
    with _runner(workers, recipe) as run:
        for start in range(0, len(parts), wave):
            of_wave = parts[start : start + wave]
            done += sum(part.unit.size for part in of_wave if part.finished)
            for size in run([part for part in of_wave if not part.finished]):
                done += size
                watch(done, total)
            if recipe.max_tokens is None:
                continue
            tokens += sum(int(part.rows()[:, 0].sum()) for part in of_wave)
            if tokens >= recipe.max_tokens:
                watch(total, total)
                return parts[: start + wave]
    return parts


def _workers_for(size: int) -> int:
    alone = size < POOL_BYTES or multiprocessing.current_process().daemon
    return 1 if alone else len(os.sched_getaffinity(0))


@contextmanager
def _runner(workers: int, recipe: Recipe) -> Iterator[Callable[[list[Part]], Iterator[int]]]:
    """A function that makes parts, here or in processes, and tells the size of each that is finished."""
    if workers == 1:
        yield lambda parts: (make_part(part, recipe) for part in parts)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(recipe,))
    try:
        yield lambda parts: (
            future.result() for future in as_completed([pool.submit(make_part_in_worker, part) for part in parts])
        )
    finally:
        pool.shutdown(cancel_futures=True)


def _unwatched(task: str, done: int, total: int) -> None:
    pass
