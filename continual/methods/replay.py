"""Replay: every update also sees samples of earlier tasks.

They come on top of the task's own batch, so a task is trained on as many of its samples with replay as without.
The settings and the memory are shared with I-LoRA. docs/replay.md has the definitions.
"""

import math
from dataclasses import dataclass

import numpy as np

from continual.batches import Batch
from continual.method import Method, MethodState, Stage, Term, Trainee
from continual.order import key_of
from continual.reservoir import Balance, Reservoir
from relora.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class ReplayConfig:
    """What is remembered of earlier tasks, and how much of an update it is."""

    size: int | None = None
    """Samples that are remembered; null: all of them."""
    ratio: float = 1.0
    """Replayed samples for each new one; they are added to the global batch."""
    weight: float | None = None
    """Share of the replayed samples' mean loss in the loss, in (0, 1); null: their share of the samples."""
    balance: Balance = Balance.samples
    """How earlier tasks share them: samples (by how many are remembered) or tasks (equally)."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.size is not None and self.size < 1:
            raise ConfigError(f"continual.replay.size must be at least 1 sample (or null), got {self.size}")
        if not 0 < self.ratio < math.inf:
            raise ConfigError(
                f"continual.replay.ratio must be above 0, got {self.ratio}: continual.method=sequential replays none"
            )
        if self.weight is not None and not 0 < self.weight < 1:
            raise ConfigError(f"continual.replay.weight must be in (0, 1) (or null), got {self.weight}")

    @property
    def share(self) -> float:
        """Weight of the replayed samples' mean loss; the new ones' has the rest."""
        return self.ratio / (1 + self.ratio) if self.weight is None else self.weight

    def samples(self, global_batch: int, processes: int = 1) -> int:
        """Replayed samples of an update, which the processes of the data axis share evenly.

        Raises: ConfigError
        """
        count = round(self.ratio * global_batch)
        if count < 1 or abs(count - self.ratio * global_batch) > 1e-6 * global_batch or count % processes:
            raise ConfigError(
                f"continual.replay.ratio={self.ratio} makes {self.ratio * global_batch:g} replayed samples of "
                f"training.global_batch_size={global_batch}: it must be a whole multiple of the {processes} processes "
                f"that share them; choose a ratio that is a multiple of {processes}/{global_batch}"
            )
        return count


class Memory:
    """A reservoir, and how methods that replay use it."""

    def __init__(self, config: ReplayConfig) -> None:
        self._config = config
        self.reservoir = Reservoir(config.size)

    def batch(self, on: Trainee, stage: Stage) -> Batch | None:
        """This process's share of the next update's replayed samples; None in the first task."""
        if not len(self.reservoir):
            return None
        count = self._config.samples(on.global_batch)
        first = (on.step - stage.first) * count
        return self.reservoir.slots(
            on.mine(np.arange(first, first + count)),
            on.stages,
            balance=self._config.balance,
            key=key_of("replay", on.seed, stage.index),
        )

    def end_stage(self, on: Trainee, stage: Stage) -> None:
        """Remember the stage's samples."""
        self.reservoir.offer_stage(stage, on.global_batch, on.seed)

    def state(self) -> MethodState:
        """What is remembered."""
        return MethodState(values={"offered": self.reservoir.values()}, tensors=self.reservoir.tensors())

    def load(self, state: MethodState) -> None:
        """Take over what `state` gave."""
        self.reservoir.load(state.values["offered"], state.tensors)


class Replay(Method):
    """The mean loss over new and replayed samples."""

    def __init__(self, config: ReplayConfig) -> None:
        self._config = config
        self._memory = Memory(config)

    def terms(self, on: Trainee, stage: Stage, batch: Batch) -> list[Term]:
        """The task's loss, and from the second task on that of replayed samples."""
        replayed = self._memory.batch(on, stage)
        if replayed is None:
            return [Term(name="task", batch=batch)]
        share = self._config.share
        return [
            Term(name="task", batch=batch, weight=1 - share),
            Term(name="replay", batch=replayed, weight=share, all_seen=True),
        ]

    def end_stage(self, on: Trainee, stage: Stage) -> None:
        """Remember the stage's samples."""
        self._memory.end_stage(on, stage)

    def state(self) -> MethodState:
        """The memory."""
        return self._memory.state()

    def load(self, state: MethodState) -> None:
        """The same memory."""
        self._memory.load(state)
