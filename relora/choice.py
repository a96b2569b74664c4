"""What `lora.forward=auto` takes for a layer: the path that is fastest for its shape, by measurement.

A stand-in of the layer's shape is run forward and backward on the device. Times differ from machine to machine and
from day to day, so a choice is made once for a run and kept with its state; relora knows no files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from relora.kernels.setting import INTERPRETED, run_on
from relora.linear import LowRankLinear
from relora.merged import formed_weights
from relora.paths import ForwardPath
from relora.quantised import BaseFormat

_SECONDS = 0.3  # of measurement for each path
_LEAST, _MOST = 3, 50  # repetitions
_CLEARLY = 0.95  # smaller differences are often the measurement's own


@dataclass(kw_only=True, slots=True, frozen=True)
class LayerShape:
    """What decides how long a layer takes."""

    outputs: int
    inputs: int
    rank: int
    tokens: int
    """Rows of a microbatch."""
    microbatches: int
    """Of an update; they share a formed weight."""
    dtype: str
    trains_down: bool
    transposed: bool
    extra_bits: bool
    base: BaseFormat = BaseFormat.full

    @property
    def key(self) -> str:
        """The shape as a word."""
        words = [f"{self.outputs}x{self.inputs} rank {self.rank} tokens {self.tokens}x{self.microbatches} {self.dtype}"]
        words += ["transposed"] if self.transposed else []
        words += ["split"] if self.extra_bits else []
        words += [self.base.value] if self.base != BaseFormat.full else []
        words += [] if self.trains_down else ["down frozen"]
        return " ".join(words)


def shape_of(layer: LowRankLinear, *, tokens: int, microbatches: int) -> LayerShape:
    """Return the shape of a layer that is whole in this process, or a part by tensor parallelism."""
    return LayerShape(
        outputs=layer.out_features,
        inputs=layer.in_features,
        rank=layer.adapter_rank,
        tokens=tokens,
        microbatches=microbatches,
        dtype=str(layer.up.dtype).removeprefix("torch."),
        trains_down=layer.down.requires_grad,
        transposed=layer.transposed,
        extra_bits=layer.extra_bits is not None,
        base=BaseFormat.full if layer.quantised is None else layer.quantised.form,
    )


def candidates(device: torch.device, dtype: torch.dtype, *, may_form: bool) -> list[ForwardPath]:
    """Return the paths that `auto` measures; `merged` only where its weights may be formed, and quickly."""
    found = [ForwardPath.factored, ForwardPath.addmm]
    if may_form and (dtype != torch.bfloat16 or run_on(device)):  # torch rounds by chance in 64-bit integers
        found.append(ForwardPath.merged)
    if run_on(device) and not INTERPRETED:  # which is for proofs, not for speed
        found.append(ForwardPath.fused)
    return found


def measure(shape: LayerShape, paths: Sequence[ForwardPath], device: torch.device) -> dict[ForwardPath, float]:
    """Return the seconds of a microbatch's forward and backward by each path, with its share of forming a weight.

    The paths take turns, and the fastest turn counts: what else the machine does only ever adds.
    """
    with torch.random.fork_rng():
        layer = _stand_in(shape, device)
        x = torch.randn(shape.tokens, shape.inputs, device=device, dtype=layer.up.dtype, requires_grad=True)
        gradient = torch.randn(shape.tokens, shape.outputs, device=device, dtype=layer.up.dtype)
    best = dict.fromkeys(paths, float("inf"))
    spent, turn = 0.0, 0
    while turn < _LEAST or (spent < _SECONDS * len(paths) and turn < _MOST):
        for path in paths:
            layer.path = path
            forming = _timed_forming(layer, device) if path == ForwardPath.merged else 0.0
            with formed_weights(layer, seed=0, step=0):
                passes = timed(partial(_passes, layer, x, gradient), device)
            spent += forming + passes
            if turn:  # the first one warms up
                best[path] = min(best[path], passes + forming / shape.microbatches)
            layer.zero_grad()
            x.grad = None
        turn += 1
    return best


def fastest(times: Mapping[ForwardPath, float]) -> ForwardPath:
    """Return the path to take: `addmm`, unless another one is clearly faster."""
    best = min(times, key=times.__getitem__)
    return best if times[best] < _CLEARLY * times[ForwardPath.addmm] else ForwardPath.addmm


def _passes(layer: LowRankLinear, x: Tensor, gradient: Tensor) -> None:
    layer(x).backward(gradient)


def _stand_in(shape: LayerShape, device: torch.device) -> LowRankLinear:
    size = (shape.inputs, shape.outputs) if shape.transposed else (shape.outputs, shape.inputs)
    weight = nn.Parameter(torch.randn(size, device=device))
    layer = LowRankLinear(weight, None, adapter_rank=shape.rank, scaling=0.5, transposed=shape.transposed)
    nn.init.normal_(layer.up)
    if shape.extra_bits:
        layer.split_base_()
    elif shape.base != BaseFormat.full:
        layer.quantise_base_(shape.base, remainder=False)
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(getattr(torch, shape.dtype))
    layer.down.requires_grad_(shape.trains_down)
    return layer


def _timed_forming(layer: LowRankLinear, device: torch.device) -> float:
    def form_once() -> None:
        with formed_weights(layer, seed=0, step=0):
            pass

    return timed(form_once, device)


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of an action, until the device has done all of it."""
    _wait(device)
    began = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
