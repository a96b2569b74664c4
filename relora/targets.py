"""Which linear layers become low-rank: names against suffixes and regular expressions.

Every pattern must match something: one that does not is a slip, and stopping is better than ignoring it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from relora.errors import ConfigError

ALL_LINEAR = "all-linear"


def check_targets(targets: Any) -> None:
    """Check the form of lora.target_modules.

    Raises: ConfigError
    """
    if isinstance(targets, str) and targets:
        if targets != ALL_LINEAR:
            compiled("lora.target_modules", targets)
        return
    listed = isinstance(targets, list) and all(isinstance(suffix, str) and suffix for suffix in targets)
    if not (listed and targets):
        raise ConfigError(
            f"lora.target_modules must be {ALL_LINEAR}, a list of name suffixes such as [q_proj,v_proj], or "
            f"a regular expression; got {targets!r}"
        )


def named_by(name: str, pattern: str) -> bool:
    """Tell whether a key of lora.rank_pattern names a module: a suffix, or a regular expression of it all."""
    return _has_suffix(name, pattern) or bool(compiled("lora.rank_pattern", pattern).fullmatch(name))


def output_embedding(model: nn.Module) -> nn.Module | None:
    """Return the layer that turns hidden states into logits, where the model tells."""
    find = getattr(model, "get_output_embeddings", None)
    found = find() if callable(find) else None
    return found if isinstance(found, nn.Module) else None


def output_layer(model: nn.Module) -> nn.Module | None:
    """Return the layer that makes logits: the output embedding, or that of a classifier."""
    found = output_embedding(model)
    if found is not None:
        return found
    outputs = getattr(getattr(model, "config", None), "num_labels", None)
    heads = [getattr(model, name, None) for name in ("classifier", "score")]
    return next((head for head in heads if isinstance(head, nn.Linear) and head.out_features == outputs), None)


def find_targets(model: nn.Module, wanted: str | list[str]) -> dict[str, nn.Module]:
    """Return the linear layers that lora.target_modules names.

    Raises: ConfigError when it, or one of its suffixes, matches nothing, or a match shares its weight.
    """
    # Subclasses of nn.Linear may compute something else, so only the two plain layers count.
    linear = {name: module for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)}
    if wanted == ALL_LINEAR:
        head = output_layer(model)
        targets = {name: module for name, module in linear.items() if module is not head}
    elif isinstance(wanted, str):
        targets = {name: module for name, module in linear.items() if re.fullmatch(wanted, name)}
    else:
        _check_each(wanted, linear)
        targets = {name: module for name, module in linear.items() if any(_has_suffix(name, one) for one in wanted)}
    if not targets:
        raise ConfigError(f"lora.target_modules={wanted} matches no linear layer; there are {_leaves(linear)}")
    _check_unshared(model, targets)
    return targets


def check_ranks(targets: Mapping[str, nn.Module], ranks: Mapping[str, int], patterns: Mapping[str, int]) -> None:
    """Check that every pattern of lora.rank_pattern is of use and every rank fits its layer.

    Raises: ConfigError
    """
    for pattern in patterns:
        if not any(named_by(name, pattern) for name in targets):
            raise ConfigError(f"lora.rank_pattern: {pattern!r} matches no low-rank layer of {_leaves(targets)}")
    for name, module in targets.items():
        assert isinstance(module.weight, Tensor)
        limit = min(module.weight.shape)
        if ranks[name] > limit:
            raise ConfigError(
                f"lora.rank must be at most min(in, out) = {limit} for {name}, got {ranks[name]}: "
                "lower it, or give this layer its own in lora.rank_pattern"
            )


def compiled(key: str, pattern: str) -> re.Pattern[str]:
    """Compile a regular expression of the user's.

    Raises: ConfigError
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{key}: {pattern!r} is no regular expression ({error}); for name suffixes give a list"
        ) from error


def _has_suffix(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _leaves(modules: Mapping[str, nn.Module]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in modules})) or "none"


def _check_each(suffixes: list[str], linear: Mapping[str, nn.Module]) -> None:
    for suffix in suffixes:
        if not any(_has_suffix(name, suffix) for name in linear):
            raise ConfigError(f"lora.target_modules: {suffix!r} matches no linear layer; there are {_leaves(linear)}")


def _check_unshared(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, module in targets.items():
        if owners[id(module.weight)] > 1:
            raise ConfigError(
                f"lora.target_modules: {name} shares its weight with another module, and a merge would "
                "change both: leave it out"
            )
