"""Groups of low-rank factors that live or die together, and the proximal step that makes whole groups exactly zero.

The step solves argmin over x of threshold * ||x|| + ||x - theta||^2 / 2 for each group, which is
x = theta * max(0, 1 - threshold / ||theta||). It runs on masters, whole or cut among processes.
Source: Yuan and Lin 2006 (group lasso); Parikh and Boyd 2014, Proximal Algorithms, section 6.5.1.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from continual.method import Trainee
from relora.linear import LowRankLinear
from relora.optimizer import scale_moments


class Grouping(str, Enum):
    """Which factors form a group."""

    block = "block"
    """All of a transformer block."""
    matrix = "matrix"
    """Both of a layer."""
    factor = "factor"
    """Each by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Factors that become zero together."""

    name: str
    parameters: tuple[nn.Parameter, ...]


def groups_of(layers: Mapping[str, LowRankLinear], grouping: Grouping) -> list[Group]:
    """The groups of a model's low-rank layers, in the order of the layers."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, layer in layers.items():
        for factor, parameter in (("down", layer.down), ("up", layer.up)):
            found.setdefault(_group_name(name, factor, grouping), []).append(parameter)
    return [Group(name=name, parameters=tuple(parameters)) for name, parameters in found.items()]


def block_of(name: str) -> str:
    """The block of a module: its name up to the first number, as in model.layers.3; without one, itself."""
    words = name.split(".")
    return next((".".join(words[: place + 1]) for place, word in enumerate(words) if word.isdigit()), name)


def norms_of(on: Trainee, groups: Sequence[Group]) -> list[float]:
    """The norm of each group, equal on all processes."""
    squared = on.squared_norms([parameter for group in groups for parameter in group.parameters]).cpu()
    parts = squared.split([len(group.parameters) for group in groups])
    return [math.sqrt(float(part.sum())) for part in parts]


def size_of(on: Trainee, group: Group) -> int:
    """Entries of a group."""
    return sum(math.prod(on.store.shape(parameter)) for parameter in group.parameters)


@torch.no_grad()
def shrink_(on: Trainee, groups: Sequence[Group], threshold: float, dead: Collection[str] = ()) -> list[float]:
    """The proximal step for threshold * sum over groups of sqrt(entries) * ||theta||; returns the norms after it.

    A group that becomes zero, or is named dead, loses its Adam state too: momentum would bring it back.
    """
    norms = norms_of(on, groups)
    edited: list[nn.Parameter] = []
    after: list[float] = []
    for group, norm in zip(groups, norms, strict=True):
        least = math.inf if group.name in dead else threshold * math.sqrt(size_of(on, group))
        kept = 0.0 if norm <= least else 1.0 - least / norm
        after.append(norm * kept)
        if norm > 0.0 and kept < 1.0:
            for parameter in group.parameters:
                _scale_(on, parameter, kept)
            edited.extend(group.parameters)
    if edited:
        on.store.publish(edited)
    return after


def _scale_(on: Trainee, parameter: nn.Parameter, kept: float) -> None:
    master: Tensor = on.store.master(parameter)
    if kept > 0.0:
        master.mul_(kept)
        return
    master.zero_()
    moments = on.store.moments(parameter)
    if moments is not None:
        scale_moments(moments, 0.0)


def _group_name(layer: str, factor: str, grouping: Grouping) -> str:
    if grouping is Grouping.block:
        return block_of(layer)
    return layer if grouping is Grouping.matrix else f"{layer}.{factor}"
