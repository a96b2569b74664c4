"""From what a launcher announced to running process groups on the mesh.

One process needs no launcher: its group lives in memory, without a port. The device is this process's GPU when
there is one, else the CPU. How launchers announce processes is in parallel/launchers.py.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from parallel.launchers import Announcement, announced
from parallel.mesh import Mesh, Place, mesh_of
from parallel.rendezvous import with_address
from relora.errors import ConfigError

_AXES = (("data",), ("tensor",), ("data", "tensor"), ("head",), ("head", "data"))
DEFAULT_TIMEOUT = 600.0
"""Seconds that a collective may take before the run ends."""


class NotMet(RuntimeError):
    """Processes did not come together, which may be another process's fault or a machine's, and pass."""


@dataclass(frozen=True, slots=True)
class Axis:
    """This process's group along one axis of the mesh, or along several."""

    size: int
    index: int
    group: dist.ProcessGroup | None
    """None when the process is alone, so that nothing is exchanged."""
    ranks: tuple[int, ...]
    """Global ranks of the members, in order."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Runtime:
    """Where this process stands, and whom it talks to."""

    process_rank: int
    world_size: int
    device: torch.device
    mesh: Mesh = field(default_factory=Mesh)
    data: Axis = Axis(1, 0, None, (0,))
    """Processes that hold the same part of the model and train on other sequences."""
    tensor: Axis = Axis(1, 0, None, (0,))
    """Processes that hold the other parts of the same model."""
    model: Axis = Axis(1, 0, None, (0,))
    """All processes of this head: data x tensor."""
    head: Axis = Axis(1, 0, None, (0,))
    """This process's counterparts: those that hold the same part of the model for the other heads."""
    batch: Axis = Axis(1, 0, None, (0,))
    """Processes that train on different sequences: the data axes of all heads, one head after the other."""
    control: dist.ProcessGroup | None = None
    """All processes, over gloo on any device: small objects and agreements."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder and speaks to the user."""
        return self.process_rank == 0

    @property
    def place(self) -> Place:
        """Coordinates of this process."""
        return self.mesh.place(self.process_rank)


@contextmanager
def start(*, tensor: int = 1, heads: int = 1, timeout_seconds: float = DEFAULT_TIMEOUT) -> Iterator[Runtime]:
    """Open the process groups for the length of a run, and always close them.

    Inside another `start` they are joined and left open: DeepSpeed keeps groups for the life of a process, so
    several runs in one process must share them.

    Raises:
        ConfigError: the degrees do not divide the number of processes, or the launcher's words contradict each other.
        NotMet: another process did not come in time.
    """
    if dist.is_initialized():
        mesh = mesh_of(dist.get_world_size(), tensor=tensor, heads=heads)
        yield _on_mesh(dist.get_rank(), mesh, timeout_seconds)
        return
    found = with_address(announced(os.environ))
    mesh = mesh_of(found.world_size, tensor=tensor, heads=heads)
    device = _device(found)
    _announce_to_libraries(found, device)
    _open(found, "nccl" if device.type == "cuda" else "gloo", timeout_seconds)
    try:
        yield _on_mesh(found.process_rank, mesh, timeout_seconds)
    finally:
        _groups.cache_clear()
        dist.destroy_process_group()


def as_one(runtime: Runtime, timeout_seconds: float) -> Runtime:
    """The same processes as one head, whose data axis spans all of them.

    Collectives: makes groups, by all processes alike.
    """
    if runtime.mesh.heads == 1:
        return runtime
    mesh = mesh_of(runtime.world_size, tensor=runtime.mesh.tensor, heads=1)
    return _on_mesh(runtime.process_rank, mesh, timeout_seconds)


def with_limit(runtime: Runtime, seconds: float) -> Runtime:
    """The same processes, whose small exchanges take no longer than so many seconds each, or fail.

    Collectives: makes a group, by all processes alike.
    """
    if runtime.control is None:
        return runtime
    ranks = list(range(runtime.world_size))
    return replace(runtime, control=dist.new_group(ranks, timeout=timedelta(seconds=seconds), backend="gloo"))


def _open(found: Announcement, backend: str, timeout_seconds: float) -> None:
    limit = timedelta(seconds=timeout_seconds)
    if found.address is None:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=limit)
        return
    try:
        dist.init_process_group(
            backend, init_method="env://", rank=found.process_rank, world_size=found.world_size, timeout=limit
        )
    except dist.DistError as error:
        raise NotMet(
            f"process {found.process_rank} of {found.world_size} did not meet the others at "
            f"{found.address}:{found.port} within {timeout_seconds:g} s: see whether another process failed before, "
            "whether all machines reach that address, and whether the port is free (MASTER_ADDR and MASTER_PORT "
            f"overrule {found.launcher}'s). {str(error).splitlines()[0]}"
        ) from error


def _announce_to_libraries(found: Announcement, device: torch.device) -> None:
    """Set what torch and DeepSpeed read: without it DeepSpeed asks MPI, which srun and others do not offer."""
    os.environ["DS_ACCELERATOR"] = "cpu" if device.type == "cpu" else os.environ.get("DS_ACCELERATOR", "cuda")
    os.environ["LOCAL_RANK"] = str(found.local_rank if device.index is None else device.index)
    if found.address is not None:
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(found.process_rank), str(found.world_size)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = found.address, str(found.port)


def _device(found: Announcement) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = found.local_rank, torch.cuda.device_count()
    if index >= count and found.launcher not in ("torchrun", "deepspeed") and "CUDA_VISIBLE_DEVICES" in os.environ:
        index = 0  # srun and mpirun may show each process its own GPU only (--gpus-per-task)
    if index >= count:
        raise ConfigError(
            f"process {index} of this machine has no GPU: it has {count}; start at most {count} processes on it"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _on_mesh(process_rank: int, mesh: Mesh, timeout_seconds: float) -> Runtime:
    groups = _groups(mesh, timeout_seconds)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def axis(*names: str) -> Axis:
        ranks = next(ranks for ranks in mesh.groups(*names) if process_rank in ranks)
        return Axis(len(ranks), ranks.index(process_rank), groups.get(tuple(ranks)), tuple(ranks))

    return Runtime(
        process_rank=process_rank,
        world_size=mesh.world_size,
        device=device,
        mesh=mesh,
        data=axis("data"),
        tensor=axis("tensor"),
        model=axis("data", "tensor"),
        head=axis("head"),
        batch=axis("head", "data"),
        control=groups.get(()),
    )


@cache
def _groups(mesh: Mesh, timeout_seconds: float) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """Groups of more than one process by their members, and the control group as (); made by all processes alike."""
    wanted = [ranks for axes in _AXES for ranks in mesh.groups(*axes)]
    distinct = dict.fromkeys(tuple(ranks) for ranks in wanted if len(ranks) > 1)
    limit = timedelta(seconds=timeout_seconds)  # a new group does not take over the first one's
    made = {ranks: dist.new_group(list(ranks), timeout=limit) for ranks in distinct}
    if mesh.world_size > 1:
        made[()] = dist.new_group(list(range(mesh.world_size)), timeout=limit, backend="gloo")
    return made
