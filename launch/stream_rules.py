"""Rules about streams of tasks that span sections of the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from continual.config import Competing, ContinualConfig
from continual.fisher import Labels
from continual.method import TaskKind
from continual.methods.registry import METHODS
from relora.errors import ConfigError
from relora.lte import Exchange, LteConfig, SyncReset

if TYPE_CHECKING:
    from launch.config import TrainConfig
    from launch.training.course import Course


def check_stream(config: TrainConfig, continual: ContinualConfig) -> None:
    """Refuse what a stream cannot be combined with.

    Raises: ConfigError
    """
    entry, method = METHODS[continual.method], continual.method
    for key in ("steps", "tokens"):
        if getattr(config.training, key) is not None:
            raise ConfigError(
                f"training.{key}={getattr(config.training, key)} has no effect on a stream, whose tasks have steps "
                "or epochs of their own: set it to null"
            )
    if config.data.path is not None:
        raise ConfigError(
            f"data.path={config.data.path} has no effect on a stream, whose tasks name their data: set it to null"
        )
    if config.lte is not None:
        _check_heads(config.lte, method)
    if entry.low_rank and config.lora is None:
        raise ConfigError(f"continual.method={method} works on low-rank factors: choose lora=lora, or another method")
    if not entry.restarts and config.relora is not None:
        raise ConfigError(
            f"continual.method={method} keeps to one draw of factors through a task, and restarts draw anew: choose "
            "relora=none, or another method"
        )
    relora, full_rank = config.relora, continual.full_rank_steps
    if relora is not None and relora.warm_start_steps and full_rank:
        raise ConfigError(
            f"relora.warm_start_steps={relora.warm_start_steps} has no effect, since the first tasks train at full "
            "rank: set it to 0"
        )
    if full_rank and config.lora is None:
        raise ConfigError(
            "full_rank: true has no effect with lora=none, where all tasks train at full rank: leave it out"
        )
    if continual.logits is Competing.task and method == "joint":
        raise ConfigError(
            "continual.logits=task has no effect with continual.method=joint, whose one task has all classes: choose "
            "continual.logits=seen"
        )


def _check_heads(lte: LteConfig, method: str) -> None:
    """What a stream asks of LTE's heads."""
    entry = METHODS[method]
    if lte.meeting is not None:
        raise ConfigError(
            f"lte.meeting={lte.meeting} has heads come and go at any step, and a stream's tasks end for all heads at "
            "once: choose lte=heads, or continual=none"
        )
    if not entry.heads:
        able = ", ".join(name for name, one in METHODS.items() if one.heads)
        raise ConfigError(
            f"continual.method={method} works on one model's factors, and lte's heads train theirs apart: choose "
            f"lte=none, or one of {able}"
        )
    for key, draws, instead in (("reset", SyncReset.factors, "none"), ("exchange", Exchange.shared, "auto")):
        if not entry.trains_down and getattr(lte, key) is draws:
            raise ConfigError(
                f"lte.{key}={draws.value} draws `down` at random, and continual.method={method} designs it: choose "
                f"lte.{key}={instead}"
            )


def check_opened(config: TrainConfig, continual: ContinualConfig, course: Course, processes: int) -> None:
    """Refuse what shows itself when the tasks are open.

    Args:
        processes: that share the global batch.

    Raises: ConfigError
    """
    stop, total = config.training.stop_after, course.total_steps
    if stop is not None and stop >= total:
        raise ConfigError(
            f"training.stop_after={stop} has no effect on a stream of {total} steps: leave it out or lower it"
        )
    _check_last_task(continual, course)
    _check_requests(continual, course)
    text = [stage.name for stage in course.stages if stage.kind is not TaskKind.classification]
    if continual.method == "ewc" and continual.ewc.labels is Labels.model and text:
        raise ConfigError(
            f"continual.ewc.labels=model draws classes, and {text[0]} has none: choose continual.ewc.labels=data"
        )
    if "replay" in METHODS[continual.method].sections:
        continual.replay.samples(config.job_batch, processes)


def _check_last_task(continual: ContinualConfig, course: Course) -> None:
    """Refuse to stop after a task that is none, or the last."""
    names = [stage.name for stage in course.stages]
    if continual.stop_after is not None and continual.stop_after not in names[:-1]:
        reason = "is the last task" if continual.stop_after == names[-1] else "is no task of this stream"
        rule = f"name one of {', '.join(names[:-1])}, or leave it out" if names[:-1] else "leave it out"
        raise ConfigError(f"continual.stop_after={continual.stop_after} {reason}: {rule}")


def _check_requests(continual: ContinualConfig, course: Course) -> None:
    """Refuse requests to forget that the method does not serve."""
    method = continual.method
    requests = [stage for stage in course.stages if stage.kind is TaskKind.forget]
    if requests and not METHODS[method].forgets:
        able = ", ".join(name for name, entry in METHODS.items() if entry.forgets)
        raise ConfigError(
            f"continual.method={method} does not forget, which {requests[0].name} asks for: choose {able}, or leave "
            "that task out"
        )
    for stage in requests:
        if stage.full_rank:
            raise ConfigError(
                f"continual.tasks.{stage.name}.full_rank=true: continual.method={method} forgets with low-rank "
                "factors; leave it out there"
            )
    if method == "gs_lora" and continual.gs_lora.prototypes and requests and not course.class_names:
        raise ConfigError(
            "continual.gs_lora.prototype_retain and prototype_forget are about classes, which a language model has "
            "none of: leave them out"
        )
