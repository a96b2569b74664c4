"""The trainers of one model: built, measured for memory, and timed in turns.

A CPU is timed by what this process takes of its processors, so that what else the machine does is not in it, and its
memory is that of the tensors; a GPU is timed by the wall clock, and its memory is what torch's allocator has given out.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.outcome import paired_ratio
from benchmarks.step_variants import Shape, Variant, configured, full_rank, hf_config_of, low_rank_paths, peft_torch
from launch.planning.estimate import Layout, cost
from launch.planning.flops import mfu, peak_flops
from launch.planning.microbatch import Ledger
from launch.planning.skeleton import Skeletons
from launch.watching.watch import has_room
from parallel.runtime import Runtime
from relora.choice import timed

FULL, PEFT = "full rank", "PEFT LoRA, torch AdamW"
Rows = list[dict[str, Any]]


class Memory:
    """Bytes that one trainer holds, from its building on."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._ledger = device, Ledger([])
        self._before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What is made or freed within counts."""
        if self._device.type == "cuda":
            yield
            return
        with self._ledger:
            yield

    def begin_peak(self) -> None:
        """Forget the height so far."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._ledger.peak = self._ledger.now

    @property
    def now(self) -> int:
        """Held now."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) - self._before
        return int(self._ledger.now)

    @property
    def peak(self) -> int:
        """Most since `begin_peak`."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return int(self._ledger.peak)


def measure(shape: Shape, runtime: Runtime, cache: Path, *, repetitions: int) -> Rows:
    """A row for each trainer of a model, full rank first."""
    makers = {
        FULL: lambda: {FULL: full_rank(shape, runtime)},
        PEFT: lambda: {PEFT: peft_torch(shape, runtime)},
        "Accrete": lambda: {f"Accrete, {name}": one for name, one in low_rank_paths(shape, runtime, cache).items()},
    }
    planned = planned_peaks(shape, runtime.device)
    side_by_side = has_room(runtime.device, sum(planned[name] for name in makers))
    rows: Rows = []
    for group in [list(makers)] if side_by_side else [[name] for name in makers]:
        chosen = {name: makers[name] for name in group}
        rows += _stand(chosen, planned, shape, runtime, repetitions=repetitions)
    return _compared(rows, side_by_side=side_by_side)


def planned_peaks(shape: Shape, device: torch.device) -> dict[str, int]:
    """What `accrete plan` says that each trainer needs; PEFT's LoRA is taken for ours."""
    peaks = {}
    for low_rank in (False, True):
        config = configured(shape, low_rank=low_rank)
        on = Layout(zero_stage=0, tensor=1, data=1)
        skeletons = Skeletons(config, hf_config_of(config))
        found = cost(config, skeletons, on, low_rank=low_rank, on_gpu=device.type == "cuda")
        peaks[low_rank] = found.peak if device.type == "cuda" else max(found.peak, found.building)
    return {FULL: peaks[False], PEFT: peaks[True], "Accrete": peaks[True]}


def _stand(
    makers: Mapping[str, Callable[[], dict[str, Variant]]],
    planned: Mapping[str, int],
    shape: Shape,
    runtime: Runtime,
    *,
    repetitions: int,
) -> Rows:
    """Rows of trainers that stand in memory together."""
    device, rows, standing = runtime.device, Rows(), dict[str, Variant]()
    for name, make in makers.items():
        if not has_room(device, planned[name]):
            rows.append({"variant": name, "missing": f"memory does not suffice: {planned[name] / 1e9:.0f} GB planned"})
            continue
        try:
            made, found = _built(make, device)
        except torch.OutOfMemoryError:
            rows.append({"variant": name, "missing": "memory does not suffice: the device refused it"})
            continue
        standing |= made
        rows += found
    times: dict[str, list[float]] = {name: [] for name in standing}
    for _ in range(repetitions):
        for name, variant in standing.items():
            times[name].append(seconds(variant.step, device))
    peak, _ = peak_flops(device, torch.bfloat16 if shape.dtype == "bf16" else torch.float32)
    for row in rows:
        if "missing" not in row:
            took = median(times[row["variant"]])
            row |= {"times": times[row["variant"]], "seconds": took, "mfu": mfu(row["flops"], took, peak)}
            row["tokens_per_second"] = shape.batch * shape.sequence / took
    standing.clear()
    gc.collect()
    return rows


def _built(make: Callable[[], dict[str, Variant]], device: torch.device) -> tuple[dict[str, Variant], Rows]:
    """Trainers that share their state, and what memory each takes."""
    memory, rows = Memory(device), Rows()
    with memory.watched():
        made = make()
        for name, variant in made.items():
            variant.step()  # Adam's state is made by the first one
            memory.begin_peak()
            variant.passes()
            state = memory.now
            variant.update()
            rows.append(
                {
                    "variant": name,
                    "trainable": variant.trainable,
                    "flops": variant.flops,
                    "state_bytes": state,
                    "peak_bytes": memory.peak,
                }
            )
    return made, rows


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of an action: of the wall clock on a GPU, else of one processor, however many worked on it."""
    if device.type == "cuda":
        return timed(action, device)
    began = time.process_time()
    action()
    return (time.process_time() - began) / torch.get_num_threads()


def _compared(rows: Rows, *, side_by_side: bool) -> Rows:
    """Rows beside full rank and PEFT: speed and memory as ratios, None without the other."""
    known = {row["variant"]: row for row in rows if "missing" not in row}
    for row in known.values():
        row["side_by_side"] = side_by_side
        for key, name in (("to_full", FULL), ("to_peft", PEFT)):
            other = known.get(name)
            row[key] = None
            if other is not None:
                speed = paired_ratio(other["times"], row["times"])
                row[key] = {"speed": speed, **{of: row[of] / other[of] for of in ("state_bytes", "peak_bytes")}}
    return rows
