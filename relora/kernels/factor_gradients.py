"""One pass over dY for two products: dS = s dY up and d_up = s dY' S, the latter the same from run to run.

Each program reads its strip of rows of dY once. What it adds to d_up goes to a slice of its own in float32, and the
slices are summed in a fixed order: no atomics. Saves one of two readings of dY, 2 M N bytes in bfloat16.
Source: the backward pass of LoRAFusion, Zhu et al. 2025 (arXiv 2510.00206), with the reduction made deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from relora.kernels.setting import widened

STRIPS, WARPS = 128, 8
LARGEST_RANK = 128
"""A program holds all of dS's columns."""


def tile(rank: int, widen: bool) -> tuple[int, int]:
    """Return rows and columns of a block: as large as registers hold without spilling on sm_90, in bfloat16."""
    return (64, 32) if rank <= 64 and not widen else (32, 32)


@triton.jit
def factor_gradients_kernel(  # type: ignore[no-untyped-def]
    outer,
    up,
    small,
    inner,
    slices,
    scaling,
    rows,
    columns,
    rank,
    strip,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """dS of one strip of rows, and the strip's share of d_up; everything is contiguous."""
    k = tl.arange(0, BLOCK_RANK)
    of_rank = (k < rank)[None, :]
    mine = slices + tl.program_id(0).to(tl.int64) * columns * rank
    start = tl.program_id(0) * strip
    for offset in range(0, strip, BLOCK_ROWS):
        row = (start + offset + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        row_inside = (row < tl.minimum(start + strip, rows))[:, None]
        s = tl.load(small + row[:, None] * rank + k[None, :], row_inside & of_rank, 0.0)
        total = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
        for first in range(0, columns, BLOCK_COLUMNS):
            column = first + tl.arange(0, BLOCK_COLUMNS)
            y = tl.load(outer + row[:, None] * columns + column[None, :], row_inside & (column < columns)[None, :], 0.0)
            place, inside = column[:, None] * rank + k[None, :], (column < columns)[:, None] & of_rank
            u = tl.load(up + place, inside, 0.0)
            if WIDEN:
                y, u, s = y.to(tl.float32), u.to(tl.float32), s.to(tl.float32)
            total += tl.dot(y, u, input_precision="ieee")
            before = tl.load(mine + place, inside, 0.0)
            tl.store(mine + place, before + tl.dot(tl.trans(y), s, input_precision="ieee"), inside)
        tl.store(
            inner + row[:, None] * rank + k[None, :], (scaling * total).to(inner.dtype.element_ty), row_inside & of_rank
        )


def factor_gradients(outer: Tensor, up: Tensor, small: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return s dY up in dY's dtype and s dY' S in up's, for ranks up to LARGEST_RANK.

    Shapes: outer (rows, out), up (out, rank), small (rows, rank)
    """
    outer, up, small = outer.contiguous(), up.contiguous(), small.contiguous()
    (rows, columns), rank = outer.shape, up.shape[1]
    assert rank <= LARGEST_RANK
    widen = widened(outer, up, small)
    height, width = tile(rank, widen)
    strip = triton.cdiv(triton.cdiv(rows, STRIPS), height) * height
    count = triton.cdiv(rows, strip)
    inner = torch.empty(rows, rank, dtype=outer.dtype, device=outer.device)
    slices = torch.zeros(count, columns, rank, device=outer.device)
    factor_gradients_kernel[(count,)](
        outer,
        up,
        small,
        inner,
        slices,
        scaling,
        rows,
        columns,
        rank,
        strip,
        WIDEN=widen,
        BLOCK_ROWS=height,
        BLOCK_COLUMNS=width,
        BLOCK_RANK=max(16, triton.next_power_of_2(rank)),
        num_warps=WARPS,
    )
    return inner, slices.sum(0).mul_(scaling).to(up.dtype)


def factor_gradients_twin(outer: Tensor, up: Tensor, small: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The same in torch."""
    inner, of_up = scaling * (outer.float() @ up.float()), scaling * (outer.float().t() @ small.float())
    return inner.to(outer.dtype), of_up.to(up.dtype)
