"""The phases of a run on the layout that was asked for, and on others beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from launch.config import TrainConfig
from launch.planning.estimate import Cost, Layout, cost
from launch.planning.microbatch import Microbatch
from launch.planning.skeleton import Skeletons
from launch.training.recomputation import Checkpointing
from parallel.mesh import mesh_of
from relora.errors import ConfigError
from relora.quantised import BaseFormat

DEGREES = (1, 2, 4, 8)
"""Tensor degrees that are compared, where the model allows them."""
STAGES = (0, 1, 2, 3)
_WORLDS = (0.25, 0.5, 1, 2, 4)  # times the number of processes that was asked for


@dataclass(kw_only=True, slots=True, frozen=True)
class Outlook:
    """What one phase will need."""

    name: str
    runs: bool
    """Whether it is a phase of the run; else it is there to compare with."""
    cost: Cost
    """On the layout that was asked for."""
    otherwise: Microbatch
    """Its microbatch without activation checkpointing, or with the full one where it has none."""
    grid: dict[Layout, Cost | None]
    """On other layouts; None where they cannot share the global batch."""

    @property
    def recomputed_flops(self) -> int:
        """Of a microbatch's backward pass, those that activation checkpointing costs."""
        return max(0, self.cost.microbatch.backward_flops - self.otherwise.backward_flops)


def outlooks(config: TrainConfig, skeletons: Skeletons, processes: int) -> list[Outlook]:
    """All phases of a run, the low-rank one first; full-rank training is there even when it is no phase of it.

    Raises:
        ConfigError: the model or the global batch cannot be shared so.
    """
    low_rank, warm_start = config.lora is not None, config.warm_start_steps > 0
    heads = config.heads
    result = (
        [_outlook(config, skeletons, asked(config, processes, heads), "low rank", low_rank=True)] if low_rank else []
    )
    name = "warm start" if warm_start else "full rank"
    full = asked(config, processes, 1 if low_rank else heads)
    return [*result, _outlook(config, skeletons, full, name, low_rank=False, runs=warm_start or not low_rank)]


def asked(config: TrainConfig, processes: int, heads: int) -> Layout:
    """The layout of so many processes as so many heads.

    Raises:
        ConfigError: they cannot be shared so.
    """
    mesh = mesh_of(processes, tensor=config.parallel.tensor, heads=heads)
    if mesh.heads < heads:
        raise ConfigError(
            f"plan.processes={processes} must be a multiple of lte.heads={heads}: plan reckons with heads that have "
            "processes of their own, and not with several in one"
        )
    return Layout(zero_stage=config.parallel.zero_stage, tensor=mesh.tensor, data=mesh.data, heads=heads)


def fitting(phases: Sequence[Outlook], limit: float) -> list[Layout]:
    """Layouts on which every phase of the run stays within so many bytes, those with the fewest processes first."""
    first, *others = [
        {(layout.processes, layout.tensor, layout.zero_stage): (layout, cost) for layout, cost in phase.grid.items()}
        for phase in phases
        if phase.runs
    ]
    each = {
        layout: [cost, *(other[key][1] if key in other else None for other in others)]
        for key, (layout, cost) in first.items()
    }
    return [layout for layout, costs in each.items() if all(one is not None and one.peak <= limit for one in costs)]


def _outlook(
    config: TrainConfig, skeletons: Skeletons, layout: Layout, name: str, *, low_rank: bool, runs: bool = True
) -> Outlook:
    here = cost(config, skeletons, layout, low_rank=low_rank)
    keeps_all = config.training.activation_checkpointing is Checkpointing.none
    other = skeletons.get(
        low_rank=low_rank,
        tensor=layout.tensor,
        sequences=here.sequences,
        checkpointing=Checkpointing.full if keeps_all else Checkpointing.none,
    )
    grid = _grid(config, skeletons, layout, here.sequences, low_rank=low_rank) if runs else {}
    return Outlook(name=name, runs=runs, cost=here, otherwise=other.microbatch, grid=grid)


def _grid(
    config: TrainConfig, skeletons: Skeletons, layout: Layout, sequences: int, *, low_rank: bool
) -> dict[Layout, Cost | None]:
    grid: dict[Layout, Cost | None] = {}
    heads = layout.heads
    for world in sorted({round(layout.processes * factor) for factor in _WORLDS if layout.processes * factor >= 1}):
        for tensor in DEGREES:
            if world % (heads * tensor) or (tensor > 1 and config.base is not BaseFormat.full):
                continue
            data = world // (heads * tensor)
            share, rest = divmod(config.training.global_batch_size, heads * data)
            for stage in STAGES:
                other = Layout(zero_stage=stage, tensor=tensor, data=data, heads=heads)
                if rest or (stage == 3 and config.base is not BaseFormat.full):
                    grid[other] = None
                    continue
                size = math.gcd(share, sequences)
                try:
                    grid[other] = cost(config, skeletons, other, low_rank=low_rank, sequences=size)
                except ConfigError:  # the model does not split so
                    break
    return grid
