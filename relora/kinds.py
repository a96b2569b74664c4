"""What a parameter outside the low-rank layers' weights is for; decides whether it trains at full rank."""

from __future__ import annotations

from enum import Enum

from torch import nn

from relora.targets import output_layer


class ParameterKind(str, Enum):
    """The words of lora.dense."""

    embeddings = "embeddings"
    """Of nn.Embedding, with an output embedding that is tied to one."""
    norms = "norms"
    """One-dimensional weights of normalisation layers."""
    head = "head"
    """The layer that makes logits, when it is not tied: the output embedding, or that of a classifier."""
    biases = "biases"
    """Every bias, those of low-rank layers and of normalisation layers too."""
    other = "other"
    """The rest, such as linear layers that no target matches."""


def parameter_kinds(model: nn.Module) -> dict[int, ParameterKind]:
    """Return each parameter's kind by identity; embeddings go first, so a tied head counts with them."""
    kinds: dict[int, ParameterKind] = {}
    head = output_layer(model)
    for module in sorted(model.modules(), key=lambda module: not isinstance(module, nn.Embedding)):
        for name, parameter in module.named_parameters(recurse=False):
            kinds.setdefault(id(parameter), _kind(module, name, parameter, module is head))
    return kinds


def _kind(module: nn.Module, name: str, parameter: nn.Parameter, is_head: bool) -> ParameterKind:
    if isinstance(module, nn.Embedding):
        return ParameterKind.embeddings
    if name == "bias" or name.endswith("_bias"):
        return ParameterKind.biases
    if parameter.ndim == 1 and "Norm" in type(module).__name__:
        return ParameterKind.norms
    return ParameterKind.head if is_head else ParameterKind.other
