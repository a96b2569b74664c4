"""The trainers that the step benchmark compares, each built as its users build it.

All start from the same random model, see the same batch and train the same kinds of parameters; those with
low-rank factors have the same adapter rank and the same layers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from benchmarks.linear_variants import paths_on
from continual.data import Batch
from continual.method import Term
from launch.config import TrainConfig, load
from launch.models.model import build_model, model_config
from launch.planning.flops import count_step_flops
from launch.planning.skeleton import step_flops
from launch.training.objective import accumulate, microbatches, summed_loss
from launch.training.phase import Phase, make_engine, make_phase
from parallel.engine import Engine
from parallel.runtime import Runtime
from relora.convert import low_rank_modules
from relora.kinds import parameter_kinds
from relora.linear import LowRankLinear
from relora.merged import formed_weights
from relora.optimizer import parameter_groups
from relora.paths import ForwardPath
from relora.restart import restart
from relora.targets import find_targets

_SEED = 0
_BYTES = 256  # size of the vocabulary where the model leaves it open


@dataclass(kw_only=True, slots=True, frozen=True)
class Shape:
    """What all variants have in common."""

    model: str
    """An option of conf/model."""
    rank: int
    batch: int
    sequence: int
    dtype: str
    microbatch: int = 0
    """Sequences of a forward and backward pass; 0: the whole batch."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Variant:
    """One trainer, ready to step."""

    trainable: int
    flops: int
    """Executed by a forward and backward pass of the batch."""
    passes: Callable[[], None]
    """Forward and backward."""
    update: Callable[[], None]
    """Clipping and optimizer."""
    restart: Callable[[int], None] | None = None
    """ReLoRA's restart, given its index."""

    def step(self) -> None:
        """All of a training step."""
        self.passes()
        self.update()


def full_rank(shape: Shape, runtime: Runtime) -> Variant:
    """Accrete, all parameters."""
    return _engine_variant(shape, runtime, low_rank=False)


def relora(shape: Shape, runtime: Runtime) -> Variant:
    """Accrete, low-rank factors and the dense kinds."""
    return _engine_variant(shape, runtime, low_rank=True)


def peft_engine(shape: Shape, runtime: Runtime) -> Variant:
    """PEFT's layers in Accrete's engine, so that nothing but the layers differs."""
    config, batch = configured(shape, low_rank=True), _batch(shape)
    model = _peft_model(config, runtime.device, autocast=False).to(config.torch_dtype)
    flops = _flops(model, batch, runtime.device)
    return _in_engine(Phase(model=model, conversion=None, outputs={}, targets=[]), config, batch, runtime, flops)


def peft_torch(shape: Shape, runtime: Runtime) -> Variant:
    """PEFT with torch's AdamW, as its users write it.

    In bf16 that is: factors in fp32 under autocast, and dense parameters without fp32 masters.
    """
    config, batch = configured(shape, low_rank=True), _batch(shape)
    device, half = runtime.device, config.torch_dtype is torch.bfloat16
    model = _peft_model(config, device, autocast=True)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.optimizer), fused=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def passes() -> None:
        total = torch.zeros((), device=device)
        for part in microbatches(batch, shape.microbatch or shape.batch):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                loss = summed_loss(model, part, device) / batch.targets
            loss.backward()
            total += loss.detach()
        float(total)

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, config.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    flops = count_step_flops(passes)
    optimizer.zero_grad()
    trainable = sum(parameter.numel() for parameter in parameters)
    return Variant(trainable=trainable, flops=flops, passes=passes, update=update)


VARIANTS: dict[str, Callable[[Shape, Runtime], Variant]] = {
    "full rank": full_rank,
    "ReLoRA": relora,
    "PEFT LoRA, same engine": peft_engine,
    "PEFT LoRA, torch AdamW": peft_torch,
}


def configured(shape: Shape, *further: str, low_rank: bool) -> TrainConfig:
    """The run that a variant is the step of."""
    lora = (f"lora.rank={shape.rank}", "relora.warm_start_steps=0") if low_rank else ("lora=none",)
    return load(
        [
            f"model={shape.model}",
            f"data.sequence_length={shape.sequence}",
            f"training.global_batch_size={shape.batch}",
            f"training.microbatch_size={shape.microbatch or 'null'}",
            f"training.dtype={shape.dtype}",
            *lora,
            *further,
        ]
    )


def _batch(shape: Shape) -> Batch:
    generator = torch.Generator().manual_seed(_SEED)
    tokens = torch.randint(_BYTES, (shape.batch, shape.sequence), generator=generator)
    return Batch(inputs={"input_ids": tokens}, labels=tokens)


def hf_config_of(config: TrainConfig) -> PretrainedConfig:
    """The configuration of its model."""
    return model_config(config.model, vocab_size=_BYTES, sequence_length=config.data.sequence_length)


def _peft_model(config: TrainConfig, device: torch.device, *, autocast: bool) -> nn.Module:
    """PEFT's low-rank model with the layers, the rank and the dense parameters of ours."""
    lora = config.lora
    assert lora is not None
    plain: Any = build_model(config.model, hf_config_of(config), seed=_SEED)
    model = plain.to(device=device, dtype=config.torch_dtype)
    kinds = parameter_kinds(model)
    dense = [parameter for parameter in model.parameters() if kinds[id(parameter)] in lora.dense]
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(find_targets(model, lora.target_modules)),
    )
    wrapped: nn.Module = peft.get_peft_model(model, settings, autocast_adapter_dtype=autocast)
    for parameter in dense:
        parameter.requires_grad_(True)
    return wrapped.train()


def _engine_variant(shape: Shape, runtime: Runtime, *, low_rank: bool) -> Variant:
    config = configured(shape, low_rank=low_rank)
    hf_config = hf_config_of(config)
    phase = make_phase(config, hf_config, step=0, fresh=True, tensor=1)
    return _in_engine(phase, config, _batch(shape), runtime, step_flops(config, hf_config, 0, print))


def low_rank_paths(shape: Shape, runtime: Runtime, cache: Path) -> dict[str, Variant]:
    """Accrete by each path of `lora.forward`, `auto` too; they share one engine, and so its weights and its state.

    Args:
        cache: a folder for what `auto` measures.
    """
    config = configured(shape, "lora.forward=auto", f"data.cache={cache}", low_rank=True)
    hf_config, taken = hf_config_of(config), dict[str, str]()
    phase = make_phase(config, hf_config, step=0, fresh=True, tensor=1)
    layers = low_rank_modules(phase.model)
    engine = make_engine(phase, config, runtime, taken)
    made = {}
    for path in (*paths_on(runtime.device), ForwardPath.auto):
        of_each = {name: ForwardPath(taken[name]) if path is ForwardPath.auto else path for name in layers}
        for name, layer in layers.items():
            layer.path = of_each[name]
        plain = _around(engine, config, _batch(shape), runtime, flops=0)
        flops = count_step_flops(plain.passes)
        engine.step(0.0, lambda norm: "only counted")
        made[path.value] = replace(plain, flops=flops, passes=partial(_by, layers, of_each, plain.passes))
    return made


def _by(layers: Mapping[str, LowRankLinear], paths: Mapping[str, ForwardPath], passes: Callable[[], None]) -> None:
    for name, layer in layers.items():
        layer.path = paths[name]
    passes()


def _in_engine(phase: Phase, config: TrainConfig, batch: Batch, runtime: Runtime, flops: int) -> Variant:
    return _around(make_engine(phase, config, runtime), config, batch, runtime, flops)


def _around(engine: Engine, config: TrainConfig, batch: Batch, runtime: Runtime, flops: int) -> Variant:
    model, term = engine.model, Term(name="task", batch=batch)
    size = config.microbatch()

    def passes() -> None:
        with formed_weights(model, seed=_SEED, step=0):
            total = accumulate(engine, term, targets=[batch.targets], microbatch_size=size, device=runtime.device)
        float(total)

    def update() -> None:
        engine.step(config.optimizer.lr, lambda norm: None)

    def restart_once(index: int) -> None:
        assert config.relora is not None
        restart(model, config.relora, engine.store, seed=_SEED, restart_index=index)

    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    again = restart_once if low_rank_modules(model) else None
    return Variant(trainable=trainable, flops=flops, passes=passes, update=update, restart=again)


def _flops(model: nn.Module, batch: Batch, device: torch.device) -> int:
    flops = count_step_flops(partial(_backward, model, batch, device))
    model.zero_grad(set_to_none=True)
    return flops


def _backward(model: nn.Module, batch: Batch, device: torch.device) -> None:
    loss: Tensor = summed_loss(model, batch, device)
    loss.backward()
