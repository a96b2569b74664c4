"""PEFT is the oracle: what it computes with an adapter is what our layers must compute with it."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from relora.adapter import load_adapter_, names_to_save, save_adapter
from relora.convert import LoraConfig, Scaling, low_rank_modules, to_low_rank
from relora.errors import ConfigError

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "llama_tied": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
}


def adapter_of(base, folder, **settings):
    """An adapter of PEFT's that is not zero, saved; returns PEFT's model."""
    settings = {"r": 4, "lora_alpha": 8, "fan_in_fan_out": "c_attn" in settings["target_modules"], **settings}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 0.1 if "lora_" in name else 0.02
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    model.save_pretrained(folder)
    return model


def converted(model, **settings):
    settings = {"rank": 4, "alpha": 8.0, "target_modules": TARGETS["llama"], **settings}
    to_low_rank(model, LoraConfig(**settings), seed=3)
    return model


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.fixture
def saved(build, tmp_path):
    """An adapter for the tiny Llama that fits what `converted` makes of it."""
    adapter_of(build(), tmp_path / "adapter", target_modules=TARGETS["llama"])
    return tmp_path / "adapter"


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", TARGETS)
def test_an_adapter_computes_here_what_it_computes_in_peft(build, tokens, tmp_path, family, rslora):
    last = TARGETS[family][-1]
    oracle = adapter_of(
        build(family), tmp_path, target_modules=TARGETS[family], use_rslora=rslora, rank_pattern={last: 2}
    )
    model = converted(
        build(family),
        target_modules=TARGETS[family],
        rank_pattern={last: 2},
        scaling=Scaling.rslora if rslora else Scaling.standard,
    )
    plain = logits(model, tokens)
    report = load_adapter_(model, tmp_path)
    assert set(report.loaded) == set(low_rank_modules(model))
    assert not report.missing
    assert not report.dense
    torch.testing.assert_close(logits(model, tokens), logits(oracle, tokens), rtol=0, atol=1e-5)
    assert (logits(model, tokens) - plain).abs().max() > 0.01


def test_layers_without_adapter_weights_start_at_zero_and_are_reported(build, tokens, tmp_path):
    oracle = adapter_of(build(), tmp_path, target_modules=["q_proj"])
    model = converted(build(), target_modules=["q_proj", "up_proj"])
    report = load_adapter_(model, tmp_path)
    assert report.missing == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert not low_rank_modules(model)["model.layers.0.mlp.up_proj"].up.any()
    torch.testing.assert_close(logits(model, tokens), logits(oracle, tokens), rtol=0, atol=1e-5)
    assert "2 layers start from the adapter, 2 are not in it" in str(report)


@pytest.mark.parametrize(("family", "saved", "more"), [
    ("llama", ["model.norm", "lm_head"], {}),
    ("llama_tied", ["embed_tokens", "lm_head"], {"ensure_weight_tying": True}),
])  # fmt: skip
def test_modules_that_peft_saved_whole_replace_dense_parameters(build, tokens, tmp_path, family, saved, more):
    oracle = adapter_of(build(family), tmp_path, target_modules=["q_proj"], modules_to_save=saved, **more)
    model = converted(build(family), target_modules=["q_proj"])
    assert load_adapter_(model, tmp_path).dense
    torch.testing.assert_close(logits(model, tokens), logits(oracle, tokens), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_tied_embeddings_that_peft_untied_are_refused(build, tmp_path):
    for number, saved in enumerate((["embed_tokens"], ["embed_tokens", "lm_head"])):
        folder = tmp_path / str(number)
        adapter_of(build("llama_tied"), folder, target_modules=["q_proj"], modules_to_save=saved)
        with pytest.raises(ConfigError, match="differ there and are tied here"):
            load_adapter_(converted(build("llama_tied"), target_modules=["q_proj"]), folder)


def _set(**values):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def _tensors(edit):
    def change(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return change


def _damage(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])


def _to_pickle(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(("change", "words"), [
    (_set(use_dora=True), "use_dora"),
    (_set(bias="all"), "bias='all'"),
    (_set(lora_bias=True), "lora_bias"),
    (_set(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    (_set(peft_type="LOHA"), "peft_type is LOHA"),
    (_set(init_lora_weights="pissa"), "init_lora_weights='pissa' changed the base"),
    (_set(lora_alpha=16), r"is 4 there \(alpha 16, rank 4\) and 2 here: set lora.alpha=16 and lora.scaling=standard"),
    (_set(use_rslora=True), "set lora.alpha=8 and lora.scaling=rslora"),
    (_set(alpha_pattern={"layers.1.self_attn.q_proj": 3}), "layers.1.self_attn.q_proj is 0.75 there"),
    (_tensors(lambda tensors: tensors.pop(KEY)), "q_proj has lora_A only"),
    (_tensors(lambda tensors: tensors.update({KEY: torch.zeros(5, 4)})), "it is of another model"),
    (_tensors(lambda tensors: tensors.update({"base_model.model.strange.weight": torch.zeros(2)})), "strange.weight"),
    (_tensors(lambda tensors: tensors.update(
        {"base_model.model.model.layers.0.self_attn.q_proj.weight": torch.zeros(16, 16)}
    )), "whole there and low-rank here"),
    (_tensors(lambda tensors: tensors.update({"base_model.model.model.norm.weight": torch.zeros(8)})), "is .8,. there"),
    (_tensors(dict.clear), "no lora_A and lora_B"),
    (_damage, "adapter_model.safetensors is damaged"),
    (_to_pickle, "a pickle"),
    (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json cannot be read"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(build, saved, change, words):
    model = converted(build())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(saved)
    with pytest.raises(ConfigError, match=words) as refusal:
        load_adapter_(model, saved)
    assert str(refusal.value).startswith(f"lora.init_from={saved}: ")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("settings", "words"), [
    ({"rank": 8}, "rank of .* is 4 there and 8 here: set lora.rank=4"),
    ({"target_modules": ["q_proj"]}, "factors for down_proj, q_proj, v_proj, the low-rank layers here are q_proj"),
    ({"alpha": 4.0}, "and 1 here: set lora.alpha=8"),
])  # fmt: skip
def test_a_run_of_other_settings_is_told_which(build, saved, settings, words):
    with pytest.raises(ConfigError, match=words):
        load_adapter_(converted(build(), **settings), saved)


@pytest.mark.parametrize("family", TARGETS)
def test_what_is_saved_here_loads_in_peft_and_comes_back_unchanged(build, tokens, tmp_path, family):
    targets, last = TARGETS[family], TARGETS[family][-1]
    settings = {"target_modules": targets, "rank_pattern": {last: 2}, "scaling": Scaling.rslora}
    model = converted(build(family), **settings)
    for layer in low_rank_modules(model).values():
        nn.init.normal_(layer.up, std=0.1)
    factors = {name: (layer.down.detach(), layer.up.detach()) for name, layer in low_rank_modules(model).items()}
    save_adapter(tmp_path, build(family), factors, alpha=8.0, rslora=True, base=tmp_path / "base")
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == set(targets)
    loaded = peft.PeftModel.from_pretrained(build(family), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=0, atol=1e-5)
    again = converted(build(family), **settings)
    load_adapter_(again, tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_targets_keep_their_whole_names_where_the_last_part_says_too_much(build, tokens, tmp_path):
    model = converted(build(), target_modules=r".*layers\.0.*q_proj")
    ((name, layer),) = low_rank_modules(model).items()
    nn.init.normal_(layer.up)
    save_adapter(tmp_path, build(), {name: (layer.down, layer.up)}, alpha=8, rslora=False, base=tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [name]
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=0, atol=1e-5)


def test_dense_tensors_are_saved_as_whole_modules_and_under_every_tied_name(build):
    names = names_to_save(build("llama_tied"), ["model.embed_tokens.weight"], [])
    assert names == ["model.embed_tokens.weight", "lm_head.weight"]
    names = names_to_save(build("gpt2"), ["transformer.ln_f.weight", "transformer.h.0.mlp.c_fc.bias"],
                          ["transformer.h.0.mlp.c_fc"])  # fmt: skip
    assert names == ["transformer.h.0.mlp.c_fc.bias", "transformer.ln_f.weight", "transformer.ln_f.bias"]


def test_a_parameter_beside_submodules_cannot_go_into_an_adapter():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.inner = nn.Parameter(torch.zeros(1)), nn.Linear(2, 2)

    with pytest.raises(ConfigError, match=r"cannot carry 0\.gate"):
        names_to_save(nn.Sequential(Gated()), ["0.gate"], [])
