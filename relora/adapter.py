"""PEFT's LoRA adapters, in and out: the names in them, and what of PEFT the low-rank layers cannot say.

PEFT's lora_A is `down` and its lora_B is `up`. `load_adapter_` starts the factors of a converted model from a
folder, `save_adapter` writes a folder that `PeftModel.from_pretrained` loads.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from relora.convert import low_rank_modules
from relora.errors import ConfigError
from relora.linear import LowRankLinear

Factors = tuple[Tensor, Tensor]
"""(down, up)."""

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(A|B)\.weight")
# Settings that make an adapter compute something else than W + scaling * up @ down.
_OTHER_FUNCTIONS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# The other initialisations (pissa, olora, loftq, corda, ...) change the base weights, too.
_BASE_KEEPING = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(kw_only=True, slots=True)
class AdapterReport:
    """What an adapter brought into a model."""

    loaded: list[str]
    """Low-rank modules that took their factors from it."""
    missing: list[str]
    """Low-rank modules that it does not have: their `up` stays zero."""
    dense: list[str]
    """Dense parameters that it replaced (PEFT's modules_to_save)."""
    base: str
    """The model that it says it was trained on."""

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} layers start from the adapter"]
        if self.missing:
            parts.append(f"{len(self.missing)} are not in it and start at zero ({_some(self.missing)})")
        if self.dense:
            parts.append(f"{len(self.dense)} dense parameters are replaced ({_some(self.dense)})")
        return ", ".join(parts) + (f"; it was trained on {self.base}" if self.base else "")


@torch.no_grad()
def load_adapter_(model: nn.Module, folder: Path) -> AdapterReport:
    """Start the factors of a converted model from a PEFT adapter; nothing is changed unless all of it fits.

    Raises: ConfigError
    """
    settings = _read_settings(folder)
    factors, dense = _sorted_out(folder, _read_tensors(folder))
    layers = low_rank_modules(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _check_names(folder, factors, dense, layers, parameters)
    _check_dense(folder, dense, parameters, tied=bool(settings.get("ensure_weight_tying")))
    for name, (down, up) in factors.items():
        _check_factors(folder, name, down, up, layers[name])
        _check_scaling(folder, name, settings, layers[name])
    for name, (down, up) in factors.items():
        layers[name].down.copy_(down)
        layers[name].up.copy_(up)
    for name, value in dense.items():
        parameters[name].copy_(value)
    return AdapterReport(
        loaded=list(factors),
        missing=[name for name in layers if name not in factors],
        dense=list(dense),
        base=str(settings.get("base_model_name_or_path") or ""),
    )


def names_to_save(model: nn.Module, changed: Iterable[str], low_rank: Iterable[str]) -> list[str]:
    """The tensors that PEFT needs so that changed dense ones arrive: whole modules, under all tied names.

    Raises: ConfigError for a parameter of a module with parts, which PEFT cannot replace beside its layers.
    """
    tensors = model.state_dict(keep_vars=True)
    wanted, layers = {id(tensors[name]) for name in changed}, set(low_rank)
    names: dict[str, None] = {}
    for name in (name for name, tensor in tensors.items() if id(tensor) in wanted):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if owner not in layers and (not owner or next(module.children(), None) is not None):
            raise ConfigError(
                f"export.to=svd cannot carry {name}, which was trained but belongs to a module with parts: use "
                "export.to=model or export.to=adapter"
            )
        leaves = [leaf] if owner in layers else module.state_dict()
        names |= dict.fromkeys(f"{owner}.{part}" for part in leaves)
    return list(names)


def save_adapter(
    folder: Path,
    model: nn.Module,
    factors: Mapping[str, Factors],
    *,
    alpha: float,
    rslora: bool,
    base: Path,
    dense: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a PEFT adapter.

    Args:
        model: whose modules the names belong to; its weights are not read and may be on the meta device.
        base: folder of the model that the adapter is to be put on.
        dense: parameters that replace the base's, as `names_to_save` lists them.
    """
    from peft import LoraConfig as PeftConfig

    dense = dense or {}
    biases = {name for name in dense if name.rpartition(".")[0] in factors}
    ranks = {name: down.shape[0] for name, (down, _) in factors.items()}
    usual = max(ranks.values(), key=list(ranks.values()).count)
    PeftConfig(
        r=usual,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        use_rslora=rslora,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != usual},
        target_modules=_targets(model, factors),
        modules_to_save=sorted({name.rpartition(".")[0] for name in dense if name not in biases}) or None,
        bias="lora_only" if biases else "none",
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in factors),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        inference_mode=True,
    ).save_pretrained(folder)
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = down.detach().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = up.detach().contiguous()
    for name, value in dense.items():
        owner, _, leaf = name.rpartition(".")
        key = f"{owner}.base_layer.{leaf}" if name in biases else name
        tensors[_PREFIX + key] = value.detach().clone()  # tied ones share memory, which the format refuses
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _targets(model: nn.Module, factors: Mapping[str, Factors]) -> list[str]:
    """Last parts of names where they say the same as the names."""
    leaves = {name.rpartition(".")[2] for name in factors}
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves}
    return sorted(leaves if matched == set(factors) else factors)


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(folder, f"{path.name} cannot be read ({error}); name a folder that PEFT saved") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        raise _refused(folder, f"its peft_type is {kind}, and only LORA can be a start")
    for key in _OTHER_FUNCTIONS:
        if settings.get(key):
            raise _refused(folder, f"it has {key}={settings[key]!r}, and only plain LoRA can be a start")
    if settings.get("bias", "none") != "none":
        raise _refused(folder, f"it has bias={settings['bias']!r}; merge it into its base and train on from that")
    if settings.get("init_lora_weights") not in _BASE_KEEPING:
        raise _refused(
            folder,
            f"init_lora_weights={settings['init_lora_weights']!r} changed the base weights, too; let PEFT convert it "
            "to a plain adapter (path_initial_model_for_weight_conversion)",
        )
    return settings


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        found = "only adapter_model.bin, a pickle" if (folder / "adapter_model.bin").exists() else "no weights"
        raise _refused(folder, f"it holds {found}; save it with safe_serialization=True")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise _refused(folder, f"{path.name} is damaged ({error})") from error
    return tensors


def _sorted_out(folder: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    halves: dict[str, dict[str, Tensor]] = {}
    dense: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        match = _FACTOR.fullmatch(name)
        if match:
            halves.setdefault(match[1], {})[match[2]] = tensor
        else:
            dense[name] = tensor
    for name, half in halves.items():
        if len(half) < 2:
            raise _refused(folder, f"{name} has lora_{next(iter(half))} only")
    return {name: (half["A"], half["B"]) for name, half in halves.items()}, dense


def _check_names(
    folder: Path,
    factors: Mapping[str, Factors],
    dense: Mapping[str, Tensor],
    layers: Mapping[str, LowRankLinear],
    parameters: Mapping[str, nn.Parameter],
) -> None:
    if not factors:
        raise _refused(folder, "it holds no lora_A and lora_B")
    unknown = [name for name in factors if name not in layers]
    if unknown:
        raise _refused(
            folder,
            f"it has factors for {_leaves(factors)}, the low-rank layers here are {_leaves(layers)}; without a place "
            f"are {_some(unknown)}: set lora.target_modules to the adapter's, and take the model that it was made for",
        )
    strange = [name for name in dense if name not in parameters]
    if strange:
        raise _refused(folder, f"this model has nothing that is called {_some(strange)}")
    whole = [name for name in dense if name.rpartition(".")[0] in layers]
    if whole:
        raise _refused(folder, f"{_some(whole)} is whole there and low-rank here: leave it out of lora.target_modules")


def _check_dense(
    folder: Path, dense: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], *, tied: bool
) -> None:
    for name, value in dense.items():
        here = parameters[name]
        if value.shape != here.shape:
            raise _refused(folder, f"{name} is {tuple(value.shape)} there and {tuple(here.shape)} here")
        for twin in (other for other, parameter in parameters.items() if parameter is here and other != name):
            # PEFT copies a tied module that it saves, and leaves its twin as it was.
            if not (torch.equal(dense[twin], value) if twin in dense else tied):
                raise _refused(folder, f"{name} and {twin} differ there and are tied here: untie the model's first")


def _check_factors(folder: Path, name: str, down: Tensor, up: Tensor, layer: LowRankLinear) -> None:
    rank = down.shape[0]
    if rank != layer.adapter_rank:
        raise _refused(
            folder,
            f"the rank of {name} is {rank} there and {layer.adapter_rank} here: set lora.rank={rank}, or "
            f"lora.rank_pattern for this layer",
        )
    if down.shape != layer.down.shape or up.shape != layer.up.shape:
        there, here = (rank, down.shape[-1], up.shape[0]), (rank, layer.in_features, layer.out_features)
        raise _refused(folder, f"{name} has (rank, in, out) {there} there and {here} here: it is of another model")


def _check_scaling(folder: Path, name: str, settings: Mapping[str, Any], layer: LowRankLinear) -> None:
    alpha, rank, rslora = _alpha(name, settings), layer.adapter_rank, bool(settings.get("use_rslora"))
    scaling = alpha / (rank**0.5 if rslora else rank)
    if not math.isclose(scaling, layer.scaling, rel_tol=1e-6):
        raise _refused(
            folder,
            f"the scaling of {name} is {scaling:g} there (alpha {alpha:g}, rank {rank}) and {layer.scaling:g} here: "
            f"set lora.alpha={alpha:g} and lora.scaling={'rslora' if rslora else 'standard'}",
        )


def _alpha(name: str, settings: Mapping[str, Any]) -> float:
    """PEFT's rule: the first pattern that a name ends with."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(alpha)
    return float(settings.get("lora_alpha", 8))  # PEFT's default


def _refused(folder: Path, reason: str) -> ConfigError:
    return ConfigError(f"lora.init_from={folder}: {reason}")


def _leaves(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more
