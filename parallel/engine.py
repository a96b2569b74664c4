"""The only module that knows DeepSpeed's engine: it is built here, and wrapped.

The wrapper adds to it: the learning rate comes from outside, step by step; an update can be refused after its
gradient norm is known; and `store` reaches every parameter's master and moments. The settings are derived in
parallel/zero.py; where DeepSpeed keeps things is in parallel/places.py.
"""

import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from parallel.collectives import sum_over
from parallel.places import trainable_places
from parallel.regions import Region
from parallel.runtime import Axis, Runtime
from parallel.shards import Shards
from parallel.zero import BUCKET_ENTRIES, ParallelConfig, deepspeed_config
from relora.coded_moments import CodedAdamW, MomentFormat
from relora.linear import LowRankLinear

Groups = Sequence[dict[str, Any]]


@dataclass(kw_only=True, slots=True, frozen=True)
class StepResult:
    """What one optimizer step did; equal on all processes."""

    grad_norm: float
    """Global gradient norm before clipping; infinite or NaN when the gradients were."""
    refused: str | None
    """Why the update was not made, or None."""


class SharedGradients(Protocol):
    """What LTE's heads do together in each update, if their dense parameters share gradients."""

    def agree(self, may: bool) -> bool:
        """Tell the other heads whether this one may update; returns whether all may."""

    def average(self, gradients: Sequence[Tensor]) -> None:
        """Replace gradients by their means over heads."""


class _Gated(torch.optim.Optimizer):
    """Asks before it updates; the engine calls it when gradients are reduced and clipped."""

    gate: Callable[[], bool]
    shared: SharedGradients | None = None

    def step(self, closure: Any = None) -> Any:
        if not self.gate():
            return None
        if self.shared is not None:
            self.shared.average(self._dense_gradients())
        return super().step(closure)

    def _dense_gradients(self) -> list[Tensor]:
        dense = [one for group in self.param_groups if group["name"].startswith("dense") for one in group["params"]]
        for parameter in dense:  # every head must bring the same tensors
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in dense]


class _GatedAdamW(_Gated, torch.optim.AdamW):
    """torch's."""


class _GatedCodedAdamW(_Gated, CodedAdamW):
    """Ours, with moments in 8 bits."""


class Engine:
    """Trains one model: forward, backward, step, and access to what the optimizer holds.

    Collectives: every method, by all processes of a head.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        *,
        runtime: Runtime,
        parallel: ParallelConfig,
        regions: Mapping[str, Region],
        betas: tuple[float, float],
        eps: float,
        moments: MomentFormat = MomentFormat.full,
        microbatch_size: int,
        max_grad_norm: float,
    ) -> None:
        """Build it.

        Args:
            regions: what tensor parallelism left of parameters and buffers, by name; the others are whole.
        """
        members = [list(group["params"]) for group in groups]
        trainable = [parameter for group in members for parameter in group]
        bf16 = trainable[0].dtype == torch.bfloat16
        self._runtime = runtime
        self._stage = parallel.zero_stage
        self._max_grad_norm = max_grad_norm
        self._optimizer: _Gated = (
            _GatedAdamW(list(groups), betas=betas, eps=eps, fused=True)
            if moments is MomentFormat.full
            else _GatedCodedAdamW(list(groups), betas=betas, eps=eps)
        )
        self._optimizer.gate = self._may_update
        self._admit: Callable[[float], str | None] | None = None
        self._result: StepResult | None = None
        self._taken: dict[nn.Parameter, Tensor] | None = None
        self._looks: list[RemovableHandle] = []
        self._finite = torch.ones((), dtype=torch.bool, device=runtime.device)
        settings = deepspeed_config(
            parallel,
            bf16=bf16,
            microbatch_size=microbatch_size,
            max_grad_norm=max_grad_norm,
            trainable=sum(parameter.numel() for parameter in trainable),
            on_gpu=runtime.device.type == "cuda",
        )
        axes = _Axes(runtime, replicas=parallel.zero_stage == 0)
        self._engine = _initialize(model, self._optimizer, settings, axes, runtime.device)
        # At stage 0 DeepSpeed sees a data axis of one process, and the sum over the real one is made here.
        self._engine.enable_backward_allreduce = self._stage > 0
        self.model = model
        self._places = trainable_places(self._optimizer, self._engine.optimizer, members)
        self.store = Shards(
            model,
            self._optimizer,
            self._places,
            runtime=runtime,
            regions=regions,
            spread=self._stage > 0 and runtime.data.size > 1,
        )

    def share_dense(self, shared: SharedGradients) -> None:
        """Average the gradients of dense parameters with the other heads', clipped, in each update."""
        self._optimizer.shared = shared

    def __call__(self, **inputs: Any) -> Any:
        """The model's output for one microbatch."""
        return self._engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this process's share of the step's loss; the shares of the data axis are summed."""
        averaged_over = self._runtime.data.size if self._stage > 0 else 1
        self._engine.backward(loss * averaged_over if averaged_over > 1 else loss, scale_wrt_gas=False)

    def step(self, lr: float, admit: Callable[[float], str | None]) -> StepResult:
        """Clip, ask `admit` with the gradient norm, update unless it names a reason not to, clear gradients.

        Args:
            lr: every group's learning rate for this update.
            admit: called once with the gradient norm; returns a reason to refuse the update, or None. Its answer
                must be the same on all processes.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._stage == 0 and self._runtime.data.group is not None:
            self._sum_gradients()
        self._admit, self._result = admit, None
        self._engine.step()
        if self._result is None:  # DeepSpeed refused by itself: the norm was not finite
            norm = float("inf")
            if self._optimizer.shared is not None:
                self._optimizer.shared.agree(False)
            self._result = StepResult(grad_norm=norm, refused=admit(norm) or "gradients are not finite")
        self._admit = None
        return self._result

    def look_at_gradients(self, *, wanted: bool) -> None:
        """Look at this process's own gradients as they are made, from the next step on, or no more.

        Collectives: none.
        """
        if not wanted and not self._looks:
            return
        self._finite.fill_(True)
        for look in self._looks:
            look.remove()
        self._looks = [parameter.register_hook(self._look) for parameter in self._places] if wanted else []

    @property
    def own_gradients_finite(self) -> bool:
        """Whether all were, as far as they were looked at."""
        return bool(self._finite)

    def _look(self, gradient: Tensor) -> None:
        self._finite &= torch.isfinite(gradient).all()

    def add_gradients(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Add to the gradients of the step in progress, on all processes alike.

        Shapes: those of the parameters as tensor parallelism leaves them here
        """
        if not gradients:
            return
        if self._optimizer is not self._engine.optimizer:
            # A forward of the engine does so before each backward; without it stage 3 would write over what is there.
            self._engine.optimizer.clear_backward_seen_flag()
        with self._gathered(list(gradients)):
            # The loss whose gradient they are: so they go the way of all gradients, whatever the stage does with it.
            products = [(parameter * gradient.to(parameter)).sum() for parameter, gradient in gradients.items()]
            self.backward(torch.stack(products).sum() / self._runtime.data.size)

    def take_gradients(self) -> dict[nn.Parameter, Tensor]:
        """This process's part of the gradients, summed over the data axis, as `store.master` has masters; cleared then.

        Nothing is updated.
        """
        self._taken = {}
        result = self.step(0.0, lambda norm: "the gradients were taken")
        taken, self._taken = self._taken, None
        # DeepSpeed has clipped already, by its own rule.
        clipped = self._optimizer is not self._engine.optimizer and self._max_grad_norm > 0
        factor = max(1.0, (result.grad_norm + 1e-6) / self._max_grad_norm) if clipped else 1.0
        return {
            parameter: taken[parameter].mul_(factor) if parameter in taken else place.owner.new_zeros(place.count)
            for parameter, place in self._places.items()
        }

    def _gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """Whole parameters, where stage 3 has cut them."""
        if self._stage < 3:
            return nullcontext()
        gathered: AbstractContextManager[Any] = importlib.import_module("deepspeed").zero.GatheredParameters(parameters)
        return gathered

    def _take(self) -> None:
        assert self._taken is not None
        for parameter, place in self._places.items():
            if place.owner.grad is not None and parameter not in self._taken:
                self._taken[parameter] = place.of(place.owner.grad).float().clone()

    def _may_update(self) -> bool:
        """Decide once for a step; stage 3 asks for each of its groups, and its set-up before any step."""
        if self._admit is None:
            return False
        if self._taken is not None:
            self._take()
        if self._result is None:
            norm = self._norm_and_clip()
            refused = self._admit(norm)
            if self._optimizer.shared is not None and not self._optimizer.shared.agree(refused is None):
                refused = refused or "another head refused it"
            self._result = StepResult(grad_norm=norm, refused=refused)
        return self._result.refused is None

    def _norm_and_clip(self) -> float:
        if self._optimizer is not self._engine.optimizer:
            norm = float(self._engine.optimizer._global_grad_norm)
            return norm if norm >= 0 else float("inf")  # DeepSpeed's sign of a norm that is not finite
        parameters = self._trainable()
        norm_ = _total_norm(parameters, self._runtime.tensor)
        if self._max_grad_norm > 0 and self._taken is None:
            nn.utils.clip_grads_with_norm_(parameters, self._max_grad_norm, norm_)
        return float(norm_)

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _sum_gradients(self) -> None:
        """Sum gradients over the data axis, in flat buckets."""
        zero = self._engine.optimizer
        if zero is not self._optimizer:
            gradients = list(zero.fp32_groups_gradients_flat)
        else:
            for parameter in self._trainable():  # every process must bring the same tensors
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in self._trainable()]
        for bucket in _buckets(gradients, BUCKET_ENTRIES):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                sum_over(self._runtime.data, bucket[0])
                continue
            flat = sum_over(self._runtime.data, torch.cat([gradient.flatten() for gradient in bucket]))
            for gradient, summed in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the model; at stage 3 its weights stay partitioned."""
        self._engine.destroy()
        importlib.import_module(
            "deepspeed.runtime.zero.parameter_offload"
        ).FWD_MODULE_STACK.clear()  # keeps models alive
        for parameter in self.model.parameters():
            parameter.grad = None
            for name in ("_hp_mapping", "_hp_grad"):
                if hasattr(parameter, name):
                    delattr(parameter, name)


def _total_norm(parameters: Sequence[nn.Parameter], tensor: Axis) -> Tensor:
    """Norm of all gradients of a model; parameters that every process of the tensor axis holds count once."""
    if tensor.group is None:
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    counted = [
        parameter.grad
        for parameter in parameters
        if parameter.grad is not None and (tensor.index == 0 or hasattr(parameter, "tensor_model_parallel"))
    ]
    return sum_over(tensor, nn.utils.get_total_norm(counted).float() ** 2) ** 0.5


def _buckets(tensors: Sequence[Tensor], entries: int) -> list[list[Tensor]]:
    """Consecutive tensors of one dtype, up to a number of entries together."""
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not buckets or tensor.numel() > room or tensor.dtype != buckets[-1][0].dtype:
            buckets.append([])
            room = entries
        buckets[-1].append(tensor)
        room -= tensor.numel()
    return buckets


class _Axes:
    """The mesh in the words that DeepSpeed asks a Megatron-like `mpu` with."""

    def __init__(self, runtime: Runtime, *, replicas: bool) -> None:
        rank = runtime.process_rank
        self._data = Axis(1, 0, None, (rank,)) if replicas else runtime.data
        self._tensor = runtime.tensor

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Group that ZeRO partitions over."""
        return _group_of(self._data)

    def get_data_parallel_world_size(self) -> int:
        """Its size."""
        return self._data.size

    def get_data_parallel_rank(self) -> int:
        """This process's number in it."""
        return self._data.index

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Its members."""
        return list(self._data.ranks)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Group that holds the parts of one model."""
        return _group_of(self._tensor)

    def get_model_parallel_world_size(self) -> int:
        """Its size."""
        return self._tensor.size

    def get_model_parallel_rank(self) -> int:
        """This process's number in it."""
        return self._tensor.index

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def _group_of(axis: Axis) -> dist.ProcessGroup:
    if axis.group is not None:
        return axis.group
    world = dist.group.WORLD
    assert world is not None
    return world if dist.get_world_size() == 1 else _alone(dist.get_rank())


@cache
def _alone(rank: int) -> dist.ProcessGroup:
    group = dist.new_group([rank], use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Bring all buffers to the device but extra bits, which are as large as weights and are cut first."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if not (isinstance(module, LowRankLinear) and name == "extra_bits"):
                setattr(module, name, buffer.to(device))


@contextmanager
def _no_reports_of_memory() -> Iterator[None]:
    """DeepSpeed's bf16 optimizer prints the memory in use a dozen times, and collects garbage for each figure."""
    module: Any = importlib.import_module("deepspeed.runtime.utils")
    kept, module.gc = module.gc, SimpleNamespace(collect=lambda: 0)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        module.gc = kept


def _initialize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    axes: _Axes,
    device: torch.device,
) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    importlib.import_module("torch._dynamo")  # stage 3 looks for it in torch and does not import it
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its calls of older names of torch's collectives are nothing that a user could mend.
    warnings.filterwarnings("ignore", r"`torch.distributed.*is deprecated", FutureWarning)
    # Built from source on first use, for minutes, and it ignores process groups.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with _no_reports_of_memory():
        if settings.get("zero_optimization", {}).get("stage") == 3:
            # Left to the engine, the whole model would be on the device before it is partitioned.
            deepspeed.zero.Init(
                module=model, data_parallel_group=axes.get_data_parallel_group(), config_dict_or_path=settings, mpu=axes
            )
            _move_buffers(model, device)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, mpu=axes, dist_init_required=False
        )
    return engine
