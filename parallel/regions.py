"""Which part of a whole tensor a process holds, whatever cut it: tensor parallelism, ZeRO, or nothing.

Tensor parallelism takes ranges of one dimension (several, where a weight packs query, key and value); ZeRO takes
a range of what is left, flattened. A region says both, so that parts written by one layout of processes can be
read by any other. Pure arithmetic and slicing.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a tensor: ranges of one dimension, then a flat range of those."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    dim: int = 0
    """The dimension that is cut."""
    ranges: tuple[tuple[int, int], ...] | None = None
    """Half-open ranges along `dim`, in the order in which the process holds them; None: all of it."""
    start: int = 0
    """First element of the flat range."""
    count: int | None = None
    """Elements of the flat range; None: all."""

    def __post_init__(self) -> None:
        # Equal parts are equal regions, so that each is written once.
        if self.ranges is not None and self.ranges == ((0, self.shape[self.dim]),):
            object.__setattr__(self, "ranges", None)
        if self.ranges is None:
            object.__setattr__(self, "dim", 0)

    @property
    def cut_shape(self) -> tuple[int, ...]:
        """Shape of what tensor parallelism leaves of the whole, before the flat range is taken."""
        if self.ranges is None:
            return self.shape
        length = sum(stop - start for start, stop in self.ranges)
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])

    @property
    def numel(self) -> int:
        """Elements of the part."""
        return math.prod(self.cut_shape) if self.count is None else self.count

    @property
    def is_flat(self) -> bool:
        """Whether the part is a flat range; otherwise it has `cut_shape`."""
        return self.count is not None

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        return self.cut_shape if self.count is None else (self.count,)

    def flat(self, start: int, count: int) -> "Region":
        """The flat range of this region's cut."""
        assert self.count is None, "a flat range is taken once"
        return Region(self.shape, self.dim, self.ranges, start, count)

    @property
    def cut_only(self) -> "Region":
        """This region without its flat range."""
        return Region(self.shape, self.dim, self.ranges)

    def cut(self, whole: Tensor) -> Tensor:
        """What tensor parallelism leaves of the whole tensor. Shapes: `cut_shape`."""
        if self.ranges is None:
            return whole
        parts = [whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def take(self, whole: Tensor) -> Tensor:
        """The part of the whole tensor. Shapes: `cut_shape`, or (count,) when flat."""
        cut = self.cut(whole)
        if self.count is None:
            return cut
        return cut.reshape(-1)[self.start : self.start + self.count]

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write the part into the whole tensor, in place."""
        if self.count is None:
            self._put_cut(whole, part.reshape(self.cut_shape))
            return
        cut = self.cut(whole).contiguous()  # the very memory of `whole` where the cut is contiguous in it
        cut.view(-1)[self.start : self.start + self.count] = part.reshape(-1)
        self._put_cut(whole, cut)

    def _put_cut(self, whole: Tensor, cut: Tensor) -> None:
        if self.ranges is None:
            whole.copy_(cut)
            return
        begin = 0
        for start, stop in self.ranges:
            whole.narrow(self.dim, start, stop - start).copy_(cut.narrow(self.dim, begin, stop - start))
            begin += stop - start

    def to_json(self) -> list[Any]:
        """Plain values for a file."""
        ranges = None if self.ranges is None else [list(pair) for pair in self.ranges]
        return [list(self.shape), self.dim, ranges, self.start, self.count]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> "Region":
        """The region that `to_json` wrote."""
        shape, dim, ranges, start, count = values
        pairs = None if ranges is None else tuple((int(a), int(b)) for a, b in ranges)
        return cls(tuple(shape), int(dim), pairs, int(start), count)


def whole(tensor: Tensor) -> Region:
    """The region of a tensor that nothing cuts."""
    return Region(tuple(tensor.shape))


def covers(regions: Sequence[Region]) -> bool:
    """Whether parts of one tensor hold all of it between them.

    Each of their cuts must be there completely.
    """
    cuts: dict[Region, list[tuple[int, int]]] = defaultdict(list)
    for region in regions:
        cuts[region.cut_only].append((region.start, region.start + region.numel))
    if not all(_reach(ranges, math.prod(cut.cut_shape)) for cut, ranges in cuts.items()):
        return False
    if any(cut.ranges is None for cut in cuts):
        return True
    along = {cut.dim: cut.shape[cut.dim] for cut in cuts}
    return any(
        _reach([pair for cut in cuts if cut.dim == dim for pair in cut.ranges or ()], length)
        for dim, length in along.items()
    )


def _reach(ranges: Sequence[tuple[int, int]], length: int) -> bool:
    """Whether half-open ranges leave no gap between 0 and a length."""
    reached = 0
    for start, stop in sorted(ranges):
        if start > reached:
            return False
        reached = max(reached, stop)
    return reached >= length


def even_range(length: int, count: int, index: int) -> tuple[int, int]:
    """The index-th of `count` consecutive ranges of nearly equal length; the first ones may be one longer."""
    size, longer = divmod(length, count)
    start = index * size + min(index, longer)
    return start, start + size + (index < longer)
