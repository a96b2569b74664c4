"""What a continual method remembers, in checkpoints: plain values, whole tensors, and parts of parameters."""

import torch
from torch import Tensor

from continual.method import MethodState
from launch.training.run import Run
from parallel.checkpoint import Checkpoint
from parallel.engine import Engine
from parallel.regions import Region, whole

KIND = "method"
_WHOLE, _PART = "whole/", "part/"


def held_of_method(run: Run) -> dict[str, tuple[Region, Tensor]]:
    """Its tensors under the names of checkpoints; a part's name tells its parameter, too."""
    state, held = run.method.state(), {}
    for name, tensor in state.tensors.items():
        held[_WHOLE + name] = whole(tensor), tensor
    for name, (parameter, part) in state.parts.items():
        assert isinstance(run.engine, Engine)
        store = run.engine.store
        held[f"{_PART}{name}:{store.name(parameter)}"] = store.as_held(parameter, part)
    return held


def names_of_parts(checkpoint: Checkpoint, before: str) -> dict[str, str]:
    """What parts are called in a checkpoint, by their parameters: those named by it with these letters before it."""
    named = (name.rpartition(":")[::2] for name in checkpoint.names(KIND))
    return {parameter: f"{own}:{parameter}" for own, parameter in named if own == f"{_PART}{before}{parameter}"}


def load_method(run: Run, checkpoint: Checkpoint) -> None:
    """Give the method back what it remembered, cut for this layout of processes."""
    state = MethodState(values=checkpoint.state[KIND])
    parameters = dict(run.model.named_parameters())
    for name in checkpoint.names(KIND):
        if name.startswith(_WHOLE):
            state.tensors[name.removeprefix(_WHOLE)] = checkpoint.whole(KIND, name).clone()
            continue
        own, _, of = name.removeprefix(_PART).partition(":")
        parameter = parameters[of]
        if parameter.requires_grad:
            assert isinstance(run.engine, Engine)
            store = run.engine.store
            part = _part(checkpoint, name, store.master_region(parameter), grows=of in run.outputs)
            state.parts[own] = parameter, part.reshape(-1).to(store.master(parameter).device, copy=True)
    run.method.load(state)


def _part(checkpoint: Checkpoint, name: str, region: Region, *, grows: bool) -> Tensor:
    """A part as this layout cuts it; outputs of classes that tasks have brought since then begin at zero."""
    shape = checkpoint.shape(KIND, name)
    if not (grows and shape[0] < region.shape[0]):
        return checkpoint.part(KIND, name, region)
    grown = torch.zeros(region.shape)
    grown[: shape[0]] = checkpoint.whole(KIND, name)
    return region.take(grown)
