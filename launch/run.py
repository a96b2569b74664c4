"""One run in memory: its model, engine and state; how they are built, saved, and handed from phase to phase.

A run has one phase (full-rank, or low-rank from the start) or two: a full-rank warm start, then low-rank
training. A phase is an engine; changing phase builds a new one and carries weights and Adam state over.
"""

import shutil
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from continual.data import Data
from launch.config import TrainConfig, resolved
from launch.flops import count_step_flops
from launch.guard import Guard
from launch.model import build_model, save_model
from launch.objective import summed_loss
from launch.run_folder import RunFolder
from launch.signals import StopRequest
from launch.spectra import Spectra
from launch.state import RunState
from launch.watch import Watch
from parallel.checkpoint import Checkpoint, prune_checkpoints, step_name, write_checkpoint
from parallel.engine import Engine
from relora.adapter import load_adapter_
from relora.convert import Conversion, planned_layers, prepare_base_, to_low_rank
from relora.errors import ConfigError
from relora.optimizer import Moments, parameter_groups
from relora.precision import MergePrecision

Kept = dict[str, tuple[Tensor, Moments | None]]
"""By parameter name: the fp32 master and the Adam state, where there is one."""


@dataclass(kw_only=True, slots=True)
class Run:
    """Everything that the loop works on."""

    config: TrainConfig
    folder: RunFolder
    device: torch.device
    data: Data
    model: nn.Module
    engine: Engine
    state: RunState
    guard: Guard
    watch: Watch
    stop: StopRequest
    spectra: Spectra | None
    conversion: Conversion | None


def low_rank_at(config: TrainConfig, step: int) -> bool:
    """Whether the update after `step` updates is a low-rank one."""
    return config.lora is not None and step >= config.warm_start_steps


def make_phase(model: nn.Module, config: TrainConfig, device: torch.device, *, low_rank: bool) -> Conversion | None:
    """Bring an fp32 model into the form that a phase trains: converted, in its precision, on its device."""
    conversion = None
    if low_rank:
        assert config.lora is not None
        conversion = to_low_rank(model, config.lora, seed=config.run.seed)
    precision = config.relora.merge_precision if config.relora else MergePrecision.nearest
    prepare_base_(model, config.torch_dtype, precision)
    model.to(device)
    if config.training.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    model.train()
    return conversion


def make_engine(model: nn.Module, config: TrainConfig) -> Engine:
    """An engine over the trainable parameters of a phase."""
    if config.training.compile:
        model.compile()
    return Engine(
        model,
        parameter_groups(model, config.optimizer),
        betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
        eps=config.optimizer.eps,
        microbatch_size=config.training.microbatch,
        max_grad_norm=config.training.max_grad_norm,
    )


def masters(run: Run) -> dict[str, Tensor]:
    """The fp32 values that the optimizer updates, by parameter name."""
    return {name: run.engine.store.master(parameter) for name, parameter in _trainable(run.model)}


def hand_over(run: Run) -> None:
    """End the warm start: make the model low-rank and give it an engine of its own.

    Parameters that train on keep their masters and Adam state; the wrapped weights start their first cycle.
    """
    kept: Kept = {
        name: (run.engine.store.master(parameter).clone(), run.engine.store.moments(parameter))
        for name, parameter in _trainable(run.model)
    }
    run.engine.close()
    run.model._compiled_call_impl = None  # compiled anew by the next phase, once its FLOPs are counted
    run.model.float()
    parameters = dict(run.model.named_parameters())
    for name, (master, _) in kept.items():
        parameters[name].data = master.to(run.device)
    run.conversion = make_phase(run.model, run.config, run.device, low_rank=True)
    run.watch.flops_per_step = step_flops(run.model, run.data, run.config, run.device)
    run.engine = make_engine(run.model, run.config)
    _restore(run, {name: kept[name] for name, _ in _trainable(run.model) if name in kept})
    show_model(run)
    save_start(run)


def show_model(run: Run) -> None:
    """Print what of the model is low-rank, what trains dense and what is frozen."""
    trainable = sum(parameter.numel() for _, parameter in _trainable(run.model))
    if run.conversion is None:
        run.watch.say(f"full rank: {trainable:,} parameters train on {run.device}")
        return
    lines = [astuple(row) for row in run.conversion.rows()]
    run.watch.console.table("model", ("kind", "modules", "parameters", "trainable", "state"), lines)
    run.watch.say(f"low rank: {trainable:,} parameters train, for a model of {run.conversion.total:,}, on {run.device}")


def save_start(run: Run) -> None:
    """Write start/: the model that low-rank training begins from, in fp32, as spectra and `export` read it."""
    if run.config.run.save_start:
        save_model(run.model, run.folder.path / "start", run.data.tokenizer, dtype=torch.float32, masters=masters(run))


def save_checkpoint(run: Run) -> None:
    """Write a checkpoint of the run as it is after its last step, and drop old ones."""
    state, store = run.state, run.engine.store
    state.note_best(step_name(state.step))
    model = {name: tensor.detach() for name, tensor in _tensors(run.model)}
    optimizer: dict[str, Tensor] = {}
    for name, parameter in _trainable(run.model):
        if store.has_master(parameter):
            optimizer[f"{name}/master"] = store.master(parameter)
        moments = store.moments(parameter)
        if moments is not None:
            optimizer[f"{name}/exp_avg"] = moments.exp_avg
            optimizer[f"{name}/exp_avg_sq"] = moments.exp_avg_sq
            optimizer[f"{name}/step"] = moments.step.clone()
    path = write_checkpoint(
        run.folder.checkpoints,
        state.step,
        tensors={"model": model, "optimizer": optimizer, "generators": _generators(run.device)},
        state={"run": state.to_dict(), "config": resolved(run.config), "data": run.data.fingerprint},
    )
    keep = run.config.checkpoint
    best = state.best_checkpoint if keep.keep_best else None
    prune_checkpoints(run.folder.checkpoints, keep=keep.keep, best=best)
    run.watch.event("checkpoint", state.step, path=path.name)


def load_checkpoint(run: Run, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's tensors and generators into a freshly built run of the same phase.

    Raises:
        ConfigError: its tensors are not this model's.
    """
    live, stored = dict(_tensors(run.model)), checkpoint.tensors("model")
    for name in sorted(set(live) ^ set(stored)):
        side = "the checkpoint lacks" if name in live else "only the checkpoint has"
        raise ConfigError(f"{checkpoint.folder} is of another model: {side} {name}")
    for name, tensor in stored.items():
        if tensor.shape != live[name].shape:
            raise ConfigError(
                f"{checkpoint.folder} is of another model: {name} is {tuple(tensor.shape)} there and "
                f"{tuple(live[name].shape)} here"
            )
        live[name].data.copy_(tensor)
    _restore(run, _stored_state(run, checkpoint.tensors("optimizer"), stored))
    _set_generators(checkpoint.tensors("generators"), run.device)


def adopt_start(run: Run, checkpoint: Checkpoint) -> None:
    """Take over start/ from the run that a checkpoint came from, when this run branches off it."""
    source, target = checkpoint.folder.parent.parent / "start", run.folder.path / "start"
    if source.is_dir() and not target.exists():
        shutil.copytree(source, target)


def build(
    config: TrainConfig, hf_config: PretrainedConfig, device: torch.device, state: RunState, *, fresh: bool
) -> tuple[nn.Module, Conversion | None, str | None]:
    """The model of the phase that `state` is in, and what an adapter brought into it.

    Args:
        fresh: whether pre-trained weights and lora.init_from are wanted; a checkpoint brings its own.

    Raises:
        ConfigError: a target or rank fits no layer, or the adapter does not fit.
    """
    model = build_model(config.model, hf_config, seed=config.run.seed, weights=fresh)
    if config.lora is not None:
        planned_layers(model, config.lora)  # a target that fits nothing must not wait for the end of a warm start
    conversion = make_phase(model, config, device, low_rank=low_rank_at(config, state.step))
    adapter = None
    if fresh and config.lora is not None and config.lora.init_from is not None:
        adapter = str(load_adapter_(model, Path(config.lora.init_from).expanduser()))
    return model, conversion, adapter


def step_flops(model: nn.Module, data: Data, config: TrainConfig, device: torch.device) -> int:
    """FLOPs that one update executes, counted on one microbatch; before an engine or a compiler has the model."""
    batch = data.train.batch(0, config.training.microbatch)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        flops = count_step_flops(lambda: summed_loss(model, batch, device).backward())
    model.zero_grad(set_to_none=True)
    return flops * (config.training.global_batch_size // config.training.microbatch)


def _restore(run: Run, kept: Kept) -> None:
    parameters = dict(run.model.named_parameters())
    for name, (master, moments) in kept.items():
        run.engine.store.write(parameters[name], master)
        if moments is not None:
            run.engine.store.write_moments(parameters[name], moments)


def _stored_state(run: Run, optimizer: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> Kept:
    kept: Kept = {}
    for name, _ in _trainable(run.model):
        moments = None
        if f"{name}/step" in optimizer:
            moments = Moments(
                exp_avg=optimizer[f"{name}/exp_avg"],
                exp_avg_sq=optimizer[f"{name}/exp_avg_sq"],
                step=optimizer[f"{name}/step"],
            )
        kept[name] = (optimizer.get(f"{name}/master", model[name]), moments)
    return kept


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter once, and the buffers that are state (extra bits); those a model can compute are not."""
    persistent = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]
    return [*model.named_parameters(), *buffers]


def _generators(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
