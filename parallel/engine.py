"""The only module that knows DeepSpeed: its configuration is derived here, and its engine is wrapped here.

The wrapper adds three things to DeepSpeed's engine: the learning rate comes from outside, step by step; an
update can be refused after its gradient norm is known; and `store` reaches every parameter's master and moments.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel.shards import Shards
from relora.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How processes share the work."""

    zero_stage: int = 0
    """ZeRO stage; 0 while there is one process, which has nothing to partition."""
    tensor: int = 1
    """Degree of tensor parallelism; 1 while there is one process."""

    def __post_init__(self) -> None:
        for key, value, only in (("zero_stage", self.zero_stage, 0), ("tensor", self.tensor, 1)):
            if value != only:
                raise ConfigError(f"parallel.{key} must be {only}, got {value}: this version trains in one process")


def deepspeed_config(*, bf16: bool, microbatch_size: int, max_grad_norm: float) -> dict[str, Any]:
    """The engine's dictionary, derived from a run's settings.

    In bf16 the engine keeps fp32 masters and sums gradients in fp32. DeepSpeed offers that optimizer as ZeRO
    stage 1; with one process nothing is partitioned by it. In fp32 clipping is ours, since DeepSpeed's plain
    path does not tell the norm.
    """
    config: dict[str, Any] = {
        "train_batch_size": microbatch_size,
        "train_micro_batch_size_per_gpu": microbatch_size,
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }
    if bf16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["zero_optimization"] = {"stage": 1}
        config["gradient_clipping"] = max_grad_norm
    return config


@dataclass(kw_only=True, slots=True, frozen=True)
class StepResult:
    """What one optimizer step did."""

    grad_norm: float
    """Global gradient norm before clipping; infinite or NaN when the gradients were."""
    refused: str | None
    """Why the update was not made, or None."""


class _GatedAdamW(torch.optim.AdamW):
    """AdamW that asks before it updates; the engine calls it when gradients are reduced and clipped."""

    gate: Callable[[], bool]

    def step(self, closure: Any = None) -> Any:
        return super().step(closure) if self.gate() else None


class Engine:
    """Trains one model: forward, backward, step, and access to what the optimizer holds.

    Collectives: none in one process.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        microbatch_size: int,
        max_grad_norm: float,
    ) -> None:
        trainable = [parameter for group in groups for parameter in group["params"]]
        bf16 = trainable[0].dtype == torch.bfloat16
        self._clip_here = 0.0 if bf16 else max_grad_norm
        self._optimizer = _GatedAdamW(list(groups), betas=betas, eps=eps, fused=True)
        self._optimizer.gate = self._may_update
        self._admit: Callable[[float], str | None] = lambda norm: None
        self._result: StepResult | None = None
        settings = deepspeed_config(bf16=bf16, microbatch_size=microbatch_size, max_grad_norm=max_grad_norm)
        self._engine = _initialize(model, self._optimizer, settings)
        self.model = model
        self.store = Shards(self._optimizer, trainable)

    def __call__(self, **inputs: Any) -> Any:
        """The model's output for one microbatch."""
        return self._engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one microbatch's share of the step's loss."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float, admit: Callable[[float], str | None]) -> StepResult:
        """Clip, ask `admit` with the gradient norm, update unless it names a reason not to, clear gradients.

        Args:
            lr: every group's learning rate for this update.
            admit: called once with the gradient norm; returns a reason to refuse the update, or None.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._admit, self._result = admit, None
        self._engine.step()
        if self._result is None:  # DeepSpeed refused by itself: the norm was not finite
            norm = float("inf")
            self._result = StepResult(grad_norm=norm, refused=admit(norm) or "gradients are not finite")
        return self._result

    def _may_update(self) -> bool:
        norm = self._norm_and_clip()
        self._result = StepResult(grad_norm=norm, refused=self._admit(norm))
        return self._result.refused is None

    def _norm_and_clip(self) -> float:
        if self._optimizer is not self._engine.optimizer:
            return float(self._engine.optimizer._global_grad_norm)
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._clip_here > 0:
            nn.utils.clip_grads_with_norm_(parameters, self._clip_here, norm)
        return float(norm)

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the model, so that another engine can take it over."""
        self._engine.destroy()
        for parameter in self.model.parameters():
            parameter.grad = None
            for name in ("_hp_mapping", "_hp_grad"):
                if hasattr(parameter, name):
                    delattr(parameter, name)


def _initialize(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Built from source on first use, for minutes, and of no use to one process.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine
