"""How processes share a model, as the user says it and as DeepSpeed is told it. Pure functions of settings.

Which ZeRO stage keeps what: 0 nothing is partitioned; 1 fp32 masters and Adam moments; 2 gradients, too; 3 the
weights themselves. Frozen weights have none of the first three; stage 3 alone makes them smaller.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from relora.errors import ConfigError


class Offload(str, Enum):
    """What lives in host memory instead of the GPU's."""

    none = "none"
    optimizer = "optimizer"
    """Masters and moments; the update runs on the CPU. From stage 1."""
    all = "all"
    """The partitioned weights, too. Stage 3."""


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How processes share the work."""

    zero_stage: int = 0
    """ZeRO stage: 0 replicas, 1 optimizer state partitioned, 2 gradients too, 3 weights too."""
    tensor: int = 1
    """Degree of tensor parallelism; what it leaves of the processes is the data axis."""
    tensor_plan: Any = None
    """Module name pattern -> column, packed, row, vocabulary, summed or replicate; on top of the family's own plan."""
    offload: Offload = Offload.none
    """none, optimizer (masters and moments in host memory) or all (stage 3: weights, too)."""
    deepspeed: Any = None
    """Further keys for DeepSpeed's configuration, such as {zero_optimization: {reduce_bucket_size: 100000000}}."""
    timeout_seconds: float = 600.0
    """Longest that a process waits for another before the run ends with a message."""
    silence_seconds: float = 30.0
    """How long a process may give no sign of life before the run ends with a message."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"parallel.zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}")
        if self.tensor < 1:
            raise ConfigError(f"parallel.tensor must be at least 1, got {self.tensor}")
        for key in ("timeout_seconds", "silence_seconds"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"parallel.{key} must be above 0, got {getattr(self, key)}")
        needed = {Offload.none: 0, Offload.optimizer: 1, Offload.all: 3}[Offload(self.offload)]
        if self.zero_stage < needed:
            raise ConfigError(
                f"parallel.offload={Offload(self.offload).value} needs parallel.zero_stage={needed} or more, got "
                f"{self.zero_stage}: raise it, or leave offload at none"
            )
        for key in ("deepspeed", "tensor_plan"):
            if getattr(self, key) is not None and not isinstance(getattr(self, key), Mapping):
                raise ConfigError(f"parallel.{key} must be a mapping, got {getattr(self, key)!r}")
        _refuse_owned(self.deepspeed or {}, _OWNED, "parallel.deepspeed")


_OWNED: dict[str, Any] = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.microbatch_size",
    "gradient_accumulation_steps": "training.microbatch_size",
    "managed_gradient_accumulation": "training.microbatch_size",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "training.dtype",
    "fp16": "training.dtype",
    "bfloat16": "training.dtype",
    "torch_autocast": "training.dtype",
    "data_types": "training.dtype",
    "amp": "training.dtype",
    "tensor_parallel": "parallel.tensor",
    "sequence_parallel_size": None,
    "pipeline": None,
    "compression_training": None,
    "checkpoint": "checkpoint",
    "elasticity": "checkpoint.resume, which takes any number of processes",
    "wandb": "tracker",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_force_ds_cpu_optimizer": "optimizer",
    "zero_optimization": {
        "stage": "parallel.zero_stage",
        "offload_optimizer": "parallel.offload",
        "offload_param": "parallel.offload",
        "cpu_offload": "parallel.offload",
        "zero_hpz_partition_size": None,
        "zero_quantized_weights": None,
        "zero_quantized_nontrainable_weights": None,
        "zero_quantized_gradients": None,
        "round_robin_gradients": None,
        "mics_shard_size": None,
        "elastic_checkpoint": "checkpoint.resume, which takes any number of processes",
    },
}
"""DeepSpeed keys that follow from other settings (their names), or that would move weights out of our sight (None)."""


def _refuse_owned(given: Mapping[str, Any], owned: Mapping[str, Any], path: str) -> None:
    for key, value in given.items():
        if key not in owned:
            continue
        if isinstance(owned[key], Mapping):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{path}.{key} must be a mapping, got {value!r}")
            _refuse_owned(value, owned[key], f"{path}.{key}")
            continue
        instead = f"set {owned[key]} instead" if owned[key] else "restarts and checkpoints do not work with it"
        raise ConfigError(f"{path}.{key}={value!r} is not yours to set: {instead}; leave it out")


BUCKET_ENTRIES = 200_000_000
"""Most gradient entries that are exchanged at once."""


def deepspeed_config(
    parallel: ParallelConfig,
    *,
    bf16: bool,
    microbatch_size: int,
    max_grad_norm: float,
    trainable: int,
    on_gpu: bool,
) -> dict[str, Any]:
    """The engine's dictionary, derived from a run's settings.

    Args:
        trainable: entries that train in this process; DeepSpeed's buckets, which it allocates in full, need no more.

    In bf16 the engine keeps fp32 masters and sums gradients in fp32; DeepSpeed offers that from stage 1 on, so
    stage 0 is its stage 1 over a group of one. In fp32 at stage 0 clipping is ours, since DeepSpeed's plain path
    does not tell the norm.
    """
    stage = max(parallel.zero_stage, int(bf16))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": microbatch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
        "gradient_clipping": max_grad_norm if stage > 0 else 0.0,  # left out, it would be 1
    }
    if bf16:
        # At once: otherwise a bf16 gradient of everything stays beside the fp32 one until the step.
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if stage > 0:
        config["zero_optimization"] = _zero_section(parallel, stage, trainable, on_gpu)
    return _merged(config, parallel.deepspeed or {})


def _zero_section(parallel: ParallelConfig, stage: int, trainable: int, on_gpu: bool) -> dict[str, Any]:
    section: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": on_gpu and stage >= 2,
        "reduce_bucket_size": max(1, min(BUCKET_ENTRIES, trainable)),
    }
    if parallel.offload != Offload.none:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if parallel.offload == Offload.all:
        section["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    return section


def _merged(base: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`more` over `base`, section by section."""
    result = dict(base)
    for key, value in more.items():
        known = result.get(key)
        result[key] = _merged(known, value) if isinstance(known, dict) and isinstance(value, Mapping) else value
    return result
