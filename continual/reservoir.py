"""Which samples of earlier tasks are served again: by name, not by content, so that every process knows them all.

A sample is the number of its stage and its identity in it. A reservoir keeps a fixed number of all that were offered,
each with the same chance; without a size, all stay. Chances are keyed by the seed and by how many were offered before,
so the memory is a pure function of the sequence. Source: Vitter 1985, algorithm R.
"""

from collections.abc import Sequence
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from continual.batches import Batch, joined
from continual.method import Stage
from continual.order import Indices, groups, key_of, permute, sample_at

_BLOCK = 1 << 20
"""Samples that are offered at once, to bound memory."""
_CHANCES = 1 << 62


class Balance(str, Enum):
    """How earlier tasks share what is served again."""

    samples = "samples"
    """By how many samples of theirs are remembered."""
    tasks = "tasks"
    """Equally."""


class Reservoir:
    """Samples of finished stages."""

    def __init__(self, size: int | None) -> None:
        """`size` None keeps all, in no memory at all: a stage tells what it has served."""
        self._size = size
        self._offered: list[tuple[int, int]] = []
        """Stage and number of samples, in order."""
        self._kept = np.empty((0, 2), dtype=np.int64)

    def __len__(self) -> int:
        return self._count if self._size is None else len(self._kept)

    @property
    def _count(self) -> int:
        return sum(count for _, count in self._offered)

    def offer(self, stage: int, identities: Indices, seed: int) -> None:
        """Take samples up, in this order, each with the chance that is due to it."""
        if self._size is not None:
            for start in range(0, len(identities), _BLOCK):
                self._take(stage, identities[start : start + _BLOCK], self._count + start, seed)
        self._offered.append((stage, len(identities)))

    def offer_stage(self, stage: Stage, global_batch: int, seed: int) -> None:
        """Take up what a finished stage has served: each sample once, those of its first epoch."""
        count = served(stage, global_batch)
        if self._size is None:
            self._offered.append((stage.index, count))
        else:
            self.offer(stage.index, stage.data.train.identities(0, count), seed)

    def _take(self, stage: int, identities: Indices, before: int, seed: int) -> None:
        assert self._size is not None
        number = np.arange(before, before + len(identities))
        place = np.where(number < self._size, number, _uniform(number, seed))
        chosen = place < self._size
        entries = np.stack([np.full_like(identities, stage), identities], axis=1)
        grown = min(self._size, before + len(identities)) - len(self._kept)
        self._kept = np.concatenate([self._kept, np.empty((grown, 2), dtype=np.int64)])
        # Where several come to one place, the last stays.
        places, last = np.unique(place[chosen][::-1], return_index=True)
        self._kept[places] = entries[chosen][::-1][last]

    def slots(self, slots: Indices, stages: Sequence[Stage], *, balance: Balance, key: int) -> Batch:
        """The samples at some places of an endless order over what is remembered; each epoch is in an order of its own.

        With balance=tasks the tasks take turns, each with an order of its own.
        """
        assert len(self) > 0
        pools = self._pools(balance)
        turn, within = slots % len(pools), slots // len(pools)
        found = np.empty((len(slots), 2), dtype=np.int64)
        for number, chosen in groups(turn):
            pool = pools[number]
            order = sample_at(within[chosen], _length(pool), seed=key, stream=number)
            found[chosen] = self._entries(pool, order, stages)
        batches = [stages[stage].data.train.at(found[mine, 1]) for stage, mine in groups(found[:, 0])]
        return joined(batches)

    def _pools(self, balance: Balance) -> "list[list[tuple[int, int]]] | list[Indices]":
        """What is remembered, in the parts that take turns."""
        if self._size is None:
            return [[one] for one in self._offered] if balance is Balance.tasks else [self._offered]
        if balance is Balance.samples:
            return [self._kept]
        return [self._kept[mine] for _, mine in groups(self._kept[:, 0])]

    def _entries(self, pool: "list[tuple[int, int]] | Indices", order: Indices, stages: Sequence[Stage]) -> Indices:
        """The samples at places of a pool. Shapes: (n,) -> (n, 2)."""
        if isinstance(pool, np.ndarray):
            entries: Indices = pool[order]
            return entries
        ends = np.cumsum([count for _, count in pool])
        which = np.searchsorted(ends, order, side="right")
        entries = np.empty((len(order), 2), dtype=np.int64)
        for number, chosen in groups(which):
            stage, count = pool[number]
            first = ends[number] - count
            train = stages[stage].data.train
            entries[chosen, 0] = stage
            entries[chosen, 1] = [train.identities(int(place - first), 1)[0] for place in order[chosen]]
        return entries

    def values(self) -> list[list[int]]:
        """The plain part of what is remembered: stages, and how many samples each offered."""
        return [list(one) for one in self._offered]

    def tensors(self) -> dict[str, Tensor]:
        """The samples themselves. Shapes: (N, 2), int64."""
        return {} if self._size is None else {"reservoir": torch.from_numpy(self._kept.copy())}

    def load(self, values: Sequence[Sequence[int]], tensors: dict[str, Tensor]) -> None:
        """Take over what `values` and `tensors` gave."""
        self._offered = [(int(stage), int(count)) for stage, count in values]
        if self._size is not None:
            self._kept = tensors["reservoir"].cpu().numpy().astype(np.int64).reshape(-1, 2)


def served(stage: Stage, global_batch: int) -> int:
    """Samples that a stage has served, those of later epochs not counted again."""
    return min(stage.steps * global_batch, len(stage.data.train))


def _length(pool: "list[tuple[int, int]] | Indices") -> int:
    return len(pool) if isinstance(pool, np.ndarray) else sum(count for _, count in pool)


def _uniform(number: Indices, seed: int) -> Indices:
    """A draw from 0 to `number` for each, keyed by it."""
    chance = permute(number, _CHANCES, key_of("reservoir", seed))
    share = chance.astype(np.float64) / _CHANCES
    drawn: Indices = np.minimum((share * (number + 1)).astype(np.int64), number)
    return drawn
