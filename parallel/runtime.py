"""From the environment of a process to a running process group.

One process needs no launcher: its group lives in memory, without a port. The device is the local GPU when
there is one, else the CPU.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from relora.errors import ConfigError


@dataclass(kw_only=True, slots=True, frozen=True)
class Runtime:
    """Where this process stands."""

    process_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder and speaks to the user."""
        return self.process_rank == 0


def world_size_of(environment: dict[str, str]) -> int:
    """Number of processes that a launcher announced: torchrun, srun, Open MPI; 1 without a launcher.

    Raises:
        ConfigError: the variable is not a number.
    """
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        if name in environment:
            try:
                return int(environment[name])
            except ValueError as error:
                raise ConfigError(
                    f"{name} must be a number, got {environment[name]!r}: unset it or start with torchrun"
                ) from error
    return 1


@contextmanager
def start() -> Iterator[Runtime]:
    """Open the process group for the length of a run, and always close it.

    Inside another `start` it is joined and left open: DeepSpeed keeps groups for the life of a process, so several
    runs in one process must share one.

    Raises:
        ConfigError: more than one process was started.
    """
    world_size = world_size_of(dict(os.environ))
    if world_size != 1:
        raise ConfigError(
            f"this version trains in one process, but the launcher started {world_size}: "
            "start it with --nproc_per_node 1 or with plain python"
        )
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    here = Runtime(process_rank=0, world_size=1, device=device)
    if dist.is_initialized():
        yield here
        return
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        yield here
    finally:
        dist.destroy_process_group()
