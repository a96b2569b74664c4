"""O-LoRA: a task's update reads directions of a layer's input that no earlier task's update has read.

The rows of `down` are drawn away from the span of all earlier ones by a penalty that no rank, width or depth scales:
the mean over rows of the share of a row's square that lies in the span.
Source: Wang et al. 2023, Orthogonal Subspace Learning (arXiv 2310.14152); docs/o_lora.md has the equations and the
differences from its code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from continual.method import Method, MethodState, Stage, Trainee
from relora.errors import ConfigError

_DEPENDENT = 1e-3
"""Rest of a row of norm 1 outside the span below which it is taken to lie inside."""
_BASIS = "basis."


@dataclass(kw_only=True, slots=True)
class OLoraConfig:
    """How strongly tasks are kept apart."""

    strength: float = 1.0
    """Loss, in nats, of a task whose rows all lie in the span of earlier ones."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 < self.strength < math.inf:
            raise ConfigError(
                f"continual.o_lora.strength must be above 0, got {self.strength}: sequential training does without"
            )


class OLora(Method):
    """Factors of a task join the base at its end; the directions that they read are remembered."""

    folds: ClassVar[bool] = True

    def __init__(self, config: OLoraConfig) -> None:
        self.config = config
        self._bases: dict[str, Tensor] = {}
        """By layer, orthonormal columns that earlier tasks read. Shapes: (in, k)"""
        self._overlap = 0.0
        self._told: dict[str, Any] = {}

    def begin_stage(self, on: Trainee, stage: Stage) -> None:
        """Nothing has been measured of the new task."""
        self._overlap, self._told = 0.0, {}

    def after_backward(self, on: Trainee, stage: Stage) -> None:
        """Add the penalty's gradient."""
        if not self._bases or not on.layers:
            return
        downs = {name: on.whole(layer.down) for name, layer in on.layers.items()}
        self._bases = {name: basis.to(downs[name].device) for name, basis in self._bases.items()}
        penalty, gradients = overlap(downs, self._bases)
        self._overlap = float(penalty)
        on.add_gradients({on.layers[name].down: one * self.config.strength for name, one in gradients.items()})

    def end_stage(self, on: Trainee, stage: Stage) -> None:
        """Remember what the task's factors read, before the base takes them up."""
        layers: dict[str, Any] = {}
        for name, layer in on.layers.items():
            down = on.whole(layer.down)
            before = self._bases.get(name, down.new_zeros(down.shape[1], 0))
            share = float(overlap({name: down}, {name: before})[0])
            self._bases[name] = basis = extended(before, down)
            layers[name] = {"remembered": basis.shape[1], "features": basis.shape[0], "overlap": share}
        full = [name for name, told in layers.items() if told["remembered"] == told["features"]]
        self._told = {"layers": layers, "full": full} if layers else {}

    def measures(self) -> dict[str, float]:
        """The penalty before its weight, between 0 and 1."""
        return {"overlap": self._overlap} if self._bases else {}

    def report(self) -> dict[str, Any]:
        """By layer: directions remembered, of how many, and the overlap at the task's end; layers with none left."""
        return self._told

    def state(self) -> MethodState:
        """The bases."""
        tensors = {_BASIS + name: basis.cpu() for name, basis in self._bases.items()}
        return MethodState(values={"told": self._told, "overlap": self._overlap}, tensors=tensors)

    def load(self, state: MethodState) -> None:
        """Take over all of it."""
        self._told, self._overlap = dict(state.values["told"]), state.values["overlap"]
        self._bases = {name.removeprefix(_BASIS): basis for name, basis in state.tensors.items()}


def overlap(downs: Mapping[str, Tensor], bases: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over the rows a of all layers of |Q'a|^2 / |a|^2, and its gradient for each `down`.

    The gradient 2 (Q Q'a - p a) / |a|^2, with p the row's share, is at a right angle to the row: it turns it and leaves
    its length alone. Where Q spans everything it is zero. Shapes: of each down (r, in), of each Q (in, k).
    """
    rows = sum(len(down) for down in downs.values())
    total = torch.zeros(())
    gradients: dict[str, Tensor] = {}
    for name, down in downs.items():
        exact, basis = down.double(), bases[name].double()
        inside = exact @ basis
        length = exact.square().sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        share = inside.square().sum(1, keepdim=True) / length
        total = total.to(exact) + share.sum() / rows
        turned = torch.zeros_like(exact) if basis.shape[1] == len(basis) else inside @ basis.t() - share * exact
        gradients[name] = (turned * (2 / rows) / length).float()
    return total, gradients


def extended(basis: Tensor, down: Tensor) -> Tensor:
    """A basis of the span of a basis and of further rows, in float32.

    Shapes: (in, k), (r, in) -> (in, at most k + r)
    """
    held = basis.double()
    rows = torch.nn.functional.normalize(down.double(), dim=1)
    rest = rows - rows @ held @ held.t()
    _, sizes, directions = torch.linalg.svd(rest, full_matrices=False)
    added = directions[: min(int((sizes > _DEPENDENT).sum()), len(held) - held.shape[1])]
    added = added - added @ held @ held.t()  # once more: what is left of a short rest is rounding errors
    return torch.cat([held, torch.linalg.qr(added.t()).Q], dim=1).float().contiguous()
