"""The linear layers that benchmarks/linear.py compares: each takes an input forward and a gradient back.

All hold the same weight and, but for the full linear, factors of the same rank. What operations read and write is
counted as they are dispatched; what a compiled graph does inside is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.planning.flops import operation_flops
from launch.planning.microbatch import Ledger
from relora.choice import candidates, fastest, measure, shape_of
from relora.kernels.setting import run_on
from relora.linear import LowRankLinear
from relora.merged import formed_weights
from relora.paths import ForwardPath

SCALING = 0.25
FULL, PEFT, COMPILED = "full linear", "PEFT, eager", "PEFT, compiled"
AUTO = ForwardPath.auto.value


@dataclass(kw_only=True, slots=True, frozen=True)
class Shape:
    """One layer and its microbatch."""

    outputs: int
    inputs: int
    tokens: int
    rank: int
    dtype: str
    microbatches: int = 1
    """Passes of an update, which share a formed weight."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Counted:
    """What the operations of one update do, all told, per microbatch."""

    flops: float
    bytes: float
    """Read and written by operations."""
    peak_bytes: int
    """Most that is alive at once, besides the layer and the microbatch."""
    roofline_seconds: float
    """Sum over operations of the longer of their arithmetic and their traffic."""


def paths_on(device: torch.device) -> list[ForwardPath]:
    """The paths of `lora.forward` that can run on a device, but for `auto`."""
    missing = {ForwardPath.auto} if run_on(device) else {ForwardPath.auto, ForwardPath.fused}
    return [path for path in ForwardPath if path not in missing]


@dataclass(kw_only=True, slots=True, frozen=True)
class Compared:
    """The layers of one shape."""

    updates: dict[str, Callable[[], None]]
    """An update of each, by name."""
    taken: str
    """The path that `auto` took, by a measurement of its own."""


def variants(shape: Shape, device: torch.device, *, compiled: bool) -> Compared:
    """Make the layers."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, shape.dtype)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    x, gradient = drawn(shape.tokens, shape.inputs).requires_grad_(), drawn(shape.tokens, shape.outputs)
    weight = drawn(shape.outputs, shape.inputs) * shape.inputs**-0.5
    down, up = drawn(shape.rank, shape.inputs) * shape.inputs**-0.5, drawn(shape.outputs, shape.rank)

    def update(layer: nn.Module, run: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def once() -> None:
            with formed_weights(layer, seed=0, step=0):
                for _ in range(shape.microbatches):
                    run(x).backward(gradient)
            layer.zero_grad(set_to_none=True)
            x.grad = None

        return once

    full = nn.Linear(shape.inputs, shape.outputs, bias=False, device=device, dtype=dtype)
    full.weight.data = weight.clone()
    made = {FULL: update(full, full)}
    paths = paths_on(device)

    def ours(path: ForwardPath) -> LowRankLinear:
        layer = LowRankLinear(nn.Parameter(weight), None, adapter_rank=shape.rank, scaling=SCALING)
        layer.down.data, layer.up.data, layer.path = down.clone(), up.clone(), path
        return layer

    for path in paths:
        made[path.value] = update(layer := ours(path), layer)
    wanted = shape_of(ours(ForwardPath.addmm), tokens=shape.tokens, microbatches=shape.microbatches)
    taken = fastest(measure(wanted, candidates(device, dtype, may_form=True), device))
    made[AUTO] = update(layer := ours(taken), layer)
    theirs = _peft_layer(weight, down, up)
    made[PEFT] = update(theirs, theirs)
    if compiled:
        torch.compiler.reset()
        made[COMPILED] = update(theirs, torch.compile(theirs))
    return Compared(updates=made, taken=taken.value)


def _peft_layer(weight: Tensor, down: Tensor, up: Tensor) -> nn.Module:
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    plain.weight.data = weight
    settings = peft.LoraConfig(r=len(down), lora_alpha=SCALING * len(down), target_modules=["0"])
    model: Any = peft.get_peft_model(nn.Sequential(plain), settings, autocast_adapter_dtype=False)
    layer: Any = model.base_model.model[0]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = down.clone(), up.clone()
    module: nn.Module = layer.train()
    return module


class _Traffic(TorchDispatchMode):
    """Bytes that operations read and write, and the time that they need at least."""

    def __init__(self, peak: float, bandwidth: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak, self.bandwidth, self.bytes, self.seconds = peak, bandwidth, 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        written = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        places = {one.untyped_storage().data_ptr() for one in read}
        is_view = not func._schema.is_mutable and any(one.untyped_storage().data_ptr() in places for one in written)
        if not is_view and "empty" not in func._schema.name:
            moved = sum(one.numel() * one.element_size() for one in (*read, *written))
            flops = operation_flops(func, args, kwargs or {}, result)
            self.bytes += moved
            self.seconds += max(flops / self.peak, moved / self.bandwidth)
        return result


def counted(update: Callable[[], None], shape: Shape, *, peak: float, bandwidth: float) -> Counted:
    """Run an update and count."""
    with Ledger([]) as ledger:
        update()
    with _Traffic(peak, bandwidth) as traffic:
        update()
    return Counted(
        flops=ledger.flops / shape.microbatches,
        bytes=traffic.bytes / shape.microbatches,
        peak_bytes=ledger.peak,
        roofline_seconds=traffic.seconds / shape.microbatches,
    )
