"""Measures all entries of one number of processes, inside these processes.

Each trainer is built, and its memory and its collectives are taken; then all take turns, step by step, and what else
the machine does hits all alike. That all compute the same is checked by their losses.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from types import TracebackType
from typing import Any

import torch

from benchmarks.outcome import paired_ratio
from benchmarks.parallel_layouts import FULL_RANK, RELORA, Entry, Shape, Trainer, build, configured
from benchmarks.parallel_traffic import Traffic
from launch.planning.estimate import Cost, cost
from launch.planning.microbatch import Ledger
from launch.planning.skeleton import Skeletons
from parallel.collectives import barrier, gather_objects
from parallel.runtime import Runtime

_WARM_UP = 2
_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}  # of a loss, after as many updates and restarts


class _RealTensors(Ledger):
    """Counts no tensors without memory, such as DeepSpeed's stand-ins for gradients."""

    def _note(self, storage: Any) -> None:
        if storage.device.type != "meta":
            super()._note(storage)


class Memory:
    """Bytes on the device that are made within it and alive: of tensors on the CPU, of the allocator on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ledger = None if device.type == "cuda" else _RealTensors([])
        self._before = torch.cuda.memory_allocated(device) if self._ledger is None else 0

    def __enter__(self) -> "Memory":
        if self._ledger is not None:
            self._ledger.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ledger is not None:
            self._ledger.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def forget_peak(self) -> None:
        """Look for a new one from here on."""
        if self._ledger is None:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._ledger.peak = self._ledger.now

    @property
    def peak(self) -> int:
        """The most bytes at once."""
        if self._ledger is None:
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return self._ledger.peak


def measure(chosen: Sequence[Entry], shape: Shape, runtime: Runtime, *, repetitions: int) -> dict[str, Any] | None:
    """Rows and times of all entries; None on all but the main process.

    Collectives: by all processes alike.
    """
    trainers, facts = [], []
    for entry in chosen:
        trainer, fact = _inspected(entry, shape, runtime)
        trainers.append(trainer)
        facts.append(fact)
    times = [_Times() for _ in trainers]
    for turn in range(_WARM_UP + repetitions):
        for trainer, own in zip(trainers, times, strict=True):
            own.step.append(_seconds(partial(_step, trainer, own), trainer, runtime))
            if trainer.restart is not None:
                own.restart.append(_seconds(partial(trainer.restart, turn + 3), trainer, runtime))
    if not runtime.is_main:
        return None
    for own in times:
        del own.step[:_WARM_UP], own.restart[:_WARM_UP]
    _check_losses(chosen, times, shape)
    rows = [_row(*each, shape, runtime) for each in zip(chosen, facts, times, strict=True)]
    _compare(rows, chosen, times)
    turns = [
        {"name": entry.name, "step": own.step, "restart": own.restart} for entry, own in zip(chosen, times, strict=True)
    ]
    return {"processes": runtime.world_size, "rows": rows, "times": turns}


class _Times:
    """What the turns of one trainer brought."""

    def __init__(self) -> None:
        self.step: list[float] = []
        self.restart: list[float] = []
        self.loss = float("nan")


def _inspected(entry: Entry, shape: Shape, runtime: Runtime) -> tuple[Trainer, dict[str, Any]]:
    """A trainer after five steps and two restarts, and what they took."""
    with Memory(runtime.device) as memory:
        trainer = build(entry, shape, runtime)
        for _ in range(2):  # stage 3 learns the order of layers, and Adam's state is made
            trainer.step()
        memory.forget_peak()
        trainer.step()
        if trainer.restart is not None:
            trainer.restart(1)
    peaks = gather_objects(runtime, memory.peak)
    trainer.step()  # the first after a restart gathers the new factors once more
    with Traffic(trainer.runtime) as of_step:
        trainer.step()
    with Traffic(trainer.runtime) as of_restart:
        if trainer.restart is not None:
            trainer.restart(2)
    return trainer, {"peak_bytes": max(peaks), "step": of_step.rows(), "restart": of_restart.rows()}


def _step(trainer: Trainer, own: _Times) -> None:
    own.loss = trainer.step()


def _seconds(action: Callable[[], None], trainer: Trainer, runtime: Runtime) -> float:
    """From when all processes are ready until the last one is done."""
    barrier(runtime)
    began = time.perf_counter()
    if runtime.is_main or not trainer.entry.alone:
        action()
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)
    barrier(runtime)
    return time.perf_counter() - began


def _check_losses(chosen: Sequence[Entry], times: Sequence[_Times], shape: Shape) -> None:
    expected = {entry.method: own.loss for entry, own in zip(chosen, times, strict=True) if entry.alone}
    for entry, own in zip(chosen, times, strict=True):
        difference = abs(own.loss - expected[entry.method])
        assert difference < _TOLERANCE[shape.dtype], f"{entry.name} computes something else: loss off by {difference}"


def _row(entry: Entry, fact: dict[str, Any], own: _Times, shape: Shape, runtime: Runtime) -> dict[str, Any]:
    plan = _planned(entry, shape, on_gpu=runtime.device.type == "cuda")
    seconds = median(own.step)
    return {
        "name": entry.name,
        "method": entry.method,
        "alone": entry.alone,
        "zero_stage": entry.layout.zero_stage,
        "tensor": entry.layout.tensor,
        "data": entry.layout.data,
        "seconds": seconds,
        "tokens_per_second": shape.batch * shape.sequence / seconds,
        "restart_seconds": median(own.restart) if own.restart else None,
        "loss": own.loss,
        **fact,
        "planned": {"peak_bytes": plan.peak, "step": plan.sent_in_step, "restart": plan.sent_in_restart},
    }


def _planned(entry: Entry, shape: Shape, *, on_gpu: bool) -> Cost:
    config, hf_config = configured(entry, shape)
    skeletons = Skeletons(config, hf_config)
    return cost(config, skeletons, entry.layout, low_rank=entry.method == RELORA, on_gpu=on_gpu)


def _compare(rows: Sequence[dict[str, Any]], chosen: Sequence[Entry], times: Sequence[_Times]) -> None:
    """Add the times over those of one process, of replicas, and of full rank on the same layout."""

    def key(entry: Entry) -> tuple[str, bool, int, int]:
        return entry.method, entry.alone, entry.layout.zero_stage, entry.layout.tensor

    steps = {key(entry): own.step for entry, own in zip(chosen, times, strict=True)}
    for row, entry in zip(rows, chosen, strict=True):
        mine, alone = steps[key(entry)], steps[entry.method, True, 0, 1]
        full = steps.get((FULL_RANK, *key(entry)[1:]))
        row["to_one_process"] = paired_ratio(mine, alone)
        row["to_ddp"] = None if entry.alone else paired_ratio(mine, steps.get((entry.method, False, 0, 1), alone))
        row["to_full_rank"] = None if full is None or entry.method == FULL_RANK else paired_ratio(mine, full)
