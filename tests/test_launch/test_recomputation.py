"""Activation checkpointing of blocks: the same values and gradients whatever is kept.

`fused` needs a place where kernels run: test_relora/test_kernels.py starts its test there.
"""

import os

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from launch.training.recomputation import Checkpointing, checkpoint_blocks_
from relora.convert import LoraConfig, low_rank_modules, to_low_rank
from relora.errors import ConfigError
from relora.merged import formed_weights
from relora.paths import ForwardPath

DEVICE = os.environ.get("KERNEL_DEVICE", "cpu")
PATHS = [ForwardPath.factored, ForwardPath.addmm, ForwardPath.merged]
PATHS += [ForwardPath.fused] if "KERNEL_DEVICE" in os.environ else []
SHAPE = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def model_of(path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    to_low_rank(model, LoraConfig(rank=2), seed=0)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    for layer in low_rank_modules(model).values():
        layer.path = path
    return model.to(DEVICE).train()


def gradients(model):
    ids = torch.randint(97, (3, 7), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with formed_weights(model, seed=0, step=0):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    return {"loss": loss.detach()} | {name: one.grad for name, one in model.named_parameters() if one.requires_grad}


@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_bitwise_the_same_whatever_is_kept(path):
    wanted = gradients(model_of(path))
    for kind in (Checkpointing.full, Checkpointing.selective):
        model = model_of(path)
        checkpoint_blocks_(model, kind)
        found = gradients(model)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_model_that_writes_over_its_products_is_refused_before_it_goes_wrong():
    class InPlace(nn.Linear):
        def forward(self, x):
            return super().forward(x).mul_(0.5)

    model = model_of(ForwardPath.addmm)
    model.model.layers[1].mlp.act_fn = nn.Sequential(InPlace(24, 24), nn.SiLU())
    checkpoint_blocks_(model, Checkpointing.selective)
    with pytest.raises(ConfigError, match="writes over its products: choose full or none"):
        gradients(model)
