"""Models without memory that still run forward and backward: tensors on the meta device have shapes and no values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten


@contextmanager
def weightless(*, packed: bool) -> Iterator[None]:
    """Within it new tensors are on the meta device, and models can run on it.

    Args:
        packed: whether sequences are several documents, which transformers looks for in their values.
    """
    fused, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _attention
    try:
        with torch.device("meta"), _Answers(packed):
            yield
    finally:
        F.scaled_dot_product_attention = fused


class _Answers(TorchFunctionMode):
    """Answers the one question that models ask about values: whether each sequence is a single document."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self._packed = packed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return not self._packed
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Fused attention, as a GPU or a CPU would choose it; the meta device would write all scores out."""
    attend = _aten._scaled_dot_product_flash_attention_for_cpu
    result: Tensor = attend(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return result
