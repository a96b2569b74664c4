"""All processes write one checkpoint together: each a share of the parts, side by side, if wanted while they train.

A part that several processes hold is written by one of them, so that all write about as many bytes. Collectives
happen here only, in the thread that trains; the writing itself is in parallel/writing.py.
"""

import json
import secrets
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.checkpoint import CheckpointConfig, remove_partial
from parallel.collectives import barrier, gather_objects
from parallel.files import usual_mode
from parallel.regions import Region, covers
from parallel.runtime import Runtime
from parallel.writing import Draft, Outcome, Parts, Writing
from relora.errors import ConfigError

Held = Parts
"""What this process holds: by kind and name, a part of a whole tensor, shaped as `Region.take` gives it."""

Entry = tuple[str, str, Region, int]
"""Kind, name, region and bytes of a part."""


class Saver:
    """Writes checkpoints under a folder that all processes share.

    Collectives: all processes call the constructor, `save` and `wait`.
    """

    def __init__(self, root: Path, runtime: Runtime, config: CheckpointConfig) -> None:
        self._root, self._runtime, self._config = root, runtime, config
        self._mode = usual_mode()
        self._writing: Writing | None = None
        self._entries: list[Entry] | None = None
        self._mine: set[tuple[str, str]] = set()
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._published: deque[str] = deque()
        self.last: int | None = None
        """Step of the checkpoint that was written, or loaded, last."""
        if runtime.is_main:
            remove_partial(root)
        barrier(runtime)

    def save(
        self, step: int, held: Held, state: dict[str, Any], *, best: str | None, kept: Collection[str] = ()
    ) -> None:
        """Write a checkpoint, or begin to: when it is asynchronous, what is held may change after this call.

        Args:
            state: plain values; the main process's are written.
            best: name of the best checkpoint so far, maybe this one; it is kept if the configuration says so.
            kept: names of others that are kept, maybe this one's.

        Raises:
            ConfigError: this one, or the one before, could not be written; equal on all processes.
        """
        self.wait()
        draft = Draft(
            root=self._root,
            step=step,
            token=self._share_out(held),
            rank=self._runtime.process_rank,
            world_size=self._runtime.world_size,
            mode=self._mode,
            parts=self._collect(held),
            state=json.dumps(state, indent=1),
            keep=self._config.keep,
            kept=frozenset(kept) | ({best} if best is not None and self._config.keep_best else set()),
        )
        self._writing = Writing(draft, self._published.append)
        self._writing.start()
        self.last = step
        if not self._config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
            ConfigError: it could not be written, on any process; earlier checkpoints are untouched.
        """
        writing, pause = self._writing, 0.002
        if writing is None:
            return
        # Many short collectives rather than a long one: slow disks break no time limit, a dead process is noticed.
        while None in (outcomes := gather_objects(self._runtime, writing.outcome)):
            others = outcomes[1:]
            if None not in others and any(outcome != Outcome() for outcome in others):
                writing.abandoned.set()
            writing.join(pause)
            pause = min(2 * pause, 0.5)
        self._writing = None
        _raise_first([outcome for outcome in outcomes if outcome is not None], writing.error)

    def published(self) -> list[str]:
        """Names of the checkpoints published since the last call; on the main process."""
        return [self._published.popleft() for _ in range(len(self._published))]

    def _share_out(self, held: Held) -> str:
        """Decide what this process writes, anew only when what is held has changed; returns a name of this attempt."""
        entries = [
            (kind, name, region, tensor.numel() * tensor.element_size())
            for kind, named in held.items()
            for name, (region, tensor) in named.items()
        ]
        answers = gather_objects(self._runtime, (entries == self._entries, secrets.token_hex(4)))
        if not all(unchanged for unchanged, _ in answers):
            self._mine = share_out(gather_objects(self._runtime, entries))[self._runtime.process_rank]
            self._entries, self._copies = entries, {}
        return answers[0][1]

    def _collect(self, held: Held) -> Parts:
        """The parts that this process writes."""
        mine: dict[str, dict[str, tuple[Region, Tensor]]] = defaultdict(dict)
        for kind, named in held.items():
            for name, (region, tensor) in named.items():
                assert tensor.numel() == region.numel, f"{kind} {name} is not what its region says"
                if (kind, name) in self._mine:
                    mine[kind][name] = region, self._frozen((kind, name), tensor.detach())
        return mine

    def _frozen(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        """What the thread may read while training goes on; the memory of copies is used again by the next ones."""
        if not self._config.asynchronous:
            return tensor
        copy = self._copies.get(key)
        if copy is None or copy.dtype != tensor.dtype:
            copy = self._copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return copy.copy_(tensor)


def share_out(entries: Sequence[Sequence[Entry]]) -> list[set[tuple[str, str]]]:
    """Which parts each process writes, given what each one holds: every part once, bytes balanced."""
    holders: dict[tuple[str, str, Region], list[int]] = defaultdict(list)
    sizes: dict[tuple[str, str, Region], int] = {}
    for rank, held in enumerate(entries):
        for kind, name, region, size in held:
            holders[kind, name, region].append(rank)
            sizes[kind, name, region] = size
    _check_complete(holders)
    loads = [0] * len(entries)
    shares: list[set[tuple[str, str]]] = [set() for _ in entries]
    # Parts without a choice first, then large before small: the small ones even out what is left.
    for part in sorted(holders, key=lambda part: (len(holders[part]) > 1, -sizes[part])):
        kind, name, region = part
        if region.numel == 0 and 0 not in region.shape:
            continue  # padding of a flat range
        rank = min(holders[part], key=lambda rank: (loads[rank], rank))
        loads[rank] += sizes[part]
        shares[rank].add((kind, name))
    return shares


def _check_complete(parts: Iterable[tuple[str, str, Region]]) -> None:
    regions: dict[tuple[str, str], list[Region]] = defaultdict(list)
    for kind, name, region in parts:
        regions[kind, name].append(region)
    for (kind, name), together in regions.items():
        assert covers(together), f"no process holds some part of {kind} {name}: {together}"


def _raise_first(outcomes: Sequence[Outcome], own: BaseException | None) -> None:
    """Raise what the user can mend on all processes alike, else what went wrong here or, failing that, elsewhere."""
    failed = [(rank, outcome) for rank, outcome in enumerate(outcomes) if outcome.error is not None]
    if not failed:
        return
    rank, first = min(failed, key=lambda pair: not pair[1].refusal)
    if first.refusal:
        raise ConfigError(first.error) from own
    if own is not None:
        raise own
    raise RuntimeError(f"process {rank} could not write its part of a checkpoint: {first.error}")
