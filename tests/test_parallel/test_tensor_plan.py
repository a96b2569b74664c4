"""Who is split how, which parts result, and what is refused; models without memory, on one process."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

from parallel.tensor_plan import FAMILIES, Style, tensor_plan, tensor_regions
from relora.convert import LoraConfig, to_low_rank
from relora.errors import ConfigError

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 49}
OPT = {
    **{f"self_attn.{name}_proj": "column" for name in "qkv"},
    "out_proj": "row",
    "fc1": "column",
    "fc2": "row",
    "layers.*.*_layer_norm": "replicate",
}


def _model(family, **values):
    make = AutoModelForImageClassification if family == "vit" else AutoModelForCausalLM
    config = AutoConfig.for_model(family, **({} if family == "vit" else {**SIZES, **values}))
    with torch.device("meta"):
        return make.from_config(config)


def _refusal(model, patterns=None, size=2):
    with pytest.raises(ConfigError) as refused:
        tensor_regions(model, tensor_plan(model, patterns), size=size, index=0)
    assert str(refused.value).startswith("parallel.tensor")
    return str(refused.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_table_says_what_hugging_faces_plan_says(family, monkeypatch):
    model = _model(family)
    ours = tensor_plan(model)
    assert len(set(ours.values()) & {Style.row, Style.column}) == 2
    if model._tp_plan:
        monkeypatch.delitem(FAMILIES, family)
        assert tensor_plan(model) == ours


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_all_processes_are_the_whole(family):
    model = _model(family)
    if family != "vit":
        to_low_rank(model, LoraConfig(rank=2), seed=0)
    plan = tensor_plan(model)
    parts = [tensor_regions(model, plan, size=4, index=index) for index in range(4)]
    tensors = dict(model.named_parameters())
    for name in parts[0]:
        shape = tensors[name.replace("extra_bits", "weight")].shape
        count = torch.zeros(shape)
        for regions in parts:
            ones = torch.zeros(shape)
            regions[name].put(ones, torch.ones(regions[name].cut_shape))
            count += ones
        assert torch.equal(count, torch.ones(shape)), name


def test_styles_follow_the_users_patterns_before_the_plan():
    model = _model("llama")
    plan = tensor_plan(model, {"mlp.*_proj": "replicate", "lm_head": "replicate"})
    assert not [name for name in plan if "mlp" in name or name == "lm_head"]
    assert plan["model.layers.0.self_attn.q_proj"] == Style.column
    assert plan["model.embed_tokens"] == Style.vocabulary


def test_a_family_without_a_plan_is_split_by_the_users():
    plan = tensor_plan(_model("opt", word_embed_proj_dim=16), OPT)
    assert plan["model.decoder.layers.0.fc2"] == Style.row
    assert plan["model.decoder.embed_tokens"] == plan["lm_head"] == Style.vocabulary
    assert "model.decoder.embed_positions" not in plan


def test_packed_outputs_are_cut_part_by_part():
    model = _model("gpt2", n_embd=16, n_layer=1, n_head=4)
    regions = tensor_regions(model, tensor_plan(model), size=2, index=1)
    region = regions["transformer.h.0.attn.c_attn.weight"]
    assert (region.dim, region.ranges) == (1, ((8, 16), (24, 32), (40, 48)))
    assert regions["transformer.h.0.attn.c_proj.weight"].ranges == ((8, 16),)
    assert regions["transformer.wte.weight"].ranges == ((25, 49),)
    assert not {name for name in regions if "wpe" in name or "ln_" in name or name.endswith("c_proj.bias")}


def test_one_process_holds_everything():
    model = _model("llama")
    assert tensor_regions(model, tensor_plan(model), size=1, index=0) == {}


@pytest.mark.parametrize(
    ("family", "values", "patterns", "size", "words"),
    [
        ("opt", {"word_embed_proj_dim": 16}, {}, 2, ["opt", "q_proj: column", "parallel.tensor=1"]),
        ("mixtral", {}, {}, 2, ["mixtral", "gate_up_proj", "'packed_colwise'"]),
        ("olmo2", {}, {}, 2, ["q_proj", "'colwise_gather_output'"]),
        ("llama", {}, {}, 3, ["num_attention_heads=4", "got 3", "1, 2, 4"]),
        ("llama", {"num_key_value_heads": 1}, {}, 2, ["num_key_value_heads=1", "got 2"]),
        ("llama", {"intermediate_size": 3}, {}, 4, ["at most 3", "got 4"]),
        ("llama", {}, {"q_porj": "column"}, 2, ["'q_porj'", "matches no module", "q_proj"]),
        ("llama", {}, {"q_proj": "colum"}, 2, ["q_proj", "'colum'", "column, packed, row"]),
        ("llama", {}, {"o_proj": "replicate"}, 2, ["o_proj", "all linear layers, or none"]),
        ("llama", {}, {"self_attn.*_proj": "replicate", "mlp.*_proj": "replicate"}, 2, ["no linear layer of llama"]),
        ("llama", {}, {"input_layernorm": "row"}, 2, ["input_layernorm", "LlamaRMSNorm"]),
        ("llama", {}, {"input_layernorm": "summed"}, 2, ["input_layernorm", "its gradient is whole"]),
        ("llama", {}, {"mlp.up_proj": "vocabulary"}, 2, ["up_proj", "no output layer"]),
        ("llama", {}, {"mlp.up_proj": "packed"}, 2, ["up_proj", "25 outputs"]),
        ("llama", {}, {"lm_head": "column"}, 2, ["lm_head", "vocabulary"]),
        ("llama", {"tie_word_embeddings": True}, {"lm_head": "replicate"}, 2, ["share", "embed_tokens"]),
        ("qwen3", {}, {"self_attn.*_proj": "replicate"}, 2, ["q_norm", "no layer beside it is split"]),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(family, values, patterns, size, words):
    if "packed" in patterns.values():
        values = {"intermediate_size": 25}
    message = _refusal(_model(family, **values), patterns, size)
    assert [word for word in words if word not in message] == [], message


def test_a_module_beside_split_layers_needs_a_word():
    patterns = {key: style for key, style in OPT.items() if "norm" not in key}
    assert "has no style" in _refusal(_model("opt", word_embed_proj_dim=16), patterns)


def test_parameters_without_a_module_of_their_own_beside_split_layers_are_refused():
    model = _model("llama")
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(4))
    assert "self_attn has parameters of its own" in _refusal(model)
