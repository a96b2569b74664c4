"""The learning rate as a pure function of the step.

A base curve (cosine, linear, wsd or constant) times a ramp: after each restart, and at the hand-over from a
warm start, the rate climbs from 0 back onto the curve. It may also anneal towards 0 before a restart.
Nothing is stored, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from relora.errors import ConfigError

Restarts = tuple[int, int]
"""(every, start): a restart after each `every` steps, counted from step `start`."""


class ScheduleKind(str, Enum):
    """The base curve."""

    cosine = "cosine"
    linear = "linear"
    wsd = "wsd"
    constant = "constant"


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """The learning rate's course."""

    kind: ScheduleKind = ScheduleKind.cosine
    """Curve after the warm-up: cosine or linear to min_ratio, wsd (flat, then linear to it), or constant."""
    warmup_steps: int = 0
    """Steps of the linear warm-up from 0 at the start of the run."""
    restart_warmup_steps: int = 0
    """Steps of the linear ramp from 0 after each restart."""
    anneal_steps: int = 0
    """Steps of the linear descent towards 0 before each restart."""
    min_ratio: float = 0.1
    """Where the base curve ends, as a share of the peak."""
    decay_share: float | None = None
    """wsd only: the last share of the run, in which the rate decays."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("warmup_steps", "restart_warmup_steps", "anneal_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"schedule.{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.min_ratio <= 1:
            raise ConfigError(f"schedule.min_ratio must be in [0, 1], got {self.min_ratio}")
        if self.kind == ScheduleKind.constant and self.min_ratio != 1:
            raise ConfigError(
                f"schedule.min_ratio={self.min_ratio} has no effect with schedule.kind=constant: set it to 1, or "
                "choose another kind"
            )
        if self.kind == ScheduleKind.wsd:
            if self.decay_share is None:
                raise ConfigError("schedule.kind=wsd needs schedule.decay_share: the share of the run that decays")
            if not 0 < self.decay_share <= 1:
                raise ConfigError(f"schedule.decay_share must be in (0, 1], got {self.decay_share}")
        elif self.decay_share is not None:
            raise ConfigError(
                f"schedule.decay_share={self.decay_share} has no effect with schedule.kind="
                f"{ScheduleKind(self.kind).value}: leave it out, or choose schedule.kind=wsd"
            )


def check_schedule(config: ScheduleConfig, *, total_steps: int, restarts: Restarts | None) -> None:
    """Refuse a schedule that does not fit the run's length or its cycles.

    Raises: ConfigError
    """
    if config.warmup_steps and config.warmup_steps >= total_steps:
        raise ConfigError(
            f"schedule.warmup_steps={config.warmup_steps} must be below the run's {total_steps} steps: "
            "lower it, or train for longer"
        )
    if config.decay_share is not None and config.warmup_steps > total_steps * (1 - config.decay_share):
        raise ConfigError(
            f"schedule.warmup_steps={config.warmup_steps} reaches into the decay, the last "
            f"{config.decay_share:g} of {total_steps} steps: lower it or schedule.decay_share"
        )
    if restarts is None:
        if config.anneal_steps:
            raise ConfigError(
                f"schedule.anneal_steps={config.anneal_steps} has no effect without restarts: "
                "leave it out, or set relora.every"
            )
        return
    every, _ = restarts
    if config.restart_warmup_steps + config.anneal_steps > every:
        raise ConfigError(
            f"schedule.restart_warmup_steps={config.restart_warmup_steps} and schedule.anneal_steps="
            f"{config.anneal_steps} must fit together into a cycle of relora.every={every} steps"
        )


def multiplier(
    step: int, config: ScheduleConfig, *, total_steps: int, restarts: Restarts | None, asked: Sequence[int] = ()
) -> float:
    """Return the factor on the peak learning rate of the update that follows the first `step` updates.

    Args:
        asked: steps of restarts beside those of the rhythm; they have the ramp, and nothing anneals before them.

    Units: step counts finished updates, so the first update is 0 and the last total_steps - 1.
    Source: the ramp is that of `cosine_restarts` in github.com/Guitaricet/relora, for any base curve.
    """
    value = _curve(step, config, total_steps)
    if restarts is None or step < restarts[1]:
        return value
    every, start = restarts
    planned = step - (step - start) % every
    cycle_start = max([planned, *(one for one in asked if start < one <= step)])
    # Step 0 is the warm-up's; nothing restarts at or after the end of the run.
    if 0 < cycle_start < total_steps and step - cycle_start < config.restart_warmup_steps:
        progress = (step - cycle_start) / config.restart_warmup_steps
        value = progress * _curve(cycle_start + config.restart_warmup_steps, config, total_steps)
    next_restart = planned + every
    if next_restart < total_steps and next_restart - step < config.anneal_steps:
        value *= (next_restart - step) / config.anneal_steps
    return value


def _curve(step: int, config: ScheduleConfig, total_steps: int) -> float:
    """Return the base curve with the first warm-up, but without the restarts' ramps."""
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.kind == ScheduleKind.constant:
        return 1.0
    decay_start = config.warmup_steps
    if config.decay_share is not None:
        decay_start = max(decay_start, total_steps - round(config.decay_share * total_steps))
    progress = min(1.0, max(0.0, (step - decay_start) / max(1, total_steps - decay_start)))
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if config.kind == ScheduleKind.cosine else 1 - progress
    return config.min_ratio + (1 - config.min_ratio) * fall
