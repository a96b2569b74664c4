"""Linear layers split over the processes of the tensor axis, with or without a low-rank branch.

A column-split layer holds some of the outputs, a row-split one some of the inputs, and between the two nothing is
exchanged. The low-rank branch shares its layer's one collective; only the factor that stays whole finds a part of
its gradient on each process, and has it summed. The algebra is in docs/tensor.md.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from transformers.pytorch_utils import Conv1D

from parallel.runtime import Axis
from relora.linear import LowRankLinear


class _Copied(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.is_parameter = axis, isinstance(value, nn.Parameter)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Written over: a split layer's input has the layer for its only reader, which has just made this gradient. Any
        # module may own a parameter, and hand down a gradient that others read.
        gradient = gradient.clone(memory_format=torch.contiguous_format) if ctx.is_parameter else gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.axis.group)
        return gradient, None


class _Summed(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, axis: Axis) -> Tensor:
        value = value.contiguous()
        dist.all_reduce(value, group=axis.group)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def copied(value: Tensor, axis: Axis) -> Tensor:
    """A value equal on all processes, as each one's input to its own part; their gradients are summed."""
    result: Tensor = _Copied.apply(value, axis)  # type: ignore[no-untyped-call]
    return result


def summed(value: Tensor, axis: Axis) -> Tensor:
    """The sum of the processes' values, each of which gets the whole gradient; the argument is overwritten."""
    result: Tensor = _Summed.apply(value, axis)  # type: ignore[no-untyped-call]
    return result


class Split(nn.Module):
    """A module of which this process holds a part."""

    axis: Axis
    first: int
    """The first token of the part, where the vocabulary is cut."""


class ColumnLinear(Split, nn.Linear):
    """Some of the outputs."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., in) -> (..., part of out)."""
        return super().forward(copied(x, self.axis))


class ColumnConv1D(Split, Conv1D):  # type: ignore[misc]  # transformers is not typed
    """Some of the outputs."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., in) -> (..., part of out)."""
        result: Tensor = super().forward(copied(x, self.axis))
        return result


class ColumnLowRank(Split, LowRankLinear):
    """Some of the outputs; `up` is cut along, `down` is whole."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., in) -> (..., part of out)."""
        x, (down, up) = copied(x, self.axis), self.live()
        return self.output(x, copied(down, self.axis), up, self.bias)


class RowLinear(Split, nn.Linear):
    """Some of the inputs; the bias is whole and added once."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., part of in) -> (..., out)."""
        return _with_bias(summed(F.linear(x, self.weight), self.axis), self.bias)


class RowConv1D(Split, Conv1D):  # type: ignore[misc]  # transformers is not typed
    """Some of the inputs; the bias is whole and added once."""

    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., part of in) -> (..., out)."""
        return _with_bias(summed(x @ self.weight, self.axis), self.bias)


class RowLowRank(Split, LowRankLinear):
    """Some of the inputs; `down` is cut along, `up` and the bias are whole."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., part of in) -> (..., out)."""
        down, up = self.live()
        part = self.output(x, down, copied(up, self.axis), None)
        return _with_bias(summed(part, self.axis), self.bias)


class SummedGradients(Split):
    """Mixed into a module that is whole on every process but sees only a part of the values."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The module's own forward, on parameters whose gradients are summed over the processes."""
        stand_in = object.__new__(type(self))
        own = self._parameters.items()
        parameters = {name: None if value is None else copied(value, self.axis) for name, value in own}
        stand_in.__dict__.update(self.__dict__, _parameters=parameters)
        return super(SummedGradients, stand_in).forward(*inputs, **named)


def _with_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias
