"""Small exchanges between processes: sums of scalars, plain objects, agreement. All members of a group call them.

Big tensors do not travel here: gradients go through the engine, factors through parallel/shards.py, activations
through parallel/tensor_layers.py.
"""

import itertools
import pickle
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from parallel.runtime import Axis, Runtime
from relora.errors import ConfigError

T = TypeVar("T")
_POLL_SECONDS = 0.05
_tasks = itertools.count()  # of this process; the same on all, since all call on_main alike


def sum_over(axis: Axis, value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over an axis, equal on all of its processes; the argument is overwritten."""
    if axis.group is not None:
        dist.all_reduce(value, group=axis.group)
    return value


def gather_objects(runtime: Runtime, value: T) -> list[T]:
    """Every process's plain object, in order of process ranks, on every process."""
    if runtime.control is None:
        return [value]
    gathered: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(gathered, value, group=runtime.control)
    return gathered


def broadcast_object(runtime: Runtime, value: T | None) -> T:
    """The main process's plain object, on every process; the others' argument is ignored."""
    box: list[Any] = [value]
    if runtime.control is not None:
        dist.broadcast_object_list(box, src=0, group=runtime.control)
    result: T = box[0]
    return result


def share_work(runtime: Runtime, names: Sequence[str], work: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a piece of work gives for each name, made by one process and given to all; on the CPU where it was sent."""
    if runtime.control is None:
        return {name: work(name) for name in names}
    mine = {
        name: work(name).cpu().contiguous()
        for number, name in enumerate(names)
        if number % runtime.world_size == runtime.process_rank
    }
    kinds = gather_objects(runtime, {name: (tuple(value.shape), value.dtype) for name, value in mine.items()})
    results = {}
    for number, name in enumerate(names):
        owner = number % runtime.world_size
        shape, dtype = kinds[owner][name]
        results[name] = mine[name] if owner == runtime.process_rank else torch.empty(shape, dtype=dtype)
        dist.broadcast(results[name], src=owner, group=runtime.control)
    return results


def on_main(runtime: Runtime, task: Callable[[], T]) -> T:
    """What the main process gets from a task, on every process; the others wait however long it takes.

    The result must be picklable. It travels through the store of the process group, which has no time limit.

    Raises:
        ConfigError: the task's, on every process.
    """
    if runtime.control is None:
        return task()
    store, key = dist.distributed_c10d._get_default_store(), f"on_main/{next(_tasks)}"
    if runtime.is_main:
        store.set(key, pickle.dumps(_outcome(task)))  # type: ignore[arg-type]  # its annotation forgets bytes
    while not store.check([key]):
        time.sleep(_POLL_SECONDS)
    value, error = pickle.loads(store.get(key))  # written by this job's own main process
    if error is not None:
        raise ConfigError(error)
    result: T = value
    return result


def _outcome(task: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return task(), None
    except ConfigError as error:
        return None, str(error)


def barrier(runtime: Runtime) -> None:
    """Wait until every process is here."""
    if runtime.control is not None:
        dist.barrier(group=runtime.control)


def same_on_all(runtime: Runtime, what: str, value: str, way_out: str) -> None:
    """Check that a value is the same on every process.

    Raises:
        ConfigError: it is not, on every process alike.
    """
    values = gather_objects(runtime, value)
    for rank, theirs in enumerate(values):
        if theirs != values[0]:
            raise ConfigError(
                f"{what} must be the same on all {runtime.world_size} processes, but process 0 has {values[0]} and "
                f"process {rank} has {theirs}: {way_out}"
            )
