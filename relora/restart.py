"""The restart: fold the factors into the base weight, draw new ones, forget their Adam state.

It knows no processes: a ParameterStore reaches base weights, float32 masters and Adam state wherever they live,
and PlainStore does so for a torch optimizer. The learning rate's part is in relora/schedule.py.
Source: ReLoRA, Lialin et al. 2023 (arXiv 2307.05695); docs/relora.md says what differs from its code and why.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from relora.convert import low_rank_modules
from relora.errors import ConfigError
from relora.initialize import draw_down, key_of, keyed_generator
from relora.linear import BasePart, LowRankLinear
from relora.optimizer import Moments, Reset, clear_moments, kept, prune_moments
from relora.precision import MergePrecision

_PRUNING = (Reset.magnitude, Reset.random)

Draw = Callable[[str, Sequence[int], int], Tensor | None]


@dataclass(kw_only=True, slots=True)
class ReloraConfig:
    """When to restart, and what a restart keeps."""

    every: int = 1000
    """Steps in a cycle."""
    reset: Reset = Reset.zero
    """What happens to the factors' Adam state: zero, magnitude, random or none."""
    prune_ratio: float | None = None
    """Share of the Adam state that `magnitude` and `random` remove."""
    warm_start_steps: int = 0
    """Full-rank steps before the first cycle."""
    warm_start_lr: float | None = None
    """Peak learning rate of the warm start; null: optimizer.lr, though low-rank training wants about twice as much."""
    merge_precision: MergePrecision = MergePrecision.split
    """How a bfloat16 base weight takes up a merge: split, stochastic or nearest; no matter in float32."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.every < 1:
            raise ConfigError(f"relora.every must be at least 1 step, got {self.every}")
        if self.warm_start_steps < 0:
            raise ConfigError(f"relora.warm_start_steps must not be negative, got {self.warm_start_steps}")
        if self.warm_start_lr is not None and not self.warm_start_lr > 0:
            raise ConfigError(f"relora.warm_start_lr must be above 0 (or null), got {self.warm_start_lr}")
        if self.reset in _PRUNING:
            if self.prune_ratio is None:
                raise ConfigError(
                    f"relora.reset={Reset(self.reset).value} needs relora.prune_ratio, the share to remove"
                )
            if not 0 < self.prune_ratio <= 1:
                raise ConfigError(f"relora.prune_ratio must be in (0, 1], got {self.prune_ratio}")
        elif self.prune_ratio is not None:
            raise ConfigError(
                f"relora.prune_ratio={self.prune_ratio} has no effect with relora.reset="
                f"{Reset(self.reset).value}: leave it out, or choose relora.reset=magnitude or random"
            )


@dataclass(kw_only=True, slots=True)
class RestartReport:
    """What one restart did; the fields of the run's restart event."""

    restart: int
    """Its index; the first is 1."""
    layers: int
    """Layers merged."""
    update_ratio: float
    """Norm of all merged updates over the norm of all their base weights."""
    changed_share: float
    """Share of the base weights' entries that changed; far below 1, the merge rounded away."""
    pruned_count: int
    """Entries of the factors' moments that were removed."""
    pruned_share: float
    """The same as a share of the entries there were; 0 when there was no state yet."""
    seconds: float
    """Wall time."""
    base_error: float | None = None
    """Of quantised base weights: how far codes are from what they should hold, over the weights' norm; else None."""
    lost_share: float | None = None
    """Norm of what the merges lost for good over that of the updates: next to 0 when remainders are kept."""
    base_shift: float | None = None
    """How far the weights that passes compute with moved besides the updates, over their norm."""


class ParameterStore(Protocol):
    """Access to what a restart reads and writes, wherever it lives: whole, or cut among processes.

    A "whole" value has the shape that it has in the plain model in one process.
    """

    masters_alike: bool
    """Whether all processes that train on different sequences hold the same masters."""

    def factors(self, layer: LowRankLinear) -> tuple[Tensor, Tensor]:
        """Return the float32 values of down and up, in the shapes that the layer computes with."""

    def factor_shapes(self, layer: LowRankLinear) -> tuple[Sequence[int], Sequence[int]]:
        """Return the shapes of what `factors` returns."""

    def base(self, layer: LowRankLinear) -> BasePart:
        """Return the part of the layer's base weight that this process holds: live memory, edited in place."""

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Return the parameter's whole shape."""

    def write(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Set the master and the live copy from the whole value."""

    def moments(self, parameter: nn.Parameter) -> Moments | None:
        """Return live views of this process's part of the Adam state, or None before the first step."""

    def first_moment(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole first moment."""

    def part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """Return the entries of a whole tensor that `moments` holds, in its shape."""

    def total(self, sums: Tensor) -> Tensor:
        """Add up sums over all processes that share the model."""

    def master(self, parameter: nn.Parameter) -> Tensor:
        """Return a live view of this process's part of the float32 master, flat."""

    def publish(self, parameters: Sequence[nn.Parameter]) -> None:
        """Bring the copies that the next forward pass uses up to their edited masters."""


class PlainStore:
    """The store of a torch Adam in one process, whose parameters are their own masters."""

    masters_alike = True

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def factors(self, layer: LowRankLinear) -> tuple[Tensor, Tensor]:
        """Return the parameters' values; in float32 they are the parameters' own memory."""
        return layer.down.detach().float(), layer.up.detach().float()

    def factor_shapes(self, layer: LowRankLinear) -> tuple[Sequence[int], Sequence[int]]:
        """Return the parameters' shapes."""
        return layer.down.shape, layer.up.shape

    def base(self, layer: LowRankLinear) -> BasePart:
        """Return all of it."""
        return layer.whole_base()

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Return the parameter's shape."""
        return tuple(parameter.shape)

    def write(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Overwrite the parameter."""
        parameter.data.copy_(whole)

    def moments(self, parameter: nn.Parameter) -> Moments | None:
        """Return the optimizer's own tensors, or None before the first step."""
        state = self._optimizer.state.get(parameter)  # indexing would make an empty state and break saving it
        if not state:
            return None
        return Moments(exp_avg=state["exp_avg"], exp_avg_sq=state["exp_avg_sq"], step=state["step"])

    def first_moment(self, parameter: nn.Parameter) -> Tensor:
        """Return the optimizer's own tensor."""
        exp_avg: Tensor = self._optimizer.state[parameter]["exp_avg"]
        return exp_avg

    def part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """Return all of it."""
        return whole

    def total(self, sums: Tensor) -> Tensor:
        """Return the sums, which are this process's."""
        return sums

    def master(self, parameter: nn.Parameter) -> Tensor:
        """Return the parameter's own memory."""
        return parameter.data.view(-1)

    def publish(self, parameters: Sequence[nn.Parameter]) -> None:
        """Do nothing: parameters are their own masters."""


def restart_due(config: ReloraConfig, step: int, total_steps: int) -> bool:
    """Tell whether a restart follows the first `step` updates.

    None follows the warm start's last step, nor the run's: there the export folds the factors in.
    """
    trained = step - config.warm_start_steps
    return trained > 0 and step < total_steps and trained % config.every == 0


def cycle_of(config: ReloraConfig, step: int) -> int:
    """Return the 0-based cycle of the update that comes after `step` updates; the warm start counts as 0."""
    return max(0, step - config.warm_start_steps) // config.every


@torch.no_grad()
def restart(
    model: nn.Module,
    config: ReloraConfig,
    store: ParameterStore,
    *,
    seed: int,
    restart_index: int,
    heads: Sequence[int] = (0,),
    merged: bool = False,
    draw: Draw | None = None,
) -> RestartReport:
    """Merge, redraw and reset every low-rank layer; the model's function is the same before and after.

    Args:
        heads: whose factors this process holds; of several, stacked.
        merged: whether the base weights have taken the factors up already, by a sync.
        draw: what gives a layer its new `down`, from its name, the shape and the restart's index; at random where it
            gives None.

    Raises: ConfigError when a pruning reset removed nothing from the state there was.
    """
    assert restart_index >= 1, "draw 0 is the conversion's"
    began = time.perf_counter()
    sums = torch.zeros(7, dtype=torch.float64)
    removed = state_entries = 0
    layers = low_rank_modules(model)
    for name, layer in layers.items():
        down, up = store.factors(layer)
        key = None if merged else key_of(seed, "round", name, heads[0], restart_index)
        sums += _merged(layer, down, up, store.base(layer), config.merge_precision, key)
        shape = store.shape(layer.down)
        given = None if draw is None else draw(name, shape, restart_index)
        store.write(layer.down, _drawn(name, shape, seed, heads, restart_index) if given is None else given)
        store.write(layer.up, torch.zeros(()).expand(store.shape(layer.up)))
        pruned, of = _reset_layer(name, layer, config, store, seed=seed, heads=heads, restart_index=restart_index)
        removed, state_entries = removed + pruned, state_entries + of
    if config.reset in _PRUNING and state_entries and not removed:
        raise ConfigError(
            f"relora.prune_ratio={config.prune_ratio} removed none of the {state_entries} entries of Adam's "
            "state: raise it, or say so with relora.reset=none"
        )
    delta_squared, base_squared, changes, entries, *errors = store.total(sums).tolist()
    quantised = any(layer.quantised is not None for layer in layers.values())
    norms = (base_squared, delta_squared, base_squared)
    shares = [(error / norm) ** 0.5 if norm else 0.0 for error, norm in zip(errors, norms, strict=True)]
    base_error, lost_share, base_shift = shares if quantised else (None, None, None)
    return RestartReport(
        restart=restart_index,
        layers=len(layers),
        update_ratio=(delta_squared / base_squared) ** 0.5 if base_squared else 0.0,
        changed_share=changes / max(1, entries),
        pruned_count=removed,
        pruned_share=removed / max(1, state_entries),
        seconds=time.perf_counter() - began,
        base_error=base_error,
        lost_share=lost_share,
        base_shift=base_shift,
    )


def _merged(
    layer: LowRankLinear, down: Tensor, up: Tensor, base: BasePart, precision: MergePrecision, key: int | None
) -> Tensor:
    """Merge a layer's delta, unless its base weight has it (no key); return what that adds to a restart's sums.

    Shapes: (7,): delta squared, base squared, entries changed, entries; of requantised ones, error squared, lost, moved
    """
    sums = torch.zeros(7, dtype=torch.float64)
    sums[1], sums[3] = base.squared_norm(), base.entries
    if base.quantised is not None:
        assert key is not None, "syncs of LTE know no quantised base weights"
        taken = layer.requantise_(down, up)
        sums[0], sums[2] = taken.update, taken.changed
        sums[4], sums[5], sums[6] = taken.rounding, taken.lost, taken.moved
    elif key is not None:
        sums[0] = layer.delta_norm(down, up) ** 2 * base.replicas / base.layer_replicas
        sums[2] = layer.merge_(precision, down, up, key, base)
    return sums / base.replicas


def _drawn(name: str, shape: Sequence[int], seed: int, heads: Sequence[int], restart_index: int) -> Tensor:
    rank, inputs = shape[-2:]
    each = [draw_down(name, (rank, inputs), seed=seed, head=head, restart_index=restart_index) for head in heads]
    return torch.stack(each).view(*shape)


def _reset_layer(
    name: str,
    layer: LowRankLinear,
    config: ReloraConfig,
    store: ParameterStore,
    *,
    seed: int,
    heads: Sequence[int],
    restart_index: int,
) -> tuple[int, int]:
    """Reset both factors' moments; return the entries removed and the entries there were, of the whole."""
    removed = entries = 0
    for factor, parameter in (("down", layer.down), ("up", layer.up)):
        moments = store.moments(parameter) if parameter.requires_grad else None
        if moments is None:
            continue
        size = math.prod(store.shape(parameter))
        entries += size
        if config.reset == Reset.zero:
            clear_moments(moments)
            removed += size
        elif config.reset in _PRUNING:
            assert config.prune_ratio is not None, "ReloraConfig asks for it"
            first = store.first_moment(parameter)
            of_heads = first.view(len(heads), -1)
            masks = [
                kept(
                    row,
                    config.reset,
                    config.prune_ratio,
                    keyed_generator(seed, "prune", name, factor, head, restart_index),
                )
                for row, head in zip(of_heads, heads, strict=True)
            ]
            keep = torch.stack(masks).view(first.shape)
            prune_moments(moments, store.part(parameter, keep))
            removed += size - int(torch.count_nonzero(keep))
    return removed, entries
