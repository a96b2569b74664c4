"""How LTE's heads talk: each process with its counterparts, which hold the same part of the model for other heads.

Sums are made in order of heads, each entry in one place, and their bits are handed out: all heads end with the very
same numbers on any backend. How many bytes that sends: parallel/sync_traffic.py.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.runtime import Runtime
from parallel.sync_traffic import factors_are_fewer, gather_bytes, mean_bytes
from relora.lte import Exchange


class HeadExchange:
    """The other heads, over torch.distributed. Implements `relora.lte.Heads`.

    Collectives: every method that takes a tensor, by all counterparts, with tensors of one shape.
    """

    def __init__(self, runtime: Runtime, choice: Exchange) -> None:
        self._axis = runtime.head
        self._device = runtime.device
        self._choice = choice
        self.count = runtime.head.size
        self.index = runtime.head.index
        self.sent = 0
        """Bytes that this process has sent."""

    def gather(self, own: Tensor) -> list[Tensor]:
        """Every head's tensor, in order of heads."""
        own = own.to(self._device)
        if self._axis.group is None or not own.numel():
            return [own] * self.count
        told = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(told, own.contiguous(), group=self._axis.group)
        self.sent += gather_bytes(self.count, own.numel(), own.element_size())
        return told

    def mean(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over heads, and this head's share of the inner products of their tensors.

        Each head averages one piece, then tells the others.
        Shapes: (entries,) and (heads, heads), float64.
        """
        if self._axis.group is None or not own.numel():
            return own, (own.double() @ own.double()).view(1, 1).expand(self.count, self.count).cpu()
        size = -(-own.numel() // self.count)
        pieces = torch.zeros(self.count * size, dtype=own.dtype, device=self._device)
        pieces[: own.numel()] = own
        mine = torch.empty_like(pieces)
        dist.all_to_all_single(mine, pieces, group=self._axis.group)
        of_heads = mine.view(self.count, size).double()
        total = torch.zeros(size, dtype=torch.float64, device=self._device)
        for piece in of_heads:  # in order of heads, whatever a library's sum over rows does
            total += piece
        mean = (total / self.count).to(own.dtype)
        dist.all_gather(list(pieces.split(size)), mean, group=self._axis.group)
        self.sent += mean_bytes(self.count, own.numel(), own.element_size())
        return pieces[: own.numel()], (of_heads @ of_heads.t()).cpu()

    def by_factors(self, factors: int, part: int) -> bool:
        """Whether a layer's factors travel (so many entries a head), or its dense change (so many here)."""
        if self._choice == Exchange.auto:
            return factors_are_fewer(self.count, factors=factors, part=part)
        return self._choice == Exchange.factors
