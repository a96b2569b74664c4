"""Turning a Hugging Face model into a low-rank one, and back into plain weights.

`to_low_rank` wraps the linear layers that the configuration names and decides what else trains; its
Conversion says what it found. `merged_state_dict` is the way back. The layer itself is in relora/linear.py,
the matching of names in relora/targets.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from relora.errors import ConfigError
from relora.initialize import draw_down
from relora.kinds import ParameterKind, parameter_kinds
from relora.linear import LowRankLinear
from relora.paths import ForwardPath
from relora.precision import MergePrecision
from relora.quantised import BaseFormat
from relora.targets import ALL_LINEAR, check_ranks, check_targets, compiled, find_targets, named_by


class Scaling(str, Enum):
    """The factor on `up @ down`: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)."""

    standard = "standard"
    rslora = "rslora"


def _default_dense() -> list[ParameterKind]:
    return [ParameterKind.embeddings, ParameterKind.norms, ParameterKind.head, ParameterKind.biases]


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Which layers become low-rank, how, and what trains beside them."""

    rank: int = 128
    """Adapter rank."""
    alpha: float = 32.0
    """Numerator of the scaling."""
    dropout: float = 0.0
    """Dropout probability on the input of the factors."""
    target_modules: Any = ALL_LINEAR
    """`all-linear` (every linear layer but the output embedding), a list of name suffixes, or a regular
    expression that must match the whole module name."""
    rank_pattern: dict[str, int] | None = None
    """Other ranks: name suffix, or regular expression of the whole name -> rank; the first match counts."""
    scaling: Scaling = Scaling.standard
    """standard: alpha / rank; rslora: alpha / sqrt(rank)."""
    dense: list[ParameterKind] = field(default_factory=_default_dense)
    """Kinds of parameters that train at full rank; the others are frozen."""
    forward: ForwardPath = ForwardPath.addmm
    """Compute path of the low-rank layers: factored, addmm, merged, fused (Triton kernels), or auto, which measures."""
    base: BaseFormat = BaseFormat.full
    """Store of the frozen weights under the factors: full, int8 or nf4 (docs/quantised.md)."""
    init_from: str | None = None
    """Folder of a PEFT adapter to start from."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.rank < 1:
            raise ConfigError(f"lora.rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ConfigError(f"lora.alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must be in [0, 1), got {self.dropout}")
        if self.dropout > 0 and self.forward == ForwardPath.merged:
            raise ConfigError(
                f"lora.dropout={self.dropout} cannot be with lora.forward=merged, whose one product has no input of "
                "the factors to drop from: choose addmm, or lora.dropout=0"
            )
        if self.base != BaseFormat.full and self.forward == ForwardPath.merged:
            raise ConfigError(
                f"lora.base={BaseFormat(self.base).value} cannot be with lora.forward=merged, which forms every weight "
                "in the precision that is trained, and keeps it for the update: choose addmm"
            )
        for pattern, rank in (self.rank_pattern or {}).items():
            compiled("lora.rank_pattern", pattern)
            if rank < 1:
                raise ConfigError(f"lora.rank_pattern.{pattern} must be at least 1, got {rank}")
        known = [kind.value for kind in ParameterKind]
        for kind in self.dense:
            if kind not in known:
                raise ConfigError(f"lora.dense may hold {', '.join(known)}; got {kind!r}")
        check_targets(self.target_modules)

    def rank_of(self, module_name: str) -> int:
        """Return the adapter rank of a module."""
        for pattern, rank in (self.rank_pattern or {}).items():
            if named_by(module_name, pattern):
                return rank
        return self.rank

    def scale(self, rank: int) -> float:
        """Return the factor on `up @ down` at an adapter rank."""
        return self.alpha / (rank**0.5 if self.scaling == Scaling.rslora else rank)


@dataclass(kw_only=True, slots=True)
class ConversionRow:
    """One line of the table of what a conversion did."""

    kind: str
    """A kind of parameter, or the last part of low-rank modules' names."""
    modules: int
    """Modules that own such parameters."""
    parameters: int
    """Entries in the plain model; the factors are not among them."""
    trainable: int
    """Entries that train; of low-rank modules, the factors'."""
    state: str
    """low-rank, dense or frozen."""


@dataclass(kw_only=True, slots=True)
class Conversion:
    """What became of every part of the model."""

    low_rank: dict[str, LowRankLinear]
    """The low-rank layers by module name."""
    dense: list[str]
    """Parameters that train at full rank."""
    frozen: list[str]
    """Parameters that do not train, the low-rank layers' base weights among them."""
    table: list[ConversionRow]
    """The same in sums."""

    @property
    def trainable(self) -> int:
        """Return the number of entries that train: factors and dense parameters."""
        return sum(row.trainable for row in self.table)

    @property
    def total(self) -> int:
        """Return the number of entries of the plain model, without the factors."""
        return sum(row.parameters for row in self.table)

    def rows(self) -> list[ConversionRow]:
        """Return the table: low-rank modules by the last part of their names, then the kinds of the rest."""
        return self.table


def planned_layers(model: nn.Module, config: LoraConfig) -> dict[str, tuple[nn.Module, int]]:
    """Return the layers that a conversion would match, with their adapter ranks; nothing is changed.

    Raises: ConfigError when a target or a rank fits no layer.
    """
    targets = find_targets(model, config.target_modules)
    ranks = {name: config.rank_of(name) for name in targets}
    check_ranks(targets, ranks, config.rank_pattern or {})
    return {name: (module, ranks[name]) for name, module in targets.items()}


def to_low_rank(
    model: nn.Module,
    config: LoraConfig,
    *,
    seed: int,
    head: int = 0,
    merge_precision: MergePrecision | None = None,
    train_down: bool = True,
) -> Conversion:
    """Make the matched layers low-rank in place, without changing the model's function, and set what trains.

    Args:
        train_down: whether `down` trains; otherwise only `up` learns (FFA-LoRA, arXiv 2403.12313).

    Raises: ConfigError when a target or a rank fits no layer.
    """
    for name, (module, rank) in planned_layers(model, config).items():
        layer = LowRankLinear.from_module(module, adapter_rank=rank, scaling=config.scale(rank), dropout=config.dropout)
        drawn = draw_down(name, (rank, layer.in_features), seed=seed, head=head)
        layer.down.data.copy_(drawn)
        layer.down.requires_grad_(train_down)
        layer.path = ForwardPath.addmm if config.forward == ForwardPath.auto else config.forward
        if merge_precision == MergePrecision.split and layer.weight.dtype == torch.bfloat16:
            layer.extra_bits = torch.zeros_like(layer.weight, dtype=torch.int16, requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    return _set_trainable(model, config)


def low_rank_modules(model: nn.Module) -> dict[str, LowRankLinear]:
    """Return the low-rank layers by module name; the names key the random draws, so pass the bare model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


@torch.no_grad()
def prepare_base_(
    model: nn.Module, dtype: torch.dtype, precision: MergePrecision | None, base: BaseFormat = BaseFormat.full
) -> None:
    """Cast the parameters to the training dtype; `split` keeps what bfloat16, or codes, drop of the base weights.

    Buffers keep their dtype: rotary frequencies rounded to bfloat16 turn far positions by whole radians.
    Raises: ConfigError for a dtype other than float32 and bfloat16.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"training.dtype must be float32 or bfloat16, got {dtype}")
    for layer in low_rank_modules(model).values():
        if base != BaseFormat.full:
            layer.quantise_base_(base, remainder=precision == MergePrecision.split)
            continue
        assert layer.extra_bits is None or dtype == torch.bfloat16, "the extra bits belong to bfloat16"
        if precision == MergePrecision.split and (layer.weight.dtype, dtype) == (
            torch.float32,
            torch.bfloat16,
        ):
            layer.split_base_()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def merged_state_dict(
    model: nn.Module, masters: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the plain model's weights under their Hugging Face names, on the CPU, with the deltas folded in.

    `masters` (parameter name -> float32) replace live parameters; without `dtype` each tensor keeps its live
    dtype. Unmerged tensors may share the model's memory, and tied ones share each other's.
    """
    masters = masters or {}
    layers = low_rank_modules(model)
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    done: dict[int, Tensor] = {}
    merged: dict[str, Tensor] = {}
    for stored, live in model.state_dict(keep_vars=True).items():
        key = stored.replace(".quantised.codes", ".weight")
        owner, _, leaf = key.rpartition(".")
        layer = layers.get(owner)
        if layer is not None and leaf in ("down", "up", "extra_bits", "synced_down", "synced_up"):
            continue
        if owner.endswith(".quantised"):
            continue
        if id(live) not in done:
            if layer is not None and leaf == "weight":
                delta = layer.delta(masters.get(f"{owner}.down"), masters.get(f"{owner}.up"))
                value = layer.base() + delta
                value = value.t().contiguous() if layer.transposed else value
            else:
                value = masters.get(first_name.get(id(live), key), live.detach())
            own = live.dtype if layer is None or layer.quantised is None else layer.up.dtype
            target = (dtype or own) if own.is_floating_point else own
            done[id(live)] = value.to(device="cpu", dtype=target)
        merged[key] = done[id(live)]
    return merged


def _set_trainable(model: nn.Module, config: LoraConfig) -> Conversion:
    """Set requires_grad everywhere and write down what was found."""
    layers = low_rank_modules(model)
    rows: dict[str, ConversionRow] = {}
    for name, layer in layers.items():
        kind = name.rpartition(".")[2]
        row = rows.setdefault(kind, _empty_row(kind, "low-rank"))
        row.modules += 1
        row.parameters += layer.weight.numel()
        row.trainable += sum(factor.numel() for factor in (layer.down, layer.up) if factor.requires_grad)
    kinds = parameter_kinds(model)
    wrapped = {id(part) for layer in layers.values() for part in (layer.weight, layer.down, layer.up)}
    dense: list[str] = []
    frozen = [f"{name}.weight" for name in layers]
    owners: dict[ParameterKind, set[str]] = {kind: set() for kind in ParameterKind}
    for name, parameter in model.named_parameters():
        if id(parameter) in wrapped:
            continue
        kind_of = kinds[id(parameter)]
        trains = kind_of in config.dense
        parameter.requires_grad_(trains)
        (dense if trains else frozen).append(name)
        owners[kind_of].add(name.rpartition(".")[0])
        row = rows.setdefault(f"({kind_of.value})", _empty_row(kind_of.value, "dense" if trains else "frozen"))
        row.modules = len(owners[kind_of])
        row.parameters += parameter.numel()
        row.trainable += parameter.numel() if trains else 0
    return Conversion(low_rank=layers, dense=dense, frozen=frozen, table=list(rows.values()))


def _empty_row(kind: str, state: str) -> ConversionRow:
    return ConversionRow(kind=kind, modules=0, parameters=0, trainable=0, state=state)
