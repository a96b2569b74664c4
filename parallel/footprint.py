"""How many bytes one process holds of a model that an engine trains, by kind. Pure arithmetic.

What each ZeRO stage of DeepSpeed allocates was read in its source and is measured in the tests; settings come from
`deepspeed_config`, so that a bucket size has one home. Activations are not known here: launch/planning/microbatch.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from parallel.zero import BUCKET_ENTRIES, Offload, ParallelConfig
from relora.coded_moments import MomentFormat, bytes_of_moments, bytes_of_update

FP32 = 4
EXTRA_BITS = 2
_NORM = 8  # DeepSpeed takes norms in fp64
_ALIGNMENT = 2  # DeepSpeed pads a flat group to this many entries for each process
_ALL_REDUCE_ENTRIES = 500_000_000  # DeepSpeed's bucket for gradients outside ZeRO's own buckets


class Role(str, Enum):
    """What a parameter is to low-rank training."""

    base = "base"
    """A frozen weight under factors."""
    factor = "factor"
    dense = "dense"
    """Trains at full rank."""
    frozen = "frozen"
    """Neither trains nor has factors."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Held:
    """One parameter, as a process holds it before ZeRO: whole, or what tensor parallelism left of it."""

    name: str
    entries: int
    role: Role
    group: str | None
    """Its optimizer group; None when it does not train."""
    extra_bits: bool = False
    """Whether 16 further bits stand beside each entry."""
    adapter_rank: int = 0
    """Of the factors over it; 0 where there are none."""
    whole: bool = True
    """Whether tensor parallelism left it whole on every process."""
    quantised: int | None = None
    """Bytes of its codes and scales, when they stand in its place."""
    remainder: int = 0
    """Bytes beside them in host memory, whatever is offloaded."""
    pinned: bool = False
    """Whether layers compute with a view of it, which keeps what stage 3 gathered until the backward pass."""


class Kind(str, Enum):
    """What memory is for."""

    base = "base weights"
    frozen = "frozen weights"
    dense = "dense weights"
    factors = "factors"
    extra_bits = "extra bits"
    gradients = "gradients"
    masters = "fp32 masters"
    moments = "Adam moments"
    buffers = "communication buffers"
    synced = "factors of the last sync"
    peers = "other heads' factors"
    anchors = "dense masters of the last sync"
    outer = "outer momentum"
    residuals = "what rounding kept back"
    flight = "a sync on its way"


_WEIGHTS = {Role.base: Kind.base, Role.frozen: Kind.frozen, Role.dense: Kind.dense, Role.factor: Kind.factors}


@dataclass(kw_only=True, slots=True)
class Footprint:
    """Bytes of one process, activations aside."""

    device: dict[Kind, int] = field(default_factory=dict)
    """What stays between the microbatches of a step."""
    host: dict[Kind, int] = field(default_factory=dict)
    """The same in host memory, where offload puts it."""
    in_forward: int = 0
    """On the device besides, while a microbatch runs."""
    in_backward: int = 0
    """On the device besides, from its first gradient on."""
    in_step: int = 0
    """On the device besides, while gradients are summed and weights are updated."""

    @property
    def resident(self) -> int:
        """What stays on the device."""
        return sum(self.device.values())

    @property
    def on_host(self) -> int:
        """What stays in host memory."""
        return sum(self.host.values())

    def keep(self, kind: Kind, size: int, *, on_host: bool = False) -> None:
        """Count memory that stays."""
        side = self.host if on_host else self.device
        side[kind] = side.get(kind, 0) + size


def footprint(
    held: Sequence[Held],
    parallel: ParallelConfig,
    settings: Mapping[str, Any],
    *,
    data: int,
    microbatches: int = 1,
    checkpointing: bool = False,
    moments: MomentFormat = MomentFormat.full,
) -> Footprint:
    """What a process holds.

    Args:
        held: its parameters in the model's order.
        settings: what `deepspeed_config` makes of the run.
        data: processes that ZeRO partitions over.
        microbatches: in a step; some buffers exist only when there are several.
        checkpointing: whether blocks are computed anew in the backward pass.
    """
    section = settings.get("zero_optimization", {})
    stage, bf16 = section.get("stage", 0), "bf16" in settings
    if stage == 0:
        result, sizes = _replicas(held, data), [one.entries for one in held if one.group is not None]
    elif stage == 3:
        pinned = 0 if checkpointing else sum(one.entries for one in held if one.pinned)
        result, sizes = _stage_three(held, parallel, section, bf16=bf16, data=data, pinned=pinned)
    elif bf16 and stage == 1 and parallel.offload is Offload.none:
        immediate = bool(settings["bf16"].get("immediate_grad_update", False))
        result, sizes = _bf16_optimizer(held, parallel, data=data, immediate=immediate)
    else:
        result, sizes = _stages_one_and_two(held, parallel, section, bf16=bf16, data=data, microbatches=microbatches)
    offloaded = parallel.offload is not Offload.none
    result.keep(Kind.moments, bytes_of_moments(sizes, moments), on_host=offloaded)
    result.in_step = max(result.in_step, 0 if offloaded else bytes_of_update(sizes, moments))
    return result


def groups_of(held: Sequence[Held]) -> list[list[int]]:
    """Entries of the trainable parameters, by optimizer group."""
    groups: dict[str, list[int]] = {}
    for one in held:
        if one.group is not None:
            groups.setdefault(one.group, []).append(one.entries)
    return list(groups.values())


def trainable_entries(held: Sequence[Held]) -> int:
    """Entries that train."""
    return sum(one.entries for one in held if one.group is not None)


def piece(entries: int, count: int) -> int:
    """Entries of one of `count` equal parts, the last one padded."""
    return -(-entries // count)


def flat_size(entries: Sequence[int], data: int) -> int:
    """Entries of a group's flat tensor, padded for its processes."""
    return piece(sum(entries), _ALIGNMENT * data) * _ALIGNMENT * data


def _replicas(held: Sequence[Held], data: int) -> Footprint:
    """fp32 at stage 0: parameters are their own masters, and DeepSpeed adds nothing."""
    result, trainable = Footprint(), trainable_entries(held)
    _keep_weights(result, held, FP32)
    result.keep(Kind.gradients, trainable * FP32)
    if data > 1:
        result.in_step = min(trainable, BUCKET_ENTRIES) * FP32
    return result


def _bf16_optimizer(
    held: Sequence[Held], parallel: ParallelConfig, *, data: int, immediate: bool
) -> tuple[Footprint, list[int]]:
    """bf16 at stages 0 and 1: gradients are summed in fp32 over all parameters, whatever is partitioned.

    Returns the entries of each tensor with moments, too.
    """
    result, parts = Footprint(), data if parallel.zero_stage > 0 else 1
    groups = groups_of(held)
    sizes = [flat_size(group, parts) for group in groups]
    _keep_weights(result, held, 2, padding=sum(sizes) - trainable_entries(held))
    low_precision = 0 if immediate else 2 * trainable_entries(held)
    result.keep(Kind.gradients, sum(sizes) * FP32 + low_precision)
    result.keep(Kind.masters, sum(sizes) // parts * FP32)
    if parallel.zero_stage > 0:  # DeepSpeed flattens a bucket of several tensors, and sums a bf16 copy of it
        result.in_step = max(sum(one) * (2 if len(one) == 1 else FP32 + 2) for one in _buckets(sizes))
    elif data > 1:
        result.in_step = min(sum(sizes), BUCKET_ENTRIES) * FP32
    return result, [size // parts for size in sizes]


def _stages_one_and_two(
    held: Sequence[Held],
    parallel: ParallelConfig,
    section: Mapping[str, Any],
    *,
    bf16: bool,
    data: int,
    microbatches: int,
) -> tuple[Footprint, list[int]]:
    result, width = Footprint(), 2 if bf16 else FP32
    groups = groups_of(held)
    sizes = [flat_size(group, data) for group in groups]
    part, trainable = sum(sizes) // data, trainable_entries(held)
    offloaded = parallel.offload is not Offload.none
    _keep_weights(result, held, width, padding=sum(sizes) - trainable)
    result.keep(Kind.masters, part * FP32, on_host=offloaded)
    touched = sum(_touched(group, data) for group in groups) * FP32
    largest = max(max(group) for group in groups)
    bucket, copies = int(section["reduce_bucket_size"]), 2 if section.get("overlap_comm") else 1
    if section["stage"] == 1:  # from the first gradient to the step
        result.keep(Kind.gradients, trainable * FP32)
        result.keep(Kind.buffers, copies * bucket * FP32)
        result.in_step = bucket * FP32 + touched
    else:
        result.keep(Kind.gradients, part * FP32 if bf16 else 0 if offloaded else touched)
        again = bucket * width + (0 if bf16 or microbatches == 1 else touched)  # a bucket flattened, new gradients
        result.in_backward = copies * bucket * width + (again if trainable > bucket else 0)
        result.in_step = max(max(sizes) // data * FP32, copies * bucket * width + again)
    result.in_step = max(result.in_step, min(largest, max(sizes) // data) * _NORM)
    if offloaded:
        result.keep(Kind.gradients, part * FP32, on_host=True)
        result.keep(Kind.buffers, (part + largest) * width, on_host=True)
        result.keep(Kind.buffers, largest * width)
        if not bf16 and section["stage"] == 2 and microbatches > 1:
            result.keep(Kind.gradients, touched, on_host=True)
    return result, [size // data for size in sizes]


def _stage_three(
    held: Sequence[Held], parallel: ParallelConfig, section: Mapping[str, Any], *, bf16: bool, data: int, pinned: int
) -> tuple[Footprint, list[int]]:
    result, width = Footprint(), 2 if bf16 else FP32
    offloaded, weights_on_host = parallel.offload is not Offload.none, parallel.offload is Offload.all
    for one in held:
        result.keep(_WEIGHTS[one.role], piece(one.entries, data) * width, on_host=weights_on_host)
        if one.extra_bits:
            result.keep(Kind.extra_bits, piece(one.entries, data) * EXTRA_BITS)
    parts = [sum(piece(size, data) for size in group) for group in groups_of(held)]
    part = sum(parts)
    result.keep(Kind.masters, part * FP32, on_host=offloaded)
    result.keep(Kind.gradients, part * FP32 * (2 if offloaded else 1), on_host=offloaded)
    result.keep(Kind.buffers, int(section["reduce_bucket_size"]) * width)
    whole = Gathering(held, section, data=data)
    result.keep(Kind.buffers, whole.kept * width)
    result.in_forward = (min(whole.live + pinned, whole.passing) + whole.arriving) * width
    result.in_step = 0 if offloaded else min(max(parts), int(section.get("sub_group_size", 1e9))) * FP32
    return result, parts


class Gathering:
    """Whole weights that stage 3 puts together for a while. Entries.

    Source: DeepSpeed's PartitionedParameterCoordinator; its defaults stand where the settings name none.
    """

    def __init__(self, held: Sequence[Held], section: Mapping[str, Any], *, data: int) -> None:
        threshold = int(section.get("stage3_param_persistence_threshold", 1e5))
        sizes = [one.entries for one in held] if data > 1 else []
        self.kept = sum(size for size in sizes if size <= threshold)
        """Small parameters that stay whole; gathered once a step."""
        self.passing = sum(size for size in sizes if size > threshold)
        """The others; gathered by every pass of every microbatch."""
        reuse = int(section.get("stage3_max_reuse_distance", 1e9))
        self.turning = min(self.passing, reuse // 2)
        """Those at the model's end that the backward pass finds where the forward pass left them."""
        ahead = int(section.get("stage3_prefetch_bucket_size", 5e7))
        largest = max((size for size in sizes if size > threshold), default=0)
        limit = int(section.get("stage3_max_live_parameters", 1e9)) if ahead else 0  # what fetching ahead may fill
        self.live = min(self.passing, max(self.turning, limit) + largest)
        """Most of the others that are whole at one time."""
        self.arriving = min(self.passing, max(largest, ahead))
        """Those that lie in a buffer of their collective before each gets its own memory."""


def _keep_weights(result: Footprint, held: Sequence[Held], width: int, padding: int = 0) -> None:
    for one in held:
        result.keep(_WEIGHTS[one.role], one.entries * width if one.quantised is None else one.quantised)
        if one.extra_bits:
            result.keep(Kind.extra_bits, one.entries * EXTRA_BITS)
        if one.remainder:
            result.keep(Kind.extra_bits, one.remainder, on_host=True)
    if padding:
        result.keep(Kind.buffers, padding * width)


def _touched(sizes: Sequence[int], data: int) -> int:
    """Entries of the parameters that the fullest of a group's partitions has a part of."""
    part, most = flat_size(sizes, data) // data, 0
    for index in range(data):
        begin, total, touched = 0, (index + 1) * part, 0
        for size in sizes:
            if begin < total and begin + size > index * part:
                touched += size
            begin += size
        most = max(most, touched)
    return most


def _buckets(sizes: Sequence[int]) -> list[list[int]]:
    """Tensors that DeepSpeed sums together outside ZeRO's own buckets; the one that makes it too many is the last."""
    buckets: list[list[int]] = [[]]
    for size in sizes:
        if sum(buckets[-1]) > _ALL_REDUCE_ENTRIES:
            buckets.append([])
        buckets[-1].append(size)
    return buckets
