"""The layer by fused kernels: y = x W' + b + s S up' with S = x down', forward and backward.

Forward: S by a plain product, then one pass for both products of y. Backward: one pass over dY for dS and d_up, one
for dx = dY W + dS down, and a plain product for d_down = dS' x. For small ranks or few tokens; docs/performance.md.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from relora.kernels.factor_gradients import factor_gradients
from relora.kernels.products import products


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Return the layer's output.

    Shapes: x (..., in), weight (out, in), down (rank, in), up (out, rank)
    """
    rows: Tensor = _Fused.apply(x.reshape(-1, x.shape[-1]), weight, down, up, scaling)  # type: ignore[no-untyped-call]
    y = rows.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class _Fused(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        small = x @ down.t()
        ctx.save_for_backward(x, small, weight, down, up)
        ctx.scaling = scaling
        return products(x, weight.t(), small, up.t(), scaling)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, small, weight, down, up = ctx.saved_tensors
        inner, up_gradient = factor_gradients(gradient, up, small, ctx.scaling)
        x_gradient = products(gradient, weight, inner, down, 1.0) if ctx.needs_input_grad[0] else None
        return x_gradient, None, inner.t() @ x, up_gradient, None
