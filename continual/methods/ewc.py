"""EWC: weights that earlier tasks depend on are held where those tasks left them, each as firmly as they need it.

What they need is the diagonal of the Fisher information, and the pull is a proximal step after each of Adam's.
Source: Kirkpatrick et al. 2017 (arXiv 1612.00796), online as in Schwarz et al. 2018 (arXiv 1805.06370); equations and
differences from both in docs/ewc.md. The information itself is in continual/fisher.py.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from continual.fisher import Labels, fisher_diagonal
from continual.method import Method, MethodState, Stage, Trainee
from relora.errors import ConfigError

_FISHER, _ANCHOR = "fisher.", "anchor."


@dataclass(kw_only=True, slots=True)
class EwcConfig:
    """How firmly weights are held, and how it is found out which ones."""

    strength: float = 1.0
    """Weight of the estimated rise of earlier tasks' mean losses; 1: as much as the new task's mean loss."""
    decay: float = 1.0
    """What earlier tasks' information is multiplied by as a task joins it; 1: all tasks count alike."""
    labels: Labels = Labels.data
    """Whose labels the gradients are of: data (true ones: the empirical Fisher) or model (drawn from the model)."""
    samples: int | None = 256
    """Samples of a task that it is measured on; null: those it trained on, an epoch at most."""
    group: int = 1
    """Samples in one backward pass; of more than 1 they get random signs, so that squares add up on average."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 < self.strength < math.inf:
            raise ConfigError(
                f"continual.ewc.strength must be above 0, got {self.strength}: sequential training holds nothing"
            )
        if not 0 < self.decay <= 1:
            raise ConfigError(f"continual.ewc.decay must be in (0, 1], got {self.decay}")
        if self.samples is not None and self.samples < 1:
            raise ConfigError(f"continual.ewc.samples must be at least 1 (or null), got {self.samples}")
        if self.group < 1:
            raise ConfigError(f"continual.ewc.group must be at least 1 sample, got {self.group}")


class Ewc(Method):
    """A quadratic hold on all that trains, from the second task on."""

    def __init__(self, config: EwcConfig) -> None:
        self.config = config
        self._parameters: dict[str, nn.Parameter] = {}
        self._fisher: dict[str, Tensor] = {}
        self._anchor: dict[str, Tensor] = {}
        self._counted = 0
        """Tasks whose information is in it."""
        self._told: dict[str, Any] = {}

    def begin_stage(self, on: Trainee, stage: Stage) -> None:
        """Take up what the tasks before depend on, and where they left the weights.

        That is measured now, not as they ended, so that a stream's last task needs no measuring, and so that after a
        warm start it is measured on what trains from now on.
        """
        self._told = {}
        if stage.index == 0:
            return
        self._parameters = dict(on.trainable())
        if self._fisher.keys() != self._parameters.keys():
            self._fisher = {name: torch.zeros_like(on.store.master(one)) for name, one in self._parameters.items()}
            self._counted = 0
        for earlier in on.stages[self._counted : stage.index]:
            found = fisher_diagonal(
                on, earlier, labels=self.config.labels, samples=self.config.samples, group=self.config.group
            )
            for name, value in self._fisher.items():
                value.mul_(self.config.decay).add_(found[self._parameters[name]])
        self._counted = stage.index
        self._anchor = {name: on.store.master(one).clone() for name, one in self._parameters.items()}

    @torch.no_grad()
    def after_step(self, on: Trainee, stage: Stage) -> None:
        """Move each weight towards its anchor, to the least of hold and distance in Adam's own metric."""
        if stage.index == 0:
            return
        for name, parameter in self._parameters.items():
            master = on.store.master(parameter)
            pull = self._fisher[name] * on.step_sizes(parameter) * self.config.strength
            pull.clamp_(max=1e30)  # infinite only where there is nothing but a hold
            master.sub_((master - self._anchor[name]).mul_(pull / (1 + pull)))
        on.store.publish(list(self._parameters.values()))

    def end_stage(self, on: Trainee, stage: Stage) -> None:
        """Estimate by how much the mean losses of the tasks before have risen."""
        if stage.index == 0:
            return
        parameters = self._parameters
        moved = [
            (on.store.master(one) - self._anchor[name]) * self._fisher[name].sqrt() for name, one in parameters.items()
        ]
        rise = float(on.squared_norms(list(parameters.values()), moved).sum()) / 2
        traces = on.squared_norms(list(parameters.values()), [one.sqrt() for one in self._fisher.values()])
        self._told = {"tasks": self._counted, "information": float(traces.sum()), "estimated_rise": rise}

    def report(self) -> dict[str, Any]:
        """Tasks that were held, the trace of their information, and the rise of their mean losses that it estimates."""
        return self._told

    def state(self) -> MethodState:
        """The information and the anchors, cut like masters."""
        parts = {_FISHER + name: (self._parameters[name], part) for name, part in self._fisher.items()}
        parts |= {_ANCHOR + name: (self._parameters[name], part) for name, part in self._anchor.items()}
        return MethodState(values={"counted": self._counted, "told": self._told}, parts=parts)

    def load(self, state: MethodState) -> None:
        """Take over all of it."""
        self._counted, self._told = state.values["counted"], dict(state.values["told"])
        self._parameters, self._fisher, self._anchor = {}, {}, {}
        for own, (parameter, part) in state.parts.items():
            held, _, name = own.partition(".")
            (self._fisher if held + "." == _FISHER else self._anchor)[name] = part
            self._parameters[name] = parameter
