"""What one process holds of what LTE's heads sync, and how many bytes their syncs take. Pure arithmetic.

relora/sync.py says what is kept from sync to sync and why; it is float32, and so is what travels before it is rounded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.footprint import FP32, Footprint, Held, Kind, Role, flat_size, piece
from parallel.sync_traffic import Load, SyncedLayer, SyncLayout, dense_load, layer_load
from relora.heads import Compression, Way
from relora.lte import DenseSync, Exchange, LteConfig, OuterOptimizer

_FP64 = 8
_MEAN_BYTES = 32  # an entry: own change, in pieces, encoded, as it came in, the same in float64, and the mean
_ROUNDED_BYTES = 8  # besides, with compression: decoded again, and what is kept back
_OUTER_BYTES = 12  # besides, with an outer optimizer: what the change is measured from, and the step


@dataclass(kw_only=True, slots=True, frozen=True)
class SyncedHeld:
    """What one process holds of what syncs."""

    layers: list[SyncedLayer]
    """Low-rank layers, in the model's order."""
    ranks: list[int]
    """Of their factors."""
    dense: int
    """Entries of masters of dense parameters, as far as syncs average them."""
    gradients: list[int]
    """Entries of the gradients that heads average in every step instead, by exchange; padding included."""
    dense_alike: bool
    """Whether all of the data axis hold the same of them."""

    def loads(self, layout: SyncLayout, config: LteConfig) -> list[Load]:
        """How the layers travel."""
        return [layer_load(layout, layer, config.exchange, config.compression) for layer in self.layers]

    def dense_loads(self, config: LteConfig) -> list[Load]:
        """How the dense parameters travel."""
        return dense_load(self.dense, alike=self.dense_alike, compression=config.compression)

    def gradient_loads(self) -> list[Load]:
        """How their gradients travel in every step."""
        return [Load(way=Way.mean, entries=size, alike=self.dense_alike) for size in self.gradients]


def synced_held(
    held: Sequence[Held], config: LteConfig, *, zero_stage: int, bf16: bool, data: int, index: int = 0
) -> SyncedHeld:
    """What the process at `index` of the data axis holds; parts need not be equal."""
    entries = {one.name: one.entries for one in held}
    layers, ranks = [], []
    for one in held:
        if one.role is not Role.base:
            continue
        stem = one.name.removesuffix("weight")
        up = entries[f"{stem}up"]
        part = _part(one.entries, data, index) if zero_stage == 3 else one.entries
        layers.append(SyncedLayer(factors=up + entries[f"{stem}down"], up=up, part=part, alike=zero_stage < 3))
        ranks.append(one.adapter_rank)
    masters, padded = _dense_masters(held, zero_stage=zero_stage, bf16=bf16, data=data, index=index)
    averaged = config.dense == DenseSync.averaged
    return SyncedHeld(
        layers=layers,
        ranks=ranks,
        dense=masters if averaged else 0,
        gradients=[] if averaged else padded,
        dense_alike=zero_stage == 0,
    )


def _dense_masters(
    held: Sequence[Held], *, zero_stage: int, bf16: bool, data: int, index: int
) -> tuple[int, list[int]]:
    """Entries of this process's dense masters, and what DeepSpeed updates at a time, with padding."""
    groups: dict[str, list[int]] = {}
    for one in held:
        if one.role is Role.dense and one.group is not None:
            groups.setdefault(one.group, []).append(one.entries)
    if zero_stage == 0:
        masters = [sum(group) for group in groups.values()]
        padded = [flat_size([size], 1) if bf16 else size for size in masters]
    elif zero_stage == 3:
        masters = [sum(_part(size, data, index) for size in group) for group in groups.values()]
        padded = [sum(piece(size, data) for size in group) for group in groups.values()]
    else:
        padded = [flat_size(group, data) // data for group in groups.values()]
        masters = [
            max(0, min(part, sum(group) - index * part)) for part, group in zip(padded, groups.values(), strict=True)
        ]
    at_once = zero_stage == 0 or (bf16 and zero_stage == 1)  # else group by group
    return sum(masters), [sum(padded)] if at_once and padded else padded


def _part(entries: int, count: int, index: int) -> int:
    size = piece(entries, count)
    return max(0, min(size, entries - index * size))


def keep_syncs(
    result: Footprint, here: SyncedHeld, config: LteConfig, layout: SyncLayout, *, own_gradients: bool
) -> None:
    """Add what stays from sync to sync, and what a delayed one keeps on its way.

    Args:
        own_gradients: whether gradients stay where autograd puts them: in fp32, at stages 0 and 1.
    """
    shared = config.exchange == Exchange.shared
    pairs = list(zip(here.layers, here.loads(layout, config), strict=True))
    if config.keeps_synced:
        result.keep(Kind.synced, sum(layer.up if shared else layer.factors for layer, _ in pairs) * FP32)
        gathered = sum(layer.factors for layer, load in pairs if load.way is Way.gather)
        if own_gradients and not shared:  # those of `down` are halves of those of `down` and its prime together
            result.keep(Kind.gradients, sum(layer.factors - layer.up for layer, _ in pairs) * FP32)
        result.keep(Kind.peers, _of_all_heads(config, gathered) * FP32, on_host=True)
    if config.outer_momentum:
        result.keep(Kind.outer, (sum(layer.part for layer in here.layers) + here.dense) * FP32)
    if config.compression != Compression.none:
        meant = sum(load.entries for _, load in pairs if load.way is Way.mean)
        result.keep(Kind.residuals, (meant + here.dense) * FP32)
    if config.outer != OuterOptimizer.none or config.compression != Compression.none:
        result.keep(Kind.anchors, here.dense * FP32)
    if config.delay:
        fragments = (pairs[first :: config.fragments] for first in range(config.fragments))
        result.keep(Kind.flight, max(sum(_on_its_way(config, *pair) for pair in one) for one in fragments))


def _of_all_heads(config: LteConfig, entries: int) -> int:
    """Entries of all heads' factors, from those of a head of the largest rank."""
    return entries * config.heads if config.ranks is None else entries * sum(config.ranks) // max(config.ranks)


def _on_its_way(config: LteConfig, layer: SyncedLayer, load: Load) -> int:
    """Bytes of a layer's snapshot, its change, and what comes back before it is merged."""
    own = layer.factors * (3 if config.keeps_synced else 1)
    return (own + load.entries * (config.heads if load.way is Way.gather else 1)) * FP32


def in_sync(here: SyncedHeld, config: LteConfig, layout: SyncLayout, *, merge: int) -> int:
    """Most bytes at once that a sync takes besides, for one layer after the other, then the dense parameters.

    Args:
        merge: bytes of a merge itself.
    """
    per_entry = _MEAN_BYTES + (0 if config.compression == Compression.none else _ROUNDED_BYTES)
    per_entry += 0 if config.outer == OuterOptimizer.none else _OUTER_BYTES
    times = 2 if config.keeps_synced else 1
    most = here.dense * per_entry
    for layer, load in zip(here.layers, here.loads(layout, config), strict=True):
        own = layer.factors * (1 + (times if config.keeps_synced else 0)) * FP32
        if load.way is Way.gather:
            # All heads' rows, encoded and decoded; factors of the mean change side by side, and twice in float64.
            most = max(most, own + config.heads * layer.factors * (2 * FP32 + times * (FP32 + 2 * _FP64)) + merge)
        else:
            most = max(most, own + load.entries * per_entry, own + load.entries * 2 * FP32 + merge)
    return most
