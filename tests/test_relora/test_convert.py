"""Conversion: what matches, what trains, that nothing changes, and the way back."""

import re
from collections.abc import Callable

import pytest
import torch
from omegaconf import OmegaConf, ValidationError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from relora.convert import (
    Conversion,
    LoraConfig,
    Scaling,
    low_rank_modules,
    merged_state_dict,
    prepare_base_,
    to_low_rank,
)
from relora.errors import ConfigError
from relora.kinds import ParameterKind
from relora.linear import LowRankLinear
from relora.optimizer import OptimizerConfig, Reset
from relora.precision import MergePrecision, join
from relora.restart import ReloraConfig
from relora.schedule import ScheduleConfig, ScheduleKind

Build = Callable[..., nn.Module]
Train = Callable[..., list[float]]

LLAMA_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LINEARS = {
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
}
TIED = {"llama_tied", "qwen2", "gemma", "gpt2"}


def _convert(model: nn.Module, **settings: object) -> Conversion:
    return to_low_rank(model, LoraConfig(**{"rank": 2, "alpha": 4.0, **settings}), seed=3)


def _train_everything(model: nn.Module, train: Train, steps: int = 3) -> None:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    train(model, torch.optim.AdamW(trainable, lr=0.01), steps)


def _tied(model: nn.Module) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


# ---- the function


def test_conversion_leaves_the_function_exactly_unchanged(family: str, build: Build, tokens: Tensor) -> None:
    model = build(family)
    before = model(input_ids=tokens).logits
    _convert(model)
    assert torch.equal(model(input_ids=tokens).logits, before)


def test_conversion_matches_every_linear_layer_but_the_output_embedding(family: str, build: Build) -> None:
    model = build(family)
    conversion = _convert(model)
    assert {name.rpartition(".")[2] for name in conversion.low_rank} == LINEARS.get(family, LLAMA_LINEARS)
    assert not isinstance(model.get_output_embeddings(), LowRankLinear)
    assert low_rank_modules(model) == conversion.low_rank


def test_conversion_keeps_hugging_face_names_and_parameter_objects(family: str, build: Build) -> None:
    model = build(family)
    before = dict(model.named_parameters(remove_duplicate=False))
    _convert(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {name.rpartition(".")[2] for name in after.keys() - before.keys()} == {"down", "up"}


def test_ties_stay_ties_through_conversion_cast_and_training(family: str, build: Build, train: Train) -> None:
    model = build(family)
    assert _tied(model) == (family in TIED)
    _convert(model)
    prepare_base_(model, torch.bfloat16, MergePrecision.split)
    _train_everything(model, train)
    assert _tied(model) == (family in TIED)


def test_every_trainable_tensor_has_a_gradient_within_two_steps(family: str, build: Build, tokens: Tensor) -> None:
    model = build(family)
    _convert(model, dense=list(ParameterKind))
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=0.01)
    silent = set(trainable)
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        silent -= {name for name, parameter in trainable.items() if parameter.grad.abs().max() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert not silent


def test_down_is_drawn_by_seed_head_and_name(build: Build) -> None:
    config = LoraConfig(rank=2)
    first, again, seed, head = (
        to_low_rank(build(), config, seed=seed, head=head).low_rank for seed, head in [(3, 0), (3, 0), (4, 0), (3, 1)]
    )
    for name, layer in first.items():
        assert torch.equal(layer.down, again[name].down)
        assert not torch.equal(layer.down, seed[name].down)
        assert not torch.equal(layer.down, head[name].down)
    q, k = (first[f"model.layers.{index}.self_attn.q_proj"].down for index in (0, 1))
    assert not torch.equal(q, k)


# ---- targets and ranks


def test_targets_by_suffix_and_by_regular_expression(build: Build) -> None:
    by_suffix = _convert(build(), target_modules=["q_proj", "mlp.up_proj"])
    by_regex = _convert(build(), target_modules=r".*\.(q_proj|up_proj)")
    assert len(by_suffix.low_rank) == 4
    assert by_suffix.low_rank.keys() == by_regex.low_rank.keys()


def test_an_untied_head_can_be_a_target(build: Build) -> None:
    assert list(_convert(build(), target_modules=["lm_head"]).low_rank) == ["lm_head"]


def test_a_suffix_is_whole_parts_of_a_name_and_an_expression_the_whole_name(build: Build) -> None:
    with pytest.raises(ConfigError, match="'proj' matches no linear layer"):
        _convert(build(), target_modules=["proj"])
    with pytest.raises(ConfigError, match="matches no linear layer"):
        _convert(build(), target_modules="q_proj")


def test_ranks_by_pattern_and_their_scaling(build: Build) -> None:
    pattern = {r".*layers\.0.*q_proj": 3, "q_proj": 4}
    layers = _convert(build(), rank_pattern=pattern, alpha=12.0).low_rank
    ranks = [layers[f"model.layers.{index}.self_attn.{leaf}"].adapter_rank for index, leaf in
             [(0, "q_proj"), (1, "q_proj"), (0, "o_proj")]]  # fmt: skip
    assert ranks == [3, 4, 2]
    assert layers["model.layers.1.self_attn.q_proj"].scaling == 3.0
    rslora = _convert(build(), rank=4, alpha=12.0, scaling=Scaling.rslora).low_rank
    assert all(layer.scaling == 6.0 for layer in rslora.values())


def test_nothing_matched_lists_what_there_is(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"lora\.target_modules.*down_proj, gate_proj.*v_proj"):
        _convert(build(), target_modules=r"encoder\..*")


def test_one_suffix_without_a_match_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"lora\.target_modules.*'c_attn'.*q_proj"):
        _convert(build(), target_modules=["q_proj", "c_attn"])


def test_a_rank_pattern_without_a_match_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"lora\.rank_pattern.*'v_proj'"):
        _convert(build(), target_modules=["q_proj"], rank_pattern={"v_proj": 1})


def test_a_rank_above_the_layer_is_refused_before_anything_changes(build: Build) -> None:
    model = build()
    with pytest.raises(ConfigError, match=r"lora\.rank .* = 8 for model\.layers\.0\.self_attn\.k_proj, got 9"):
        _convert(model, rank=9)
    assert not low_rank_modules(model)


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_a_tied_head_is_refused_as_a_target(family: str, build: Build) -> None:
    with pytest.raises(ConfigError, match="lm_head shares its weight"):
        _convert(build(family), target_modules=["lm_head"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "lora.rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "lora.alpha must be above 0, got 0.0"),
        ({"dropout": 1.0}, "lora.dropout must be in [0, 1), got 1.0"),
        ({"rank_pattern": {"q_proj": 0}}, "lora.rank_pattern.q_proj must be at least 1, got 0"),
        ({"rank_pattern": {"(": 2}}, "lora.rank_pattern: '(' is no regular expression"),
        ({"dense": ["norm"]}, "lora.dense may hold embeddings, norms, head, biases, other; got 'norm'"),
        ({"target_modules": []}, "lora.target_modules must be all-linear"),
        ({"target_modules": ""}, "lora.target_modules must be all-linear"),
        ({"target_modules": 3}, "lora.target_modules must be all-linear"),
        ({"target_modules": "*proj"}, "lora.target_modules: '*proj' is no regular expression"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        LoraConfig(**settings)


def test_sections_can_be_set_by_yaml_words() -> None:
    words = """
    lora: {rank: 4, scaling: rslora, dense: [norms], target_modules: [q_proj], rank_pattern: {q_proj: 2}}
    relora: {reset: magnitude, prune_ratio: 0.9, merge_precision: split}
    schedule: {kind: wsd, decay_share: 0.2}
    optimizer: {betas: [0.9, 0.99]}
    """
    sections = {
        "lora": LoraConfig,
        "relora": ReloraConfig,
        "schedule": ScheduleConfig,
        "optimizer": OptimizerConfig,
    }
    made = OmegaConf.to_object(OmegaConf.merge(sections, OmegaConf.create(words)))
    assert made["lora"] == LoraConfig(
        rank=4,
        scaling=Scaling.rslora,
        dense=[ParameterKind.norms],
        target_modules=["q_proj"],
        rank_pattern={"q_proj": 2},
    )
    assert (made["relora"].reset, made["relora"].merge_precision) == (Reset.magnitude, MergePrecision.split)
    assert made["schedule"].kind is ScheduleKind.wsd
    assert made["optimizer"].betas == [0.9, 0.99]
    with pytest.raises(ValidationError, match="zero, magnitude, random, none"):
        OmegaConf.merge(sections, OmegaConf.create("relora: {reset: all}"))


# ---- what trains


def test_default_trains_factors_embeddings_norms_head_and_biases(family: str, build: Build) -> None:
    conversion = _convert(build(family))
    assert conversion.frozen == [f"{name}.weight" for name in conversion.low_rank]
    state = {row.kind: row.state for row in conversion.rows()}
    assert state["embeddings"] == state["norms"] == "dense"
    assert ("head" in state) == (family not in TIED)
    assert ("biases" in state) == (family in {"gpt_neox", "qwen2", "gpt2"})
    assert "other" not in state


def test_each_kind_trains_when_it_is_named_and_only_then(build: Build) -> None:
    def trained(*kinds: ParameterKind) -> set[str]:
        conversion = _convert(build("gpt_neox"), dense=list(kinds), target_modules=["query_key_value", "dense"])
        return {re.sub(r"layers\.\d+\.", "", name).removeprefix("gpt_neox.") for name in conversion.dense}

    assert trained() == set()
    assert trained(ParameterKind.embeddings) == {"embed_in.weight"}
    assert trained(ParameterKind.head) == {"lm_head.weight"}
    assert trained(ParameterKind.norms) == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "final_layer_norm.weight",
    }
    assert trained(ParameterKind.other) == {"mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"}
    biases = trained(ParameterKind.biases)
    assert {"attention.dense.bias", "mlp.dense_h_to_4h.bias", "input_layernorm.bias"} <= biases
    assert all(name.endswith("bias") for name in biases)


def test_a_tied_head_counts_with_the_embeddings(build: Build) -> None:
    model = build("llama_tied")
    assert _convert(model, dense=[ParameterKind.head]).dense == []
    assert not model.get_output_embeddings().weight.requires_grad


def test_counts_are_those_of_the_model(family: str, build: Build) -> None:
    model = build(family)
    size = sum(parameter.numel() for parameter in model.parameters())
    conversion = _convert(model)
    assert conversion.total == size
    assert conversion.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    names = {name for name, _ in model.named_parameters()}
    factors = {f"{name}.{factor}" for name in conversion.low_rank for factor in ("down", "up")}
    assert names == set(conversion.dense) | set(conversion.frozen) | factors
    assert len(conversion.dense) + len(conversion.frozen) + len(factors) == len(names)


def test_the_table_counts_modules(build: Build) -> None:
    rows = {row.kind: row for row in _convert(build("gpt2")).rows()}
    assert (rows["c_proj"].modules, rows["c_proj"].parameters) == (4, 2 * (16 * 16 + 24 * 16))
    assert rows["c_proj"].trainable == 2 * 2 * (32 + 40)
    assert (rows["embeddings"].modules, rows["embeddings"].parameters) == (2, (48 + 32) * 16)
    assert rows["norms"].modules == 5


@pytest.mark.parametrize(
    ("hidden", "ffn", "layers", "total", "trainable"),
    [(512, 1376, 8, 58, 43), (768, 2048, 12, 134, 72), (2048, 5461, 24, 1339, 251)],
)
def test_counts_in_millions_are_those_of_the_paper(
    hidden: int, ffn: int, layers: int, total: int, trainable: int
) -> None:
    """ReLoRA, table 2: rank 128, vocabulary 32100."""
    config = LlamaConfig(
        vocab_size=32100,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=8,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    conversion = _convert(model, rank=128)
    assert round(conversion.total / 1e6) == total
    assert round(conversion.trainable / 1e6) == trainable


# ---- the way back


def test_merged_weights_load_strictly_and_give_the_same_logits(
    family: str, build: Build, train: Train, tokens: Tensor
) -> None:
    model, fresh = build(family), build(family, seed=5)
    _convert(model)
    _train_everything(model, train)
    merged = merged_state_dict(model)
    fresh.load_state_dict(merged, strict=True)
    ours, theirs = model(input_ids=tokens).logits, fresh(input_ids=tokens).logits
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()
    assert not torch.allclose(ours, build(family)(input_ids=tokens).logits, atol=1e-2)


def test_merging_for_export_leaves_the_model_alone(build: Build, train: Train) -> None:
    model = build("gpt2")
    _convert(model)
    _train_everything(model, train)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged_state_dict(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_export_uses_masters_and_extra_bits(build: Build) -> None:
    """A bfloat16 run exports what its float32 masters say, not what the forward pass rounds."""
    model = build("llama_tied")
    conversion = _convert(model)
    exact = {name: layer.base().clone() for name, layer in conversion.low_rank.items()}
    prepare_base_(model, torch.bfloat16, MergePrecision.split)
    masters = {name: torch.randn(parameter.shape) for name, parameter in model.named_parameters()}
    masters = {name: value for name, value in masters.items() if name not in conversion.frozen}
    merged = merged_state_dict(model, masters=masters, dtype=torch.float32)
    for name, layer in conversion.low_rank.items():
        update = layer.scaling * masters[f"{name}.up"] @ masters[f"{name}.down"]
        assert torch.allclose(merged[f"{name}.weight"], exact[name] + update, atol=1e-6)
    assert torch.equal(merged["model.embed_tokens.weight"], masters["model.embed_tokens.weight"])
    assert merged["lm_head.weight"] is merged["model.embed_tokens.weight"]
    assert merged_state_dict(model)["model.norm.weight"].dtype == torch.bfloat16


# ---- bfloat16


def test_a_bfloat16_model_keeps_the_exact_base_and_its_buffers(family: str, build: Build, tokens: Tensor) -> None:
    model = build(family)
    conversion = _convert(model)
    logits = model(input_ids=tokens).logits
    exact = {name: layer.base().clone() for name, layer in conversion.low_rank.items()}
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}
    prepare_base_(model, torch.bfloat16, MergePrecision.split)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    for name, layer in conversion.low_rank.items():
        assert torch.equal(layer.base(), exact[name])
        assert layer.extra_bits.dtype == torch.int16
    after = {name: buffer.dtype for name, buffer in model.named_buffers() if not name.endswith("extra_bits")}
    assert after == buffers
    assert torch.allclose(model(input_ids=tokens).logits.float(), logits, atol=0.05)


@pytest.mark.parametrize("precision", [MergePrecision.nearest, MergePrecision.stochastic, None])
def test_only_split_keeps_extra_bits(precision: MergePrecision | None, build: Build) -> None:
    model = build()
    conversion = _convert(model)
    prepare_base_(model, torch.bfloat16, precision)
    assert all(layer.extra_bits is None for layer in conversion.low_rank.values())


def test_float32_training_needs_no_preparation(build: Build) -> None:
    model = build()
    conversion = _convert(model)
    prepare_base_(model, torch.float32, MergePrecision.split)
    assert all(layer.extra_bits is None for layer in conversion.low_rank.values())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_model_loaded_in_bfloat16_starts_with_empty_extra_bits(build: Build) -> None:
    model = build().to(torch.bfloat16)
    weights = {name: p.float() for name, p in model.named_parameters()}
    conversion = to_low_rank(model, LoraConfig(rank=2), seed=3, merge_precision=MergePrecision.split)
    for name, layer in conversion.low_rank.items():
        assert torch.equal(join(layer.weight, layer.extra_bits), weights[f"{name}.weight"])


def test_float16_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"training\.dtype must be float32 or bfloat16"):
        prepare_base_(build(), torch.float16, None)
