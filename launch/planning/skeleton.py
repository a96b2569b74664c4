"""A run's model without memory: what a process would hold of it, and what a microbatch would take.

It is the model that `train` builds, on the meta device. Only one and two of its blocks are built and run where all
blocks are alike, since a whole large model takes seconds even without memory.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PretrainedConfig

from launch.config import TrainConfig
from launch.models.model import build_model
from launch.planning.microbatch import Microbatch, run_microbatch
from launch.planning.weightless import weightless
from launch.training.phase import low_rank_at, make_phase
from launch.training.recomputation import Checkpointing, checkpoint_blocks_
from parallel.footprint import Held, Role
from parallel.output_loss import OutputLoss, take_output_loss_
from parallel.pretence import imagined_axis
from parallel.tensor import split_model
from relora.convert import Conversion, ConversionRow, low_rank_modules, planned_layers, prepare_base_
from relora.errors import ConfigError
from relora.linear import LowRankLinear
from relora.optimizer import parameter_groups
from relora.paths import ForwardPath
from relora.quantised import QuantisedBase


@dataclass(kw_only=True, slots=True, frozen=True)
class Skeleton:
    """One phase of a run, as the first process of the tensor axis sees it."""

    held: list[Held]
    """Its parameters, in the model's order."""
    rows: list[ConversionRow]
    """What the conversion did to the whole model; empty at full rank."""
    microbatch: Microbatch


class Skeletons:
    """The skeletons of a run; each is made once."""

    def __init__(self, config: TrainConfig, hf_config: PretrainedConfig) -> None:
        if config.model.attention != "eager":  # other fused kernels keep the same, and may not be installed here
            config = replace(config, model=replace(config.model, attention="sdpa"))
        self._low, self._full = config, replace(config, lora=None, relora=None, lte=None)
        self.hf_config = hf_config
        self._blocks = getattr(hf_config, "num_hidden_layers", None)
        self.alike = self._blocks is not None and self._blocks > 2 and self._repeats(self._blocks)
        self._made: dict[tuple[bool, int, int, Checkpointing], Skeleton] = {}

    def get(self, *, low_rank: bool, tensor: int, sequences: int, checkpointing: Checkpointing) -> Skeleton:
        """One phase, split over `tensor` processes, with microbatches of so many sequences.

        Raises:
            ConfigError: the model cannot be built, converted or split so.
        """
        key = (low_rank, tensor, sequences, checkpointing)
        if key not in self._made:
            self._made[key] = self._make(*key)
        return self._made[key]

    def _make(self, low_rank: bool, tensor: int, sequences: int, checkpointing: Checkpointing) -> Skeleton:
        config = self._low if low_rank else self._full

        def made(hf_config: PretrainedConfig) -> Skeleton:
            return _skeleton(config, hf_config, tensor=tensor, sequences=sequences, checkpointing=checkpointing)

        if not self.alike:
            return made(self.hf_config)
        assert self._blocks is not None
        try:
            one, two = (made(_shallow(self.hf_config, blocks)) for blocks in (1, 2))
        except ConfigError:  # let the whole model say it, if it is true of the whole model
            return made(self.hf_config)
        further = self._blocks - 1
        return Skeleton(
            held=_repeated(one.held, two.held, further),
            rows=[_more(*pair, further) for pair in zip(one.rows, two.rows, strict=True)],
            microbatch=one.microbatch.deeper(two.microbatch, further),
        )

    def _repeats(self, blocks: int) -> bool:
        whole = self._sizes(self.hf_config)
        try:
            one, two = (self._sizes(_shallow(self.hf_config, depth)) for depth in (1, 2))
        except ConfigError:  # a target names a block that is not there
            return False
        return all(
            total == first + (blocks - 1) * (second - first)
            for total, first, second in zip(whole, one, two, strict=True)
        )

    def _sizes(self, hf_config: PretrainedConfig) -> tuple[int, int]:
        """Entries of the model, and of its factors."""
        with torch.device("meta"):
            model = build_model(self._low.model, hf_config, seed=0, weights=False)
        layers = {} if self._low.lora is None else planned_layers(model, self._low.lora)
        factors = sum(rank * sum(module.get_parameter("weight").shape) for module, rank in layers.values())
        return sum(parameter.numel() for parameter in model.parameters()), factors


def _shallow(hf_config: PretrainedConfig, blocks: int) -> PretrainedConfig:
    cut = copy.deepcopy(hf_config)
    cut.num_hidden_layers = blocks
    if getattr(cut, "layer_types", None) is not None:
        cut.layer_types = cut.layer_types[:blocks]
    return cut


def _skeleton(
    config: TrainConfig, hf_config: PretrainedConfig, *, tensor: int, sequences: int, checkpointing: Checkpointing
) -> Skeleton:
    packed, ranks = config.data.document_mask, config.lte.ranks if config.lte is not None else None
    head = ranks.index(max(ranks)) if ranks else 0  # the largest one
    with weightless(packed=packed):
        phase = make_phase(config, hf_config, step=config.warm_start_steps, fresh=False, tensor=tensor, heads=[head])
        model = phase.model
        split_model(model, imagined_axis(tensor), config.parallel.tensor_plan)
        prepare_base_(model, config.torch_dtype, config.merge_precision, config.base)
        checkpoint_blocks_(model, checkpointing)
        planned = OutputLoss.plain if config.training.loss is OutputLoss.plain else OutputLoss.chunked
        take_output_loss_(model, planned, torch.device("meta"))
        model.train()
        try:
            microbatch = run_microbatch(model, sequences=sequences, length=config.data.sequence_length, packed=packed)
        except (NotImplementedError, RuntimeError) as error:
            raise ConfigError(
                f"this model cannot be planned: its forward pass needs values, not only shapes ({error})"
            ) from error
    return Skeleton(held=_held(model, config, tensor), rows=_rows(phase.conversion), microbatch=microbatch)


def _rows(conversion: Conversion | None) -> list[ConversionRow]:
    return [] if conversion is None else conversion.rows()


def _held(model: nn.Module, config: TrainConfig, tensor: int) -> list[Held]:
    low_rank = low_rank_modules(model)
    layers = {id(layer.weight): layer for layer in low_rank.values() if layer.quantised is None}
    factors = {id(factor) for layer in low_rank.values() for factor in (layer.down, layer.up)}
    groups = {id(one): group["name"] for group in parameter_groups(model, config.optimizer) for one in group["params"]}
    held = [_quantised(name, layer, layer.quantised) for name, layer in low_rank.items() if layer.quantised is not None]
    for name, parameter in model.named_parameters():
        layer, group = layers.get(id(parameter)), groups.get(id(parameter))
        role = Role.dense if group is not None else Role.frozen
        role = Role.base if layer is not None else Role.factor if id(parameter) in factors else role
        whole = not hasattr(parameter, "tensor_model_parallel")
        held.append(
            Held(
                name=name,
                entries=parameter.numel(),
                role=role,
                group=group,
                extra_bits=layer is not None and layer.extra_bits is not None,
                adapter_rank=0 if layer is None else layer.adapter_rank,
                whole=whole,
                pinned=_keeps_a_view(layer) if layer is not None else role is Role.factor and whole and tensor > 1,
            )
        )
    return held


def _quantised(name: str, layer: LowRankLinear, base: QuantisedBase) -> Held:
    return Held(
        name=f"{name}.weight",
        entries=base.entries,
        role=Role.base,
        group=None,
        adapter_rank=layer.adapter_rank,
        quantised=base.codes.nbytes + base.scales.nbytes + (0 if base.pairs is None else base.pairs.nbytes),
        remainder=0 if base.remainder is None else base.remainder.nbytes,
    )


def _keeps_a_view(layer: LowRankLinear) -> bool:
    """Whether a view of its weight stays from forward to backward, and ZeRO-3 cannot free what lies behind it."""
    return layer.transposed and layer.path == ForwardPath.factored


def _repeated(one: list[Held], two: list[Held], further: int) -> list[Held]:
    """A model's parameters when its second block stands `further` times."""
    known = {held.name for held in one}
    block = [held for held in two if held.name not in known]
    found = re.match(r"(.+?\.)1\.", block[0].name)
    assert found is not None, "blocks are numbered"
    path = found.group(1)
    result: list[Held] = []
    for held in two:
        if held is block[0]:
            for number in range(1, further + 1):
                result += [replace(part, name=f"{path}{number}.{part.name[len(path) + 2 :]}") for part in block]
        elif held.name in known:
            result.append(held)
    return result


def _more(one: ConversionRow, two: ConversionRow, further: int) -> ConversionRow:
    def grown(first: int, second: int) -> int:
        return first + further * (second - first)

    return replace(
        one,
        modules=grown(one.modules, two.modules),
        parameters=grown(one.parameters, two.parameters),
        trainable=grown(one.trainable, two.trainable),
    )


def step_flops(config: TrainConfig, hf_config: PretrainedConfig, step: int, say: Callable[[str], None]) -> int:
    """FLOPs that the update after `step` updates executes, on all processes together.

    0, and a word about it, for a model that cannot be traced without memory: it trains all the same.
    """
    sequences = config.training.microbatch_size or 1
    low_rank, checkpointing = low_rank_at(config, step), config.training.activation_checkpointing
    skeletons = Skeletons(config, hf_config)
    try:
        skeleton = skeletons.get(low_rank=low_rank, tensor=1, sequences=sequences, checkpointing=checkpointing)
    except ConfigError as error:
        say(f"no FLOPs are reported: {error}")
        return 0
    return skeleton.microbatch.update_flops(config.job_batch // sequences)
