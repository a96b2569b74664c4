"""What carries bytes between the groups of processes that host LTE's heads.

A carrier joins this process and its counterparts, which hold the same part of the model for other heads. It moves
bytes and makes no sums, so that all carriers have the same results.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.runtime import Axis, Runtime


class Carrier(Protocol):
    """Collectives over counterparts; all call the same ones in the same order, from one thread at a time."""

    def all_gather(self, flat: Tensor) -> Tensor:
        """All counterparts' bytes, in order. Shapes: (bytes,), to (counterparts, bytes)."""

    def all_to_all(self, rows: Tensor) -> Tensor:
        """Send row i to counterpart i; what each sent here, in order. Shapes: (counterparts, bytes), both."""

    def check_thread(self) -> None:
        """Refuse what cannot be used from a second thread.

        Raises:
            ConfigError: it cannot.
        """


class Alone:
    """One group of processes hosts all heads: nothing travels."""

    def all_gather(self, flat: Tensor) -> Tensor:
        """The same bytes. Shapes: (bytes,), to (1, bytes)."""
        return flat[None]

    def all_to_all(self, rows: Tensor) -> Tensor:
        """The same row. Shapes: (1, bytes), both."""
        return rows

    def check_thread(self) -> None:
        """Nothing is wrong with it."""


class GroupCarrier:
    """torch.distributed, over a group that nothing else uses."""

    def __init__(self, axis: Axis) -> None:
        assert axis.group is not None
        self._group, self._size = axis.group, axis.size

    def all_gather(self, flat: Tensor) -> Tensor:
        """All counterparts' bytes, in order. Shapes: (bytes,), to (counterparts, bytes)."""
        told = flat.new_empty(self._size, flat.numel())
        dist.all_gather(list(told.unbind()), flat.contiguous(), group=self._group)
        return told

    def all_to_all(self, rows: Tensor) -> Tensor:
        """Send row i to counterpart i; what each sent here, in order. Shapes: (counterparts, bytes), both."""
        received = torch.empty_like(rows, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, rows.contiguous(), group=self._group)
        return received

    def check_thread(self) -> None:
        """Any thread may call it."""


def group_carrier(runtime: Runtime) -> Carrier:
    """The carrier over torch.distributed, or none where one group hosts all heads."""
    return Alone() if runtime.head.group is None else GroupCarrier(runtime.head)
