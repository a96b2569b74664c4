"""The trainers that the step benchmark compares, each built as its users build it.

All start from the same random model, see the same batch and train the same kinds of parameters; those with
low-rank factors have the same adapter rank and the same layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from continual.data import Batch
from continual.method import Term
from launch.config import TrainConfig, load
from launch.models.model import build_model, model_config
from launch.planning.flops import count_step_flops
from launch.planning.skeleton import step_flops
from launch.training.objective import accumulate, summed_loss
from launch.training.phase import Phase, make_engine, make_phase
from parallel.runtime import Runtime
from relora.convert import low_rank_modules
from relora.kinds import parameter_kinds
from relora.optimizer import parameter_groups
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


@dataclass(kw_only=True, slots=True, frozen=True)
class Variant:
    """One trainer, ready to step."""

    trainable: int
    flops: int
    """Executed by a forward and backward pass of the batch."""
    step: Callable[[], None]
    """Forward, backward, clipping, optimizer."""
    restart: Callable[[int], None] | None = None
    """ReLoRA's restart, given its index."""


def full_rank(shape: Shape, runtime: Runtime) -> Variant:
    """Accrete, all parameters."""
    return _engine_variant(shape, runtime, low_rank=False)


def relora(shape: Shape, runtime: Runtime) -> Variant:
    """Accrete, low-rank factors and the dense kinds."""
    return _engine_variant(shape, runtime, low_rank=True)


def peft_engine(shape: Shape, runtime: Runtime) -> Variant:
    """PEFT's layers in Accrete's engine, so that nothing but the layers differs."""
    config, batch = _config(shape, low_rank=True), _batch(shape)
    model = _peft_model(config, runtime.device, autocast=False).to(config.torch_dtype)
    flops = _flops(model, batch, runtime.device)
    return _in_engine(Phase(model=model, conversion=None, outputs={}, targets=[]), config, batch, runtime, flops)


def peft_torch(shape: Shape, runtime: Runtime) -> Variant:
    """PEFT with torch's AdamW, as its users write it; in bf16 the dense parameters have no fp32 masters."""
    config, batch = _config(shape, low_rank=True), _batch(shape)
    device = runtime.device
    model = _peft_model(config, device, autocast=True)
    flops = _flops(model, batch, device)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.optimizer), fused=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        loss = summed_loss(model, batch, device) / batch.targets
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())

    return Variant(trainable=sum(parameter.numel() for parameter in parameters), flops=flops, step=step)


VARIANTS: dict[str, Callable[[Shape, Runtime], Variant]] = {
    "full rank": full_rank,
    "ReLoRA": relora,
    "PEFT LoRA, same engine": peft_engine,
    "PEFT LoRA, torch AdamW": peft_torch,
}


def _config(shape: Shape, *, low_rank: bool) -> TrainConfig:
    lora = (f"lora.rank={shape.rank}", "relora.warm_start_steps=0") if low_rank else ("lora=none",)
    return load(
        [
            f"model={shape.model}",
            f"data.sequence_length={shape.sequence}",
            f"training.global_batch_size={shape.batch}",
            f"training.dtype={shape.dtype}",
            *lora,
        ]
    )


def _batch(shape: Shape) -> Batch:
    generator = torch.Generator().manual_seed(_SEED)
    tokens = torch.randint(_BYTES, (shape.batch, shape.sequence), generator=generator)
    return Batch(inputs={"input_ids": tokens}, labels=tokens)


def _hf_config(config: TrainConfig) -> PretrainedConfig:
    return model_config(config.model, vocab_size=_BYTES, sequence_length=config.data.sequence_length)


def _peft_model(config: TrainConfig, device: torch.device, *, autocast: bool) -> nn.Module:
    """PEFT's low-rank model with the layers, the rank and the dense parameters of ours."""
    lora = config.lora
    assert lora is not None
    plain: Any = build_model(config.model, _hf_config(config), seed=_SEED)
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
    config = _config(shape, low_rank=low_rank)
    hf_config = _hf_config(config)
    phase = make_phase(config, hf_config, step=0, fresh=True, tensor=1)
    return _in_engine(phase, config, _batch(shape), runtime, step_flops(config, hf_config, 0, print))


def _in_engine(phase: Phase, config: TrainConfig, batch: Batch, runtime: Runtime, flops: int) -> Variant:
    engine = make_engine(phase, config, runtime)
    model, size, term = engine.model, len(batch), Term(name="task", batch=batch)

    def step() -> None:
        float(accumulate(engine, term, targets=[batch.targets], microbatch_size=size, device=runtime.device))
        engine.step(config.optimizer.lr, lambda norm: None)

    def restart_once(index: int) -> None:
        assert config.relora is not None
        restart(model, config.relora, engine.store, seed=_SEED, restart_index=index)

    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    again = restart_once if low_rank_modules(model) else None
    return Variant(trainable=trainable, flops=flops, step=step, restart=again)


def _flops(model: nn.Module, batch: Batch, device: torch.device) -> int:
    flops = count_step_flops(partial(_backward, model, batch, device))
    model.zero_grad(set_to_none=True)
    return flops


def _backward(model: nn.Module, batch: Batch, device: torch.device) -> None:
    loss: Tensor = summed_loss(model, batch, device)
    loss.backward()
