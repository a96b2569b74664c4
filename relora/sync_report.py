"""What a sync of LTE did: norms, angles and ranks of the heads' changes, from sums that each process makes of its part.

Norms and cosines come from Gram matrices of the factors, or of pieces of the dense changes, and cost next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from relora.heads import Delivery
from relora.linear import BasePart, squared
from relora.restart import ParameterStore
from relora.spectrum import effective_rank, product_singular_values


@dataclass(kw_only=True, slots=True)
class SyncReport:
    """What one sync did; equal on all heads but for the time."""

    sync: int
    """Its index; the first is 1."""
    fragment: int | None
    """Which group of layers; None: all."""
    layers: int
    """Low-rank layers merged."""
    by_factors: int
    """How many of them sent factors."""
    members: list[int]
    """Heads that took part."""
    weights: list[float]
    """How much each counted."""
    update_ratio: float
    """Norm of the mean change over the norm of these layers' base weights."""
    changed_share: float
    """Share of the base weights' entries that changed; far below 1, the merge rounded away."""
    delta_norms: list[float]
    """Norm of each member's own change; with lte.exchange=shared, of its scaled `up`."""
    shrinkage: float
    """Norm of the mean change over the mean of those norms: 1 when heads agree, 1 / sqrt(heads) when orthogonal."""
    cosine_mean: float | None
    """Cosine between two heads' changes, on average over pairs; None with one head, or without any change."""
    cosine_min: float | None
    cosine_max: float | None
    effective_rank: float | None
    """Of the mean change, on average over the layers that are measured and whose factors travelled; None without."""
    bytes: int
    """Sent by all processes of one head since the last report."""
    seconds: float
    """Wall time that training stood still."""


class Tally:
    """Sums over the layers of one process, each divided by the processes that have the same."""

    def __init__(self, members: int) -> None:
        self.base_squared = self.entries = self.changed = self.mean_squared = 0.0
        self.known = torch.zeros(members, members, dtype=torch.float64)
        """Inner products of heads' changes, of which every head knows the whole."""
        self.by_factors = 0
        self.ranks: list[float] = []
        """Effective ranks of mean changes."""

    def weigh(self, part: BasePart) -> None:
        """Count a layer's base weight."""
        self.base_squared += squared(part.weight) / part.replicas
        self.entries += part.weight.numel() / part.replicas

    def merged(self, downs: Tensor, ups: Tensor, part: BasePart, *, measure: bool) -> None:
        """Count a mean change that is there as factors; of some, tell the effective rank."""
        if measure:
            self.ranks.append(effective_rank(product_singular_values(downs, ups)))
        self.mean_squared += float(((ups.t() @ ups) * _gram(downs)).sum().clamp_min(0.0)) / part.layer_replicas

    def report(
        self,
        store: ParameterStore,
        delivery: Delivery,
        products: Tensor,
        *,
        index: int,
        fragment: int | None,
        layers: int,
        sent: int,
    ) -> SyncReport:
        """Sum up over the processes of the head; the time is left to the caller.

        Args:
            products: this process's share of inner products of what travelled as means.
            sent: bytes of this process.
        """
        products = store.total(self.known + products)
        sums = [self.base_squared, self.entries, self.changed, self.mean_squared, sent]
        base, entries, changed, mean, total_sent = store.total(torch.tensor(sums, dtype=torch.float64)).tolist()
        weights = torch.tensor(delivery.weights, dtype=torch.float64)
        norms = products.diagonal().clamp_min(0.0).sqrt()
        spread = float((weights * norms).sum())
        cosines = _cosines(products, norms)
        return SyncReport(
            sync=index,
            fragment=fragment,
            layers=layers,
            by_factors=self.by_factors,
            members=list(delivery.members),
            weights=list(delivery.weights),
            update_ratio=(mean / base) ** 0.5 if base else 0.0,
            changed_share=changed / max(1, entries),
            delta_norms=norms.tolist(),
            shrinkage=float((weights @ products @ weights).clamp_min(0.0)) ** 0.5 / spread if spread else 1.0,
            cosine_mean=sum(cosines) / len(cosines) if cosines else None,
            cosine_min=min(cosines, default=None),
            cosine_max=max(cosines, default=None),
            effective_rank=fmean(self.ranks) if self.ranks else None,
            bytes=round(total_sent),
            seconds=0.0,
        )


def _gram(downs: Tensor) -> Tensor:
    downs = downs.double()
    return downs @ downs.t()


def inner_products(downs: Tensor, ups: Tensor, owner: Tensor, count: int) -> Tensor:
    """Return tr(D_i' D_j) of the products D_i = up_i down_i, whose factors lie side by side and belong to `owner`."""
    entries = (ups.t() @ ups) * _gram(downs)
    rows = entries.new_zeros(count, len(owner)).index_add_(0, owner, entries)
    return entries.new_zeros(count, count).index_add_(1, owner, rows).cpu()


def _cosines(products: Tensor, norms: Tensor) -> list[float]:
    """Return the cosine of each pair of heads' changes."""
    first, second = torch.triu_indices(len(norms), len(norms), offset=1)
    scale = norms[first] * norms[second]
    cosines: list[float] = (products[first, second] / scale).tolist() if scale.all() else []
    return cosines
