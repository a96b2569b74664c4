"""Documents to tokens, exactly as a tokenizer of transformers would, but without loading transformers.

A document is its tokens and one end-of-sequence token. Special tokens are not looked for in text: a document that
spells `<eos>` is encoded as these characters.
"""

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

TokenArray = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """Turns documents into tokens; picklable, and knows nothing of transformers."""

    definition: str
    """The tokenizer in the format of `tokenizers`; empty for bytes."""
    eos: int
    vocab_size: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest type that holds every token."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def fingerprint(self) -> str:
        """Different for encoders that may differ in a token."""
        return blake2b(repr((self.definition, self.eos)).encode(), digest_size=16).hexdigest()

    def encode(self, texts: list[str]) -> list[TokenArray]:
        """The tokens of each document, with its end."""
        if self.definition:
            encodings = _backend(self.definition).encode_batch_fast(texts, add_special_tokens=False)
            return [self._ended(encoding.ids) for encoding in encodings]
        return [self._ended(np.frombuffer(text.encode(), np.uint8)) for text in texts]

    def _ended(self, ids: npt.ArrayLike) -> TokenArray:
        ids = np.asarray(ids, self.dtype)
        ended = np.full(len(ids) + 1, self.eos, self.dtype)
        ended[:-1] = ids
        return ended


@lru_cache(maxsize=1)
def _backend(definition: str) -> Any:
    backend = Tokenizer.from_str(definition)
    backend.encode_special_tokens = True
    return backend
