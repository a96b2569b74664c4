"""The loss inside of the output layer against the plain one: value, all gradients, memory; and what it refuses."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PhiConfig,
    ViTConfig,
    ViTForImageClassification,
)

from continual.batches import Batch
from launch.planning.microbatch import Ledger, run_microbatch
from launch.training.objective import summed_loss
from parallel import output_loss
from parallel.output_loss import OutputLoss, take_output_loss_
from parallel.vocabulary import IGNORED
from relora.convert import LoraConfig, to_low_rank
from relora.errors import ConfigError

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
CONFIGS = {
    "untied": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "with a bias": PhiConfig(**SHAPE),
}


def model_of(name, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype)


def batch_of(sequences=3, length=7):
    ids = torch.randint(97, (sequences, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 2:5] = IGNORED
    labels[-1, -1] = IGNORED
    return Batch(inputs={"input_ids": ids}, labels=labels)


def gradients(model, batch):
    """The loss, and the gradients of a share of it."""
    model.zero_grad()
    loss = summed_loss(model, batch, CPU)
    (loss * 0.3).backward()
    return loss.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_value_and_all_gradients_are_those_of_the_plain_loss(name, rows, monkeypatch):
    monkeypatch.setattr(output_loss, "_LOGITS", 97 * rows)
    plain, chunked = model_of(name), model_of(name)
    assert take_output_loss_(chunked, OutputLoss.auto, CPU) is OutputLoss.chunked
    (loss, wanted), (ours, found) = gradients(plain, batch_of()), gradients(chunked, batch_of())
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-6)


def test_in_bf16_the_weight_gradient_is_summed_in_fp32(monkeypatch):
    monkeypatch.setattr(output_loss, "_LOGITS", 97)
    plain, chunked = (model_of("untied", torch.bfloat16) for _ in range(2))
    take_output_loss_(chunked, OutputLoss.chunked, CPU)
    batch = batch_of(8, 32)
    (loss, wanted), (ours, found) = gradients(plain, batch), gradients(chunked, batch)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    error = (found["lm_head.weight"].float() - wanted["lm_head.weight"].float()).norm()
    assert error < 2**-8 * wanted["lm_head.weight"].float().norm()  # each product and the sum are rounded once


def test_a_frozen_output_layer_has_no_gradient_and_takes_part_all_the_same(monkeypatch):
    monkeypatch.setattr(output_loss, "_LOGITS", 97 * 4)
    plain, chunked = model_of("untied"), model_of("untied")
    take_output_loss_(chunked, OutputLoss.chunked, CPU)
    for model in (plain, chunked):
        model.lm_head.requires_grad_(False)
    (_, wanted), (_, found) = gradients(plain, batch_of()), gradients(chunked, batch_of())
    assert "lm_head.weight" not in found
    key = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(found[key], wanted[key], rtol=1e-5, atol=1e-6)


def test_evaluation_keeps_no_gradients_and_logits_are_logits_without_labels():
    plain, chunked = model_of("untied"), model_of("untied")
    take_output_loss_(chunked, OutputLoss.chunked, CPU)
    batch = batch_of()
    known = [*chunked.parameters(), *chunked.buffers(), *batch.inputs.values(), batch.labels]
    with torch.no_grad(), Ledger(known) as ledger:
        ours = summed_loss(chunked, batch, CPU)
        kept = ledger.now
    assert kept < 3 * 7 * 97  # a quarter of the logits
    torch.testing.assert_close(ours, summed_loss(plain, batch, CPU).detach(), rtol=1e-6, atol=0)
    assert torch.equal(chunked(**batch.inputs).logits, plain(**batch.inputs).logits)


def test_the_logits_of_all_tokens_never_come_together_and_flops_stay(monkeypatch):
    monkeypatch.setattr(output_loss, "_LOGITS", 97 * 8)
    sizes = {}
    for choice in (OutputLoss.plain, OutputLoss.chunked):
        model = model_of("untied")
        take_output_loss_(model, choice, CPU)
        sizes[choice] = run_microbatch(model, sequences=8, length=64)
    plain, chunked = sizes.values()
    logits = 8 * 64 * 97 * 4
    assert plain.at_loss > plain.saved + 2 * logits
    assert chunked.at_loss < chunked.saved + logits / 4
    assert (chunked.forward_flops + chunked.backward_flops) == plain.forward_flops + plain.backward_flops


def test_it_is_refused_where_it_would_be_wrong():
    capped = AutoModelForCausalLM.from_config(Gemma2Config(**SHAPE, head_dim=8, num_key_value_heads=2))
    take_output_loss_(capped, OutputLoss.chunked, CPU)
    with pytest.raises(ConfigError, match=r"training\.loss must be plain for Gemma2ForCausalLM"):
        summed_loss(capped, batch_of(), CPU)
    low_rank = model_of("untied")
    to_low_rank(low_rank, LoraConfig(rank=2, target_modules=["lm_head"]), seed=0)
    with pytest.raises(ConfigError, match="this one's is LowRankLinear: leave it at plain"):
        take_output_loss_(low_rank, OutputLoss.chunked, CPU)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    with pytest.raises(ConfigError, match="this one's is none"):
        take_output_loss_(ViTForImageClassification(ViTConfig(**shape)), OutputLoss.chunked, CPU)
    with pytest.raises(ConfigError, match=r"training\.loss=liger needs a GPU"):
        take_output_loss_(model_of("untied"), OutputLoss.liger, CPU)
