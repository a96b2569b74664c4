"""A model that hosts several heads against as many models of one head each."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from relora.convert import LoraConfig, low_rank_modules, to_low_rank
from relora.errors import ConfigError
from relora.hosted import heads_in, host_heads
from relora.optimizer import OptimizerConfig, parameter_groups

HEADS, ROWS, LENGTH, VOCABULARY = [2, 3, 4], 2, 12, 53
KINDS = {
    "llama": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "pad_token_id": 3,
    },
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0},
    "gpt_neox": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24},
    "opt": {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 24,
    },
}


def _model(kind, head, *, lora=True, synced=False):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, use_cache=False, **KINDS[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if lora:
        to_low_rank(model, LoraConfig(rank=3, alpha=6.0), seed=1, head=head)
    for layer in low_rank_modules(model).values() if synced else ():
        layer.keep_synced_()
    return model


def _pair(kind, **how):
    """A hosting model, and one for each head, with the same random values in all that is a head's own."""
    apart = [_model(kind, head, **how) for head in HEADS]
    together = _model(kind, 0, **how)
    host_heads(together, HEADS, seed=1)
    for name, parameter in together.named_parameters():
        ours = [dict(model.named_parameters())[name] for model in apart]
        if not parameter.requires_grad:
            assert all(torch.equal(parameter, one) for one in ours)
            continue
        assert all(torch.equal(parameter[place], one) for place, one in enumerate(ours)), "as they start alone"
        parameter.data += 0.1 * torch.randn(parameter.shape)
        for place, one in enumerate(ours):
            one.data.copy_(parameter[place])
    for name, buffer in together.named_buffers():
        if "synced" in name:
            buffer.normal_(std=0.1)
            for place, model in enumerate(apart):
                dict(model.named_buffers())[name].copy_(buffer[place])
    return together, apart


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("llama", {"synced": True}),
        ("llama", {"lora": False}),
        ("gpt2", {"synced": True}),
        ("gpt2", {"lora": False}),
        ("gpt_neox", {}),
        ("opt", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@pytest.mark.parametrize("packed", [False, True])
def test_outputs_and_gradients_are_those_of_models_apart(kind, how, packed):
    together, apart = _pair(kind, **how)
    ids = torch.randint(0, VOCABULARY, (len(HEADS) * ROWS, LENGTH))
    ids[:, 4] = 3  # the padding of one kind
    places = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]).expand(len(ids), LENGTH) if packed else None
    output = together(input_ids=ids, position_ids=places).logits
    output.square().mean((1, 2)).sum().backward()
    for place, model in enumerate(apart):
        rows = slice(place * ROWS, (place + 1) * ROWS)
        alone = model(input_ids=ids[rows], position_ids=None if places is None else places[rows]).logits
        alone.square().mean((1, 2)).sum().backward()
        torch.testing.assert_close(output[rows], alone, rtol=1e-5, atol=1e-5)
        own = dict(together.named_parameters())
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        assert trained.keys() == {name for name, one in own.items() if one.requires_grad}, "tied ones once"
        for name, one in trained.items():
            torch.testing.assert_close(own[name].grad[place], one.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_dropout_draws_for_each_head_and_only_in_training():
    torch.manual_seed(0)
    model = _model("llama", 0, lora=False)
    to_low_rank(model, LoraConfig(rank=3, dropout=0.5), seed=1)
    host_heads(model, HEADS, seed=1)
    layer = next(iter(low_rank_modules(model).values()))
    layer.up.data.fill_(1.0)
    layer.down.data.fill_(1.0)
    x = torch.ones(3, 4, layer.in_features)
    assert layer(x)[0].allclose(layer(x)[2])
    layer.train()
    assert not layer(x)[0].allclose(layer(x)[2])


def test_weight_decay_knows_matrices_below_the_heads():
    config = OptimizerConfig(weight_decay=0.1)
    together, apart = _pair("gpt2")
    assert heads_in(together) == 3
    assert heads_in(apart[0]) == 1
    names = [
        [(group["name"], len(group["params"])) for group in parameter_groups(m, config)] for m in (together, apart[0])
    ]
    assert names[0] == names[1]


def test_the_delta_of_a_hosting_layer_is_the_mean_of_the_heads():
    together, apart = _pair("gpt2", synced=True)
    for name, layer in low_rank_modules(together).items():
        deltas = [low_rank_modules(model)[name].delta() for model in apart]
        torch.testing.assert_close(layer.delta(), sum(deltas) / len(deltas))


def test_factors_that_are_no_fresh_draw_are_kept_by_all_heads():
    model = _model("llama", 7)
    layers = low_rank_modules(model)
    learned, frozen, *_ = layers.values()
    learned.up.data.fill_(0.5)
    frozen.down.requires_grad_(False)
    before = [layer.down.clone() for layer in (learned, frozen)]
    host_heads(model, HEADS, seed=1)
    for layer, down in zip((learned, frozen), before, strict=True):
        assert all(torch.equal(one, down) for one in layer.down)
    assert not frozen.down.requires_grad


class _Crowded(nn.Module):
    """Has a parameter of its own beside a part with parameters."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.part = nn.Linear(3, 3)


def test_a_module_that_cannot_be_stacked_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"lte.heads: 0 has parameters beside parts.*start a process for each head"):
        host_heads(nn.Sequential(_Crowded()), HEADS, seed=1)
