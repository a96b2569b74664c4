"""GS-LoRA: forget some classes or documents, keep the rest, and change as few groups of factors as that needs.

A request to forget is trained on what is to be retained, and on a loss that falls as what is to be forgotten gets
worse, up to a bound. A group-sparse penalty, applied by an exact proximal step after each update, makes the groups
zero that neither loss needs. In tasks that teach it selects the groups which the task may change.
Source: Zhao et al., GS-LoRA (arXiv 2403.11530) and GS-LoRA++ (arXiv 2501.09705); differences in docs/gs_lora.md.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from continual.batches import Batch
from continual.groups import Grouping, groups_of, norms_of, shrink_
from continual.method import Forward, Method, MethodState, Stage, Term, Trainee
from continual.prototypes import distances, features_of, pooled, prototypes_of
from relora.errors import ConfigError

_KEY = "continual.gs_lora"


@dataclass(kw_only=True, slots=True)
class GsLoraConfig:
    """How hard a request to forget pushes, how far, and how sparse the change is."""

    beta: float = 0.5
    """Weight of the forget loss."""
    bound: float = 5.0
    """Nats per target at which a sample counts as forgotten, and is pushed no further."""
    alpha: float = 1.0
    """Weight of the group-sparse penalty: what it takes from an entry in an update, in learning rates."""
    warmup: float = 0.3
    """Share of a task's updates before the penalty begins."""
    groups: Grouping = Grouping.block
    """Factors that become zero together: block (all of a transformer block), matrix (a layer's two) or factor."""
    prototype_retain: float = 0.0
    """Weight of the retained samples' distance from their class's prototype; GS-LoRA++."""
    prototype_forget: float = 0.0
    """Weight of the loss that drives samples to be forgotten away from their class's prototype; GS-LoRA++."""
    prototype_bound: float | None = None
    """Nats from its prototype at which a sample to be forgotten is pushed no further; with prototype_forget only."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("beta", "bound"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{_KEY}.{name} must be above 0, got {getattr(self, name)}")
        for name in ("alpha", "prototype_retain", "prototype_forget"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{_KEY}.{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(
                f"{_KEY}.warmup must be a share of a task's updates in [0, 1), got {self.warmup}: the penalty begins "
                "after it"
            )
        if self.prototype_bound is not None and not 0 < self.prototype_bound < math.inf:
            raise ConfigError(f"{_KEY}.prototype_bound must be above 0 (or null), got {self.prototype_bound}")
        if (self.prototype_bound is None) == (self.prototype_forget > 0):
            raise ConfigError(
                f"{_KEY}.prototype_forget={self.prototype_forget} and {_KEY}.prototype_bound={self.prototype_bound} "
                "need each other: set both, or leave both out"
            )

    @property
    def prototypes(self) -> bool:
        """Whether there are any."""
        return self.prototype_retain > 0 or self.prototype_forget > 0

    def alpha_of(self, update: int, steps: int) -> float:
        """The penalty's weight in an update of a task of so many steps, counted from 0."""
        return self.alpha if update >= self.warmup * steps else 0.0


class GsLora(Method):
    """Bounded forgetting under group sparsity."""

    folds: ClassVar[bool] = True

    def __init__(self, config: GsLoraConfig) -> None:
        self.config = config
        self.dead: set[str] = set()
        """Groups that have become zero in this task; they stay so until its end."""
        self._prototypes: Tensor | None = None
        self._measures: dict[str, float] = {}
        self._told: dict[str, Any] = {}

    def begin_stage(self, on: Trainee, stage: Stage) -> None:
        """All groups may change again; prototypes are of the model as it is now."""
        self.dead, self._prototypes, self._measures, self._told = set(), None, {}, {}
        if stage.data.forget is not None and self.config.prototypes:
            sets = [stage.data.train, stage.data.forget]
            self._prototypes = prototypes_of(on, sets).cpu()

    def terms(self, on: Trainee, stage: Stage, batch: Batch) -> list[Term]:
        """The task's loss; of a request to forget, that of what is retained, and the bounded one."""
        forget = stage.data.forget
        if forget is None:
            return [Term(name="task", batch=batch)]
        position = (on.step - stage.first) * on.global_batch
        identities = on.mine(forget.identities(position, on.global_batch))

        def retain_loss(forward: Forward, part: Batch) -> Tensor:
            return self._retain_loss(on, forward, part)

        def forget_loss(forward: Forward, part: Batch) -> Tensor:
            return self._forget_loss(on, forward, part)

        return [
            Term(name="retain", batch=batch, loss=retain_loss if self.config.prototype_retain else None),
            Term(name="forget", batch=forget.at(identities), loss=forget_loss),
        ]

    def after_step(self, on: Trainee, stage: Stage) -> None:
        """The proximal step."""
        if not on.layers:
            return
        groups = groups_of(on.layers, self.config.groups)
        threshold = on.lr * self.config.alpha_of(on.step - stage.first - 1, stage.steps)
        norms = shrink_(on, groups, threshold, self.dead)
        zero = [group.name for group, norm in zip(groups, norms, strict=True) if norm == 0.0]
        if threshold > 0.0:
            self.dead.update(zero)
        self._measures = {
            "groups/zero": float(len(zero)),
            "groups/zero_share": len(zero) / len(groups),
            "groups/norm": sum(norms),
        }

    def end_stage(self, on: Trainee, stage: Stage) -> None:
        """Tell of the groups."""
        groups = groups_of(on.layers, self.config.groups)
        if not groups:
            return
        norms = norms_of(on, groups)
        zeroed = [group.name for group, norm in zip(groups, norms, strict=True) if norm == 0.0]
        self._told = {
            "groups": len(groups),
            "zero_groups": len(zeroed),
            "zero_share": len(zeroed) / len(groups),
            "zeroed": zeroed,
            "norms": [[group.name, norm] for group, norm in zip(groups, norms, strict=True)],
        }

    def measures(self) -> dict[str, float]:
        """How many groups are exactly zero, their share, and the sum of all norms."""
        return dict(self._measures)

    def report(self) -> dict[str, Any]:
        """The same at the end of the task, and each group's norm."""
        return dict(self._told)

    def state(self) -> MethodState:
        """The dead groups, the prototypes and the report."""
        tensors = {} if self._prototypes is None else {"prototypes": self._prototypes}
        return MethodState(values={"dead": sorted(self.dead), "told": self._told}, tensors=tensors)

    def load(self, state: MethodState) -> None:
        """Take over all of it."""
        self.dead, self._told = set(state.values["dead"]), dict(state.values["told"])
        self._prototypes = state.tensors.get("prototypes")

    def _retain_loss(self, on: Trainee, forward: Forward, batch: Batch) -> Tensor:
        """The cross-entropy, and the distance from the prototypes."""
        with features_of(on.model) as caught:
            losses = on.row_losses(forward(batch), batch)
        return (losses + self.config.prototype_retain * self._distances(caught, batch)).sum()

    def _forget_loss(self, on: Trainee, forward: Forward, batch: Batch) -> Tensor:
        """beta relu(bound - CE) of each sample, counted by its targets, and the same of its prototype's distance."""
        config, targets = self.config, batch.row_targets
        if config.prototype_bound is None:
            return (config.beta * _short_of(config.bound, on.row_losses(forward(batch), batch), targets)).sum()
        with features_of(on.model) as caught:
            losses = on.row_losses(forward(batch), batch)
        apart = torch.relu(config.prototype_bound - self._distances(caught, batch))
        return (config.beta * _short_of(config.bound, losses, targets) + config.prototype_forget * apart).sum()

    def _distances(self, caught: list[Tensor], batch: Batch) -> Tensor:
        assert self._prototypes is not None, "begin_stage makes them"
        features = pooled(caught[0], batch)
        return distances(features, self._prototypes.to(features.device)[batch.labels])


def _short_of(bound: float, losses: Tensor, targets: Tensor) -> Tensor:
    """How much the mean loss of each sample is short of the bound, times its targets. Shapes: (B,)."""
    return torch.relu(bound * targets - losses)
