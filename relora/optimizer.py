"""Parameter groups of a low-rank model, and the reset of its Adam state at a restart.

The factors have groups of their own: an engine may keep one step counter for a group, or flatten it into one
tensor, and a reset must reach the factors without touching the rest. When it is due: see relora/restart.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from relora.coded_moments import CodedPart, MomentFormat, numbers
from relora.convert import low_rank_modules
from relora.errors import ConfigError
from relora.hosted import heads_in


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW's settings."""

    lr: float = 1e-3
    """Peak learning rate; low-rank training takes about twice that of full-rank training."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; one-dimensional parameters (norms, biases) are never decayed."""
    moments: MomentFormat = MomentFormat.full
    """Both moments in float32 (full) or in 8 bits (int8); docs/quantised.md."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.lr > 0:
            raise ConfigError(f"optimizer.lr must be above 0, got {self.lr}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas must be two numbers in [0, 1), such as [0.9, 0.95], got {self.betas}")
        if not self.eps > 0:
            raise ConfigError(f"optimizer.eps must be above 0, got {self.eps}")
        if self.weight_decay < 0:
            raise ConfigError(f"optimizer.weight_decay must not be negative, got {self.weight_decay}")


class Reset(str, Enum):
    """What a restart does to the factors' Adam state."""

    zero = "zero"
    """Clear both moments and the step counter."""
    magnitude = "magnitude"
    """Drop the entries with the smallest first moment."""
    random = "random"
    """Drop entries by chance."""
    none = "none"
    """Keep everything."""


@dataclass(kw_only=True, slots=True)
class Moments:
    """Adam's state of one parameter: live views, edited in place."""

    exp_avg: Tensor | CodedPart
    exp_avg_sq: Tensor | CodedPart
    step: Tensor
    """Updates behind the moments; an engine may share one tensor among the parameters of a group."""


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Sort the trainable parameters into groups: down, up, dense, dense_no_decay; empty ones are left out."""
    layers = low_rank_modules(model).values()
    role = {id(layer.down): "down" for layer in layers} | {id(layer.up): "up" for layer in layers}
    matrix = 3 if heads_in(model) > 1 else 2  # heads in one process are stacked
    members: dict[str, list[nn.Parameter]] = {"down": [], "up": [], "dense": [], "dense_no_decay": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            dense = "dense" if parameter.ndim >= matrix else "dense_no_decay"
            members[role.get(id(parameter), dense)].append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "lr": config.lr,
            "betas": (config.betas[0], config.betas[1]),
            "eps": config.eps,
            "weight_decay": 0.0 if name == "dense_no_decay" else config.weight_decay,
        }
        for name, parameters in members.items()
        if parameters
    ]


@torch.no_grad()
def clear_moments(moments: Moments) -> None:
    """Forget everything, the step counter too, in place."""
    moments.exp_avg.zero_()
    moments.exp_avg_sq.zero_()
    moments.step.zero_()


@torch.no_grad()
def step_sizes(moments: Moments, *, lr: float, beta: float, eps: float) -> Tensor:
    """What Adam's last update multiplied each entry of its corrected first moment by, flat."""
    corrected: Tensor = numbers(moments.exp_avg_sq).flatten() / (1 - beta ** float(moments.step))
    return corrected.sqrt_().add_(eps).reciprocal_().mul_(lr)


@torch.no_grad()
def scale_moments(moments: Moments, factor: float) -> None:
    """Make both averages count less, in place; the step counter stays."""
    moments.exp_avg.mul_(factor)
    moments.exp_avg_sq.mul_(factor)


@torch.no_grad()
def prune_moments(moments: Moments, keep: Tensor) -> None:
    """Remove the entries outside a mask, in place.

    The step counter stays: what outlives a pruning is still an average over all those steps.
    """
    # One mask for both: an entry with exp_avg left and exp_avg_sq gone would jump by lr * exp_avg / eps.
    moments.exp_avg.masked_fill_(~keep, 0.0)
    moments.exp_avg_sq.masked_fill_(~keep, 0.0)


def kept(exp_avg: Tensor, reset: Reset, prune_ratio: float, generator: torch.Generator) -> Tensor:
    """Return the mask of the entries that a pruning keeps: exactly all but round(prune_ratio * entries).

    Indices, not a threshold or a draw per entry: exact under ties, in bfloat16, and beyond 2**24 entries.
    """
    entries = exp_avg.numel()
    number = entries - round(prune_ratio * entries)
    if reset == Reset.magnitude:
        index = exp_avg.abs().flatten().topk(number).indices
    else:
        index = torch.randperm(entries, generator=generator)[:number].to(exp_avg.device)
    mask = torch.zeros(entries, dtype=torch.bool, device=exp_avg.device)
    mask[index] = True
    return mask.view(exp_avg.shape)
