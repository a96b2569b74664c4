"""Which modules tensor parallelism splits, how, and which part of every parameter a process then holds.

A plan names a style per module: ours for the families in `FAMILIES`, else the one that Hugging Face ships with the
model, both under the user's own patterns. Pure: names and shapes are enough, so a model on the meta device will do.
The layers themselves are in parallel/tensor.py, the reasons in docs/tensor.md.
"""

import re
from collections.abc import Mapping
from enum import Enum

from torch import nn
from transformers.pytorch_utils import Conv1D

from parallel.regions import Region, even_range
from relora.errors import ConfigError
from relora.linear import LowRankLinear
from relora.targets import output_embedding


class Style(str, Enum):
    """What happens to one module."""

    column = "column"
    """A linear layer cut along its outputs; the next one must be `row`."""
    packed = "packed"
    """`column` for outputs that are query, key and value in a row: each is cut by itself."""
    row = "row"
    """A linear layer cut along its inputs; its outputs are summed over the processes."""
    vocabulary = "vocabulary"
    """An embedding or the output layer, cut along the tokens."""
    summed = "summed"
    """Whole on every process but fed by split values, such as the norm of one head: its gradients are summed."""
    replicate = "replicate"
    """Whole on every process."""


ATTENTION_AND_GATED_MLP = {
    "self_attn.q_proj": Style.column,
    "self_attn.k_proj": Style.column,
    "self_attn.v_proj": Style.column,
    "self_attn.o_proj": Style.row,
    "mlp.gate_proj": Style.column,
    "mlp.up_proj": Style.column,
    "mlp.down_proj": Style.row,
}
FAMILIES: dict[str, dict[str, Style]] = {
    "llama": ATTENTION_AND_GATED_MLP,
    "mistral": ATTENTION_AND_GATED_MLP,
    "qwen2": ATTENTION_AND_GATED_MLP,
    "gpt_neox": {
        "attention.query_key_value": Style.column,  # laid out head by head, so a range of it holds whole heads
        "attention.dense": Style.row,
        "mlp.dense_h_to_4h": Style.column,
        "mlp.dense_4h_to_h": Style.row,
    },
    "gpt2": {
        "attn.c_attn": Style.packed,
        "attn.c_proj": Style.row,
        "mlp.c_fc": Style.column,
        "mlp.c_proj": Style.row,
    },
    "vit": {
        "attention.q_proj": Style.column,
        "attention.k_proj": Style.column,
        "attention.v_proj": Style.column,
        "attention.o_proj": Style.row,
        "mlp.fc1": Style.column,
        "mlp.fc2": Style.row,
    },
}
"""Plans by model type, as name suffixes. Embedding and output layer are split by vocabulary in every family."""

_HUGGING_FACE = {
    "colwise": Style.column,
    "rowwise": Style.row,
    "embedding_rowwise": Style.vocabulary,
    "replicated_with_grad_allreduce": Style.summed,
    "replicate": Style.replicate,
}
_HUGGING_FACE_HEAD = {  # its logits are not gathered: the loss works on the parts
    "colwise": Style.vocabulary,
    "colwise_rep": Style.vocabulary,
    "colwise_gather_output": Style.vocabulary,
    "replicate": Style.replicate,
}

_LINEAR = (nn.Linear, Conv1D, LowRankLinear)
SPLIT_LINEAR = (Style.column, Style.packed, Style.row)


def tensor_plan(model: nn.Module, patterns: Mapping[str, str] | None = None) -> dict[str, Style]:
    """The style of every module that is not simply replicated, by module name.

    Args:
        patterns: the user's: module name or suffix, where `*` stands for anything between two dots -> style.

    Raises:
        ConfigError: a family without a plan, a pattern or style that is unknown or of no use, a layer that cannot be
            split so, layers that only make sense split together.
    """
    asked = _asked(model, patterns or {})
    plan = {**_shipped(model, asked), **asked}
    for name, style in plan.items():
        _check_kind(model, name, style)
    if not any(style in SPLIT_LINEAR for style in plan.values()):
        raise _plan_error(f"no linear layer of {_family(model)} would be split: name some, or set parallel.tensor=1")
    _check_siblings(model, plan)
    _check_tied(model, plan)
    return {name: style for name, style in plan.items() if style != Style.replicate}


def tensor_regions(model: nn.Module, plan: Mapping[str, Style], *, size: int, index: int) -> dict[str, Region]:
    """What the index-th of `size` processes holds of every parameter and buffer that the plan splits.

    The extra bits of a low-rank layer are among them, whether they are there already or will be made later.

    Raises:
        ConfigError: attention heads, or another length, that so many processes cannot share.
    """
    if size == 1:
        return {}
    _check_heads(model, plan, size)
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    regions: dict[str, Region] = {}
    for owner, style in plan.items():
        module = model.get_submodule(owner)
        for leaf, parameter in module.named_parameters(recurse=False):
            dim = split_dim(module, leaf, style)
            if dim is None:
                continue
            name, shape = first_name[id(parameter)], tuple(parameter.shape)
            if shape[dim] < size:
                raise _error(f"must be at most {shape[dim]}, the length of {name} along the split, got {size}")
            regions[name] = Region(shape, dim, _ranges(shape[dim], style, size, index))
            if leaf == "weight" and isinstance(module, LowRankLinear):
                regions[f"{owner}.extra_bits"] = regions[name]
            if getattr(module, f"synced_{leaf}", None) is not None:
                regions[f"{owner}.synced_{leaf}"] = regions[name]
    return regions


def split_dim(module: nn.Module, leaf: str, style: Style) -> int | None:
    """The dimension along which a module's parameter is cut; None when it stays whole."""
    transposed = isinstance(module, Conv1D) or getattr(module, "transposed", False)
    outputs, inputs = (1, 0) if transposed else (0, 1)
    if style in (Style.column, Style.packed, Style.vocabulary):
        return {"weight": outputs, "bias": 0, "up": 0}.get(leaf)
    if style == Style.row:
        return {"weight": inputs, "down": 1}.get(leaf)
    return None


def _ranges(length: int, style: Style, size: int, index: int) -> tuple[tuple[int, int], ...]:
    if style != Style.packed:
        return (even_range(length, size, index),)
    third = length // 3
    start, stop = even_range(third, size, index)
    return tuple((part * third + start, part * third + stop) for part in range(3))


def _asked(model: nn.Module, patterns: Mapping[str, str]) -> dict[str, Style]:
    plan: dict[str, Style] = {}
    for pattern, word in patterns.items():
        known = [style.value for style in Style]
        if word not in known:
            raise _plan_error(f"{pattern}: the style must be one of {', '.join(known)}, got {word!r}")
        names = _matching(model, pattern)
        if not names:
            leaves = sorted({name.rpartition(".")[2] for name in _owners(model)})
            raise _plan_error(f"{pattern!r} matches no module with parameters; their names end in {', '.join(leaves)}")
        plan.update(dict.fromkeys(names, Style(word)))
    return plan


def _shipped(model: nn.Module, asked: Mapping[str, Style]) -> dict[str, Style]:
    """The plan that needs no word of the user's."""
    family, theirs = _family(model), getattr(model, "_tp_plan", None)
    if family in FAMILIES:
        plan = {name: style for pattern, style in FAMILIES[family].items() for name in _matching(model, pattern)}
    elif theirs:
        plan = _translated(model, theirs, asked)
    elif asked:
        plan = {}
    else:
        raise _plan_error(
            f"there is no plan for the family {family}, neither here ({', '.join(FAMILIES)}) nor with its code in "
            "transformers: give one, such as {q_proj: column, k_proj: column, v_proj: column, o_proj: row, "
            "up_proj: column, down_proj: row}, or set parallel.tensor=1"
        )
    return {**plan, **_vocabulary(model)}


def _translated(model: nn.Module, theirs: Mapping[str, str], asked: Mapping[str, Style]) -> dict[str, Style]:
    """Hugging Face's plan in our words, but for what the user decides.

    Raises:
        ConfigError: it holds a style that we lack.
    """
    head = output_embedding(model)
    plan: dict[str, Style] = {}
    for pattern, word in theirs.items():
        names = _matching(model, pattern)
        if names and all(name in asked for name in names):
            continue
        is_head = bool(names) and all(model.get_submodule(name) is head for name in names)
        style = _HUGGING_FACE_HEAD.get(word) if is_head else _HUGGING_FACE.get(word)
        if style is None:
            raise _plan_error(
                f"transformers' plan for {_family(model)} treats {pattern} as {word!r}, which is not supported here: "
                f"give this module and those beside it a style ({', '.join(style.value for style in Style)}), or set "
                "parallel.tensor=1"
            )
        plan.update(dict.fromkeys(names, style))
    return plan


def _vocabulary(model: nn.Module) -> dict[str, Style]:
    find = getattr(model, "get_input_embeddings", None)
    ends = [find() if callable(find) else None, output_embedding(model)]
    return {
        name: Style.vocabulary
        for name, module in model.named_modules()
        if any(module is end for end in ends) and isinstance(module, (nn.Embedding, nn.Linear, LowRankLinear))
    }


def _check_kind(model: nn.Module, name: str, style: Style) -> None:
    module = model.get_submodule(name)
    is_linear, is_head = type(module) in _LINEAR, module is output_embedding(model)
    if style in SPLIT_LINEAR and not is_linear:
        raise _plan_error(f"{name} cannot be {style.value}: it is a {type(module).__name__}, no plain linear layer")
    if style in SPLIT_LINEAR and is_head:
        raise _plan_error(f"{name} cannot be {style.value}: the output layer is split as vocabulary, or replicate")
    if style == Style.packed and _outputs(module) % 3:
        raise _plan_error(f"{name} cannot be packed: its {_outputs(module)} outputs are not three equal parts")
    if style == Style.vocabulary and isinstance(module, nn.Embedding):
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            raise _plan_error(f"{name} has max_norm, scale_grad_by_freq or sparse, which need the whole: replicate it")
    elif style == Style.vocabulary and not (is_linear and is_head):
        kind = type(module).__name__
        raise _plan_error(f"{name} cannot be split as vocabulary: it is a {kind}, no embedding and no output layer")


def _outputs(module: nn.Module) -> int:
    dim = split_dim(module, "weight", Style.column)
    assert dim is not None
    return module.get_parameter("weight").shape[dim]


def _check_siblings(model: nn.Module, plan: Mapping[str, Style]) -> None:
    """Check that whatever stands beside a split linear layer has a style that fits it.

    A layer beside split ones that stays whole meets values of the wrong width, or finds only a part of its gradient.
    """
    owners = _owners(model)
    parents = {name.rpartition(".")[0] for name, style in plan.items() if style in SPLIT_LINEAR}
    for name in owners:
        parent = name.rpartition(".")[0]
        if name in parents:
            raise _plan_error(f"{name} has parameters of its own beside split layers: replicate the layers in it")
        if parent not in parents:
            if plan.get(name) == Style.summed:
                raise _plan_error(f"{name} cannot be summed: no layer beside it is split, so its gradient is whole")
        elif name not in plan:
            raise _plan_error(
                f"{name} stands beside split layers and has no style: say summed if it works on their split outputs, "
                "replicate if it does not, or column or row for a linear layer"
            )
        elif plan[name] == Style.replicate and type(owners[name]) in _LINEAR:
            raise _plan_error(f"{name} cannot be replicated beside split layers: split all linear layers, or none")


def _check_tied(model: nn.Module, plan: Mapping[str, Style]) -> None:
    users: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        first = users.setdefault(id(parameter), owner)
        styles = [plan.get(one, Style.replicate).value for one in (first, owner)]
        if styles[0] != styles[1]:
            raise _plan_error(f"{first} ({styles[0]}) and {owner} ({styles[1]}) share {name}: give both the same style")


def _check_heads(model: nn.Module, plan: Mapping[str, Style], size: int) -> None:
    config = getattr(model, "config", None)
    if config is None or not any(_is_attention(model, name) for name, style in plan.items() if style in SPLIT_LINEAR):
        return
    text = config.get_text_config()
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, key, None)
        if heads is not None and heads % size:
            fitting = [str(degree) for degree in range(1, heads + 1) if heads % degree == 0]
            raise _error(f"must divide the model's {key}={heads}, got {size}: take one of {', '.join(fitting)}")


def _is_attention(model: nn.Module, name: str) -> bool:
    parent = model.get_submodule(name.rpartition(".")[0])
    return any(hasattr(parent, word) for word in ("head_dim", "head_size", "attention_head_size", "num_heads"))


def _matching(model: nn.Module, pattern: str) -> list[str]:
    inside = re.escape(pattern).replace(r"\*", "[^.]*")
    return [name for name in _owners(model) if re.fullmatch(rf"(.*\.)?{inside}", name)]


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have parameters of their own."""
    return {name: module for name, module in model.named_modules() if any(True for _ in module.parameters(False))}


def _family(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _error(rule: str) -> ConfigError:
    return ConfigError(f"parallel.tensor {rule}")


def _plan_error(rule: str) -> ConfigError:
    return ConfigError(f"parallel.tensor_plan: {rule}")
