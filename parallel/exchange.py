"""How LTE's heads talk: each process with its counterparts, which hold the same part of the model for other heads.

Sums are made in order of heads, each entry in one place, and their bits are handed out: all heads end with the very
same numbers on any backend. How many bytes that sends: parallel/sync_traffic.py.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.runtime import Runtime
from parallel.sync_traffic import factors_are_fewer, gather_bytes, mean_bytes, share_of
from relora.heads import Parcel, Way
from relora.lte import Exchange, LteConfig


class HeadExchange:
    """The other heads, over torch.distributed. Implements `relora.heads.Heads`.

    What the processes of a head's data axis hold alike they send in parts, and put together inside each head.
    Collectives: every method that takes a tensor, by all processes; counterparts bring tensors of one shape.
    """

    def __init__(self, runtime: Runtime, config: LteConfig) -> None:
        self._axis, self._data = runtime.head, runtime.data
        self._device = runtime.device
        self._choice = config.exchange
        self.count = runtime.head.size
        self.hosted: Sequence[int] = [runtime.head.index]
        self.sent = 0
        """Bytes that this process has sent."""

    def exchange(
        self, parcels: Sequence[Parcel], words: Sequence[Sequence[float]], *, background: bool = False
    ) -> "_Delivery":
        """Bring parcels to all heads."""
        delivery = _Delivery(self, parcels, words)
        if background:
            delivery.carry_all()
        return delivery

    def _gather(self, own: Tensor, alike: bool) -> list[Tensor]:
        own = own.to(self._device)
        if self._axis.group is None or not own.numel():
            return [own] * self.count
        mine = self._part(own, alike)
        told = torch.empty(self.count, mine.numel(), dtype=own.dtype, device=self._device)
        dist.all_gather(list(told.unbind()), mine, group=self._axis.group)
        self.sent += gather_bytes(self.count, mine.numel(), own.element_size())
        return list(self._whole(told, own.numel(), alike).unbind())

    def _mean(self, own: Tensor, alike: bool, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        if self._axis.group is None or not own.numel():
            return own, (own.double() @ own.double()).view(1, 1).expand(self.count, self.count).cpu()
        mine = self._part(own.to(self._device), alike)
        mean, products = self._mean_of(mine, weights)
        self.sent += mean_bytes(self.count, mine.numel(), own.element_size())
        return self._whole(mean.view(1, -1), own.numel(), alike)[0], products * (self._data.size if alike else 1)

    def _mean_of(self, own: Tensor, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        size = -(-own.numel() // self.count)
        pieces = torch.zeros(self.count * size, dtype=own.dtype, device=self._device)
        pieces[: own.numel()] = own
        mine = torch.empty_like(pieces)
        dist.all_to_all_single(mine, pieces, group=self._axis.group)
        of_heads = mine.view(self.count, size).double()
        total = torch.zeros(size, dtype=torch.float64, device=self._device)
        for weight, piece in zip(weights, of_heads, strict=True):  # in order of heads, as no library promises
            total += weight * piece
        mean = total.to(own.dtype)
        dist.all_gather(list(pieces.split(size)), mean, group=self._axis.group)
        return pieces[: own.numel()], (of_heads @ of_heads.t()).cpu()

    def by_factors(self, factors: int, part: int, *, alike: bool) -> bool:
        """Whether a layer's factors travel (so many entries a head), or its dense change (so many here)."""
        if self._choice == Exchange.auto:
            data = self._data.size
            return factors_are_fewer(
                self.count, factors=share_of(factors, data), part=share_of(part, data if alike else 1)
            )
        return self._choice == Exchange.factors

    def _part(self, own: Tensor, alike: bool) -> Tensor:
        """What this process sends of a tensor; equal lengths on the data axis, so the last parts may be padded."""
        if not alike or self._data.group is None:
            return own.contiguous()
        size = share_of(own.numel(), self._data.size)
        padded = own.new_zeros(self._data.size * size)
        padded[: own.numel()] = own
        return padded[self._data.index * size :][:size]

    def _whole(self, parts: Tensor, entries: int, alike: bool) -> Tensor:
        """Tensors of so many entries, put together from what `_part` made of them. Shapes: a row for each."""
        if not alike or self._data.group is None:
            return parts
        gathered = [torch.empty_like(parts) for _ in range(self._data.size)]
        dist.all_gather(gathered, parts.contiguous(), group=self._data.group)
        return torch.cat(gathered, dim=1)[:, :entries]


class _Delivery:
    """A sync on its way."""

    def __init__(self, heads: HeadExchange, parcels: Sequence[Parcel], words: Sequence[Sequence[float]]) -> None:
        self._heads, self._parcels = heads, iter(parcels)
        self.words = [row.tolist() for row in heads._gather(torch.tensor(words[0], dtype=torch.float64), False)]
        self.members = list(range(heads.count))
        total = sum(one[0] for one in self.words)
        self.weights = [one[0] / total for one in self.words]
        self._products = torch.zeros(heads.count, heads.count, dtype=torch.float64)
        self._results: list[list[Tensor]] | None = None

    def carry_all(self) -> None:
        self._results = [self._carry(parcel) for parcel in self._parcels]

    def result(self) -> list[Tensor]:
        return self._carry(next(self._parcels)) if self._results is None else self._results.pop(0)

    def _carry(self, parcel: Parcel) -> list[Tensor]:
        (own,) = parcel.own()
        if parcel.way is Way.gather:
            padded = own.new_zeros(parcel.entries)
            padded[: own.numel()] = own
            return self._heads._gather(padded, parcel.alike)
        mean, products = self._heads._mean(own, parcel.alike, self.weights)
        if parcel.replicas:
            self._products += products / parcel.replicas
        return [mean]

    def products(self) -> Tensor:
        told = self._heads._gather(self._products.flatten(), False)
        return torch.stack([one.cpu() for one in told]).sum(0).view_as(self._products)
