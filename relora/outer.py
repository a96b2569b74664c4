"""The outer optimizer of LTE: what is made of the heads' mean change before it is merged.

The mean change takes the place of minus a gradient, and one sync that of a step.
Source: torch.optim.SGD's momentum; DiLoCo, Douillard et al. 2023 (arXiv 2311.08105), algorithm 1.
"""

import torch
from torch import Tensor

from relora.lte import LteConfig, OuterOptimizer


class Outer:
    """The optimizer, and its momentum by the name of what is updated."""

    def __init__(self, config: LteConfig) -> None:
        self._kind, self._lr, self._momentum = config.outer, config.outer_lr, config.outer_momentum
        self.momenta: dict[str, Tensor] = {}
        """Flat, in fp32, as the changes."""

    @property
    def is_off(self) -> bool:
        """Whether changes are merged as they are."""
        return self._kind == OuterOptimizer.none

    def make_room(self, name: str, like: Tensor) -> None:
        """Make the momentum that changes of this name will need, zero."""
        if self._momentum:
            self.momenta[name] = torch.zeros(like.numel(), device=like.device)

    def step(self, name: str, change: Tensor) -> Tensor:
        """Return what to add for a mean change."""
        if self.is_off:
            return change
        assert self._lr is not None
        if not self._momentum:
            return change * self._lr
        if name not in self.momenta:
            self.make_room(name, change)
        momentum = self.momenta[name].mul_(self._momentum).add_(change)
        ahead = change.add(momentum, alpha=self._momentum) if self._kind == OuterOptimizer.nesterov else momentum
        return ahead * self._lr
