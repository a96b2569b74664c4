"""The phases of a run: full-rank, or low-rank from the start, or a full-rank warm start and then low-rank.

A phase is a model in the form that is trained, and an engine over it. Every process builds the whole model in its
own memory, then keeps its part; the next phase takes its values from the checkpoint that ends the one before.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from continual.methods.registry import METHODS
from launch.config import TrainConfig
from launch.models.model import build_model, drawn_outputs
from launch.training.paths import take_paths
from launch.training.recomputation import checkpoint_blocks_
from parallel.engine import Engine
from parallel.hosted import HostedEngine
from parallel.output_loss import take_output_loss_
from parallel.regions import Region
from parallel.runtime import Runtime
from parallel.tensor import split_model
from parallel.tensor_plan import tensor_plan, tensor_regions
from relora.adapter import load_adapter_
from relora.convert import Conversion, LoraConfig, planned_layers, prepare_base_, to_low_rank
from relora.hosted import host_heads
from relora.lte import Exchange, keep_synced_
from relora.optimizer import parameter_groups


@dataclass(kw_only=True, slots=True)
class Phase:
    """A model, still whole, in fp32 and on the CPU."""

    model: nn.Module
    conversion: Conversion | None
    """What became low-rank; None at full rank."""
    outputs: dict[str, Tensor]
    """The parameters of a classifier's outputs, as they were drawn; empty for a language model."""
    targets: list[str]
    """Modules that are low-rank, or will be after a warm start."""
    adapter: str | None = None
    """What lora.init_from brought."""
    heads: Sequence[int] = (0,)
    """LTE's heads that the model is for."""


def low_rank_at(config: TrainConfig, step: int) -> bool:
    """Whether the update after `step` updates is a low-rank one."""
    return config.lora is not None and step >= config.warm_start_steps


def hosted_heads(config: TrainConfig, runtime: Runtime, step: int) -> Sequence[int]:
    """LTE's heads whose model this process holds (a part of) after `step` updates; in a warm start all are one."""
    if config.lte is None or step < config.warm_start_steps:
        return [0]
    share = config.heads // runtime.head.size
    return range(runtime.head.index * share, (runtime.head.index + 1) * share)


def make_phase(
    config: TrainConfig,
    hf_config: PretrainedConfig,
    *,
    step: int,
    fresh: bool,
    tensor: int,
    heads: Sequence[int] = (0,),
) -> Phase:
    """The whole model of the phase that an update after `step` updates belongs to, checked for all that follows.

    Args:
        fresh: whether pre-trained weights and lora.init_from are wanted; a checkpoint brings its own.
        tensor: degree of tensor parallelism that the model must allow.
        heads: whose model it will be; the factors are drawn for the first of them.

    Raises:
        ConfigError: a target or rank fits no layer, the adapter does not fit, or the model cannot be split so.
    """
    with _generators_kept(not fresh):
        model = build_model(config.model, hf_config, seed=config.run.seed, weights=fresh)
    outputs = drawn_outputs(model)
    targets: list[str] = []
    if config.lora is not None:
        targets = list(planned_layers(model, config.lora))  # what fits nothing must not wait for a warm start's end
    conversion, adapter = None, None
    if low_rank_at(config, step):
        assert config.lora is not None
        conversion = _converted(model, config, config.lora, heads[0])
        if fresh and config.lora.init_from is not None:
            adapter = str(load_adapter_(model, Path(config.lora.init_from).expanduser()))
    if tensor > 1:
        tensor_regions(model, tensor_plan(model, config.parallel.tensor_plan), size=tensor, index=0)
    return Phase(model=model, conversion=conversion, outputs=outputs, targets=targets, adapter=adapter, heads=heads)


def _converted(model: nn.Module, config: TrainConfig, lora: LoraConfig, head: int) -> Conversion:
    lte = config.lte
    if lte is None:
        trains_down = config.continual is None or METHODS[config.continual.method].trains_down
        return to_low_rank(model, lora, seed=config.run.seed, train_down=trains_down)
    shared = lte.exchange == Exchange.shared
    rank = lte.rank_of(head)
    lora = lora if rank is None else replace(lora, rank=rank)
    conversion = to_low_rank(model, lora, seed=config.run.seed, head=0 if shared else head, train_down=not shared)
    keep_synced_(model, lte)
    return conversion


def make_engine(phase: Phase, config: TrainConfig, runtime: Runtime, paths: dict[str, str] | None = None) -> Engine:
    """Keep this process's part of a phase's model, in the precision that is trained, and put an engine over it.

    Args:
        paths: what the run's layers have taken so far, to be kept and completed (launch/training/paths.py).
    """
    regions = _made_ready(phase, config, runtime, {} if paths is None else paths)
    return Engine(
        phase.model,
        parameter_groups(phase.model, config.optimizer),
        runtime=runtime,
        parallel=config.parallel,
        regions=regions,
        betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
        eps=config.optimizer.eps,
        moments=config.optimizer.moments,
        microbatch_size=config.microbatch(runtime.batch.size),
        max_grad_norm=config.training.max_grad_norm,
    )


def make_engine_of_heads(
    phase: Phase, config: TrainConfig, runtime: Runtime, paths: dict[str, str]
) -> Engine | HostedEngine:
    """The same, but the model of several heads is stacked first.

    Raises:
        ConfigError: the model cannot be stacked.
    """
    if len(phase.heads) == 1:
        return make_engine(phase, config, runtime, paths)
    host_heads(phase.model, phase.heads, seed=config.run.seed)
    _made_ready(phase, config, runtime, paths)
    return HostedEngine(
        phase.model,
        parameter_groups(phase.model, config.optimizer),
        runtime=runtime,
        betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
        eps=config.optimizer.eps,
        max_grad_norm=config.training.max_grad_norm,
    )


def _made_ready(phase: Phase, config: TrainConfig, runtime: Runtime, paths: dict[str, str]) -> Mapping[str, Region]:
    """Keep this process's part of the model, in the precision that is trained; returns what was cut."""
    model = phase.model
    regions = split_model(model, runtime.tensor, config.parallel.tensor_plan)
    prepare_base_(model, config.torch_dtype, config.merge_precision, config.base)
    paths.update(take_paths(model, config, runtime, paths))
    if config.parallel.zero_stage < 3:  # which moves and partitions one parameter at a time
        model.to(runtime.device)
    checkpoint_blocks_(model, config.training.activation_checkpointing)
    take_output_loss_(model, config.training.loss, runtime.device)
    model.train()
    if config.training.compile:
        model.compile()
    return regions


@contextmanager
def _generators_kept(wanted: bool) -> Iterator[None]:
    """Random weights that a checkpoint will replace must not disturb the draws of dropout."""
    if not wanted:
        yield
        return
    with torch.random.fork_rng():
        yield
