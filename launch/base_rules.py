"""Rules about quantised base weights (lora.base) that span sections of the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relora.errors import ConfigError
from relora.precision import MergePrecision
from relora.quantised import BaseFormat

if TYPE_CHECKING:
    from launch.config import TrainConfig


def check_base(config: TrainConfig) -> None:
    """Refuse what quantised base weights cannot be combined with.

    Raises: ConfigError
    """
    if config.base is BaseFormat.full:
        return
    base, parallel = f"lora.base={config.base.value}", config.parallel
    if parallel.zero_stage == 3:
        raise ConfigError(
            f"{base} cannot be with parallel.zero_stage=3, which cuts parameters: codes are none, and would stay whole "
            "on every process. Choose parallel.zero_stage=2, or lora.base=full"
        )
    if parallel.tensor > 1:
        raise ConfigError(
            f"{base} cannot be with parallel.tensor={parallel.tensor}, whose cuts need not lie between blocks that "
            "share a scale: choose parallel.tensor=1, or lora.base=full"
        )
    if config.lte is not None:
        raise ConfigError(
            f"{base} cannot be with lte, whose syncs add to ranges of base weights and measure them as numbers, not as "
            "codes: choose lte=none, or lora.base=full"
        )
    if config.folds and config.continual is not None:
        raise ConfigError(
            f"{base} cannot be with continual.method={config.continual.method}, which folds each task's update into "
            "the base weights and promises that outputs stay: quantising anew moves them. Choose another method, or "
            "lora.base=full"
        )
    if config.relora is not None and config.relora.merge_precision is MergePrecision.stochastic:
        raise ConfigError(
            f"relora.merge_precision=stochastic cannot be with {base}: where a block's scale changes, all its entries "
            "would be drawn anew. Choose split, which loses nothing, or nearest"
        )
