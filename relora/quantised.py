"""Frozen base weights in 8 or 4 bits, and what a merge does to them.

Each run of 64 neighbours in a row shares one scale, and an entry is `level[code] * scale`. Nothing else is what the
layer computes with: every pass makes the weight anew. A kept remainder is 16 further bits that say where in its
code's cell the exact value is; it stays in host memory, and only merges read it. Without it, a merge starts from
what the codes say, and an update smaller than a cell is lost.
Source: NF4 and blocks of 64 from QLoRA, Dettmers et al. 2023 (arXiv 2305.14314); docs/quantised.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn

BLOCK = 64
"""Entries that share a scale."""
SLAB_ENTRIES = 1 << 20
"""A merge works on rows of about this many entries, so that its temporaries stay small."""
_SLACK = 2.0**-8  # a scale stays while a block's largest entry is so near to the last level, and bfloat16 is nearer
_PLACES = 32768  # of the remainder, on each side of a level
_TWICE = {torch.bfloat16: torch.int32, torch.float32: torch.int64, torch.float64: torch.complex128}
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class BaseFormat(str, Enum):
    """How the frozen weights under the factors are stored."""

    full = "full"
    """In the precision that is trained."""
    int8 = "int8"
    """255 even levels: 1.03 bytes an entry."""
    nf4 = "nf4"
    """16 levels at the quantiles of a normal distribution: 0.53 bytes an entry."""


class Codes(NamedTuple):
    """What a weight is made from; rows end in zeros that fill their last block.

    Shapes: codes (rows, columns) int8, of NF4 (rows, columns / 2) uint8 with an even column's code in the lower half;
    scales (rows, columns / 64) bfloat16; pairs (256, 2), the levels of the two codes in a byte
    """

    codes: Tensor
    scales: Tensor
    pairs: Tensor | None
    columns: int
    """Of the weight, without what fills the last block."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight.

        Shapes: (rows, columns)
        """
        if self.pairs is None:
            entries = self.codes.to(dtype)
        else:  # both levels of a byte by one look-up, as one element of twice the width
            both = self.pairs.to(dtype).view(_TWICE[dtype]).view(256)
            entries = both.index_select(0, self.codes.reshape(-1).int()).view(dtype)
        blocks = entries.view(*self.scales.shape, BLOCK).mul_(self.scales.to(dtype).unsqueeze(-1))
        return blocks.view(len(self.codes), -1)[:, : self.columns]


@dataclass(kw_only=True, slots=True)
class Taken:
    """What a merge did: sums of squares over the entries of a weight, and a count."""

    update: Tensor
    """Of the update that was to be taken up."""
    rounding: Tensor
    """Of how far the stored codes are from that: the error of quantisation."""
    lost: Tensor
    """Of how far codes and remainder together are from it: what no later merge can find again."""
    moved: Tensor
    """Of what the weight that passes compute with moved besides the update."""
    changed: Tensor
    """Entries whose stored value changed."""


class QuantisedBase(nn.Module):
    """A frozen matrix as codes and scales, and its remainder if that is kept."""

    codes: Tensor
    scales: Tensor
    pairs: Tensor | None
    remainder: Tensor | None

    def __init__(self, weight: Tensor, form: BaseFormat, *, remainder: bool) -> None:
        """Quantise a weight.

        Args:
            remainder: whether to keep 16 further bits of each entry, in host memory.

        Shapes: weight (rows, columns)
        """
        super().__init__()
        assert form != BaseFormat.full
        self.form = form
        self.rows, self.columns = weight.shape
        width = BLOCK * math.ceil(self.columns / BLOCK)
        device, packed = weight.device, form == BaseFormat.nf4
        codes = torch.empty(
            self.rows, width // (2 if packed else 1), dtype=torch.uint8 if packed else torch.int8, device=device
        )
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.empty(self.rows, width // BLOCK, dtype=torch.bfloat16, device=device))
        self.register_buffer("pairs", _pairs(device) if packed else None, persistent=False)
        self.register_buffer("remainder", None)
        if remainder:
            self.remainder = torch.empty(self.rows, width, dtype=torch.int16, device=_host(device))
        for rows in self._slabs():
            self._store(rows, weight[rows].float(), first=True)

    @property
    def stored(self) -> Codes:
        """Return what the weight is made from."""
        return Codes(self.codes, self.scales, self.pairs, self.columns)

    @property
    def entries(self) -> int:
        """Return the number of entries."""
        return self.rows * self.columns

    @property
    def eps(self) -> float:
        """Return twice the largest error of a stored weight, over its norm, as torch.finfo(dtype).eps is."""
        levels, below, _ = _cells(self.form, torch.device("cpu"))
        of_peak = float((below / levels[-1]).max()) * (1 + _SLACK) / (1 if self.remainder is None else 2 * _PLACES)
        return 2 * of_peak * math.sqrt(BLOCK)  # a block's largest entry may be all there is of its norm

    @torch.no_grad()
    def weight(self) -> Tensor:
        """Return the weight that passes compute with, in float32.

        Shapes: (rows, columns)
        """
        return self.stored.weight(torch.float32)

    @torch.no_grad()
    def exact(self) -> Tensor:
        """Return the weight with its remainder, in float32.

        Shapes: (rows, columns)
        """
        return torch.cat([self._exact(rows) for rows in self._slabs()])

    @torch.no_grad()
    def squared_norm(self) -> Tensor:
        """Return the squared norm of the weight that passes compute with, in float64.

        Shapes: ()
        """
        parts = [self._seen(rows).double().square().sum() for rows in self._slabs()]
        return torch.stack(parts).sum()

    @torch.no_grad()
    def add_(self, update: Callable[[slice], Tensor]) -> Taken:
        """Take up an update, given for rows in float32: the exact weight and it are added up and quantised anew."""
        sums = torch.zeros(5, dtype=torch.float64, device=self.codes.device)
        for rows in self._slabs():
            seen, before, delta = self._seen(rows), self._exact(rows), update(rows)
            wanted = before + delta
            self._store(rows, wanted)
            now, kept = self._seen(rows), self._exact(rows)
            for number, part in enumerate((delta, now - wanted, kept - wanted, now - seen - delta)):
                sums[number] += torch.linalg.vector_norm(part, dtype=torch.float64).square()
            sums[4] += torch.count_nonzero(kept != before)
        taken, rounding, lost, moved, changed = sums.unbind()
        return Taken(update=taken, rounding=rounding, lost=lost, moved=moved, changed=changed)

    def extra_repr(self) -> str:
        """Describe it in the model's printout."""
        return f"{self.form.value}, remainder={self.remainder is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedBase:
        """Move everything but the remainder, which only merges read."""
        remainder, self.remainder = self.remainder, None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.remainder = remainder
        return self

    def _slabs(self) -> Iterator[slice]:
        height = max(1, SLAB_ENTRIES // max(1, self.columns))
        return (slice(first, min(first + height, self.rows)) for first in range(0, self.rows, height))

    def _seen(self, rows: slice) -> Tensor:
        return Codes(self.codes[rows], self.scales[rows], self.pairs, self.columns).weight(torch.float32)

    def _exact(self, rows: slice) -> Tensor:
        if self.remainder is None:
            return self._seen(rows)
        codes, scales = self._indices(rows), self.scales[rows].float().unsqueeze(-1)
        levels, below, above = _cells(self.form, codes.device)
        places = self.remainder[rows].to(codes.device).view(codes.shape).float() / _PLACES
        cells = torch.where(places < 0, below[codes], above[codes])
        return ((levels[codes] + places * cells) * scales).view(codes.shape[0], -1)[:, : self.columns]

    def _indices(self, rows: slice) -> Tensor:
        """Return codes as numbers of levels.

        Shapes: (rows, blocks, 64) int64
        """
        codes = self.codes[rows]
        if self.form == BaseFormat.int8:
            numbers = codes.long() + 127
        else:
            numbers = torch.stack([codes & 15, codes >> 4], dim=-1).long()
        return numbers.view(len(codes), -1, BLOCK)

    def _store(self, rows: slice, value: Tensor, *, first: bool = False) -> None:
        """Quantise rows; unless they are the first ones, with the scales that are there wherever those still fit.

        A new scale moves all entries of its block, a merge is worth far less.
        Shapes: value (rows, columns)
        """
        levels, below, above = _cells(self.form, value.device)
        missing = self.scales.shape[1] * BLOCK - self.columns
        blocks = nn.functional.pad(value, (0, missing)).view(len(value), -1, BLOCK)
        peaks = blocks.abs().amax(-1) / levels[-1]
        scales = peaks.bfloat16()
        if not first:
            old = self.scales[rows]
            scales = torch.where((peaks - old.float()).abs() <= _SLACK * old.float(), old, scales)
        units = (blocks / scales.float().unsqueeze(-1)).nan_to_num_(0.0)  # blocks of zeros have no scale
        if self.form == BaseFormat.int8:
            numbers = units.round().clamp_(-127, 127).long() + 127
            self.codes[rows] = (numbers - 127).to(torch.int8).view(len(value), -1)
        else:
            numbers = torch.bucketize(units, (levels[1:] + levels[:-1]) / 2)
            halves = numbers.to(torch.uint8).view(len(value), -1, 2)
            self.codes[rows] = halves[..., 0] | (halves[..., 1] << 4)
        self.scales[rows] = scales
        if self.remainder is not None:
            away = units - levels[numbers]
            places = (away / torch.where(away < 0, below[numbers], above[numbers])).nan_to_num_(0.0)
            places = (places * _PLACES).round_().clamp_(-_PLACES, _PLACES - 1)
            self.remainder[rows] = places.to(torch.int16).view(len(value), -1).to(self.remainder.device)


def weight_of(codes: Tensor, scales: Tensor, columns: int) -> Tensor:
    """Return the weight that codes and scales stand for, in float32.

    Shapes: (rows, columns)
    """
    pairs = _pairs(codes.device) if codes.dtype == torch.uint8 else None
    return Codes(codes, scales, pairs, columns).weight(torch.float32)


def _host(device: torch.device) -> torch.device:
    return device if device.type == "meta" else torch.device("cpu")


def _levels(form: BaseFormat, device: torch.device) -> Tensor:
    values = _NF4 if form == BaseFormat.nf4 else [float(value) for value in range(-127, 128)]
    return torch.tensor(values, device=device)


def _cells(form: BaseFormat, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the levels, and how far the cell of each reaches below and above it."""
    levels = _levels(form, device)
    halves = levels.diff() / 2
    ends = _SLACK * levels[-1:]
    return levels, torch.cat([ends, halves]), torch.cat([halves, ends])


def _pairs(device: torch.device) -> Tensor:
    levels = _levels(BaseFormat.nf4, device)
    return torch.stack([levels.repeat(16), levels.repeat_interleave(16)], dim=1)
