"""All tasks at once: what a method without a sequence can reach, as a stage like any other."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from continual.batches import Batch, HeldOut, Samples, joined
from continual.method import Stage, TaskData, TaskKind
from continual.mixture import Mixture, quotas_of
from continual.order import Indices, groups
from relora.errors import ConfigError

_TASK = 1 << 54
"""More than any identity within a task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JointSamples:
    """The samples of several tasks, mixed."""

    parts: Sequence[Samples]
    mixture: Mixture

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def identities(self, position: int, count: int) -> Indices:
        """Which samples are served at `position` and after it."""
        task, served = self.mixture.locate(np.arange(position, position + count))
        result = np.empty_like(served)
        for number, chosen in groups(task):
            wanted = served[chosen]
            first = int(wanted.min())
            run = self.parts[number].identities(first, int(wanted.max()) - first + 1)
            result[chosen] = number * _TASK + run[wanted - first]
        return result

    def at(self, identities: Indices) -> Batch:
        """These samples, in this order."""
        task = identities // _TASK
        batches = [self.parts[number].at(identities[chosen] % _TASK) for number, chosen in groups(task)]
        place = np.concatenate([np.flatnonzero(chosen) for _, chosen in groups(task)])
        return joined(batches).rows(torch.from_numpy(np.argsort(place)))

    def batch(self, position: int, count: int) -> Batch:
        """The samples at `position` and after it."""
        return self.at(self.identities(position, count))


@dataclass(frozen=True, kw_only=True, slots=True)
class JointHeldOut:
    """Held-out samples of several tasks, in turns, so that any first ones are a fair share."""

    parts: Sequence[HeldOut]

    def __len__(self) -> int:
        return len(self.parts) * min(len(part) for part in self.parts)

    def batch(self, position: int, count: int) -> Batch:
        """The samples at `position` and after it."""
        places = range(position, min(position + count, len(self)))
        return joined([self.parts[place % len(self.parts)].batch(place // len(self.parts), 1) for place in places])


def joined_tasks(stages: Sequence[Stage], *, seed: int) -> list[Stage]:
    """The stages that train at full rank, and one in place of all others, which has the samples of all.

    Raises: ConfigError when a task cannot be trained on with others.
    """
    for stage in stages:
        if stage.kind is TaskKind.forget:
            raise ConfigError(
                f"continual.method=joint: {stage.name} is a request to forget, which cannot be trained on with "
                "tasks that teach: leave it out, or choose another method"
            )
    before = [stage for stage in stages if stage.full_rank]
    rest = [stage for stage in stages if not stage.full_rank]
    if not rest:
        raise ConfigError("continual.method=joint has nothing to join: every task has full_rank: true")
    held_out: dict[str, HeldOut] = {"joint": JointHeldOut(parts=[stage.own_held_out for stage in stages])}
    quotas = quotas_of([float(stage.steps) for stage in stages], [stage.name for stage in stages])
    joint = Stage(
        index=len(before),
        name="joint",
        kind=rest[0].kind,
        first=rest[0].first,
        steps=sum(stage.steps for stage in rest),
        data=TaskData(
            train=JointSamples(parts=[stage.data.train for stage in stages], mixture=Mixture(quotas=quotas, seed=seed)),
            held_out=held_out,
            fingerprint=" ".join(stage.data.fingerprint for stage in stages),
            classes=stages[-1].seen,
        ),
        seen=stages[-1].seen,
    )
    return [*before, joint]
