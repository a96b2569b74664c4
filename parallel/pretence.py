"""Collectives of the tensor axis that are counted instead of made: for a model whose other parts do not exist."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from parallel.runtime import Axis


@dataclass(slots=True)
class Tally:
    """Bytes of the tensors that were handed over."""

    all_reduced: int = 0
    """Of sums that every process gets."""
    gathered: int = 0
    """Of this process's parts of what every process gets whole."""


@contextmanager
def counted_collectives() -> Iterator[Tally]:
    """Within it all_reduce and all_gather of torch.distributed leave their tensors alone."""
    tally, real = Tally(), (dist.all_reduce, dist.all_gather)

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        tally.all_reduced += tensor.nbytes

    def all_gather(tensors: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        tally.gathered += tensor.nbytes

    dist.all_reduce, dist.all_gather = all_reduce, all_gather  # type: ignore[assignment]
    try:
        yield tally
    finally:
        dist.all_reduce, dist.all_gather = real


def imagined_axis(size: int) -> Axis:
    """An axis of that many processes, seen from the first, that nobody stands on."""
    return Axis(size, 0, None, tuple(range(size)))


def sent_by_tensor_axis(all_reduced: int, gathered: int, size: int) -> int:
    """Bytes that one of `size` processes sends over a ring, for bytes as `Tally` counts them."""
    return round(2 * (size - 1) / size * all_reduced) + (size - 1) * gathered
