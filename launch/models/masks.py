"""What transformers need not look for: whether sequences are several documents each.

A model without an attention mask looks for documents in the values of its positions, and so waits for the device in
each forward pass. We know: a batch of several documents a sequence brings its positions along.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import masking_utils


@contextmanager
def one_document_each() -> Iterator[None]:
    """Within it transformers take each sequence for a single document."""
    real = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _none_found
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = real


def _none_found(position_ids: Tensor) -> None:
    return None
