"""LTE: low-rank heads that train apart, and the sync that folds their mean update into the shared base weight.

Between syncs a head computes with W + s (up down - up' down'), primes being its factors at the last sync. A sync adds
the mean over heads of that change to W, so that right after it all heads compute the same function: with W alone.
Products are averaged, never factors. It knows no processes: `Heads` reaches the other heads, a ParameterStore
what this one holds.
Source: LTE, Huh et al. 2024 (arXiv 2402.16828); docs/lte.md says what differs from its code and why.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor, nn

from relora.convert import low_rank_modules
from relora.errors import ConfigError
from relora.initialize import draw_down, key_of
from relora.linear import BasePart, LowRankLinear
from relora.optimizer import clear_moments
from relora.precision import MergePrecision
from relora.restart import ParameterStore
from relora.spectrum import MergeRanks


class SyncReset(str, Enum):
    """What a sync does to the factors."""

    none = "none"
    """They stay; from then on only what they change further counts."""
    factors = "factors"
    """Each head draws a new `down`, and `up` is zero again."""


class FactorAdam(str, Enum):
    """What becomes of Adam's state of factors that are drawn anew."""

    keep = "keep"
    clear = "clear"


class Exchange(str, Enum):
    """What of a layer's change travels between heads; all ways have the same result."""

    auto = "auto"
    """For each layer, whichever is fewer bytes."""
    factors = "factors"
    """The factors of the change, from every head to every other."""
    dense = "dense"
    """The change itself, summed."""


@dataclass(kw_only=True, slots=True)
class LteConfig:
    """How many heads train apart, and how they sync."""

    heads: int = 2
    """Groups of processes, each with factors, data and Adam state of its own."""
    sync_every: int = 10
    """Steps between syncs; the last step of the run ends with one, too."""
    reset: SyncReset = SyncReset.none
    """none (factors stay: the sum's rank is at most heads x lora.rank) or factors (drawn anew at each sync)."""
    adam: FactorAdam = FactorAdam.keep
    """keep or clear the Adam state of factors that lte.reset=factors draws anew."""
    exchange: Exchange = Exchange.auto
    """What travels between heads: auto (the fewer bytes, layer by layer), factors or dense."""
    merge_precision: MergePrecision = MergePrecision.split
    """How a bfloat16 base weight takes up a sync: split, stochastic or nearest; no matter in float32."""

    def __post_init__(self) -> None:
        """Check the values."""
        for key in ("heads", "sync_every"):
            if getattr(self, key) < 1:
                raise ConfigError(f"lte.{key} must be at least 1, got {getattr(self, key)}")
        if self.adam == FactorAdam.clear and self.reset == SyncReset.none:
            raise ConfigError(
                "lte.adam=clear has no effect with lte.reset=none, which keeps the factors: leave it out, or choose "
                "lte.reset=factors"
            )


class Heads(Protocol):
    """Access to the other heads; all call the same methods in the same order.

    What they return is equal on all heads, bit for bit. A tensor is `alike` when all processes of a head that train on
    different sequences bring the same: then each may send a part of it.
    """

    count: int
    """How many there are."""
    index: int
    """Which one this is."""
    sent: int
    """Bytes that this process has sent to the others."""

    def gather(self, own: Tensor, *, alike: bool) -> list[Tensor]:
        """Return every head's flat tensor, in order of heads."""

    def mean(self, own: Tensor, *, alike: bool) -> tuple[Tensor, Tensor]:
        """Return the mean of flat tensors over heads, and this process's share of the heads' inner products.

        Over the processes of all heads the shares sum to each part's products times the processes that hold it.
        Shapes: as `own`; (count, count) in float64.
        """

    def by_factors(self, factors: int, part: int, *, alike: bool) -> bool:
        """Tell whether a layer's factors travel (so many entries a head), or its dense change (so many here)."""


@dataclass(kw_only=True, slots=True)
class SyncReport:
    """What one sync did; equal on all heads but for the time."""

    sync: int
    """Its index; the first is 1."""
    layers: int
    """Low-rank layers merged."""
    by_factors: int
    """How many of them sent factors rather than dense changes."""
    update_ratio: float
    """Norm of the merged mean change over the norm of all base weights."""
    changed_share: float
    """Share of the base weights' entries that changed; far below 1, the merge rounded away."""
    delta_norms: list[float]
    """Norm of each head's own change."""
    shrinkage: float
    """Norm of the mean change over the mean of those norms: 1 when heads agree, 1 / sqrt(heads) when orthogonal."""
    cosine_mean: float | None
    """Cosine between two heads' changes, on average over pairs; None with one head, or without any change."""
    cosine_min: float | None
    cosine_max: float | None
    bytes: int
    """Sent by all processes of one head."""
    seconds: float
    """Wall time."""


def sync_due(config: LteConfig, step: int, total_steps: int) -> bool:
    """Tell whether a sync follows the first `step` updates."""
    return step > 0 and (step % config.sync_every == 0 or step == total_steps)


def keep_synced_(model: nn.Module, config: LteConfig) -> None:
    """Make room for the factors of the last sync where the sync keeps factors."""
    if config.reset == SyncReset.none:
        for layer in low_rank_modules(model).values():
            layer.keep_synced_()


def bounded_layers(model: nn.Module, config: LteConfig) -> list[str]:
    """Return the layers whose update can never reach full rank, however long the run; needs the whole layers."""
    if config.reset != SyncReset.none:
        return []
    layers = low_rank_modules(model).items()
    return [
        name for name, layer in layers if config.heads * layer.adapter_rank < min(layer.in_features, layer.out_features)
    ]


@torch.no_grad()
def sync(
    model: nn.Module,
    config: LteConfig,
    store: ParameterStore,
    heads: Heads,
    *,
    seed: int,
    sync_index: int,
    words: Sequence[float] = (),
    ranks: MergeRanks | None = None,
) -> tuple[SyncReport, list[list[float]]]:
    """Merge the heads' mean change, average what trains densely; then keep the factors, or draw new ones.

    Args:
        words: a few numbers that this head tells the others.
        ranks: takes note of merged changes whose factors travel.

    Returns the report, and every head's words.
    """
    assert sync_index >= 1, "draw 0 is the conversion's"
    began, sent = time.perf_counter(), heads.sent
    layers = low_rank_modules(model)
    tally = _Tally(heads.count)
    for name, layer in layers.items():
        down, up = store.factors(layer)
        part = store.base(layer)
        tally.weigh(part)
        key = key_of(seed, "sync", name, sync_index)
        merged = _merge_mean(layer, layer.change(down, up), part, config.merge_precision, key, heads, tally)
        if ranks is not None and merged is not None:
            ranks.note(name, *merged)
        if config.reset == SyncReset.factors:
            _redraw(name, layer, config, store, seed=seed, head=heads.index, sync_index=sync_index)
        elif layer.synced_down is not None and layer.synced_up is not None:
            layer.synced_down.copy_(down)
            layer.synced_up.copy_(up)
    _average_dense(model, store, heads)
    products, said = _closing(store, heads, tally, words)
    base_squared, changes, entries, total_sent = store.total(
        torch.cat([tally.sums, torch.tensor([heads.sent - sent], dtype=torch.float64)])
    ).tolist()
    mean_norm = float(products.sum().clamp_min(0.0)) ** 0.5 / heads.count
    norms = products.diagonal().clamp_min(0.0).sqrt()
    cosines = _cosines(products, norms)
    report = SyncReport(
        sync=sync_index,
        layers=len(layers),
        by_factors=tally.by_factors,
        update_ratio=mean_norm / base_squared**0.5 if base_squared else 0.0,
        changed_share=changes / max(1, entries),
        delta_norms=norms.tolist(),
        shrinkage=mean_norm / float(norms.mean()) if norms.any() else 1.0,
        cosine_mean=sum(cosines) / len(cosines) if cosines else None,
        cosine_min=min(cosines, default=None),
        cosine_max=max(cosines, default=None),
        bytes=round(total_sent),
        seconds=time.perf_counter() - began,
    )
    return report, said


class _Tally:
    """Sums over the layers of one process."""

    def __init__(self, heads: int) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)  # base squared, entries changed, entries
        self.known = torch.zeros(heads, heads, dtype=torch.float64)
        """Inner products of heads' changes, of which every head knows the whole."""
        self.shared = torch.zeros(heads, heads, dtype=torch.float64)
        """Those of which each head knows a share."""
        self.by_factors = 0

    def weigh(self, part: BasePart) -> None:
        squared = float(torch.linalg.vector_norm(part.weight, dtype=torch.float64)) ** 2
        self.sums += torch.tensor([squared, 0.0, part.weight.numel()], dtype=torch.float64) / part.replicas


def _merge_mean(
    layer: LowRankLinear,
    change: tuple[Tensor, Tensor],
    part: BasePart,
    precision: MergePrecision,
    key: int,
    heads: Heads,
    tally: _Tally,
) -> tuple[Tensor, Tensor] | None:
    """Add the mean of the heads' changes to this process's part of a base weight; return its factors if they came."""
    down, up = change
    merged: tuple[Tensor, Tensor] | None
    alike = part.replicas == part.layer_replicas
    if heads.by_factors(down.numel() + up.numel(), part.weight.numel(), alike=alike):
        tally.by_factors += 1
        pairs = [
            one.split([down.numel(), up.numel()])
            for one in heads.gather(torch.cat([down.flatten(), up.flatten()]), alike=True)
        ]
        downs = torch.cat([first.view_as(down) for first, _ in pairs])
        ups = torch.cat([second.view_as(up) for _, second in pairs], dim=1)
        tally.known += _inner_products(downs, ups, heads.count) * (layer.scaling**2 / part.layer_replicas)
        changed = layer.add_product_(precision, downs, ups.double() / heads.count, key, part)
        merged = downs, ups
    else:
        mean, products = heads.mean(layer.product_part(down, up, part), alike=alike)
        tally.shared += products / part.replicas
        changed = layer.add_part_(precision, mean, key, part)
        merged = None
    tally.sums[1] += changed / part.replicas
    return merged


def _inner_products(downs: Tensor, ups: Tensor, heads: int) -> Tensor:
    """Return tr(D_i' D_j) of the products D_i = up_i down_i, from the factors' Gram matrices."""
    downs, ups = downs.double(), ups.double()
    entries = (ups.t() @ ups) * (downs @ downs.t())
    size = len(entries) // heads
    return entries.view(heads, size, heads, size).sum((1, 3)).cpu()


def _redraw(
    name: str,
    layer: LowRankLinear,
    config: LteConfig,
    store: ParameterStore,
    *,
    seed: int,
    head: int,
    sync_index: int,
) -> None:
    """Start a head's factors anew, as the conversion did."""
    rank, inputs = store.shape(layer.down)
    store.write(layer.down, draw_down(name, (rank, inputs), seed=seed, head=head, restart_index=sync_index))
    store.write(layer.up, torch.zeros(()).expand(store.shape(layer.up)))
    if config.adam == FactorAdam.clear:
        for parameter in (layer.down, layer.up):
            moments = store.moments(parameter)
            if moments is not None:
                clear_moments(moments)


def _average_dense(model: nn.Module, store: ParameterStore, heads: Heads) -> None:
    """Set every parameter that trains at full rank to its mean over heads; Adam's state stays each head's own."""
    factors = {id(factor) for layer in low_rank_modules(model).values() for factor in (layer.down, layer.up)}
    dense = [one for one in model.parameters() if one.requires_grad and id(one) not in factors]
    masters = [store.master(parameter) for parameter in dense]
    if not masters:
        return
    mean, _ = heads.mean(torch.cat([master.float() for master in masters]), alike=store.masters_alike)
    for master, value in zip(masters, mean.split([len(master) for master in masters]), strict=True):
        master.copy_(value)
    store.publish(dense)


def _closing(
    store: ParameterStore, heads: Heads, tally: _Tally, words: Sequence[float]
) -> tuple[Tensor, list[list[float]]]:
    """Return the inner products of the heads' whole changes, and every head's words."""
    known, shared = store.total(torch.stack([tally.known, tally.shared]))
    own = torch.cat([torch.tensor([*words], dtype=torch.float64), shared.flatten()])
    told = [one.cpu() for one in heads.gather(own, alike=False)]
    products = known + torch.stack([one[len(words) :] for one in told]).sum(0).view_as(known)
    return products, [one[: len(words)].tolist() for one in told]


def _cosines(products: Tensor, norms: Tensor) -> list[float]:
    """Return the cosine of each pair of heads' changes."""
    first, second = torch.triu_indices(len(norms), len(norms), offset=1)
    scale = norms[first] * norms[second]
    cosines: list[float] = (products[first, second] / scale).tolist() if scale.all() else []
    return cosines
