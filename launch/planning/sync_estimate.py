"""What the syncs of LTE's heads cost: memory and FLOPs of a process, and what a head sends. Pure functions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from parallel.footprint import Footprint, Held
from parallel.link_model import Trip, gather_hops, mean_hops
from parallel.sync_footprint import SyncedHeld, in_sync, keep_syncs, synced_held
from parallel.sync_traffic import Load, SyncLayout, closing_bytes, load_bytes, opening_bytes
from relora.heads import Way
from relora.lte import LteConfig

WORDS = 4
"""Numbers that each head tells the others with a sync (launch/training/heads.py)."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Place:
    """How the processes of a head share its model."""

    zero_stage: int
    bf16: bool
    data: int
    tensor: int

    def syncs(self, config: LteConfig) -> SyncLayout:
        """The same as syncs see it."""
        return SyncLayout(heads=config.heads, groups=config.heads, data=self.data)

    def holds(self, held: Sequence[Held], config: LteConfig, index: int = 0) -> SyncedHeld:
        """What of it the process at `index` of the data axis has."""
        return synced_held(held, config, zero_stage=self.zero_stage, bf16=self.bf16, data=self.data, index=index)


@dataclass(kw_only=True, slots=True, frozen=True)
class SyncCost:
    """The syncs of `lte.sync_every` steps, each layer once."""

    in_sync: int
    """Bytes on the device besides what stays, while a process syncs."""
    flops: int
    """In float64, of one process."""
    layers: int
    by_factors: int
    """Layers whose factors travel."""
    fragments: list[Trip]
    """What a head sends with each fragment, of which training goes on during the delay."""
    dense: Trip | None
    """What it sends of dense parameters, where they travel apart."""
    gradients: Trip | None
    """What it sends in every step, where gradients of dense parameters are averaged."""
    sent: dict[str, int]
    """The bytes of all of that by what they are, gradients aside."""

    @property
    def bytes(self) -> int:
        """What all processes of a head send."""
        return sum(self.sent.values())


def sync_cost(held: Sequence[Held], config: LteConfig, place: Place, *, merge: int) -> SyncCost:
    """The cost of syncs.

    Args:
        held: what one process holds, tensor parallelism done.
        merge: bytes that a merge takes.
    """
    parts = [place.holds(held, config, index) for index in range(place.data)]
    here, layout = parts[0], place.syncs(config)
    loads, dense = here.loads(layout, config), here.dense_loads(config)
    bytes_of = [sum(each) for each in zip(*(_bytes(part.loads(layout, config), layout) for part in parts), strict=True)]
    of_dense = sum(sum(_bytes(part.dense_loads(config), layout)) for part in parts) * place.tensor
    processes, ring = place.data * place.tensor, gather_hops(config.heads)
    opening, closing = opening_bytes(layout, WORDS) * processes, closing_bytes(layout) * processes
    apart = config.delay > 0 and bool(dense)
    fragments = []
    for first in range(config.fragments):
        along = dense if first == config.fragments - 1 and not apart else []
        fragments.append(
            Trip(
                bytes=sum(bytes_of[first :: config.fragments]) * place.tensor
                + (of_dense if along else 0)
                + opening
                + closing,
                hops=_hops([*loads[first :: config.fragments], *along], config.heads) + 2 * ring,
            )
        )
    words = (opening + closing) * config.fragments + (opening if apart else 0)
    pairs = list(zip(loads, bytes_of, strict=True))
    return SyncCost(
        in_sync=in_sync(here, config, layout, merge=merge),
        flops=sum(_flops(config, here, number, load) for number, load in enumerate(loads)),
        layers=len(loads),
        by_factors=sum(load.way is Way.gather for load in loads),
        fragments=fragments,
        dense=Trip(bytes=of_dense + opening, hops=_hops(dense, config.heads) + ring) if apart else None,
        gradients=_gradients(parts, layout, place),
        sent={
            "factors": sum(size for load, size in pairs if load.way is Way.gather) * place.tensor,
            "changes": sum(size for load, size in pairs if load.way is Way.mean) * place.tensor,
            "dense parameters": of_dense,
            "words": words,
        },
    )


def keep_between_syncs(result: Footprint, held: Sequence[Held], config: LteConfig, place: Place) -> None:
    """Add to a process's memory what stays from sync to sync."""
    own_gradients = place.zero_stage < 2 and not place.bf16
    keep_syncs(result, place.holds(held, config), config, place.syncs(config), own_gradients=own_gradients)


def _gradients(parts: Sequence[SyncedHeld], layout: SyncLayout, place: Place) -> Trip | None:
    """Heads first agree on the update, by two words, then average, each time weighted by one."""
    loads = parts[0].gradient_loads()
    if not loads:
        return None
    sent = sum(sum(_bytes(part.gradient_loads(), layout)) for part in parts) * place.tensor
    words = opening_bytes(layout, 2) + len(loads) * opening_bytes(layout, 1)
    hops = _hops(loads, layout.heads) + (1 + len(loads)) * gather_hops(layout.heads)
    return Trip(bytes=sent + words * place.data * place.tensor, hops=hops)


def _bytes(loads: Iterable[Load], layout: SyncLayout) -> list[int]:
    return [load_bytes(layout, load) for load in loads]


def _hops(loads: Iterable[Load], heads: int) -> int:
    return sum(gather_hops(heads) if load.way is Way.gather else mean_hops(heads) for load in loads)


def _flops(config: LteConfig, here: SyncedHeld, number: int, load: Load) -> int:
    """Of the product that a process forms of a layer: its own head's, or that of all heads' factors."""
    rank = here.ranks[number] * (2 if config.keeps_synced else 1)
    return 2 * here.layers[number].part * rank * (config.heads if load.way is Way.gather else 1)
