"""How many bytes one process sends to its counterparts in an exchange of LTE's heads. Pure arithmetic; exact.

Of S bytes each of N heads sends (N - 1) S when all are gathered by all, and 2 (N - 1) ceil(S / N) for a mean: a piece
to each, and then its own piece of the mean to each. Where a group of processes hosts several heads, each head's bytes
travel to the other groups only. What the processes of a head's data axis hold alike each of them sends a part of. What
travels inside a group is not counted. docs/lte.md has the crossover of the two ways.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from relora.compression import block_of, encoded_bytes
from relora.heads import Compression, Way
from relora.lte import Exchange

_FP64 = 8


@dataclass(kw_only=True, slots=True, frozen=True)
class SyncLayout:
    """How heads lie on processes."""

    heads: int
    groups: int
    """Groups of processes that hold a model; each hosts heads / groups."""
    data: int = 1
    """Processes of a group's data axis."""

    @property
    def hosted(self) -> int:
        """Heads of a group."""
        return self.heads // self.groups

    @property
    def apart(self) -> "SyncLayout":
        """The same heads, each in a group of its own."""
        return replace(self, groups=self.heads)


@dataclass(kw_only=True, slots=True, frozen=True)
class SyncedLayer:
    """What one process holds of a low-rank layer, in entries of one head."""

    factors: int
    """Down and up of the largest head, as far as tensor parallelism leaves them; ZeRO does not count, since factors are
    gathered first."""
    up: int
    """Up alone, likewise."""
    part: int
    """The base weight: what tensor parallelism and, at stage 3, ZeRO leave of it."""
    alike: bool
    """Whether all of the data axis hold that part: below stage 3."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Load:
    """A parcel (relora.heads.Parcel) without its contents."""

    way: Way
    entries: int
    alike: bool
    compression: Compression = Compression.none


def _evenly(entries: int, parts: int, compression: Compression) -> int:
    """Entries of each of some equal parts, padded, whose ends are ends of blocks."""
    if parts == 1:
        return entries
    block = block_of(compression)
    return -(-entries // (parts * block)) * block


def share_of(layout: SyncLayout, entries: int, *, alike: bool, compression: Compression) -> int:
    """Entries of each head that one process of its data axis sends."""
    return _evenly(entries, layout.data if alike else 1, compression)


def piece_of(layout: SyncLayout, share: int, compression: Compression) -> int:
    """Entries of a share that each head averages."""
    return _evenly(share, layout.heads, compression)


def load_bytes(layout: SyncLayout, load: Load) -> int:
    """Sent for one parcel."""
    share = share_of(layout, load.entries, alike=load.alike, compression=load.compression)
    others, hosted = layout.groups - 1, layout.hosted
    if load.way is Way.gather:
        return others * hosted * encoded_bytes(share, load.compression)
    piece = encoded_bytes(piece_of(layout, share, load.compression), load.compression)
    return others * (hosted * hosted + hosted) * piece  # of each head a piece for each there; then the own means


def opening_bytes(layout: SyncLayout, words: int) -> int:
    """Sent so that all know so many words of each head; every exchange begins with it."""
    return (layout.groups - 1) * layout.hosted * words * _FP64


def closing_bytes(layout: SyncLayout) -> int:
    """Sent so that all know the inner products of the heads' means."""
    return (layout.groups - 1) * layout.heads**2 * _FP64


def exchange_bytes(layout: SyncLayout, loads: Iterable[Load], *, words: int) -> int:
    """Sent in one exchange, from the opening to the closing."""
    return opening_bytes(layout, words) + sum(load_bytes(layout, load) for load in loads) + closing_bytes(layout)


def factors_are_fewer(
    layout: SyncLayout, factors: int, part: int, *, alike: bool, compression: Compression = Compression.none
) -> bool:
    """Whether a layer's exchange by factors sends fewer bytes than the dense one, or as many.

    Args:
        factors: entries of a head's factors, which its data axis holds alike.
        part: entries of the base weight here.
    """
    gather = Load(way=Way.gather, entries=factors, alike=True, compression=compression)
    mean = Load(way=Way.mean, entries=part, alike=alike, compression=compression)
    return load_bytes(layout, gather) <= load_bytes(layout, mean)


def layer_load(layout: SyncLayout, layer: SyncedLayer, exchange: Exchange, compression: Compression) -> Load:
    """How a layer travels."""
    if exchange == Exchange.shared:
        return Load(way=Way.mean, entries=layer.up, alike=True, compression=compression)
    by_factors = exchange == Exchange.factors or (
        exchange == Exchange.auto
        and factors_are_fewer(layout.apart, layer.factors, layer.part, alike=layer.alike, compression=compression)
    )
    if by_factors:
        return Load(way=Way.gather, entries=layer.factors, alike=True, compression=compression)
    return Load(way=Way.mean, entries=layer.part, alike=layer.alike, compression=compression)


def dense_load(entries: int, *, alike: bool, compression: Compression) -> list[Load]:
    """How dense parameters travel, all in one parcel.

    Args:
        entries: of the masters that this process has of one head's; 0: none is averaged.
        alike: whether all of the data axis have the same ones: without ZeRO.
    """
    return [Load(way=Way.mean, entries=entries, alike=alike, compression=compression)] if entries else []


def gradient_bytes(layout: SyncLayout, entries: int, *, alike: bool) -> int:
    """Sent in each step with lte.dense=all_reduced: whether all heads may update, then the mean gradients.

    Args:
        entries: of the gradients that this process has of one head's.
        alike: whether all of the data axis have the same ones.
    """
    mean = load_bytes(layout, Load(way=Way.mean, entries=entries, alike=alike))
    return opening_bytes(layout, 2) + (opening_bytes(layout, 1) + mean if entries else 0)


def period_bytes(
    layout: SyncLayout,
    loads: Sequence[Load],
    dense: Sequence[Load],
    *,
    fragments: int = 1,
    delayed: bool = False,
    words: int,
) -> int:
    """Sent in lte.sync_every steps: every layer once, in fragments, and dense parameters with the last of them.

    Args:
        loads: of all low-rank layers, in order.
        delayed: dense parameters have an exchange of their own, without a closing, when a delayed sync ends.
    """
    layers = sum(exchange_bytes(layout, loads[first::fragments], words=words) for first in range(fragments))
    own_opening = opening_bytes(layout, words) if delayed and dense else 0
    return layers + own_opening + sum(load_bytes(layout, load) for load in dense)
