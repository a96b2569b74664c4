"""Ways to compute one low-rank layer, y = x W' + b + s (x down') up', equal in values and in all gradients.

`factored` leaves every product to autograd. `addmm` is one autograd function: the scale is folded into the products,
which add in place, and only the input and the small activation x down' are kept. `fused` is the same function with
Triton's kernels for pairs of products. `merged` takes the formed weight W + s up down (relora/merged.py), and finds the
factors' gradients without the base weight's wherever that is cheaper. Of a quantised base weight (relora/quantised.py)
both passes make W from its codes, and none keeps it.
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
from relora.quantised import Codes


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
    weight: Tensor | Codes,
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
    x, down, up = (_autocast(one) for one in (x, down, up))
    bias = None if bias is None else _autocast(bias)
    dropped = None if dropped is None else _autocast(dropped)
    columns = None
    stored: tuple[Tensor, Tensor | None, Tensor | None]
    if isinstance(weight, Codes):
        stored, columns = weight[:3], weight.columns
    else:
        stored = (_autocast(weight), None, None)
    how = (scaling, transposed, columns, fused)
    output: Tensor = _Addmm.apply(x, dropped, bias, down, up, *stored, how)  # type: ignore[no-untyped-call]
    return output


def base_only(x: Tensor, codes: Codes, bias: Tensor | None, *, transposed: bool) -> Tensor:
    """Return x W' + b of a quantised base weight; autograd keeps its codes, not W.

    Shapes: x (..., in)
    """
    bias = None if bias is None else _autocast(bias)
    how = (transposed, codes.columns)
    output: Tensor = _BaseOnly.apply(_autocast(x), bias, *codes[:3], how)  # type: ignore[no-untyped-call]
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
    def forward(  # noqa: PLR0917  # autograd counts tensors by their places
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        weight: Tensor,
        scales: Tensor | None,
        pairs: Tensor | None,
        how: tuple[float, bool, int | None, bool],
    ) -> Tensor:
        scaling, transposed, columns, fused = how
        matrix = _matrix(weight, scales, pairs, columns, transposed, x.dtype)
        source = _rows(x if dropped is None else dropped, down)
        small = source @ down.mT
        if fused:
            output: Tensor = two_products(_rows(x, down), matrix.t(), small, up.mT, bias, scaling)
            output = output.view(*x.shape[:-1], -1)
        else:
            output = F.linear(x, matrix, bias)
            _add_product_(_rows(output, up), small, up.mT, scaling)
        # The parameter itself is kept, not a view of it: ZeRO-3 changes what lies behind it between the passes.
        ctx.save_for_backward(source if ctx.needs_input_grad[3] else None, small, down, up, weight, scales, pairs)
        ctx.how, ctx.dropped, ctx.shape = how, dropped is not None, x.shape
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        source, small, down, up, weight, scales, pairs = ctx.saved_tensors
        scaling, transposed, columns, fused = ctx.how
        for_x, for_dropped, for_bias, for_down, for_up = ctx.needs_input_grad[:5]
        outer = _rows(gradient, up)
        inner, up_gradient = _of_outer(outer, up, small if for_up else None, scaling, fused)
        x_gradient = dropped_gradient = matrix = None
        if for_x:
            matrix = _matrix(weight, scales, pairs, columns, transposed, gradient.dtype)
        if matrix is not None and fused and not ctx.dropped:
            x_gradient = two_products(outer, matrix, inner, down, None, scaling).view(ctx.shape)
        elif matrix is not None:
            x_gradient = _flat(gradient) @ matrix
            if not ctx.dropped:
                _add_product_(_rows(x_gradient, down), inner, down, scaling)
            x_gradient = x_gradient.view(ctx.shape)
        if for_dropped:
            dropped_gradient = (inner @ down).mul_(scaling).view(ctx.shape)
        bias_gradient = _flat(gradient).sum(0) if for_bias else None
        down_gradient = (inner.mT @ source).mul_(scaling) if for_down else None
        return x_gradient, dropped_gradient, bias_gradient, down_gradient, up_gradient, None, None, None, None


class _BaseOnly(Function):
    """y = x W' + b with W from its codes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        scales: Tensor,
        pairs: Tensor | None,
        how: tuple[bool, int],
    ) -> Tensor:
        ctx.save_for_backward(codes, scales, pairs)
        ctx.how = how
        transposed, columns = how
        return F.linear(x, _matrix(codes, scales, pairs, columns, transposed, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales, pairs = ctx.saved_tensors
        transposed, columns = ctx.how
        for_x, for_bias = ctx.needs_input_grad[:2]
        x_gradient = None
        if for_x:
            x_gradient = gradient @ _matrix(codes, scales, pairs, columns, transposed, gradient.dtype)
        bias_gradient = _flat(gradient).sum(0) if for_bias else None
        return x_gradient, bias_gradient, None, None, None, None


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


def _matrix(
    weight: Tensor,
    scales: Tensor | None,
    pairs: Tensor | None,
    columns: int | None,
    transposed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The base weight, from its codes where it has scales.

    Shapes: (out, in)
    """
    if scales is not None:
        assert columns is not None
        weight = Codes(weight, scales, pairs, columns).weight(dtype)
    return weight.t() if transposed else weight


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
