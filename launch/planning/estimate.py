"""What a phase of a run costs on a layout: memory of a process, FLOPs and bytes sent of a step and of a restart.

Pure functions of a configuration and its skeletons; nothing is printed and nothing runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launch.config import Dtype, TrainConfig
from launch.planning.microbatch import Microbatch
from launch.planning.skeleton import Skeletons
from launch.planning.sync_estimate import Place, SyncCost, keep_between_syncs, sync_cost
from launch.training.recomputation import Checkpointing
from parallel.footprint import FP32, Footprint, Held, Role, footprint, piece, trainable_entries
from parallel.pretence import sent_by_tensor_axis
from parallel.traffic import factor_bytes, sent, step_traffic
from parallel.zero import Offload, ParallelConfig, deepspeed_config
from relora.convert import ConversionRow
from relora.linear import BLOCK_ENTRIES
from relora.lte import LteConfig
from relora.optimizer import Reset
from relora.precision import MergePrecision
from relora.quantised import SLAB_ENTRIES

_BLOCK_BYTES = {MergePrecision.split: 24, MergePrecision.nearest: 16, MergePrecision.stochastic: 16}  # per entry
_REQUANTISED_BYTES = 64  # per entry of a slab of a quantised weight


@dataclass(kw_only=True, slots=True, frozen=True)
class Layout:
    """How processes share a phase."""

    zero_stage: int
    tensor: int
    data: int
    """Of one head."""
    heads: int = 1
    """Of LTE, each of data x tensor processes."""

    @property
    def processes(self) -> int:
        """All of them."""
        return self.heads * self.tensor * self.data


@dataclass(kw_only=True, slots=True, frozen=True)
class Cost:
    """One phase on one layout, for each process."""

    layout: Layout
    rows: list[ConversionRow]
    """What of the whole model is low-rank, dense or frozen; empty at full rank."""
    held: list[Held]
    whole: list[Held]
    """The same without tensor parallelism."""
    sequences: int
    """In a microbatch."""
    microbatches: int
    """In a step."""
    footprint: Footprint
    microbatch: Microbatch
    in_merge: int
    """Bytes on the device besides what stays, while a base weight takes up its delta; 0 without restarts."""
    building: int
    """Bytes of host memory while the model is built, whole and in fp32."""
    step_flops: int
    restart_flops: int
    data_step: dict[str, int]
    """Bytes handed to collectives of the data axis in a step: `summed`, `scattered`, `gathered`."""
    data_restart: dict[str, int]
    """The same in a restart."""
    all_restart: dict[str, int]
    """The same over both axes together."""
    tensor_gradients: int
    """Bytes of factor gradients that a microbatch sums over the tensor axis."""
    sync: SyncCost | None = None
    """Of LTE's heads."""

    @property
    def in_microbatch(self) -> int:
        """Bytes besides what stays, at the height of a microbatch."""
        in_backward = self.microbatch.in_backward + self.footprint.in_backward
        return self.footprint.in_forward + max(self.microbatch.at_loss, in_backward)

    @property
    def peak(self) -> int:
        """Most bytes at once on the device."""
        in_sync = 0 if self.sync is None else self.sync.in_sync
        return self.footprint.resident + max(self.in_microbatch, self.footprint.in_step, self.in_merge, in_sync)

    @property
    def sent_in_step(self) -> dict[str, int]:
        """Bytes that a process sends, by axis and what they are."""
        data, tensor = self.layout.data, self.layout.tensor
        gradients = {key: size for key, size in self.data_step.items() if key != "gathered"}
        activations = self.microbatch.all_reduced - self.tensor_gradients
        return {
            "data axis: gradients": sent(gradients, data),
            "data axis: weights": sent(self.data_step, data) - sent(gradients, data),
            "tensor axis: activations": self.microbatches
            * sent_by_tensor_axis(activations, self.microbatch.gathered, tensor),
            "tensor axis: factor gradients": self.microbatches * sent_by_tensor_axis(self.tensor_gradients, 0, tensor),
            "other heads: dense gradients": self._dense_gradients,
        }

    @property
    def _dense_gradients(self) -> int:
        gradients = None if self.sync is None else self.sync.gradients
        return 0 if gradients is None else round(gradients.bytes / (self.layout.data * self.layout.tensor))

    @property
    def sent_in_restart(self) -> dict[str, int]:
        """The same in a restart."""
        return {
            "data axis: factors": sent(self.data_restart, self.layout.data),
            "both axes: first moments": sent(self.all_restart, self.layout.data * self.layout.tensor),
        }


def cost(
    config: TrainConfig,
    skeletons: Skeletons,
    layout: Layout,
    *,
    low_rank: bool,
    sequences: int | None = None,
    on_gpu: bool = True,
) -> Cost:
    """One phase on one layout.

    Args:
        sequences: in a microbatch, when not as the configuration says.

    Raises:
        ConfigError: the model or the global batch cannot be shared so.
    """
    sequences = sequences or config.training.microbatch(layout.heads * layout.data)
    checkpointing = config.training.activation_checkpointing
    skeleton, whole = (
        skeletons.get(low_rank=low_rank, tensor=tensor, sequences=sequences, checkpointing=checkpointing)
        for tensor in (layout.tensor, 1)
    )
    held, parallel = skeleton.held, parallel_of(config.parallel, layout)
    microbatches = config.training.global_batch_size // (layout.heads * layout.data) // sequences
    bf16 = config.training.dtype is Dtype.bf16
    settings = _settings(config, parallel, sequences, trainable_entries(held), on_gpu=on_gpu)
    doubled = sum(one.entries for one in held if one.role is Role.factor and one.whole) if layout.tensor > 1 else 0
    relora = config.relora if low_rank else None
    lte = config.lte if low_rank or config.lora is None else None
    merges = relora is not None and lte is None  # else syncs merge, and restarts only draw anew
    pruning = relora is not None and relora.reset in (Reset.magnitude, Reset.random)
    masters_apart = layout.zero_stage == 3 or (bf16 and layout.zero_stage > 0)
    stays = _stays(config, held, parallel, settings, data=layout.data, microbatches=microbatches)
    if lte is not None:
        keep_between_syncs(stays, held, lte, _place(config, layout))
    return Cost(
        layout=layout,
        rows=skeleton.rows,
        held=held,
        whole=whole.held,
        sequences=sequences,
        microbatches=microbatches,
        footprint=stays,
        microbatch=skeleton.microbatch,
        in_merge=merge_bytes(held, config.merge_precision, config.training.dtype) if merges else 0,
        building=sum(one.entries for one in whole.held) * FP32,
        step_flops=skeleton.microbatch.update_flops(microbatches),
        restart_flops=merge_flops(held, layout.data if layout.zero_stage == 3 else 1) if merges else 0,
        data_step=step_traffic(held, parallel, settings, data=layout.data, microbatches=microbatches),
        data_restart={"summed": factor_bytes(held)} if merges and masters_apart else {},
        all_restart={"summed": factor_bytes(whole.held)} if pruning else {},
        tensor_gradients=doubled * (2 if bf16 else FP32),
        sync=None if lte is None else sync_of(config, lte, held, layout),
    )


def _stays(
    config: TrainConfig,
    held: Sequence[Held],
    parallel: ParallelConfig,
    settings: Mapping[str, Any],
    *,
    data: int,
    microbatches: int,
) -> Footprint:
    """What stays between microbatches."""
    return footprint(
        held,
        parallel,
        settings,
        data=data,
        microbatches=microbatches,
        checkpointing=config.training.activation_checkpointing is not Checkpointing.none,
        moments=config.optimizer.moments,
    )


def _settings(
    config: TrainConfig, parallel: ParallelConfig, sequences: int, trainable: int, *, on_gpu: bool
) -> dict[str, Any]:
    """DeepSpeed's settings."""
    return deepspeed_config(
        parallel,
        bf16=config.training.dtype is Dtype.bf16,
        microbatch_size=sequences,
        max_grad_norm=config.training.max_grad_norm,
        trainable=trainable,
        on_gpu=on_gpu,
    )


def sync_of(config: TrainConfig, lte: LteConfig, held: Sequence[Held], layout: Layout) -> SyncCost:
    """The syncs of heads that hold this, each of them shared as the layout says."""
    merge = block_bytes(held, lte.merge_precision, config.training.dtype)
    return sync_cost(held, lte, _place(config, layout), merge=merge)


def _place(config: TrainConfig, layout: Layout) -> Place:
    bf16 = config.training.dtype is Dtype.bf16
    return Place(zero_stage=layout.zero_stage, bf16=bf16, data=layout.data, tensor=layout.tensor)


def parallel_of(parallel: ParallelConfig, layout: Layout) -> ParallelConfig:
    """A configuration for another layout; what cannot be offloaded there stays on the device."""
    allowed = {0: [Offload.none], 3: list(Offload)}.get(layout.zero_stage, [Offload.none, Offload.optimizer])
    offload = parallel.offload if parallel.offload in allowed else allowed[-1]
    return replace(parallel, zero_stage=layout.zero_stage, tensor=layout.tensor, offload=offload)


def merge_flops(held: Sequence[Held], parts: int) -> int:
    """Of the products `up @ down`, for one of `parts` equal parts of each base weight."""
    return sum(2 * piece(one.entries, parts) * one.adapter_rank for one in held if one.role is Role.base)


def merge_bytes(held: Sequence[Held], precision: MergePrecision, dtype: Dtype) -> int:
    """Temporaries of the largest merge: those of a block of the base weight, its factors in fp32, and one in fp64."""
    factors = max(one.entries for one in held if one.role is Role.factor)
    return block_bytes(held, precision, dtype) + factors * (2 * FP32 + 8)


def block_bytes(held: Sequence[Held], precision: MergePrecision, dtype: Dtype) -> int:
    """Temporaries of a block of the largest base weight that takes up its delta; 0 without base weights."""
    largest = max((one.entries for one in held if one.role is Role.base), default=0)
    if any(one.quantised is not None for one in held):
        return min(largest, SLAB_ENTRIES) * _REQUANTISED_BYTES
    per_entry = _BLOCK_BYTES[precision if dtype is Dtype.bf16 else MergePrecision.nearest]
    return min(largest, BLOCK_ENTRIES) * per_entry
