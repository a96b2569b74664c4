"""Tiny models of the families that the mathematics is tested on."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

VOCABULARY = 48
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
_KEY_VALUE = {"num_key_value_heads": 1}


def _configs() -> dict[str, PretrainedConfig]:
    return {
        "llama": LlamaConfig(**_COMMON, **_KEY_VALUE, tie_word_embeddings=False),
        "llama_tied": LlamaConfig(**_COMMON, **_KEY_VALUE, tie_word_embeddings=True),
        "gpt_neox": GPTNeoXConfig(**_COMMON, hidden_dropout=0.0, attention_dropout=0.0),
        "qwen2": Qwen2Config(**_COMMON, **_KEY_VALUE, tie_word_embeddings=True),
        "mistral": MistralConfig(**_COMMON, **_KEY_VALUE),
        "gemma": GemmaConfig(**_COMMON, **_KEY_VALUE, head_dim=8),
        "gpt2": GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_inner=24,
            n_layer=2,
            n_head=2,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
    }


FAMILIES = list(_configs())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return request.param


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    """Build a family's model with random weights, always the same."""

    def build(family: str = "llama", seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_configs()[family], dtype=torch.float32).eval()
        for parameter in model.parameters():  # biases and norms start at 0 and 1, where mistakes hide
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
        return model

    return build


@pytest.fixture
def tokens() -> Tensor:
    """Return two sequences of token ids."""
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def train(tokens: Tensor) -> Callable[..., list[float]]:
    """Train a model on the two sequences for some steps; return the losses."""

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = model(input_ids=tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return train
