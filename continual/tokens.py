"""Prepared tokens on disk: one packed stream of documents, read through memory maps.

`tokens.bin` holds the tokens of all documents one after another, `documents.bin` where each one ends (int64).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from continual.order import Indices

TOKENS = "tokens.bin"
DOCUMENTS = "documents.bin"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStream:
    """Windows of `length` tokens of a packed stream; what is left at the end makes no window."""

    tokens: npt.NDArray[Any]
    ends: Indices
    length: int

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def windows(self, index: Indices) -> Indices:
        """The tokens of each window.

        Shapes: index (B,) -> (B, T)
        """
        whole = self.tokens[: len(self) * self.length].reshape(len(self), self.length)
        return whole[index].astype(np.int64)

    def places(self, index: Indices) -> Indices:
        """How far each token is from the beginning of its document, or of the window where that is nearer.

        Shapes: index (B,) -> (B, T)
        """
        return np.stack([self._places(int(window) * self.length) for window in index])

    def _places(self, start: int) -> Indices:
        first, last = np.searchsorted(self.ends, [start, start + self.length], side="left")
        begins = np.zeros(self.length, dtype=np.int64)
        inside = self.ends[first:last] - start
        begins[inside] = inside
        return np.arange(self.length) - np.maximum.accumulate(begins)


def open_stream(folder: Path, *, tokens: int, dtype: str, documents: int, length: int) -> TokenStream:
    """The stream of so many tokens in a folder; it must not be empty.

    Raises: ValueError when the files are shorter.
    """
    return TokenStream(
        tokens=np.memmap(folder / TOKENS, dtype=dtype, mode="r", shape=(tokens,)),
        ends=np.memmap(folder / DOCUMENTS, dtype=np.int64, mode="r", shape=(documents,)),
        length=length,
    )
