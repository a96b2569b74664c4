"""The `merged` path's weights: W + s up down, formed once for all microbatches of an update.

They live from the first forward of the update to its last backward, and nothing may change weights or factors in
between. In bfloat16 they are rounded by chance: what a cycle has learned so far is mostly smaller than half of W's
last place, and would round away. Outside of an update a merged layer computes by `addmm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from relora.convert import low_rank_modules
from relora.initialize import key_of
from relora.kernels.setting import run_on
from relora.linear import BLOCK_ENTRIES, LowRankLinear
from relora.paths import ForwardPath
from relora.precision import MergePrecision, join, stochastic_round


@contextmanager
def formed_weights(model: nn.Module, *, seed: int, step: int) -> Iterator[None]:
    """Form the weights of all merged layers, for the passes of one update; the chances depend on (seed, step)."""
    layers = {name: one for name, one in low_rank_modules(model).items() if one.path == ForwardPath.merged}
    try:
        for name, layer in layers.items():
            layer.formed = form(layer, key_of(seed, "formed", name, step))
        yield
    finally:
        for layer in layers.values():
            layer.formed = None


@torch.no_grad()
def form(layer: LowRankLinear, key: int) -> Tensor:
    """Return W + s up down in the weight's dtype: as near as float32 comes, or rounded by chance to bfloat16.

    Shapes: (out, in)
    """
    down, up = layer.change(layer.down, layer.up)
    left, right = (down.t(), up.t()) if layer.transposed else (up, down)
    weight = layer.weight.detach()
    with nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False):
        if weight.dtype == torch.bfloat16 and run_on(weight.device):
            formed = _by_kernel(weight, layer.extra_bits, left, right, layer.scaling, key)
        elif weight.dtype == torch.bfloat16:
            formed = _rounded(weight, layer.extra_bits, left, right, layer.scaling, key)
        else:
            formed = torch.addmm(weight, left, right, alpha=layer.scaling)
    return formed.t() if layer.transposed else formed


def _by_kernel(weight: Tensor, bits: Tensor | None, left: Tensor, right: Tensor, scaling: float, key: int) -> Tensor:
    from relora.kernels.merge import merge

    return merge(weight, bits, left, right, scaling, MergePrecision.stochastic, key=key)[0]


def _rounded(weight: Tensor, bits: Tensor | None, left: Tensor, right: Tensor, scaling: float, key: int) -> Tensor:
    formed, width, right = torch.empty_like(weight), weight.shape[1], right.float()
    height = max(1, BLOCK_ENTRIES // width)
    for first in range(0, len(weight), height):
        rows = slice(first, first + height)
        exact = weight[rows].float() if bits is None else join(weight[rows], bits[rows])
        exact.addmm_(left[rows].float(), right, alpha=scaling)
        formed[rows] = stochastic_round(exact, key, first * width)
    return formed
