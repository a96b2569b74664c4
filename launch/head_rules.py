"""Rules between `lte` and the other sections: what does not go together, and what would have no effect."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from parallel.output_loss import OutputLoss
from relora.coded_moments import MomentFormat
from relora.errors import ConfigError
from relora.lte import DenseSync, Exchange, LteConfig, SyncReset
from relora.paths import ForwardPath

if TYPE_CHECKING:
    from launch.config import TrainConfig

_OF_FACTORS = ("reset", "exchange", "ranks", "fragments", "delay")
"""Keys of lte that are about low-rank layers."""


def check_lte(config: TrainConfig, lte: LteConfig) -> None:
    """Check them.

    Raises:
        ConfigError: an impossible combination, or a setting that would have no effect.
    """
    if config.lora is None:
        _check_full_rank(lte)
    else:
        if config.lora.init_from is not None:
            raise ConfigError(
                f"lora.init_from={config.lora.init_from} must be null with lte: heads draw their own factors"
            )
        if lte.dense == DenseSync.all_reduced and not config.lora.dense:
            raise ConfigError(
                "lte.dense=all_reduced has no effect with lora.dense=[], which freezes them: leave it out"
            )
        _check_ranks(lte, config.lora.rank_pattern)
    if config.relora is not None:
        _check_restarts(config, lte)
    if lte.meeting is not None:
        _check_elastic(config, lte)
    _check_rhythms(config, lte)


def check_hosted(config: TrainConfig, hosted: int) -> None:
    """Rules for processes that hold several heads each.

    Raises:
        ConfigError: something that is for heads with processes of their own.
    """
    if config.lora is not None and config.lora.forward in (ForwardPath.merged, ForwardPath.auto):
        raise ConfigError(
            f"lora.forward={config.lora.forward.value} needs heads with processes of their own, since heads that share "
            f"a base weight cannot merge into it, and here each process holds {hosted} of lte.heads={config.heads}: "
            "choose addmm"
        )
    if config.continual is not None:
        raise ConfigError(
            f"a stream needs heads with processes of their own, and here each process holds {hosted} of "
            f"lte.heads={config.heads}: start a multiple of {config.heads} processes, or choose lte=none"
        )
    needed = {
        "parallel.zero_stage": 0,
        "parallel.deepspeed": {},
        "lte.ranks": None,
        "training.loss": OutputLoss.plain,
        "optimizer.moments": MomentFormat.full,
    }
    for key, value in needed.items():
        section, leaf = key.split(".")
        got = getattr(getattr(config, section), leaf) or value
        if got != value:
            got = got.value if isinstance(got, Enum) else got
            raise ConfigError(
                f"{key}={got} needs heads with processes of their own, and here each process holds {hosted} of "
                f"lte.heads={config.heads}: start a multiple of {config.heads} processes, or leave {key} out"
            )


def _check_full_rank(lte: LteConfig) -> None:
    if lte.dense == DenseSync.all_reduced:
        raise ConfigError(
            "lte.dense=all_reduced with lora=none leaves heads nothing to train apart: choose averaged, or lte=none"
        )
    usual = LteConfig()
    for key in _OF_FACTORS:
        value = getattr(lte, key)
        if value != getattr(usual, key):
            told = value.value if isinstance(value, Enum) else value
            raise ConfigError(
                f"lte.{key}={told} has no effect with lora=none: full-rank heads have no factors. Leave it out, or "
                "choose lora=lora"
            )


def _check_ranks(lte: LteConfig, pattern: dict[str, int] | None) -> None:
    if lte.ranks is None:
        return
    if lte.exchange == Exchange.shared:
        raise ConfigError(
            f"lte.ranks={lte.ranks} cannot be with lte.exchange=shared, where heads have one `down`: choose auto"
        )
    if pattern:
        raise ConfigError(
            f"lte.ranks={lte.ranks} has no place beside lora.rank_pattern={dict(pattern)}: a head has one rank for all "
            "layers; leave out one of the two"
        )


def _check_restarts(config: TrainConfig, lte: LteConfig) -> None:
    relora = config.relora
    assert relora is not None
    if lte.reset != SyncReset.none:
        raise ConfigError(
            f"lte.reset={lte.reset.value} cannot be with relora, whose restarts draw new factors: choose "
            "lte.reset=none, or relora=none"
        )
    for key, value in (("every", relora.every), ("warm_start_steps", relora.warm_start_steps)):
        if value % lte.sync_every:
            raise ConfigError(
                f"relora.{key} must be a multiple of lte.sync_every={lte.sync_every}: a restart follows a sync of all "
                f"layers, got {value}: try {-(-value // lte.sync_every) * lte.sync_every}"
            )
    if relora.merge_precision != lte.merge_precision:
        raise ConfigError(
            f"relora.merge_precision={relora.merge_precision.value} has no effect with lte, whose syncs merge by "
            f"lte.merge_precision={lte.merge_precision.value}: set both alike"
        )


def _check_elastic(config: TrainConfig, lte: LteConfig) -> None:
    if config.relora is not None:
        raise ConfigError(
            "relora must be none with lte.meeting: choose lte.reset=factors, whose syncs draw new factors"
        )
    if config.training.global_batch_size % lte.heads:
        raise ConfigError(
            f"training.global_batch_size={config.training.global_batch_size} must be a multiple of lte.heads="
            f"{lte.heads}: each head takes its share of it in every step"
        )


def _check_rhythms(config: TrainConfig, lte: LteConfig) -> None:
    rhythms = {
        "evaluation.every": config.evaluation.every,
        "checkpoint.every": config.checkpoint.every,
        "training.stop_after": config.training.stop_after or 0,
    }
    for key, value in rhythms.items():
        if value % lte.sync_every:
            raise ConfigError(
                f"{key} must be a multiple of lte.sync_every={lte.sync_every}, since only then heads share one base "
                f"weight and nothing is on its way, got {value}: try {-(-value // lte.sync_every) * lte.sync_every}"
            )
