"""The pace of a stage: its learning rate, its cycles, and when its restarts are due; each stage starts anew."""

from collections.abc import Sequence
from dataclasses import replace

from continual.method import Stage
from launch.config import TrainConfig
from relora.restart import ReloraConfig, cycle_of, restart_due
from relora.schedule import Restarts, check_schedule, multiplier


def learning_rate(config: TrainConfig, stage: Stage, step: int, asked: Sequence[int] = ()) -> float:
    """That of the update after `step` updates of the run; `asked` are steps of restarts beside the planned ones."""
    peak = config.peak_lr(step) if stage.lr is None else stage.lr
    within = step - stage.first
    more = [one - stage.first for one in asked if stage.first < one]
    restarts = _restarts(config, stage)
    return peak * multiplier(within, config.schedule, total_steps=stage.steps, restarts=restarts, asked=more)


def restart_follows(config: TrainConfig, stage: Stage, step: int) -> bool:
    """Whether a restart follows the first `step` updates; none follows the last update of a stage."""
    relora = _relora(config, stage)
    return relora is not None and restart_due(relora, step - stage.first, stage.steps)


def cycle(config: TrainConfig, stage: Stage, step: int, asked: Sequence[int] = ()) -> int | None:
    """The cycle of the update after `step` updates, counted in its stage; None where there are no cycles."""
    relora = _relora(config, stage)
    if relora is None or step < config.warm_start_steps:
        return None
    return cycle_of(relora, step - stage.first) + sum(stage.first < one <= step for one in asked)


def cycles(config: TrainConfig, stage: Stage, asked: Sequence[int] = ()) -> int | None:
    """Cycles of a stage."""
    relora = _relora(config, stage)
    if relora is None:
        return None
    more = sum(stage.first < one < stage.end for one in asked)
    return -(-(stage.steps - relora.warm_start_steps) // relora.every) + more


def warm_start_end(config: TrainConfig, stage: Stage) -> int:
    """The step of the run after which a stage trains at low rank."""
    relora = _relora(config, stage)
    return stage.first + (0 if relora is None else relora.warm_start_steps)


def check_pace(config: TrainConfig, stage: Stage) -> None:
    """Refuse a schedule that does not fit a stage.

    Raises: ConfigError
    """
    if stage.steps > 0:
        check_schedule(config.schedule, total_steps=stage.steps, restarts=_restarts(config, stage))


def _relora(config: TrainConfig, stage: Stage) -> ReloraConfig | None:
    """The rhythm of restarts, with as much of the warm start as lies in this stage."""
    if config.relora is None:
        return None
    warm = min(max(0, config.warm_start_steps - stage.first), stage.steps)
    return replace(config.relora, warm_start_steps=warm)


def _restarts(config: TrainConfig, stage: Stage) -> Restarts | None:
    relora = _relora(config, stage)
    return None if relora is None else (relora.every, relora.warm_start_steps)
