"""How fast processes exchange: all-reduce over all of them, and over pairs within and between machines."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.runtime import Runtime

SIZES = (1 << 10, 1 << 20, 1 << 24)
"""Bytes: the first shows latency, the last bandwidth."""
_REPEATS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One all-reduce, as the main process saw it."""

    between: str
    """Which processes."""
    bytes: int
    """Size of the tensor."""
    seconds: float
    """Median time of one."""
    bytes_per_second: float
    """What each process's link carried: a ring sends the tensor 2 (n-1)/n times."""


def measure(runtime: Runtime, hosts: list[str]) -> list[Reading]:
    """Time all-reduces; `hosts` are the machines' names by process rank. Collectives: on all processes alike."""
    readings: list[Reading] = []
    for name, ranks in groups_to_measure(hosts).items():
        group = dist.new_group(ranks)
        if runtime.process_rank in ranks:
            readings += [_reading(runtime, group, name, len(ranks), size) for size in SIZES]
        dist.barrier(group=runtime.control)
    return readings


def time_all_reduce(runtime: Runtime, *, limit_seconds: float, size: int = 1 << 20) -> float | None:
    """Seconds of an all-reduce over all processes once they are connected; None if it does not end."""
    value = torch.ones(size // 4, device=runtime.device)
    seconds = 0.0
    for _ in range(2):  # the first one connects
        before = time.perf_counter()
        work = dist.all_reduce(value, async_op=True)
        assert work is not None
        try:
            work.wait(timedelta(seconds=limit_seconds))
        except RuntimeError:
            return None
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - before
    return seconds


def round_trips(runtime: Runtime, ranks: Sequence[int], size: int = 1 << 20) -> dict[int, float]:
    """Seconds that so many bytes take from process 0 to others and back, over gloo; nothing on the others."""
    found = {}
    value = torch.zeros(size, dtype=torch.uint8)
    for rank in ranks:
        for _ in range(2):  # the first one connects
            if runtime.is_main:
                before = time.perf_counter()
                dist.send(value, dst=rank, group=runtime.control)
                dist.recv(value, src=rank, group=runtime.control)
                found[rank] = time.perf_counter() - before
            elif runtime.process_rank == rank:
                dist.recv(value, src=0, group=runtime.control)
                dist.send(value, dst=0, group=runtime.control)
    return found


def groups_to_measure(hosts: list[str]) -> dict[str, list[int]]:
    """All processes, and with process 0 the first other one on its machine and the first one on another."""
    ranks = range(len(hosts))
    groups = {"all processes": list(ranks)}
    near = [rank for rank in ranks if rank and hosts[rank] == hosts[0]]
    far = [rank for rank in ranks if hosts[rank] != hosts[0]]
    if near and len(hosts) > 2:
        groups[f"0 and {near[0]}, one machine"] = [0, near[0]]
    if far and len(hosts) > 2:
        groups[f"0 and {far[0]}, two machines"] = [0, far[0]]
    return groups


def _reading(runtime: Runtime, group: dist.ProcessGroup, name: str, count: int, size: int) -> Reading:
    value = torch.ones(size // 4, device=runtime.device)
    times = []
    for _ in range(_REPEATS + 1):
        before = time.perf_counter()
        dist.all_reduce(value, group=group)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
        value.fill_(1.0)
    seconds = sorted(times[1:])[_REPEATS // 2]  # the first one connects
    return Reading(between=name, bytes=size, seconds=seconds, bytes_per_second=2 * (count - 1) / count * size / seconds)
