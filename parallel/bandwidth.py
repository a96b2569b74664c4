"""How fast processes exchange: all-reduce over all of them, and over pairs within and between machines."""

import time
from dataclasses import dataclass

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
