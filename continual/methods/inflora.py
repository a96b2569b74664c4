"""InfLoRA: every task learns only where the inputs of earlier tasks are not.

Before a task, each layer's frozen `down` is aimed at the task's strongest inputs among those directions that earlier
tasks left free, so that whatever `up` learns leaves the outputs on earlier inputs as they are. After it, the task's
own inputs join the protected ones, and its update is folded into the base weights.
Source: Liang and Li, InfLoRA (arXiv 2404.00228); equations and differences from its code in docs/inflora.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from continual.input_moments import Moments, input_moments
from continual.method import Method, MethodState, Stage, Trainee
from continual.subspace import Energy, Spans, Subspace, free_directions, nothing_protected, protect
from relora.errors import ConfigError

_ROW_NORM = 1 / math.sqrt(3)
"""Norm of a row of `down`, that of an average row as LoRA draws it. Source: the published code."""


@dataclass(kw_only=True, slots=True)
class InfLoraConfig:
    """How much of each task is protected, and how its inputs are measured."""

    energy: Energy = Energy.activation
    """What shares are of: activation (the inputs' mean square) or reference (as in the published code)."""
    threshold: float = 0.95
    """Share of the first task's energy that is protected."""
    final_threshold: float = 1.0
    """Share that would come after the last task; tasks between have shares in equal steps."""
    samples: int | None = None
    """Samples of a task whose inputs are measured; null: those it trains on, an epoch at most."""
    draws: int = 4
    """Sets of directions kept for restarts inside a task; after the last comes the first again."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("threshold", "final_threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"continual.inflora.{name} must be in (0, 1], got {getattr(self, name)}")
        if self.final_threshold < self.threshold:
            raise ConfigError(
                f"continual.inflora.final_threshold={self.final_threshold} must be at least "
                f"continual.inflora.threshold={self.threshold}: later tasks protect no smaller share"
            )
        if self.samples is not None and self.samples < 1:
            raise ConfigError(f"continual.inflora.samples must be at least 1 (or null), got {self.samples}")
        if self.draws < 1:
            raise ConfigError(f"continual.inflora.draws must be at least 1, got {self.draws}")

    def threshold_of(self, stage: int, stages: int) -> float:
        """The share of energy that is protected after a stage."""
        return self.threshold + (self.final_threshold - self.threshold) * stage / stages


class InfLora(Method):
    """Updates confined to what earlier tasks leave free; subspaces are held by the first layer with an input."""

    trains_down: ClassVar[bool] = False
    folds: ClassVar[bool] = True

    def __init__(self, config: InfLoraConfig) -> None:
        self.config = config
        self.sources: dict[str, str] = {}
        """Whose inputs each layer has."""
        self.subspaces: dict[str, Subspace] = {}
        self._directions: dict[str, Tensor] = {}
        self._first_restart: int | None = None
        self._told: dict[str, Any] = {}

    def begin_stage(self, on: Trainee, stage: Stage) -> None:
        """Aim `down` at the task's inputs in the free directions.

        Raises: ConfigError when `up` is not zero.
        """
        if not on.layers:
            return
        if on.squared_norms([layer.up for layer in on.layers.values()]).any():
            raise ConfigError(
                "continual.method=inflora chooses `down` for an `up` of zero: leave out lora.init_from, or merge that "
                "adapter into the model first"
            )
        moments = self._moments(on, stage)
        ranks: dict[str, int] = {}
        for name, source in self.sources.items():
            ranks[source] = max(ranks.get(source, 0), on.layers[name].adapter_rank)

        def work(source: str) -> Tensor:
            moment = moments.by_source[source]
            before = self.subspaces.get(source, nothing_protected(len(moment)))
            count = ranks[source] * self.config.draws
            rows, shares = free_directions(before, moment, energy=self.config.energy, count=count)
            return torch.cat([shares.float()[:, None], rows], dim=1)

        found = on.share_work(list(moments.by_source), work)
        self._first_restart, self._told = None, {}
        self._directions = {source: both[:, 1:].cpu().contiguous() for source, both in found.items()}
        for name, layer in on.layers.items():
            down = self._down(name, on.store.shape(layer.down), 0)
            assert down is not None
            on.store.write(layer.down, down)
        self._told = {source: {"reached": float(both[: ranks[source], 0].sum())} for source, both in found.items()}

    def end_stage(self, on: Trainee, stage: Stage) -> None:
        """Protect the task's inputs, as they are with what it has learned."""
        moments = self._moments(on, stage)
        threshold = self.config.threshold_of(stage.index, len(on.stages))

        def work(source: str) -> Tensor:
            moment = moments.by_source[source]
            before = self.subspaces.get(source, nothing_protected(len(moment)))
            after, share = protect(before, moment, energy=self.config.energy, threshold=threshold)
            head = torch.tensor([float(after.spans is Spans.protected), share])
            return torch.cat([head, after.basis.flatten()])

        found = on.share_work(list(moments.by_source), work)
        self._directions, self._first_restart = {}, None
        for source, flat in found.items():
            features = len(moments.by_source[source])
            basis = flat[2:].cpu().reshape(features, (len(flat) - 2) // features).contiguous()
            spans = Spans.protected if flat[0] else Spans.free
            self.subspaces[source] = subspace = Subspace(basis=basis, spans=spans)
            self._told[source] = {
                "layers": [name for name, of in self.sources.items() if of == source],
                "protected": subspace.protected,
                "features": features,
                "basis": spans.value,
                "energy": float(flat[1]),
                "threshold": threshold,
                "bytes": basis.numel() * basis.element_size(),
                **self._told.get(source, {}),
            }

    def draw(self, layer: str, shape: Sequence[int], restart_index: int) -> Tensor | None:
        """The task's next strongest free directions at a restart inside a task; none between tasks."""
        if self._first_restart is None:
            self._first_restart = restart_index
        return self._down(layer, shape, restart_index - self._first_restart + 1)

    def report(self) -> dict[str, Any]:
        """By distinct input: what is protected, its share of the task's energy, and the share that `down` reached."""
        return {"inputs": self._told}

    def state(self) -> MethodState:
        """Bases, what they span, whose inputs are whose, and the directions of restarts to come."""
        tensors = {f"basis.{name}": one.basis for name, one in self.subspaces.items()}
        tensors |= {f"directions.{name}": rows for name, rows in self._directions.items()}
        values = {
            "sources": self.sources,
            "spans": {name: one.spans.value for name, one in self.subspaces.items()},
            "first_restart": self._first_restart,
            "told": self._told,
        }
        return MethodState(values=values, tensors=tensors)

    def load(self, state: MethodState) -> None:
        """Take over all of it."""
        values, tensors = state.values, state.tensors
        self.sources, self._told = dict(values["sources"]), dict(values["told"])
        self._first_restart = values["first_restart"]
        self.subspaces = {
            name: Subspace(basis=tensors[f"basis.{name}"], spans=Spans(spans))
            for name, spans in values["spans"].items()
        }
        head = "directions."
        self._directions = {name[len(head) :]: rows for name, rows in tensors.items() if name.startswith(head)}

    def _moments(self, on: Trainee, stage: Stage) -> Moments:
        available = len(stage.data.train)
        count = min(available, self.config.samples or stage.steps * on.global_batch)
        moments = input_moments(on, on.targets(), stage.data.train, count)
        assert self.sources in ({}, moments.sources), "layers that share inputs in one task do so in all"
        self.sources = moments.sources
        return moments

    def _down(self, layer: str, shape: Sequence[int], turn: int) -> Tensor | None:
        """A set of directions; rows for which no direction is free are zero, and learn nothing. Shapes: `shape`."""
        rows = self._directions.get(self.sources.get(layer, layer))
        if rows is None:
            return None
        rank = shape[0]
        first = turn % max(1, len(rows) // rank) * rank
        down = torch.zeros(*shape)
        chosen = rows[first : first + rank]
        down[: len(chosen)] = chosen * _ROW_NORM
        return down
