"""Mixing sources: which source serves a position of the run, and with which of its samples.

Every block of 1024 positions holds the same whole number of samples of each source, in an order keyed by the
block. So shares are exact in every block, and a position is found without walking there.
"""

from dataclasses import dataclass

import numpy as np

from continual.order import Indices, groups, key_of, permute
from relora.errors import ConfigError

BLOCK = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Quotas per block; a pure map from positions to sources."""

    quotas: list[int]
    """Positions of each source in a block; they sum to BLOCK."""
    seed: int

    def locate(self, position: Indices) -> tuple[Indices, Indices]:
        """The source that serves each position, and how many of that source's samples came before it."""
        source, served = np.empty_like(position), np.empty_like(position)
        for number, chosen in groups(position // BLOCK):
            of_block, before = self._block(number)
            offset = position[chosen] % BLOCK
            source[chosen], served[chosen] = of_block[offset], before[offset]
        return source, served

    def _block(self, number: int) -> tuple[Indices, Indices]:
        slot = permute(np.arange(BLOCK), BLOCK, key_of("block", self.seed, number))
        source = np.searchsorted(np.cumsum(self.quotas), slot, side="right")
        served = np.empty_like(source)
        for one, chosen in groups(source):
            served[chosen] = number * self.quotas[one] + np.arange(self.quotas[one])
        return source, served


def quotas_of(weights: list[float], labels: list[str]) -> list[int]:
    """Whole positions per block closest to the weights, by largest remainders.

    Raises: ConfigError when a weight is too small for one position in a block.
    """
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK
    quotas = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(quotas - exact, kind="stable")
    quotas[by_remainder[: BLOCK - int(quotas.sum())]] += 1
    for label, quota, share in zip(labels, quotas, exact / BLOCK, strict=True):
        if quota < 1:
            raise ConfigError(
                f"data.path: the weight of {label} must give it at least 1 of {BLOCK} sequences, got a share "
                f"of {share:.2g}; give every source a weight, and this one a larger one, or leave it out"
            )
    return [int(quota) for quota in quotas]
