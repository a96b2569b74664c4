"""Two matrix products in one pass: C = A B + s P Q, accumulated in float32 and rounded once.

It is the layer's forward, x W' + s S up' with S = x down', and its gradient, dY W + dS down: the large operand of
the small product is never written and read again, as a separate addition would.
Source: LoRAFusion, Zhu et al. 2025 (arXiv 2510.00206), whose split this is; written anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from relora.kernels.setting import widened

ROWS, COLUMNS, DEPTH = 64, 64, 32


@triton.jit
def products_kernel(  # type: ignore[no-untyped-def]
    a,
    b,
    p,
    q,
    c,
    scaling,
    rows,
    columns,
    depth,
    rank,
    a_row,
    a_depth,
    b_depth,
    b_column,
    p_row,
    p_depth,
    q_depth,
    q_column,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """C = A B + s P Q on one tile; the small product's depth `rank` fits blocks of its own."""
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    row_inside, column_inside = (row < rows)[:, None], (column < columns)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for first in range(0, rank, BLOCK_RANK):
        k = first + tl.arange(0, BLOCK_RANK)
        left = tl.load(p + row[:, None] * p_row + k[None, :] * p_depth, row_inside & (k < rank)[None, :], 0.0)
        right = tl.load(q + k[:, None] * q_depth + column[None, :] * q_column, (k < rank)[:, None] & column_inside, 0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total += tl.dot(left, right, input_precision="ieee")
    total *= scaling
    for first in range(0, depth, BLOCK_DEPTH):
        k = first + tl.arange(0, BLOCK_DEPTH)
        left = tl.load(a + row[:, None] * a_row + k[None, :] * a_depth, row_inside & (k < depth)[None, :], 0.0)
        right = tl.load(
            b + k[:, None] * b_depth + column[None, :] * b_column, (k < depth)[:, None] & column_inside, 0.0
        )
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total += tl.dot(left, right, input_precision="ieee")
    tl.store(c + row[:, None] * columns + column[None, :], total.to(c.dtype.element_ty), row_inside & column_inside)


def products(a: Tensor, b: Tensor, p: Tensor, q: Tensor, scaling: float) -> Tensor:
    """Return A B + s P Q in A's dtype; any strides.

    Shapes: a (rows, depth), b (depth, columns), p (rows, rank), q (rank, columns)
    """
    rows, columns = len(a), b.shape[1]
    c = torch.empty(rows, columns, dtype=a.dtype, device=a.device)
    products_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))](
        a,
        b,
        p,
        q,
        c,
        scaling,
        rows,
        columns,
        a.shape[1],
        p.shape[1],
        *a.stride(),
        *b.stride(),
        *p.stride(),
        *q.stride(),
        WIDEN=widened(a, b, p, q),
        BLOCK_ROWS=ROWS,
        BLOCK_COLUMNS=COLUMNS,
        BLOCK_DEPTH=DEPTH,
        BLOCK_RANK=16,
    )
    return c


def products_twin(a: Tensor, b: Tensor, p: Tensor, q: Tensor, scaling: float) -> Tensor:
    """The same in torch."""
    return (a.float() @ b.float() + scaling * (p.float() @ q.float())).to(a.dtype)
