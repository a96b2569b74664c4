"""Tells everybody who watches: metrics.jsonl, the console and the tracker. Reads the run, never changes it."""

import os
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from launch.training.state import RunState
from launch.watching.console import Console, Progress
from launch.watching.records import append_records
from launch.watching.trackers.tracker import Level, Tracker


@dataclass(kw_only=True, slots=True)
class Watch:
    """One run's audience."""

    metrics: Path | None
    """Where records go; None on all processes but the main one, whose console and tracker are silent, too."""
    console: Console
    tracker: Tracker
    device: torch.device
    log_every: int
    flops_per_step: int = 0
    """FLOPs that one update executes."""
    peak_flops: float | None = None
    """FLOP/s that the utilisation is measured against."""
    cycles: int | None = None
    heads: Mapping[int, Tracker] = field(default_factory=dict)
    """The trackers of further heads of LTE that this process hosts, where they have their own."""
    progress: Progress | None = None
    _seconds: float = field(default=0.0, init=False)
    _tokens: int = field(default=0, init=False)
    _steps: int = field(default=0, init=False)

    def step(
        self,
        state: RunState,
        *,
        loss: float,
        lr: float,
        grad_norm: float,
        cycle: int | None,
        tokens: int,
        seconds: float,
        head: int | None = None,
        task: str | None = None,
        measures: Mapping[str, float] | None = None,
    ) -> None:
        """Record one update, if its turn has come."""
        self._seconds += seconds
        self._tokens += tokens
        self._steps += 1
        state.peak_memory_bytes = max(state.peak_memory_bytes, peak_memory_bytes(self.device))
        record: dict[str, Any] = {
            "step": state.step,
            "tokens": state.tokens,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": round(self._tokens / max(self._seconds, 1e-9), 1),
            "memory_bytes": memory_bytes(self.device),
        }
        record |= {key: value for key, value in (("cycle", cycle), ("head", head), ("task", task)) if value is not None}
        record |= measures or {}
        if self.flops_per_step:
            record["flops_per_second"] = round(self.flops_per_step * self._steps / max(self._seconds, 1e-9))
            if self.peak_flops:
                record["mfu"] = round(record["flops_per_second"] / self.peak_flops, 4)
        if self.progress is not None:
            self.progress.update(state.step, record, cycle=cycle, cycles=self.cycles)
        if state.step % self.log_every == 0:
            self._append(record)
            self.tracker.log(record)
            self._seconds, self._tokens, self._steps = 0.0, 0, 0

    def head(self, head: int, state: RunState, *, loss: float, lr: float, grad_norm: float) -> None:
        """Tell of one update of a further head, if it has a tracker and its turn has come."""
        if head in self.heads and state.step % self.log_every == 0:
            record = {"step": state.step, "tokens": state.tokens, "loss": loss, "lr": lr, "grad_norm": grad_norm}
            self.heads[head].log(record)

    def event(self, name: str, step: int, **values: Any) -> None:
        """Record something that happened once."""
        record = {"event": name, "step": step, **values}
        self._append(record)
        self.tracker.event(record)

    def alert(self, title: str, text: str, level: Level) -> None:
        """Tell somebody who is not looking."""
        self.tracker.alert(title, text, level)

    def finish(self, exit_code: int) -> None:
        """Close the trackers."""
        for tracker in (self.tracker, *self.heads.values()):
            tracker.finish(exit_code)

    def say(self, text: str) -> None:
        """Tell the user."""
        self.console.info(text)

    def _append(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            append_records(self.metrics, record)


def memory_bytes(device: torch.device) -> int:
    """Memory in use now: of the GPU, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_memory_bytes(device)
    return pages * resource.getpagesize()


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory in use so far: of the GPU, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def has_room(device: torch.device, size: int) -> bool:
    """Whether so many further bytes fit into a device's memory, or into this process's share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] > size
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # a system that does not tell
        return True
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > size


class Stopwatch:
    """Seconds since it was last read."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed
