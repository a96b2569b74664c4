"""One pass over dY for two products: dS = dY up and d_up = s dY' S, the latter the same from run to run.

Each program reads its strip of rows of dY once. What it adds to d_up goes to a slice of its own in float32, and the
slices are summed in a fixed order: no atomics. Saves one of two readings of dY, 2 M N bytes in bfloat16.
Source: the backward pass of LoRAFusion, Zhu et al. 2025 (arXiv 2510.00206), with the reduction made deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from relora.kernels.setting import ONE_PASS_RANK, widened

STRIPS, WARPS = 128, 8
COLUMNS = 32


def height(widen: bool) -> int:
    """Return rows of a block: as many as registers hold without spilling on sm_90."""
    return 32 if widen else 64


@triton.jit
def factor_gradients_kernel(  # type: ignore[no-untyped-def]
    outer,
    up,
    small,
    inner,
    slices,
    rows,
    columns,
    rank,
    strip,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """dS of one strip of rows of one head, and the strip's share of d_up; everything is contiguous."""
    head, k = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_RANK)
    of_rank = (k < rank)[None, :]
    mine = slices + (head * tl.num_programs(0) + tl.program_id(0)) * columns * rank
    start = tl.program_id(0) * strip
    for offset in range(0, strip, BLOCK_ROWS):
        row = start + offset + tl.arange(0, BLOCK_ROWS)
        row_inside = (row < tl.minimum(start + strip, rows))[:, None]
        row = head * rows + row
        s = tl.load(small + row[:, None] * rank + k[None, :], row_inside & of_rank, 0.0)
        total = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
        for first in range(0, columns, BLOCK_COLUMNS):
            column = first + tl.arange(0, BLOCK_COLUMNS)
            y = tl.load(outer + row[:, None] * columns + column[None, :], row_inside & (column < columns)[None, :], 0.0)
            place, inside = column[:, None] * rank + k[None, :], (column < columns)[:, None] & of_rank
            u = tl.load(up + head * columns * rank + place, inside, 0.0)
            if WIDEN:
                y, u, s = y.to(tl.float32), u.to(tl.float32), s.to(tl.float32)
            total += tl.dot(y, u, input_precision="ieee")
            before = tl.load(mine + place, inside & (offset > 0), 0.0)
            tl.store(mine + place, before + tl.dot(tl.trans(y), s, input_precision="ieee"), inside)
        tl.store(inner + row[:, None] * rank + k[None, :], total.to(inner.dtype.element_ty), row_inside & of_rank)


def factor_gradients(outer: Tensor, up: Tensor, small: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return dY up in dY's dtype and s dY' S in up's, for ranks up to ONE_PASS_RANK.

    Shapes: outer ([heads,] rows, out), up ([heads,] out, rank), small ([heads,] rows, rank)
    """
    outer, up, small = outer.contiguous(), up.contiguous(), small.contiguous()
    (rows, columns), rank = outer.shape[-2:], up.shape[-1]
    heads = len(outer) if outer.ndim == 3 else 1
    assert rank <= ONE_PASS_RANK
    widen = widened(outer, up, small)
    block = height(widen)
    strip = triton.cdiv(triton.cdiv(rows, STRIPS), block) * block
    count = triton.cdiv(rows, strip)
    inner = torch.empty_like(small, dtype=outer.dtype)
    slices = torch.empty(heads, count, columns, rank, device=outer.device)
    factor_gradients_kernel[(count, heads)](
        outer,
        up,
        small,
        inner,
        slices,
        rows,
        columns,
        rank,
        strip,
        WIDEN=widen,
        BLOCK_ROWS=block,
        BLOCK_COLUMNS=COLUMNS,
        BLOCK_RANK=ONE_PASS_RANK,
        num_warps=WARPS,
    )
    return inner, slices.sum(1).mul_(scaling).to(up.dtype).view(up.shape)


def factor_gradients_twin(outer: Tensor, up: Tensor, small: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The same in torch."""
    inner, of_up = outer.float() @ up.float(), scaling * (outer.float().mT @ small.float())
    return inner.to(outer.dtype), of_up.to(up.dtype)
