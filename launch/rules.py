"""Rules that span sections of a run's configuration; each section has checked itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launch.base_rules import check_base
from launch.head_rules import check_hosted, check_lte
from launch.stream_rules import check_stream
from launch.training.recomputation import Checkpointing
from launch.watching.trackers.config import Artifacts, HeadRuns, TrackerConfig
from parallel.mesh import Mesh
from relora.errors import ConfigError
from relora.paths import ForwardPath
from relora.quantised import BaseFormat
from relora.schedule import check_schedule

if TYPE_CHECKING:
    from launch.config import TrainConfig


def check(config: TrainConfig) -> None:
    """Check them.

    Raises:
        ConfigError: an impossible combination, or a setting that would have no effect.
    """
    if config.continual is not None:
        check_stream(config, config.continual)
    elif config.training.steps is None and config.training.tokens is None:
        raise ConfigError("training needs exactly one of training.steps and training.tokens: set one of them")
    if config.relora is not None and config.lora is None:
        raise ConfigError("relora needs low-rank layers: choose lora=lora, or relora=none for full-rank training")
    if config.lora is not None and config.lora.init_from is not None and config.warm_start_steps > 0:
        raise ConfigError(
            f"lora.init_from={config.lora.init_from} belongs to the weights that the run starts with, not to those "
            f"after relora.warm_start_steps={config.warm_start_steps}: set that to 0"
        )
    merging = {"relora": config.relora, "lte": config.lte}
    for name, section in merging.items():
        if section is None or config.training.dtype.value != "fp32" or config.base is not BaseFormat.full:
            continue
        precision = section.merge_precision.value
        if precision != "split":
            raise ConfigError(
                f"{name}.merge_precision={precision} has no effect with training.dtype=fp32, where merges are exact: "
                "leave it at split, or set training.dtype=bf16"
            )
    if config.lora is not None and config.lora.forward is ForwardPath.merged and config.parallel.zero_stage == 3:
        raise ConfigError(
            "lora.forward=merged would keep every layer whole on each process, which parallel.zero_stage=3 is there to "
            "avoid: choose addmm, or a lower stage"
        )
    if config.training.activation_checkpointing is Checkpointing.selective and config.parallel.tensor > 1:
        raise ConfigError(
            "training.activation_checkpointing=selective cannot be with parallel.tensor above 1, which sums "
            "products in place: choose full or none"
        )
    check_base(config)
    if config.lte is not None:
        check_lte(config, config.lte)
    if config.tracker is not None:
        _check_tracker(config, config.tracker)
    if config.continual is None:
        _check_length(config, config.total_steps)


def _check_tracker(config: TrainConfig, tracker: TrackerConfig) -> None:
    """Rules between what is tracked and what there is."""
    if tracker.heads is HeadRuns.apart and config.heads < 2:
        why = "elastic heads, which are runs of their own anyway" if config.jobs > 1 else "a run without lte.heads"
        raise ConfigError(f"tracker.heads=apart has no effect on {why}: leave it out")
    if tracker.artifacts in (Artifacts.final, Artifacts.all) and not config.run.save_final:
        raise ConfigError(
            f"tracker.artifacts={tracker.artifacts.value} sends final/, which run.save_final=false does not write: "
            "turn one of them"
        )


def _check_length(config: TrainConfig, steps: int) -> None:
    """Rules about the length of a run without tasks."""
    if config.relora is not None and 0 < steps <= config.warm_start_steps:
        raise ConfigError(
            f"relora.warm_start_steps={config.warm_start_steps} leaves no low-rank step of "
            f"training.steps={steps}: raise training.steps or lower it"
        )
    stop = config.training.stop_after
    if stop is not None and stop >= steps:
        raise ConfigError(
            f"training.stop_after={stop} has no effect on a run of {steps} steps: leave it out or lower it"
        )
    if config.run.profile_steps and config.run.profile_steps + 3 > steps:
        raise ConfigError(
            f"run.profile_steps={config.run.profile_steps} begins after three steps and does not fit a run of {steps}: "
            "lower it, or raise training.steps"
        )
    if steps > 0:
        check_schedule(config.schedule, total_steps=steps, restarts=config.restarts)


def check_mesh(config: TrainConfig, mesh: Mesh) -> None:
    """Rules about the number of processes.

    Raises:
        ConfigError: the global batch cannot be shared, or a setting would have no effect.
    """
    hosted = config.heads // mesh.heads
    config.microbatch(mesh.heads * mesh.data * hosted)
    if hosted > 1:
        check_hosted(config, hosted)
