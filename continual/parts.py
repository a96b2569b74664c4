"""Parts: one unit of work turned into tokens on disk.

A part is two files: its tokens, and a row of three numbers for each document. The rows appear last, and whole.
Worker processes import this module, so it stays light.
"""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from continual.documents import Unit
from continual.encoder import Encoder
from continual.folders import private_name

BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 20

# Shapes: (documents, 3): tokens, bytes of text, hash of the text
Rows = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What decides the prepared tokens, beside the text."""

    encoder: Encoder
    text_field: str
    validation_fraction: float
    """Share of the documents held out."""
    max_tokens: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A unit of work, and where its tokens go."""

    unit: Unit
    stem: Path

    @property
    def tokens_path(self) -> Path:
        """The tokens."""
        return _tokens_path(self.stem)

    @property
    def finished(self) -> bool:
        """Whether both files are there."""
        return _rows_path(self.stem).exists()

    def rows(self) -> Rows:
        """The row of each document."""
        return np.fromfile(_rows_path(self.stem), dtype=np.uint64).reshape(-1, 3)


def make_part(part: Part, recipe: Recipe) -> int:
    """Write a part, as far as `max_tokens` of it; returns the size of its unit."""
    private = private_name(part.stem)
    written = 0
    with _tokens_path(private).open("wb") as tokens_file, _rows_path(private).open("wb") as rows_file:
        for texts in _batches(part.unit.documents()):
            rows = []
            for text, tokens in zip(texts, recipe.encoder.encode(texts), strict=True):
                content = text.encode()
                rows.append((len(tokens), len(content), _hash(content)))
                tokens_file.write(tokens.tobytes())
                written += len(tokens)
            rows_file.write(np.array(rows, dtype=np.uint64).tobytes())
            if recipe.max_tokens is not None and written >= recipe.max_tokens:
                break
    _tokens_path(private).replace(_tokens_path(part.stem))
    _rows_path(private).replace(_rows_path(part.stem))
    return part.unit.size


# A vocabulary may be megabytes; each process gets it once.
_of_worker: dict[str, Recipe] = {}


def start_worker(recipe: Recipe) -> None:
    """Make a process ready for `make_part_in_worker`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _of_worker["recipe"] = recipe


def make_part_in_worker(part: Part) -> int:
    """Write a part by the recipe that the process was started with."""
    return make_part(part, _of_worker["recipe"])


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        if not text or text.isspace():
            continue
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _hash(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def _tokens_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.tokens")


def _rows_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.rows")
