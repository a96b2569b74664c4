"""I-LoRA: a working adapter that trains, and a long-term adapter that follows it slowly and keeps it from forgetting.

The long-term adapter is the moving average of the working one: of the factors, and of what trains beside them. On
replayed samples the working model's hidden states are held to the long-term model's. Source: Ren et al. 2024,
Analyzing and Reducing Catastrophic Forgetting in Parameter Efficient Tuning (arXiv 2402.18865); docs/i_lora.md says
what differs from its code.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from continual.batches import Batch
from continual.method import Forward, Method, MethodState, Stage, Term, Trainee
from continual.methods.replay import Memory, ReplayConfig
from relora.errors import ConfigError
from relora.linear import standing_in

_LONG_TERM = "long_term/"

Values = Mapping[nn.Parameter, Tensor]
"""The long-term adapter as modules compute with it, by the parameters of the working one."""


class Adapter(str, Enum):
    """One of the two adapters."""

    working = "working"
    """The one that trains."""
    long_term = "long_term"
    """Its moving average."""


@dataclass(kw_only=True, slots=True)
class ILoraConfig:
    """How slowly the long-term adapter moves, and how it acts on the working one."""

    decay: float = 0.99
    """Share of itself that the long-term adapter keeps in each update, in (0, 1)."""
    consistency: float = 1.0
    """Weight of the gap between both models' hidden states on replayed samples; 0: no such term."""
    evaluate: Adapter = Adapter.long_term
    """working or long_term: which of them is measured, and written to tasks/ and final/."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 < self.decay < 1:
            raise ConfigError(
                f"continual.i_lora.decay must be in (0, 1), got {self.decay}: at 0 there would be one adapter, at 1 "
                "the long-term one would never move"
            )
        if not 0 <= self.consistency < math.inf:
            raise ConfigError(f"continual.i_lora.consistency must be 0 or more, got {self.consistency}")
        if not self.consistency and self.evaluate is Adapter.working:
            raise ConfigError(
                "continual.i_lora.consistency=0 with continual.i_lora.evaluate=working leaves the long-term adapter "
                "without effect: choose continual.method=replay"
            )

    def rate(self, updates: int) -> float:
        """What the long-term adapter keeps of itself when it has taken up so many working adapters.

        The first ones count alike, so that it begins as a plain mean, and not at the factors as they were drawn.
        """
        return min(1 - 1 / (updates + 1), self.decay)


class ILora(Method):
    """Replay, with a consistency loss between the two adapters."""

    def __init__(self, config: ILoraConfig, replay: ReplayConfig) -> None:
        self._config = config
        self._share = replay.share
        self._memory = Memory(replay)
        self._average: dict[str, tuple[nn.Parameter, Tensor]] = {}
        """By the name of what trains: it, and its moving average in parts like masters. Empty at full rank."""
        self._updates = 0
        self._gap: Tensor | None = None
        self._measures: dict[str, float] = {}

    @property
    def written(self) -> str | None:
        """The averages, if they are what is measured."""
        return _LONG_TERM if self._config.evaluate is Adapter.long_term else None

    def begin_stage(self, on: Trainee, stage: Stage) -> None:
        """Before the first low-rank task both adapters are one; later ones go on with both."""
        if on.layers and not self._average:
            self._average = {name: (one, on.store.master(one).clone()) for name, one in on.trainable().items()}
        for parameter, average in self._average.values():
            # A classifier's outputs for classes that were appended to the stream are zero as yet, and not drawn.
            torch.where(average == 0, on.store.master(parameter), average, out=average)

    def terms(self, on: Trainee, stage: Stage, batch: Batch) -> list[Term]:
        """The task's loss, and from the second task on that of replayed samples with their consistency."""
        self._gap, self._measures = None, {}
        replayed = self._memory.batch(on, stage)
        if replayed is None:
            return [Term(name="task", batch=batch)]
        loss = None
        if self._average and self._config.consistency:
            self._gap = torch.zeros(2, dtype=torch.float64, device=on.device)
            loss = partial(self._replay_loss, on, self._values(on))
        return [
            Term(name="task", batch=batch, weight=1 - self._share),
            Term(name="replay", batch=replayed, weight=self._share, loss=loss, all_seen=True),
        ]

    def after_backward(self, on: Trainee, stage: Stage) -> None:
        """Put the gap of all processes together."""
        if self._gap is not None:
            gap, targets = on.sum(self._gap).tolist()
            self._measures = {"consistency": gap / max(targets, 1.0)}

    def after_step(self, on: Trainee, stage: Stage) -> None:
        """Move the long-term adapter towards the working one."""
        if not self._average:
            return
        moves = 1 - self._config.rate(self._updates)
        for parameter, average in self._average.values():
            average.lerp_(on.store.master(parameter), moves)
        self._updates += 1

    def end_stage(self, on: Trainee, stage: Stage) -> None:
        """Remember the stage's samples."""
        self._memory.end_stage(on, stage)

    def measured(self, on: Trainee) -> AbstractContextManager[None]:
        """The model with the adapter that is to be measured."""
        wanted = self._average and self._config.evaluate is Adapter.long_term
        return _long_term(on, self._values(on)) if wanted else nullcontext()

    def measures(self) -> dict[str, float]:
        """The mean gap of this step, per replayed target."""
        return self._measures

    def report(self) -> dict[str, Any]:
        """How many working adapters are in the long-term one, and what it keeps of itself by now."""
        return {"averaged": self._updates, "rate": self._config.rate(self._updates)}

    def state(self) -> MethodState:
        """The memory, and the long-term adapter."""
        state = self._memory.state()
        state.values["updates"] = self._updates
        state.parts = {_LONG_TERM + name: one for name, one in self._average.items()}
        return state

    def load(self, state: MethodState) -> None:
        """The same."""
        self._memory.load(state)
        self._updates = int(state.values["updates"])
        self._average = {name.removeprefix(_LONG_TERM): one for name, one in state.parts.items()}

    def _values(self, on: Trainee) -> Values:
        values = on.assembled(dict(self._average.values()))
        return {parameter: value.to(on.device, parameter.dtype) for parameter, value in values.items()}

    def _replay_loss(self, on: Trainee, long_term: Values, forward: Forward, batch: Batch) -> Tensor:
        """Cross-entropy and consistency, which share the working model's forward pass."""
        assert self._gap is not None
        kept = _states(on, long_term, batch)
        output = forward(batch, output_hidden_states=True)
        gap = consistency(kept, output.hidden_states, batch)
        self._gap += torch.stack([gap.detach().double(), gap.new_tensor(batch.targets, dtype=torch.float64)])
        return on.row_losses(output, batch).sum() + self._config.consistency / self._share * gap


@contextmanager
def _long_term(on: Trainee, values: Values) -> Iterator[None]:
    """The model with the long-term adapter."""
    layers = on.layers.values()
    own = {factor for layer in layers for factor in (layer.down, layer.up)}
    beside = {one: value for one, value in values.items() if one not in own}
    with standing_in({layer: (values[layer.down], values[layer.up]) for layer in layers}), on.swapped(beside):
        yield


@torch.no_grad()
def _states(on: Trainee, long_term: Values, batch: Batch) -> Sequence[Tensor]:
    """The long-term model's hidden states, without dropout."""
    wanted = {"use_cache": False} if batch.labels.ndim > 1 else {}
    was_training = on.model.training
    on.model.eval()
    try:
        with _long_term(on, long_term):
            states: Sequence[Tensor] = on.model(**batch.inputs, output_hidden_states=True, **wanted).hidden_states
    finally:
        on.model.train(was_training)
    return states


def consistency(kept: Sequence[Tensor], states: Sequence[Tensor], batch: Batch) -> Tensor:
    """The squared gap of hidden states where the long-term model's are larger, summed over the batch's targets.

    It is a mean over layers and features; of a classifier's sample over its positions, too.
    Shapes: kept, states (B, T, features) each
    """
    weights = _weights(batch)
    total = states[0].new_zeros((), dtype=torch.float32)
    for stable, state in zip(kept, states, strict=True):
        gap = (stable.float() - state.float()).relu().square()
        if weights is None or weights.shape != gap.shape[:2]:
            total = total + gap.flatten(1).mean(1).sum()
        else:
            total = total + (gap.mean(-1) * weights).sum()
    return total / len(states)


def _weights(batch: Batch) -> Tensor | None:
    """How much each position counts: one where a next token is a target; a sample of a classifier counts one in all.

    Shapes: (B, T); None: all positions of a sample alike.
    """
    if batch.labels.ndim > 1:
        weights = torch.zeros(batch.labels.shape, device=batch.labels.device)
        weights[:, :-1] = (batch.labels[:, 1:] != -100).float()
        return weights
    mask = batch.inputs.get("attention_mask")
    return None if mask is None else mask / mask.sum(1, keepdim=True)
