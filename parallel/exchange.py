"""How LTE's heads exchange parcels: each process with its counterparts, which hold the same part of the model.

Heads are numbered through groups of processes; a group hosts one or several. Whatever the grouping, each head's
tensor is rounded by itself, sums are made in float64 in order of heads, each entry in one place, and their bits are
handed out: all heads end with the very same numbers. How many bytes that sends: parallel/sync_traffic.py.
"""

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.background import Background
from parallel.carrier import Carrier, group_carrier
from parallel.runtime import Runtime
from parallel.sync_traffic import SyncLayout, factors_are_fewer, piece_of, share_of
from relora.compression import decode, encode
from relora.heads import Compression, Parcel, Way
from relora.lte import Exchange

T = TypeVar("T")
_CHUNK = 1 << 20
"""Entries whose inner products are computed at once."""


@dataclass(slots=True)
class _Carried:
    """A parcel's outcome as this process got it; its head may have more of it in other processes."""

    told: Tensor
    """Encoded: a row for each head's tensor, or for each head's piece of the mean."""
    lost: Tensor | None = None
    """What rounding has kept back. Shapes: (hosted heads, entries of the part)."""


class HeadExchange:
    """The way to the other heads. Implements `relora.heads.Heads`.

    What the processes of a head's data axis hold alike they send in parts, and put together inside each head.
    Collectives: `exchange` and what it returns, by all processes alike.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        heads: int,
        choice: Exchange = Exchange.auto,
        compression: Compression = Compression.none,
        carrier: Carrier | None = None,
    ) -> None:
        """Take hold of the counterparts.

        Args:
            compression: what `by_factors` reckons with.
            carrier: None: over torch.distributed.
        """
        groups = runtime.head.size
        assert heads % groups == 0, "every group hosts as many heads"
        self._layout = SyncLayout(heads=heads, groups=groups, data=runtime.data.size)
        self._data, self._device = runtime.data, runtime.device
        self._choice, self._compression = choice, compression
        self._carrier = group_carrier(runtime) if carrier is None else carrier
        self._background: Background | None = None
        self.count = heads
        self.hosted: Sequence[int] = range(
            runtime.head.index * heads // groups, (runtime.head.index + 1) * heads // groups
        )
        """Heads whose model this process holds a part of."""
        self.sent = 0
        """Bytes that this process has sent to its counterparts."""

    def exchange(
        self, parcels: Sequence[Parcel], words: Sequence[Sequence[float]], *, background: bool = False
    ) -> "ParcelDelivery":
        """Bring parcels to all heads.

        In the background, parcels are made and carried by a thread, but put together inside the head as they are asked
        for. What is carried in the foreground waits for what began in the background before: all processes keep one
        order. `sent` has all of a delivery after its `products`.
        """
        assert len(words) == len(self.hosted), "each hosted head has its words"
        if background and self._background is None:
            self._carrier.check_thread()
            self._background = Background(self._device)
        return ParcelDelivery(self, parcels, words, background=background)

    def by_factors(self, factors: int, part: int, *, alike: bool) -> bool:
        """Whether a layer's factors travel (so many entries a head), or its dense change (so many here).

        With lte.exchange=auto, whichever is fewer bytes between heads that each have processes of their own: how many
        this process hosts changes no result.
        """
        if self._choice == Exchange.auto:
            return factors_are_fewer(self._layout.apart, factors, part, alike=alike, compression=self._compression)
        return self._choice == Exchange.factors

    # ---- steps, in the main thread or in the background: they use nothing but the carrier

    def later(self, step: Callable[[], T], *, background: bool) -> Callable[[], T]:
        """The result of a step: one that is under way from now on, or that is taken when first asked for."""
        quiet = torch.no_grad()(step)
        if background:
            assert self._background is not None
            return self._background.submit(quiet).result
        return functools.cache(lambda: self._in_turn(quiet))

    def _in_turn(self, step: Callable[[], T]) -> T:
        if self._background is not None:
            self._background.wait()
        return step()

    def tell(self, numbers: Tensor) -> Tensor:
        """Every group's float64 numbers. Shapes: any, to (groups, numbers), on the CPU."""
        told = self._gather(numbers.flatten().view(torch.uint8).to(self._device))
        return told.cpu().view(torch.float64)

    def carry(self, parcel: Parcel, weights: Sequence[float], products: Tensor) -> _Carried:
        """Make a parcel and carry it; a mean's inner products are added to `products`."""
        own = self._own(parcel)
        if parcel.way is Way.mean:
            return self._carry_mean(parcel, own, weights, products)
        assert parcel.residuals is None, "only means feed back what rounding keeps"
        told = self._gather(encode(own, parcel.compression).flatten())
        return _Carried(told.view(self.count, -1))

    def _own(self, parcel: Parcel) -> Tensor:
        """What this process sends of its hosted heads' tensors. Shapes: (hosted heads, entries of its part)."""
        share = share_of(self._layout, parcel.entries, alike=parcel.alike, compression=parcel.compression)
        parts = self._layout.data if parcel.alike else 1
        rows = torch.zeros(len(self.hosted), parts * share, device=self._device)
        for row, own in zip(rows, parcel.own(), strict=True):
            row[: own.numel()] = own
        for row, kept in zip(rows, parcel.residuals or (), strict=parcel.residuals is not None):
            row[: parcel.entries] += kept.to(self._device)
        return rows[:, (self._data.index if parts > 1 else 0) * share :][:, :share]

    def _carry_mean(self, parcel: Parcel, own: Tensor, weights: Sequence[float], products: Tensor) -> _Carried:
        """Every head averages one piece, then tells the others."""
        hosted, entries = own.shape
        piece = piece_of(self._layout, entries, parcel.compression)
        pieces = own.new_zeros(hosted, self.count * piece)
        pieces[:, :entries] = own
        pieces = pieces.view(hosted, self.count, piece)
        encoded = encode(pieces, parcel.compression)
        of_heads = decode(self._swap(encoded), piece, parcel.compression).flatten(1)
        if parcel.replicas:
            parts = self._layout.data if parcel.alike else 1
            products += _inner_products(of_heads) * (parts / parcel.replicas)
        mean = _mean(of_heads, weights).view(hosted, piece)
        rounded = encode(mean.float(), parcel.compression)
        told = self._gather(rounded.flatten()).view(self.count, -1)
        if parcel.residuals is None:
            return _Carried(told)
        lost = pieces - decode(encoded, piece, parcel.compression)
        missed = mean - decode(rounded, piece, parcel.compression)
        for place, head in enumerate(self.hosted):
            if weights[head]:  # what one that does not count keeps would never arrive
                lost[place, head] += missed[place] / weights[head]
        return _Carried(told, lost.flatten(1)[:, :entries])

    def _gather(self, flat: Tensor) -> Tensor:
        """Every group's bytes, a row each."""
        if not flat.numel():
            return flat.new_empty(self._layout.groups, 0)
        self.sent += (self._layout.groups - 1) * flat.numel()
        return self._carrier.all_gather(flat)

    def _swap(self, pieces: Tensor) -> Tensor:
        """Every head's bytes for the hosted heads. Shapes: (hosted, heads, bytes), to (heads, hosted, bytes)."""
        hosted, groups = len(self.hosted), self._layout.groups
        rows = pieces.view(hosted, groups, -1).transpose(0, 1).flatten(1)
        if rows.numel():
            self.sent += (groups - 1) * rows.shape[1]
            rows = self._carrier.all_to_all(rows)
        return rows.reshape(self.count, hosted, pieces.shape[-1])

    # ---- inside the head, in the main thread

    def put_together(self, parcel: Parcel, carried: _Carried) -> list[Tensor]:
        """A parcel's outcome from all parts of it."""
        for tensor in (carried.told, carried.lost):
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream())  # made on the background's
        if parcel.residuals is not None:
            assert carried.lost is not None
            whole = self._whole(self._parts(carried.lost, parcel), parcel)
            for kept, row in zip(parcel.residuals, whole, strict=True):
                kept.copy_(row)
        told = self._parts(carried.told, parcel)
        share = share_of(self._layout, parcel.entries, alike=parcel.alike, compression=parcel.compression)
        if parcel.way is Way.gather:
            return list(self._whole(decode(told, share, parcel.compression), parcel).unbind())
        piece = piece_of(self._layout, share, parcel.compression)
        means = decode(told, piece, parcel.compression).flatten(1)[:, :share]
        return list(self._whole(means[:, None], parcel).unbind())

    def _parts(self, mine: Tensor, parcel: Parcel) -> Tensor:
        """What all parts' processes have. Shapes: (rows, columns), to (parts, rows, columns)."""
        if not parcel.alike or self._data.group is None or not mine.numel():
            return mine[None]
        parts = mine.new_empty(self._data.size, *mine.shape)
        dist.all_gather(list(parts.unbind()), mine.contiguous(), group=self._data.group)
        return parts

    @staticmethod
    def _whole(parts: Tensor, parcel: Parcel) -> Tensor:
        """Rows from their parts. Shapes: (parts, rows, share), to (rows, entries)."""
        return parts.transpose(0, 1).flatten(1)[:, : parcel.entries]


class ParcelDelivery:
    """What an exchange brings. Implements `relora.heads.Delivery`.

    In the foreground a parcel is made and carried when its result is asked for, so that one is in memory at a time.
    """

    def __init__(
        self, heads: HeadExchange, parcels: Sequence[Parcel], words: Sequence[Sequence[float]], *, background: bool
    ) -> None:
        self._heads = heads
        self._shares = torch.zeros(heads.count, heads.count, dtype=torch.float64)
        own = torch.tensor(words, dtype=torch.float64)
        self._opened = heads.later(lambda: _opened(heads.tell(own), heads.count), background=background)
        if not background:
            self._opened()
        self._parcels = deque(
            (parcel, heads.later(functools.partial(self._carry, parcel), background=background)) for parcel in parcels
        )
        self._closed = heads.later(lambda: heads.tell(self._shares), background=background)

    @property
    def members(self) -> list[int]:
        """All heads."""
        self._opened()
        return list(range(self._heads.count))

    @property
    def weights(self) -> list[float]:
        """Of each head in the means; they sum to 1."""
        return self._opened()[0]

    @property
    def words(self) -> list[list[float]]:
        """What each head said."""
        return self._opened()[1]

    def result(self) -> list[Tensor]:
        """The next parcel's outcome. Waits."""
        parcel, carried = self._parcels.popleft()
        with torch.no_grad():
            return self._heads.put_together(parcel, carried())

    def products(self) -> Tensor:
        """Inner products of what travelled as means: this process's share over all groups.

        Shapes: (heads, heads), float64, on the CPU.
        """
        assert not self._parcels, "all results come before the products"
        return self._closed().sum(0).view_as(self._shares)

    def _carry(self, parcel: Parcel) -> _Carried:
        return self._heads.carry(parcel, self.weights, self._shares)


def _opened(told: Tensor, heads: int) -> tuple[list[float], list[list[float]]]:
    """Weights and words of all heads."""
    words: list[list[float]] = told.view(heads, -1).tolist()
    first = [word[0] for word in words]
    total = sum(first)
    assert min(first) >= 0, f"weights must not be negative: {first}"
    assert total > 0, f"some weight must be above 0: {first}"
    return ([1 / heads] * heads if len(set(first)) == 1 else [one / total for one in first]), words


def _mean(of_heads: Tensor, weights: Sequence[float]) -> Tensor:
    """Weighted mean of rows, in float64 and in order, whatever a library's sum over rows does."""
    total = torch.zeros(of_heads.shape[1], dtype=torch.float64, device=of_heads.device)
    plain = len(set(weights)) == 1
    for row, weight in zip(of_heads, weights, strict=True):
        total += row.double() if plain else row.double() * weight
    return total / len(weights) if plain else total


def _inner_products(of_heads: Tensor) -> Tensor:
    products = torch.zeros(len(of_heads), len(of_heads), dtype=torch.float64, device=of_heads.device)
    for chunk in of_heads.split(_CHUNK, dim=1):
        exact = chunk.double()
        products += exact @ exact.t()
    return products.cpu()
