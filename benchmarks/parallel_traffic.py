"""What collectives send: bytes and calls by axis of the mesh and by kind.

They are counted where torch hands them to a backend, below all of torch.distributed's functions, since DeepSpeed keeps
some of these under names of its own. Sums and gathers are taken to travel over a ring.
"""

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.runtime import Runtime

DATA, TENSOR, BOTH = "data", "tensor", "both"
ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER = "all-reduce", "reduce-scatter", "all-gather"
_KINDS = {
    "allreduce_": ALL_REDUCE,
    "allreduce_coalesced_": ALL_REDUCE,
    "reduce_scatter_": REDUCE_SCATTER,
    "_reduce_scatter_base_": REDUCE_SCATTER,
    "reduce_scatter_tensor_coalesced_": REDUCE_SCATTER,
    "allgather_": ALL_GATHER,
    "_allgather_base_": ALL_GATHER,
    "allgather_coalesced_": ALL_GATHER,
    "allgather_into_tensor_coalesced_": ALL_GATHER,
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "alltoall_": "all-to-all",
    "alltoall_base_": "all-to-all",
}
_WITHOUT_TENSORS = {"barrier", "monitored_barrier_", "check_for_nan"}


@dataclass(kw_only=True, slots=True)
class Flow:
    """Collectives of one kind on one axis."""

    calls: int = 0
    handed: int = 0
    """Bytes of the whole tensors."""
    sent: int = 0
    """Bytes that one process of a ring sends for them; of a broadcast or a reduction, the mean over the processes."""


class Traffic(TorchDispatchMode):
    """Within it the collectives of this process are counted, and made."""

    def __init__(self, runtime: Runtime) -> None:
        """`runtime` knows the axes."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._axes = {frozenset(runtime.model.ranks): BOTH}
        self._axes |= {frozenset(runtime.tensor.ranks): TENSOR, frozenset(runtime.data.ranks): DATA}
        self.flows: dict[tuple[str, str], Flow] = defaultdict(Flow)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it when it is a collective."""
        namespace, name = func._overloadpacket._qualified_op_name.split("::")
        if namespace == "c10d" and name not in _WITHOUT_TENSORS:
            self._count(name, (*args, *(kwargs or {}).values()))
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, arguments: tuple[Any, ...]) -> None:
        assert name in _KINDS, f"a collective that nobody taught this benchmark to count: {name}"
        ranks = dist.get_process_group_ranks(_group(arguments))
        if len(ranks) == 1:
            return
        kind = _KINDS[name]
        whole = max(_nbytes(argument) for argument in arguments)  # parts on one side, the whole on the other
        flow = self.flows[self._axes[frozenset(ranks)], kind]
        flow.calls += 1
        flow.handed += whole
        flow.sent += ring(kind, whole, len(ranks))

    def rows(self) -> list[dict[str, Any]]:
        """The flows as plain values."""
        return [{"axis": axis, "kind": kind, **asdict(flow)} for (axis, kind), flow in sorted(self.flows.items())]


def ring(kind: str, whole: int, size: int) -> int:
    """Bytes that one of `size` processes sends for a tensor of `whole` bytes."""
    passes = 2 if kind == ALL_REDUCE else 1
    return round(passes * (size - 1) / size * whole)


def _group(arguments: tuple[Any, ...]) -> dist.ProcessGroup:
    boxed = next(one for one in arguments if isinstance(one, torch.ScriptObject) and "ProcessGroup" in str(one._type()))
    group: dist.ProcessGroup = dist.ProcessGroup.unbox(boxed)
    return group


def _nbytes(argument: Any) -> int:
    return sum(one.nbytes for one in tree_leaves(argument) if isinstance(one, torch.Tensor))
