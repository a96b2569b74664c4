"""Ways to compute one low-rank layer, y = x W' + b + s (x down') up', equal in values and in all gradients.

`factored` leaves every product to autograd. `addmm` is one autograd function: the scale is folded into the products,
which add in place, and only the input and the small activation x down' are kept. `fused` is the same function with
Triton's kernels for pairs of products. `merged` takes the formed weight W + s up down (relora/merged.py), and finds the
factors' gradients without the base weight's wherever that is cheaper.
Source: the algebra is RunLoRA's, Cherniuk et al. 2023 (arXiv 2312.03415); docs/performance.md.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from relora.kernels.fused import factor_gradients, two_products
from relora.kernels.setting import ONE_PASS_RANK


class ForwardPath(str, Enum):
    """How a low-rank layer computes."""

    auto = "auto"
    """The fastest path by measurement, for each shape of layer."""
    factored = "factored"
    addmm = "addmm"
    merged = "merged"
    fused = "fused"


def factored(x: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Return what the factors add to the output. Scaling between them touches rank values a token, not `out`."""
    return F.linear(F.linear(x, down) * scaling, up)


def addmm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
    *,
    transposed: bool = False,
    dropped: Tensor | None = None,
    fused: bool = False,
) -> Tensor:
    """Return the layer's output; with the factors of several heads, each sees its own equal run of rows.

    Args:
        dropped: the input of the factors, where it is not `x`.
        fused: whether kernels take the place of products that add in place.

    Shapes: x (..., in); weight (out, in), transposed (in, out); down ([heads,] rank, in), up ([heads,] out, rank)
    """
    x, weight, down, up = (_autocast(one) for one in (x, weight, down, up))
    bias = None if bias is None else _autocast(bias)
    dropped = None if dropped is None else _autocast(dropped)
    how = (scaling, transposed, fused)
    output: Tensor = _Addmm.apply(x, dropped, weight, bias, down, up, how)  # type: ignore[no-untyped-call]
    return output


def merged(x: Tensor, formed: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Return the layer's output from its formed weight.

    Shapes: x (..., in), formed (out, in), down (rank, in), up (out, rank)
    """
    x, formed, down, up = (_autocast(one) for one in (x, formed, down, up))
    bias = None if bias is None else _autocast(bias)
    output: Tensor = _Merged.apply(x, formed, bias, down, up, scaling)  # type: ignore[no-untyped-call]
    return output


def through_weight(tokens: int, outputs: int, inputs: int, rank: int) -> bool:
    """Tell whether the factors' gradients take fewer FLOPs from the base weight's gradient than without it."""
    return 2 * tokens * outputs * inputs + 4 * rank * outputs * inputs < 4 * tokens * rank * (outputs + inputs)


class _Addmm(Function):
    """y = x W' + b + s S up' with S = z down'; z is x, or what dropout left of it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        how: tuple[float, bool, bool],
    ) -> Tensor:
        scaling, transposed, fused = how
        source = _rows(x if dropped is None else dropped, down)
        small = source @ down.mT
        if fused:
            matrix = weight if transposed else weight.t()
            output: Tensor = two_products(_rows(x, down), matrix, small, up.mT, bias, scaling)
            output = output.view(*x.shape[:-1], -1)
        else:
            output = F.linear(x, weight.t() if transposed else weight, bias)
            _add_product_(_rows(output, up), small, up.mT, scaling)
        # The parameter itself is kept, not a view of it: ZeRO-3 changes what lies behind it between the passes.
        ctx.save_for_backward(source if ctx.needs_input_grad[4] else None, small, weight, down, up)
        ctx.how, ctx.dropped, ctx.shape = how, dropped is not None, x.shape
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        source, small, weight, down, up = ctx.saved_tensors
        scaling, transposed, fused = ctx.how
        for_x, for_dropped, _, for_bias, for_down, for_up = ctx.needs_input_grad[:6]
        outer = _rows(gradient, up)
        inner, up_gradient = _of_outer(outer, up, small if for_up else None, scaling, fused)
        matrix = weight.t() if transposed else weight
        x_gradient = dropped_gradient = None
        if for_x and fused and not ctx.dropped:
            x_gradient = two_products(outer, matrix, inner, down, None, scaling).view(ctx.shape)
        elif for_x:
            x_gradient = _flat(gradient) @ matrix
            if not ctx.dropped:
                _add_product_(_rows(x_gradient, down), inner, down, scaling)
            x_gradient = x_gradient.view(ctx.shape)
        if for_dropped:
            dropped_gradient = (inner @ down).mul_(scaling).view(ctx.shape)
        bias_gradient = _flat(gradient).sum(0) if for_bias else None
        down_gradient = (inner.mT @ source).mul_(scaling) if for_down else None
        return x_gradient, dropped_gradient, None, bias_gradient, down_gradient, up_gradient, None


class _Merged(Function):
    """y = x F' + b with F = W + s up down; the gradients of F's factors are s dY'(x down') and s (dY up)' x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, formed: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, formed, down, up)
        ctx.scaling = scaling
        return F.linear(x, formed, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, formed, down, up = ctx.saved_tensors
        for_x, _, for_bias, for_down, for_up = ctx.needs_input_grad[:5]
        outer, rows = _flat(gradient), _flat(x)
        x_gradient = (outer @ formed).view(x.shape) if for_x else None
        bias_gradient = outer.sum(0) if for_bias else None
        down_gradient = up_gradient = None
        if for_down and for_up and through_weight(len(rows), formed.shape[0], formed.shape[1], len(down)):
            of_weight = outer.mT @ rows
            down_gradient = (up.mT @ of_weight).mul_(ctx.scaling)
            up_gradient = (of_weight @ down.mT).mul_(ctx.scaling)
        else:
            if for_down:
                down_gradient = ((outer @ up).mT @ rows).mul_(ctx.scaling)
            if for_up:
                up_gradient = _of_up(outer, rows @ down.mT, ctx.scaling)
        return x_gradient, None, bias_gradient, down_gradient, up_gradient, None


def _of_outer(
    outer: Tensor, up: Tensor, small: Tensor | None, scaling: float, fused: bool
) -> tuple[Tensor, Tensor | None]:
    """Return dY up, and the gradient of `up` where S is given."""
    if fused and small is not None and up.shape[-1] <= ONE_PASS_RANK:
        inner, up_gradient = factor_gradients(outer, up, small, scaling)
        return inner, up_gradient
    return outer @ up, None if small is None else _of_up(outer, small, scaling)


def _of_up(outer: Tensor, small: Tensor, scaling: float) -> Tensor:
    # Turned: with few columns, CPUs take ten times as long for outer' small as for small' outer.
    return (small.mT @ outer).mul_(scaling).mT


def _flat(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])


def _rows(value: Tensor, factor: Tensor) -> Tensor:
    """Return a view of rows, apart for each head of the factor. Shapes: ([heads,] rows, features)."""
    if factor.ndim == 2:
        return _flat(value)
    return value.reshape(len(factor), -1, value.shape[-1])


def _add_product_(total: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    if total.ndim == 2:
        total.addmm_(left, right, alpha=scaling)
    else:
        total.baddbmm_(left, right, alpha=scaling)


def _autocast(value: Tensor) -> Tensor:
    """Cast as autocast would, which knows no products in place."""
    device = value.device.type
    if value.is_meta or not torch.is_autocast_enabled(device) or value.dtype == torch.float64:
        return value
    return value.to(torch.get_autocast_dtype(device))
