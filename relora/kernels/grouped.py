"""Factors of several heads for a batch whose rows each name their head: y_i = s up_h (down_h x_i), h = head of row i.

Rows are visited in order of their heads, in blocks of one head each, so heads may have different numbers of rows and
rows need not be sorted. Gradients of a head's factors are summed over its blocks in a fixed order.
Source: the grouped products of LoRAFusion's FusedMultiLoRA (arXiv 2510.00206) and Punica (arXiv 2310.18547), for
training; with equal runs of rows it is `torch.bmm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from relora.kernels.setting import widened

ROWS, COLUMNS, DEPTH = 32, 64, 32


@dataclass(kw_only=True, slots=True, frozen=True)
class Groups:
    """Rows in order of their heads."""

    order: Tensor
    """Row numbers, head by head."""
    starts: Tensor
    """Where each head begins in the order, and the end. Shapes: (heads + 1,)."""
    block_heads: Tensor
    """Head of each block of rows."""
    block_starts: Tensor
    """Where each block begins in the order."""


def groups_of(heads: Tensor, count: int) -> Groups:
    """Return the order of rows whose heads are given. Shapes: (rows,), integers below `count`."""
    order = torch.argsort(heads, stable=True)
    sizes = torch.bincount(heads, minlength=count)
    starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    blocks = (sizes + ROWS - 1) // ROWS
    block_heads = torch.repeat_interleave(torch.arange(count, device=heads.device), blocks)
    within = torch.arange(len(block_heads), device=heads.device) - (blocks.cumsum(0) - blocks)[block_heads]
    return Groups(order=order, starts=starts, block_heads=block_heads, block_starts=starts[block_heads] + within * ROWS)


@triton.jit
def grouped_rows_kernel(  # type: ignore[no-untyped-def]
    a,
    b,
    c,
    order,
    starts,
    block_heads,
    block_starts,
    scaling,
    columns,
    depth,
    b_head,
    b_depth,
    b_column,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """C[i] = s A[i] B[head of i] for the rows of one block; A and C are contiguous."""
    head = tl.load(block_heads + tl.program_id(0))
    at = tl.load(block_starts + tl.program_id(0)) + tl.arange(0, BLOCK_ROWS)
    row_inside = at < tl.load(starts + head + 1)
    row = tl.load(order + at, row_inside, 0)[:, None]
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_inside = (column < columns)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for first in range(0, depth, BLOCK_DEPTH):
        k = first + tl.arange(0, BLOCK_DEPTH)
        left = tl.load(a + row * depth + k[None, :], row_inside[:, None] & (k < depth)[None, :], 0.0)
        place = head * b_head + k[:, None] * b_depth + column[None, :] * b_column
        right = tl.load(b + place, (k < depth)[:, None] & column_inside, 0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total += tl.dot(left, right, input_precision="ieee")
    total *= scaling
    tl.store(c + row * columns + column[None, :], total.to(c.dtype.element_ty), row_inside[:, None] & column_inside)


@triton.jit
def grouped_outer_kernel(  # type: ignore[no-untyped-def]
    a,
    b,
    c,
    order,
    starts,
    scaling,
    height,
    width,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """C[h] = s sum over h's rows of A[i]' B[i], for one tile of one head; everything is contiguous."""
    head = tl.program_id(0)
    i = tl.program_id(1) * BLOCK_HEIGHT + tl.arange(0, BLOCK_HEIGHT)
    j = tl.program_id(2) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    first, end = tl.load(starts + head), tl.load(starts + head + 1)
    total = tl.zeros((BLOCK_HEIGHT, BLOCK_WIDTH), dtype=tl.float32)
    for start in range(first, end, BLOCK_ROWS):
        at = start + tl.arange(0, BLOCK_ROWS)
        row_inside = (at < end)[:, None]
        row = tl.load(order + at, at < end, 0)[:, None]
        left = tl.load(a + row * height + i[None, :], row_inside & (i < height)[None, :], 0.0)
        right = tl.load(b + row * width + j[None, :], row_inside & (j < width)[None, :], 0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total += tl.dot(tl.trans(left), right, input_precision="ieee")
    place = head.to(tl.int64) * height * width + i[:, None] * width + j[None, :]
    tl.store(c + place, (scaling * total).to(c.dtype.element_ty), (i < height)[:, None] & (j < width)[None, :])


def _rows(a: Tensor, b: Tensor, groups: Groups, scaling: float) -> Tensor:
    """Shapes: a (rows, depth), b (heads, depth, columns) -> (rows, columns)."""
    a, columns = a.contiguous(), b.shape[2]
    c = torch.empty(len(a), columns, dtype=a.dtype, device=a.device)
    grouped_rows_kernel[(len(groups.block_heads), triton.cdiv(columns, COLUMNS))](
        a,
        b,
        c,
        groups.order,
        groups.starts,
        groups.block_heads,
        groups.block_starts,
        scaling,
        columns,
        a.shape[1],
        *b.stride(),
        WIDEN=widened(a, b),
        BLOCK_ROWS=ROWS,
        BLOCK_COLUMNS=COLUMNS,
        BLOCK_DEPTH=DEPTH,
    )
    return c


def _outer(a: Tensor, b: Tensor, groups: Groups, scaling: float) -> Tensor:
    """Shapes: a (rows, height), b (rows, width) -> (heads, height, width)."""
    a, b = a.contiguous(), b.contiguous()
    heads, height, width = len(groups.starts) - 1, a.shape[1], b.shape[1]
    c = torch.empty(heads, height, width, dtype=a.dtype, device=a.device)
    grouped_outer_kernel[(heads, triton.cdiv(height, COLUMNS), triton.cdiv(width, COLUMNS))](
        a,
        b,
        c,
        groups.order,
        groups.starts,
        scaling,
        height,
        width,
        WIDEN=widened(a, b),
        BLOCK_ROWS=ROWS,
        BLOCK_HEIGHT=COLUMNS,
        BLOCK_WIDTH=COLUMNS,
    )
    return c


class _Grouped(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, groups: Groups, scaling: float) -> Tensor:
        small = _rows(x, down.mT, groups, 1.0)
        ctx.save_for_backward(x, small, down, up)
        ctx.groups, ctx.scaling = groups, scaling
        return _rows(small, up.mT, groups, scaling)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, small, down, up = ctx.saved_tensors
        inner = _rows(gradient, up, ctx.groups, ctx.scaling)
        x_gradient = _rows(inner, down, ctx.groups, 1.0)
        up_gradient = _outer(gradient, small, ctx.groups, ctx.scaling)
        return x_gradient, _outer(inner, x, ctx.groups, 1.0), up_gradient, None, None


def grouped(x: Tensor, down: Tensor, up: Tensor, groups: Groups, scaling: float) -> Tensor:
    """Return what each row's head adds to the row's output.

    Shapes: x (rows, in), down (heads, rank, in), up (heads, out, rank)
    """
    result: Tensor = _Grouped.apply(x, down, up, groups, scaling)  # type: ignore[no-untyped-call]
    return result


def grouped_twin(x: Tensor, down: Tensor, up: Tensor, heads: Tensor, scaling: float) -> Tensor:
    """The same in torch, with every row's own factors written out."""
    small = torch.einsum("mi,mri->mr", x, down[heads])
    return scaling * torch.einsum("mr,mor->mo", small, up[heads])
