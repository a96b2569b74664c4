"""Adding a small update to a frozen base weight without losing it.

bfloat16 keeps 8 significant bits, so most entries of a merge worth 0.1 % of the weight would round away.
`split` keeps the other 16 bits of a float32 in an int16 beside the bfloat16; `stochastic` rounds up or down
by chance, so that the sum is right on average; `nearest` is what a plain addition does. float32 needs none.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

_HALF = 0x8000  # half of the last place that bfloat16 keeps of a float32's bits


class MergePrecision(str, Enum):
    """How a bfloat16 base weight takes up a float32 update."""

    split = "split"  # type: ignore[assignment]  # the name must be the YAML word; nobody splits this string
    stochastic = "stochastic"
    nearest = "nearest"


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """Cut float32 into the nearest bfloat16 and the int16 that is missing from it.

    Ties go away from zero: then the missing part always fits 16 bits, which with ties to even it would not.
    """
    bits = value.contiguous().view(torch.int32)
    high = (bits + _HALF) >> 16
    low = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """Return the exact float32 that `split` cut."""
    bits = (high.contiguous().view(torch.int16).to(torch.int32) << 16) + low
    return bits.view(torch.float32)


def stochastic_round(value: Tensor, key: int, start: int = 0) -> Tensor:
    """Round float32 to one of its two bfloat16 neighbours, the nearer one more often: right on average.

    The chance of an entry depends on `key` and on its place, counted from `start` in memory order, alone: a part
    of a tensor rounds as it does within the whole.
    """
    noise = _noise(key, start, value.numel(), value.device).view(value.shape)
    bits = noise.add_(value.contiguous().view(torch.int32))
    return bits.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


def _noise(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Return 16 random bits for each place, by a counter-based generator; four places share a word of 64 bits.

    Source: the output function of SplitMix64, Steele, Lea and Flood 2014.
    """
    first = start >> 2
    words = torch.arange(first, (start + count + 3) >> 2, device=device).mul_(_signed(0x9E3779B97F4A7C15))
    words.add_(_signed(key))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words.bitwise_xor_(_shifted(words, shift)).mul_(_signed(factor))
    words.bitwise_xor_(_shifted(words, 31))
    # The lowest bits come first in memory, as on all processors that torch supports.
    bits = words.view(torch.int16)[start - 4 * first :][:count]
    return bits.to(torch.int32).bitwise_and_(0xFFFF)


def _shifted(value: Tensor, places: int) -> Tensor:
    """Shift int64 to the right without its sign."""
    return (value >> places).bitwise_and_((1 << (64 - places)) - 1)


def _signed(value: int) -> int:
    """Return the int64 that has these 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def add_(
    weight: Tensor,
    extra_bits: Tensor | None,
    delta: Tensor,
    precision: MergePrecision,
    key: int | None = None,
    start: int = 0,
) -> Tensor:
    """Add a float32 update to the weight in place; return how many entries changed (0-d, on its device).

    `stochastic` needs a key, and the place of the first entry where the weight is a part of a larger one.
    """
    if weight.dtype != torch.bfloat16:
        before, after = weight, weight + delta.to(weight.dtype)
        changed = torch.count_nonzero(before != after)
        weight.copy_(after)
        return changed
    assert (extra_bits is not None) == (precision == MergePrecision.split), "prepare_base_ makes the extra bits"
    if extra_bits is not None:
        exact = join(weight, extra_bits)
        after = exact + delta
        changed = torch.count_nonzero(exact != after)
        high, low = split(after)
        extra_bits.copy_(low)
    else:
        high = _rounded(weight.float() + delta, precision, key, start)
        changed = torch.count_nonzero(weight != high)
    weight.copy_(high)
    return changed


def _rounded(value: Tensor, precision: MergePrecision, key: int | None, start: int) -> Tensor:
    if precision == MergePrecision.nearest:
        return value.to(torch.bfloat16)
    assert key is not None, "stochastic rounding needs a key"
    return stochastic_round(value, key, start)
