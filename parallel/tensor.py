"""Tensor parallelism from outside the model: cut its parameters in place, and teach the modules to exchange.

Modules and parameters stay the same objects under the same names; a module's class gains the collectives. What is
split how is decided in parallel/tensor_plan.py; the layers are in parallel/tensor_layers.py and
parallel/vocabulary.py.
"""

from collections.abc import Mapping
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from parallel.regions import Region, even_range
from parallel.runtime import Axis
from parallel.tensor_layers import (
    ColumnConv1D,
    ColumnLinear,
    ColumnLowRank,
    RowConv1D,
    RowLinear,
    RowLowRank,
    Split,
    SummedGradients,
)
from parallel.tensor_plan import SPLIT_LINEAR, Style, tensor_plan, tensor_regions
from parallel.vocabulary import VocabularyEmbedding
from relora.linear import LowRankLinear

_COLUMN: dict[type[nn.Module], type[Split]] = {
    nn.Linear: ColumnLinear,
    Conv1D: ColumnConv1D,
    LowRankLinear: ColumnLowRank,
}
_ROW: dict[type[nn.Module], type[Split]] = {nn.Linear: RowLinear, Conv1D: RowConv1D, LowRankLinear: RowLowRank}
_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "split_size")
"""Numbers that some attention modules remember, and that must shrink with their layers."""


def split_model(model: nn.Module, axis: Axis, patterns: Mapping[str, str] | None = None) -> dict[str, Region]:
    """Keep of a whole model what this process needs; return the region of every tensor that was cut, by name.

    Cut parameters are marked `tensor_model_parallel`: DeepSpeed counts the others once in norms. The regions include
    the extra bits of split low-rank layers even where they are made later.

    Raises:
        ConfigError: the plan, the user's patterns or the number of processes do not fit the model.
    """
    if axis.size == 1:
        return {}
    plan = tensor_plan(model, patterns)
    regions = tensor_regions(model, plan, size=axis.size, index=axis.index)
    _cut(model, regions)
    for name, style in plan.items():
        _specialize(model.get_submodule(name), style, axis)
    for name in {name.rpartition(".")[0] for name, style in plan.items() if style in SPLIT_LINEAR}:
        _shrink_counts(model.get_submodule(name), axis.size)
    return regions


def _cut(model: nn.Module, regions: Mapping[str, Region]) -> None:
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name in regions:
            tensor.data = regions[name].cut(tensor.data).clone(memory_format=torch.contiguous_format)
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name in regions.keys() & parameters.keys():
        parameters[name].tensor_model_parallel = True


def _specialize(module: Any, style: Style, axis: Axis) -> None:
    """Give a module whose parameters are cut the class that exchanges, and the sizes of its part."""
    kind: Any = type(module)
    if style == Style.summed:
        module.__class__ = _mixed(SummedGradients, kind)
    elif isinstance(module, nn.Embedding):
        _narrow(module, *even_range(module.num_embeddings, axis.size, axis.index))
        module.__class__ = _mixed(VocabularyEmbedding, kind)
    else:
        if style == Style.vocabulary:
            module.first, _ = even_range(module.out_features, axis.size, axis.index)
        _resize(module)
        module.__class__ = (_ROW if style == Style.row else _COLUMN)[kind]
    module.axis = axis


def _narrow(embedding: Any, first: int, stop: int) -> None:
    padding = embedding.padding_idx
    embedding.padding_idx = padding - first if padding is not None and first <= padding < stop else None
    embedding.num_embeddings, embedding.first = stop - first, first


def _resize(module: Any) -> None:
    if isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
        return
    transposed = isinstance(module, LowRankLinear) and module.transposed
    sizes = module.weight.shape
    module.out_features, module.in_features = reversed(sizes) if transposed else sizes


@cache
def _mixed(mixin: Any, kind: Any) -> type:
    return type(f"{mixin.__name__}{kind.__name__}", (mixin, kind), {})


def _shrink_counts(module: nn.Module, size: int) -> None:
    for word in _COUNTS:
        if isinstance(getattr(module, word, None), int):
            setattr(module, word, getattr(module, word) // size)
