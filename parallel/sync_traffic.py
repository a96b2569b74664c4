"""How many bytes one process sends to its counterparts in a sync of LTE. Pure arithmetic; exact.

Of S bytes each of N heads sends (N - 1) S when all are gathered by all, and 2 (N - 1) ceil(S / N) for a mean: a piece
to each, and then its own piece of the mean to each. What the processes of a head's data axis hold alike each of them
sends a part of. What travels inside a head is not counted. docs/lte.md has the crossover of the two ways.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from relora.lte import Exchange, LteConfig, SyncReset

_FP32, _FP64 = 4, 8


@dataclass(kw_only=True, slots=True, frozen=True)
class SyncedLayer:
    """What one process holds of a low-rank layer, in entries."""

    factors: int
    """Down and up, as far as tensor parallelism leaves them; ZeRO does not count, since factors are gathered first."""
    part: int
    """The base weight: what tensor parallelism and, at stage 3, ZeRO leave of it."""
    alike: bool
    """Whether all of the data axis hold that part: below stage 3."""


def gather_bytes(heads: int, entries: int, width: int) -> int:
    """Sent so that all heads know all heads' tensors of so many entries of `width` bytes."""
    return (heads - 1) * entries * width


def mean_bytes(heads: int, entries: int, width: int) -> int:
    """Sent so that all heads know the mean."""
    return 2 * (heads - 1) * -(-entries // heads) * width


def share_of(entries: int, processes: int) -> int:
    """What each of some processes sends of entries that they hold alike; padded to equal lengths."""
    return -(-entries // processes)


def factors_are_fewer(heads: int, *, factors: int, part: int) -> bool:
    """Whether a layer's exchange by factors sends fewer bytes than the dense one, or as many.

    Args:
        factors: entries of a head's factors that this process would send.
        part: entries of the base weight, likewise.
    """
    return gather_bytes(heads, factors, _FP32) <= mean_bytes(heads, part, _FP32)


def layer_bytes(config: LteConfig, layer: SyncedLayer, *, data: int) -> int:
    """Sent for one layer by each of the `data` processes of a head's data axis."""
    # Without a reset the factors of the last sync travel along: nobody keeps those of the other heads.
    factors = share_of(layer.factors * (2 if config.reset == SyncReset.none else 1), data)
    part = share_of(layer.part, data if layer.alike else 1)
    by_factors = config.exchange == Exchange.factors or (
        config.exchange == Exchange.auto and factors_are_fewer(config.heads, factors=factors, part=part)
    )
    if by_factors:
        return gather_bytes(config.heads, factors, _FP32)
    return mean_bytes(config.heads, part, _FP32)


def sync_bytes(config: LteConfig, layers: Sequence[SyncedLayer], *, data: int, dense: int, words: int) -> int:
    """Sent by one process in one sync.

    Args:
        data: processes on a head's data axis.
        dense: entries of dense parameters that it sends: a share of all without ZeRO, else those whose masters it has.
        words: numbers that each head tells the others besides.
    """
    closing = gather_bytes(config.heads, words + config.heads**2, _FP64)
    merged = sum(layer_bytes(config, layer, data=data) for layer in layers)
    return merged + mean_bytes(config.heads, dense, _FP32) + closing
