"""Adam's moments in 8 bits an entry, and AdamW that keeps them so.

Each run of 256 neighbours shares a scale, its largest absolute value; an entry is `level[code] * scale`. Levels lie
evenly within decades, and there are more of them the higher the decade. Of the second moment the root is stored,
which has half of its range, and never rounds down to zero: an entry with a first moment and no second one would jump
by lr * exp_avg / eps.
Source: block-wise dynamic quantisation, Dettmers et al. 2021 (arXiv 2110.02861), section 2; docs/quantised.md says
what differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
"""Entries that share a scale."""
_SLAB = BLOCK << 12
"""An update works on so many entries at a time, so that its temporaries stay small."""
_DECADES = 7
_LEAST = 2.0**-62
"""A block whose largest entry is smaller counts as zero: squares of roots must be ordinary numbers."""


class MomentFormat(str, Enum):
    """How Adam's moments are kept between updates."""

    full = "full"
    """In float32: 8 bytes for both moments of an entry."""
    int8 = "int8"
    """As codes of 8 bits and a scale for 256 of them: 2.03 bytes."""


def bytes_of_moments(sizes: Sequence[int], form: MomentFormat) -> int:
    """Memory of both moments of tensors with so many entries, and of the tables that they share."""
    if form is MomentFormat.full:
        return 2 * 4 * sum(sizes)
    tables = sum(one.nbytes for second in (False, True) for one in _tables(second, torch.device("cpu")))
    return 2 * (BLOCK + 4) * sum(math.ceil(size / BLOCK) for size in sizes) + tables


def bytes_of_update(sizes: Sequence[int], form: MomentFormat) -> int:
    """Memory that updates of them take besides, at most: moments of a slab as numbers, and codes as they are found."""
    return 0 if form is MomentFormat.full else 32 * min(max(sizes, default=0), _SLAB)


class Coded:
    """One moment of one tensor, flat, as codes and scales.

    Quantising what `values` returns changes nothing, so a checkpoint may hold numbers.
    """

    def __init__(self, entries: int, device: torch.device, *, second: bool) -> None:
        """Begin with zeros.

        Args:
            second: whether it is the second moment, which has no signs.
        """
        self.entries, self.second = entries, second
        blocks = math.ceil(entries / BLOCK)
        self.codes = torch.full((blocks, BLOCK), 0 if second else _ZERO, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(blocks, 1, device=device)

    def part(self, start: int, count: int) -> CodedPart:
        """Return a range of it, which can be read and edited."""
        return CodedPart(self, start, count)

    @torch.no_grad()
    def values(self, start: int, count: int) -> Tensor:
        """Return a range as numbers.

        Shapes: (count,), float32
        """
        levels, _ = _tables(self.second, self.codes.device)
        blocks = slice(start // BLOCK, math.ceil((start + count) / BLOCK))
        entries = levels.index_select(0, self.codes[blocks].view(-1).int()).view(-1, BLOCK).mul_(self.scales[blocks])
        entries = entries.view(-1)[start % BLOCK :][:count]
        return entries.square_() if self.second else entries

    @torch.no_grad()
    def store(self, start: int, values: Tensor) -> None:
        """Quantise new values of whole blocks; the last one of all may be short.

        Shapes: values (entries,), float32
        """
        count = len(values)
        assert start % BLOCK == 0
        assert count % BLOCK == 0 or start + count == self.entries
        exact = values.sqrt() if self.second else values
        if count % BLOCK:
            exact = torch.nn.functional.pad(exact, (0, -count % BLOCK))
        numbers = exact.view(-1, BLOCK)
        scales = numbers.abs().amax(dim=1, keepdim=True)
        scales[scales < _LEAST] = 0.0
        ratios = numbers / scales.masked_fill(scales == 0, torch.inf)
        _, codes = _tables(self.second, self.codes.device)
        places = ratios.view(torch.int32).bitwise_right_shift_(_DROPPED_BITS).bitwise_and_(len(codes) - 1)
        blocks = slice(start // BLOCK, start // BLOCK + len(numbers))
        torch.index_select(codes, 0, places.view(-1), out=self.codes[blocks].view(-1))
        self.scales[blocks] = scales


@dataclass(slots=True, frozen=True)
class CodedPart:
    """A range of a moment, edited by the names that a tensor has for it.

    An edit quantises its first and last block anew, with what neighbours have there.
    """

    moment: Coded
    start: int
    count: int

    def numbers(self) -> Tensor:
        """Return a copy as numbers.

        Shapes: (count,), float32
        """
        return self.moment.values(self.start, self.count)

    def zero_(self) -> None:
        """Set all entries to zero."""
        self._edit(lambda values, _: values.zero_())

    def mul_(self, factor: float) -> None:
        """Multiply all entries."""
        self._edit(lambda values, _: values.mul_(factor))

    def masked_fill_(self, mask: Tensor, value: float) -> None:
        """Set the entries under a mask. Shapes: mask (count,)."""
        flat = mask.reshape(-1)
        self._edit(lambda values, at: values.masked_fill_(flat[at], value))

    def copy_(self, numbers: Tensor) -> None:
        """Set all entries. Shapes: numbers (count,)."""
        flat = numbers.reshape(-1)
        self._edit(lambda values, at: values.copy_(flat[at]))

    def _edit(self, change: Callable[[Tensor, slice], object]) -> None:
        """Call `change` with values and where in the range they are, a slab at a time."""
        end = self.start + self.count
        for first in range(self.start // BLOCK * BLOCK, end, _SLAB):
            last = min(first + _SLAB, math.ceil(end / BLOCK) * BLOCK, self.moment.entries)
            values = self.moment.values(first, last - first)
            begin, until = max(first, self.start), min(last, end)
            change(values[begin - first : until - first], slice(begin - self.start, until - self.start))
            self.moment.store(first, values)


def numbers(moment: Tensor | CodedPart) -> Tensor:
    """A moment as numbers: itself, or made from its codes."""
    return moment.numbers() if isinstance(moment, CodedPart) else moment


class CodedAdamW(torch.optim.Optimizer):
    """AdamW whose moments are quantised after each update, which itself is in float32."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        """Take groups as torch's AdamW does; parameters and gradients are float32."""
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have gradients; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def begin(self, owner: Tensor) -> dict[str, Any]:
        """Return the state of a tensor, which begins with zeros."""
        if not self.state.get(owner):
            self.state[owner] = {
                "step": torch.zeros((), device=owner.device),
                "exp_avg": Coded(owner.numel(), owner.device, second=False),
                "exp_avg_sq": Coded(owner.numel(), owner.device, second=True),
            }
        state: dict[str, Any] = self.state[owner]
        return state

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state, lr, (beta1, beta2) = self.begin(parameter), group["lr"], group["betas"]
        state["step"] += 1
        step_size, root = lr / (1 - beta1 ** state["step"]), (1 - beta2 ** state["step"]).sqrt()
        weights, gradients = parameter.view(-1), parameter.grad.reshape(-1)
        for start in range(0, len(weights), _SLAB):
            here = slice(start, start + _SLAB)
            weight, gradient = weights[here], gradients[here]
            first = state["exp_avg"].values(start, len(weight)).lerp_(gradient, 1 - beta1)
            second = state["exp_avg_sq"].values(start, len(weight)).mul_(beta2)
            second.addcmul_(gradient, gradient, value=1 - beta2)
            state["exp_avg"].store(start, first)
            state["exp_avg_sq"].store(start, second)
            weight.mul_(1 - lr * group["weight_decay"])
            weight.sub_(first.div_(second.sqrt_().div_(root).add_(group["eps"])).mul_(step_size))


@cache
def _tables(second: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels by code in ascending order, and codes by the leading bits of a float32 in [-1, 1].

    Decade k of seven ends at 10^(k-6) and has 2^k evenly spaced levels of each sign, or 2^(k+1) without signs. Nine
    bits of a significand part levels well, so a code is that of the level nearest to the middle of its bits' range.

    Shapes: (255,), (2^18,) or (2^17,)
    """
    above: list[Tensor] = []
    for decade in range(_DECADES):
        count = 2 ** (decade + second)
        above.append(torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)[1:] * 10.0 ** (decade + 1 - _DECADES))
    positive = torch.cat(above)
    bits = torch.arange(1 << (31 - _DROPPED_BITS), dtype=torch.int32) << _DROPPED_BITS
    middles = (bits + (1 << (_DROPPED_BITS - 1))).view(torch.float32).double()
    middles = middles.nan_to_num(1.0)  # patterns of what is no number do not occur
    codes = torch.bucketize(middles, (positive[1:] + positive[:-1]) / 2) + 1
    codes[middles < (0.0 if second else float(positive[0]) / 2)] = 0
    codes[0] = 0
    zero = torch.zeros(1, dtype=torch.float64)
    if not second:
        codes = torch.cat([_ZERO + codes, _ZERO - codes])
    levels = torch.cat([zero, positive] if second else [-positive.flip(0), zero, positive])
    return levels.float().to(device), codes.to(torch.uint8).to(device)


_ZERO = 127
"""Code of zero in a moment with signs."""
_DROPPED_BITS = 14
