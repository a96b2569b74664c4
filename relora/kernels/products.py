"""Two matrix products in one pass: C = A B + s P Q + b, accumulated in float32 and rounded once.

It is the layer's forward, x W' + s S up' + b with S = x down', and its gradient, dY W + s dS down: the large operand
of the small product is never written and read again, as a separate addition would.
Source: LoRAFusion, Zhu et al. 2025 (arXiv 2510.00206), whose split this is; written anew. The order of the tiles is
that of Triton's matrix product tutorial.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from relora.kernels.setting import widened

GROUP, WARPS = 8, 8


def tile(widen: bool) -> tuple[int, int, int]:
    """Return rows, columns and depth of a block; two bytes an entry leave the shared memory of small GPUs enough."""
    return (64, 64, 32) if widen else (128, 128, 64)


@triton.jit
def _added(  # type: ignore[no-untyped-def]
    total,
    left_at,
    right_at,
    left_step,
    right_step,
    depth,
    row_inside,
    column_inside,
    WIDEN: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """The total and one product's tile: blocks of its depth lie a step apart."""
    k = tl.arange(0, BLOCK_DEPTH)
    for first in range(0, depth, BLOCK_DEPTH):
        inside = k < depth - first
        left = tl.load(left_at, row_inside & inside[None, :], 0.0)
        right = tl.load(right_at, inside[:, None] & column_inside, 0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total += tl.dot(left, right, input_precision="ieee")
        left_at += left_step
        right_at += right_step
    return total


@triton.jit
def products_kernel(  # type: ignore[no-untyped-def]
    a,
    b,
    p,
    q,
    bias,
    c,
    scaling,
    rows,
    columns,
    depth,
    rank,
    a_head,
    a_row,
    a_depth,
    b_depth,
    b_column,
    p_head,
    p_row,
    p_depth,
    q_head,
    q_depth,
    q_column,
    HAS_BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """C = A B + s P Q + bias on one tile of one head; the small product's depth `rank` fits blocks of its own."""
    # Tiles that are computed at one time lie near each other, and read the same rows and columns from the cache.
    place, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    across = tl.cdiv(columns, BLOCK_COLUMNS)
    above = place // (GROUP * across) * GROUP
    height = tl.minimum(tl.cdiv(rows, BLOCK_ROWS) - above, GROUP)
    within = place % (GROUP * across)
    first_row = ((above + within % height) * BLOCK_ROWS).to(tl.int64)
    first_column = (within // height * BLOCK_COLUMNS).to(tl.int64)
    row, column = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, BLOCK_COLUMNS)[None, :]
    row_inside, column_inside = row < rows - first_row, column < columns - first_column
    k = tl.arange(0, BLOCK_RANK)
    total = _added(
        tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32),
        p + head * p_head + first_row * p_row + row * p_row + k[None, :] * p_depth,
        q + head * q_head + first_column * q_column + k[:, None] * q_depth + column * q_column,
        BLOCK_RANK * p_depth,
        BLOCK_RANK * q_depth,
        rank,
        row_inside,
        column_inside,
        WIDEN,
        BLOCK_RANK,
    )
    k = tl.arange(0, BLOCK_DEPTH)
    total = _added(
        total * scaling,
        a + head * a_head + first_row * a_row + row * a_row + k[None, :] * a_depth,
        b + first_column * b_column + k[:, None] * b_depth + column * b_column,
        BLOCK_DEPTH * a_depth,
        BLOCK_DEPTH * b_depth,
        depth,
        row_inside,
        column_inside,
        WIDEN,
        BLOCK_DEPTH,
    )
    if HAS_BIAS:
        total += tl.load(bias + first_column + column, column_inside, 0.0).to(tl.float32)
    place = (head * rows + first_row) * columns + first_column
    tl.store(c + place + row * columns + column, total.to(c.dtype.element_ty), row_inside & column_inside)


def products(a: Tensor, b: Tensor, p: Tensor, q: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """Return A B + s P Q + bias in A's dtype; any strides, and B is the same for all heads.

    Shapes: a ([heads,] rows, depth), b (depth, columns), p ([heads,] rows, rank), q ([heads,] rank, columns),
    bias (columns,) contiguous
    """
    assert a.dtype != torch.float64, "sums are float32"
    columns, widen = b.shape[1], widened(a, b, p, q)
    c = torch.empty(*a.shape[:-1], columns, dtype=a.dtype, device=a.device)
    if a.ndim == 2:
        a, p, q = a.unsqueeze(0), p.unsqueeze(0), q.unsqueeze(0)
    heads, rows, depth = a.shape
    height, width, deep = tile(widen)
    products_kernel[(triton.cdiv(rows, height) * triton.cdiv(columns, width), heads)](
        a,
        b,
        p,
        q,
        c if bias is None else bias,
        c,
        scaling,
        rows,
        columns,
        depth,
        p.shape[2],
        *a.stride(),
        *b.stride(),
        *p.stride(),
        *q.stride(),
        HAS_BIAS=bias is not None,
        WIDEN=widen,
        BLOCK_ROWS=height,
        BLOCK_COLUMNS=width,
        BLOCK_DEPTH=deep,
        BLOCK_RANK=16,
        GROUP=GROUP,
        num_warps=WARPS,
    )
    return c


def products_twin(a: Tensor, b: Tensor, p: Tensor, q: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """The same in torch."""
    total = a.float() @ b.float() + scaling * (p.float() @ q.float())
    return (total if bias is None else total + bias.float()).to(a.dtype)
