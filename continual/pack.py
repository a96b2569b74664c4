"""Packing: parts joined into one stream of tokens for training, and one for validation.

Documents are held out by the hash of their text, so equal documents are never on both sides, and what is held
out stays held out when text is added.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from continual.documents import UnreadableError
from continual.parts import Part, Recipe, Rows
from continual.tokens import DOCUMENTS, TOKENS
from relora.errors import ConfigError

LEAST_HELD_OUT = 4096
"""Tokens held out where the asked share is less, if they are no more than a tenth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """The size and the digest of a stream of tokens."""

    documents: int
    tokens: int
    text_bytes: int
    digest: str


def pack(
    parts: list[Part], folder: Path, recipe: Recipe, label: str, watch: Callable[[int], None]
) -> dict[str, Counts]:
    """Divide the parts between training and validation, document by document.

    Raises: ConfigError, UnreadableError when a side that must hold text would hold none.
    """
    threshold = _threshold(parts, recipe, label)
    writers = [_Writer(folder / "train"), _Writer(folder / "validation")]
    for number, (part, rows) in enumerate(_kept_parts(parts, recipe.max_tokens), start=1):
        tokens = np.memmap(part.tokens_path, dtype=recipe.encoder.dtype, mode="r")
        held = rows[:, 2] <= threshold if threshold is not None else np.zeros(len(rows), dtype=np.bool_)
        ends = np.cumsum(rows[:, 0].astype(np.int64))
        edges = [0, *(np.flatnonzero(held[1:] != held[:-1]) + 1), len(rows)]
        for first, last in pairwise(edges):
            begin = ends[first - 1] if first else 0
            writers[int(held[first])].append(tokens[begin : ends[last - 1]], rows[first:last])
        watch(number)
    train, validation = (writer.close() for writer in writers)
    if not train.documents:
        raise ConfigError(
            f"data.validation_fraction: {label} is a single document, which cannot be divided; set it to 0, "
            "or set data.validation_path"
        )
    return {"train": train, "validation": validation}


def _threshold(parts: list[Part], recipe: Recipe, label: str) -> np.uint64 | None:
    """The hash up to which documents are held out: the asked share of all hashes, and enough for some sequences."""
    total = 0
    lowest: Rows = np.empty((0, 3), dtype=np.uint64)
    for _, rows in _kept_parts(parts, recipe.max_tokens):
        total += int(rows[:, 0].sum())
        lowest = np.concatenate([lowest, rows])
        lowest = lowest[np.argsort(lowest[:, 2], kind="stable")]
        lowest = lowest[: _reaching(lowest, LEAST_HELD_OUT) + 2]
    if not total:
        if any(len(part.rows()) for part in parts):
            raise ConfigError(
                f"data.max_tokens must leave at least one document; the first of {label} is longer than "
                f"{recipe.max_tokens} tokens, raise it"
            )
        raise UnreadableError(f"{label} holds no text; give a source that does")
    if recipe.validation_fraction == 0:
        return None
    needed = _reaching(lowest, min(LEAST_HELD_OUT, total // 10))
    least = lowest[max(0, min(needed, len(lowest) - 2)), 2]
    threshold: np.uint64 = max(least, np.uint64(int(recipe.validation_fraction * 2**64)))
    return threshold


def _reaching(rows: Rows, tokens: int) -> int:
    """The first row by which there are so many tokens."""
    return int(np.searchsorted(np.cumsum(rows[:, 0].astype(np.int64)), tokens))


def _kept_parts(parts: list[Part], max_tokens: int | None) -> Iterator[tuple[Part, Rows]]:
    """The parts that hold documents, without those past the limit."""
    left = max_tokens
    for part in parts:
        rows = part.rows()
        if left is not None:
            whole = len(rows)
            rows = rows[np.cumsum(rows[:, 0]) <= np.uint64(left)]
            left = left - int(rows[:, 0].sum()) if len(rows) == whole else 0
        if len(rows):
            yield part, rows


class _Writer:
    """Writes one stream, and counts and digests what it writes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.tokens_file = (folder / TOKENS).open("wb")
        self.documents_file = (folder / DOCUMENTS).open("wb")
        self.tokens_digest = blake2b(digest_size=16)
        self.documents_digest = blake2b(digest_size=16)
        self.documents = self.tokens = self.text_bytes = 0

    def append(self, tokens: npt.NDArray[Any], rows: Rows) -> None:
        ends = (self.tokens + np.cumsum(rows[:, 0].astype(np.int64))).tobytes()
        self.tokens_file.write(tokens.data)
        self.tokens_digest.update(tokens.data)
        self.documents_file.write(ends)
        self.documents_digest.update(ends)
        self.documents += len(rows)
        self.tokens += len(tokens)
        self.text_bytes += int(rows[:, 1].sum())

    def close(self) -> Counts:
        self.tokens_file.close()
        self.documents_file.close()
        digest = blake2b(self.tokens_digest.digest() + self.documents_digest.digest(), digest_size=16)
        return Counts(
            documents=self.documents, tokens=self.tokens, text_bytes=self.text_bytes, digest=digest.hexdigest()
        )
