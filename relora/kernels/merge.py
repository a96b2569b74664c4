"""One pass over a base weight: W' = round(W + s up down), tile by tile, without a temporary of W's size.

Nearest or stochastic into bfloat16, exact into bfloat16 and its 16 further bits, or plain float32. The chances are
those of relora/precision.py, entry by entry, so a tile rounds as the whole does. Reads W once and writes it once:
4 bytes an entry in bfloat16 (8 with the further bits), where W += s * (up @ down) in torch moves 12 and more.
Source: the rounding of relora/precision.py; the tiles are those of Triton's matrix product tutorial.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from relora.kernels.setting import widened
from relora.precision import MergePrecision, join, split, stochastic_round

ROWS, COLUMNS, DEPTH = 64, 64, 16


@triton.jit
def _mixed(state):  # type: ignore[no-untyped-def]
    """The output function of SplitMix64 on unsigned 64-bit integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)


@triton.jit(do_not_specialize=["key"])
def merge_kernel(  # type: ignore[no-untyped-def]
    weight,
    bits,
    result,
    result_bits,
    left,
    right,
    key,
    scaling,
    rows,
    columns,
    rank,
    PRECISION: tl.constexpr,
    HAS_BITS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """W' = round(W + s left right) on one tile; left (rows, rank) and right (rank, columns) are contiguous."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for first in range(0, rank, BLOCK_DEPTH):
        depth = first + tl.arange(0, BLOCK_DEPTH)
        a = tl.load(left + row[:, None] * rank + depth[None, :], (row < rows)[:, None] & (depth < rank)[None, :], 0.0)
        b_inside = (depth < rank)[:, None] & (column < columns)[None, :]
        b = tl.load(right + depth[:, None] * columns + column[None, :], b_inside, 0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total += tl.dot(a, b, input_precision="ieee")
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    stored = tl.load(weight + place, inside, 0.0)
    if HAS_BITS:
        high = stored.to(tl.int16, bitcast=True).to(tl.int32) << 16
        low = tl.load(bits + place, inside, 0).to(tl.int32)
        exact = (high + low).to(tl.float32, bitcast=True)
    elif PRECISION == "float32":
        exact = stored
    else:  # widened by its bits: exact, and the interpreter's own widening of bfloat16 is not relied on
        exact = (stored.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    exact += scaling * total
    if PRECISION == "float32":
        tl.store(result + place, exact, inside)
        return
    word = exact.to(tl.int32, bitcast=True)
    if PRECISION == "split":
        upper = (word + 0x8000) >> 16
        tl.store(result_bits + place, (word - (upper << 16)).to(tl.int16), inside)
    elif PRECISION == "stochastic":
        state = (place >> 2).to(tl.uint64) * 0x9E3779B97F4A7C15 + key.to(tl.uint64)
        noise = (_mixed(state) >> ((place & 3) * 16).to(tl.uint64)) & 0xFFFF  # four places share a word
        upper = (word + noise.to(tl.int32)) >> 16
    else:  # nearest, ties to even
        upper = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
    tl.store(result + place, upper.to(tl.int16).to(tl.bfloat16, bitcast=True), inside)


def merge(
    weight: Tensor,
    bits: Tensor | None,
    left: Tensor,
    right: Tensor,
    scaling: float,
    precision: MergePrecision,
    *,
    key: int = 0,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return round(W + s left right), and its further bits under `split`; in W's and the bits' own memory on demand.

    Without `split` the further bits are read where there are any, and not written: the formed weight of a merged layer.

    Shapes: weight (rows, columns) contiguous, left (rows, rank), right (rank, columns)
    """
    rows, columns = weight.shape
    kind = "float32" if weight.dtype == torch.float32 else precision.value
    split_off = bits if kind == MergePrecision.split.value else None
    result = weight if in_place else torch.empty_like(weight)
    rest = split_off if in_place or split_off is None else torch.empty_like(split_off)
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))
    merge_kernel[grid](
        weight,
        weight if bits is None else bits,
        result,
        result if rest is None else rest,
        left.contiguous(),
        right.contiguous(),
        _signed(key),
        scaling,
        rows,
        columns,
        left.shape[1],
        PRECISION=kind,
        HAS_BITS=bits is not None,
        WIDEN=widened(left, right),
        BLOCK_ROWS=ROWS,
        BLOCK_COLUMNS=COLUMNS,
        BLOCK_DEPTH=DEPTH,
    )
    return result, rest


def merge_twin(
    weight: Tensor,
    bits: Tensor | None,
    left: Tensor,
    right: Tensor,
    scaling: float,
    precision: MergePrecision,
    *,
    key: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """The same in torch."""
    exact = weight.float() if bits is None else join(weight, bits)
    exact = exact + scaling * (left.float() @ right.float())
    if weight.dtype == torch.float32:
        return exact, None
    if precision == MergePrecision.split:
        return split(exact)
    return (exact.bfloat16() if precision == MergePrecision.nearest else stochastic_round(exact, key)), None


def _signed(key: int) -> int:
    return key - (1 << 64) if key >> 63 else key
