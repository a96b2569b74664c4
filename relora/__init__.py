"""The mathematics of low-rank training; it knows no processes."""

from relora.convert import (
    Conversion,
    LoraConfig,
    low_rank_modules,
    merged_state_dict,
    prepare_base_,
    to_low_rank,
)
from relora.errors import ConfigError
from relora.linear import LowRankLinear
from relora.optimizer import OptimizerConfig, parameter_groups
from relora.precision import MergePrecision
from relora.restart import ParameterStore, PlainStore, ReloraConfig, RestartReport, restart, restart_due
from relora.schedule import ScheduleConfig, multiplier

__all__ = [
    "ConfigError",
    "Conversion",
    "LoraConfig",
    "LowRankLinear",
    "MergePrecision",
    "OptimizerConfig",
    "ParameterStore",
    "PlainStore",
    "ReloraConfig",
    "RestartReport",
    "ScheduleConfig",
    "low_rank_modules",
    "merged_state_dict",
    "multiplier",
    "parameter_groups",
    "prepare_base_",
    "restart",
    "restart_due",
    "to_low_rank",
]
