import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from launch.planning.flops import count_step_flops, data_sheet_flops, mfu, peak_flops
from relora.convert import LoraConfig, to_low_rank

B, T = 2, 16
WIDTH, INNER, LAYERS, HEADS, GROUPS, VOCABULARY = 32, 48, 2, 4, 2, 50
HEAD_SIZE = WIDTH // HEADS
LINEAR = [  # (in, out) of one layer
    (WIDTH, WIDTH),
    (WIDTH, GROUPS * HEAD_SIZE),
    (WIDTH, GROUPS * HEAD_SIZE),
    (WIDTH, WIDTH),
    (WIDTH, INNER),
    (WIDTH, INNER),
    (INNER, WIDTH),
]


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        vocab_size=VOCABULARY,
        max_position_embeddings=T,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def count(model: nn.Module, *, backward: bool = True) -> int:
    tokens = torch.arange(B * T).view(B, T) % VOCABULARY

    def microbatch() -> None:
        loss = model(input_ids=tokens, labels=tokens).loss
        if backward:
            loss.backward()

    return count_step_flops(microbatch)


def products(*, adapter_rank: int | None, forward_only: bool = False) -> int:
    """All matrix products of one microbatch, by hand."""
    tokens = B * T
    pairs = sum(fan_in * fan_out for fan_in, fan_out in LINEAR) * LAYERS
    ends = sum(fan_in + fan_out for fan_in, fan_out in LINEAR) * LAYERS
    attention = LAYERS * 2 * B * HEADS * T * T * HEAD_SIZE
    head = WIDTH * VOCABULARY
    if forward_only:
        return 2 * tokens * (pairs + head) + 2 * attention
    linear = 6 * tokens * pairs
    if adapter_rank is not None:  # no gradient of the frozen weight, but all three products of both factors
        linear = 4 * tokens * pairs + 6 * tokens * adapter_rank * ends
    return linear + 6 * tokens * head + 7 * attention


def test_full_rank_flops_equal_the_formula(model):
    assert count(model) == products(adapter_rank=None)


@pytest.mark.parametrize("adapter_rank", [1, 4, 8])
def test_low_rank_flops_equal_the_formula(model, adapter_rank):
    to_low_rank(model, LoraConfig(rank=adapter_rank), seed=0)
    assert count(model) == products(adapter_rank=adapter_rank)


def test_forward_flops_equal_the_formula(model):
    assert count(model, backward=False) == products(adapter_rank=None, forward_only=True)


def test_recomputed_activations_are_counted():
    rows, width = 8, 16
    block = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
    inputs = torch.randn(rows, width, requires_grad=True)
    product = 2 * rows * width * width
    assert count_step_flops(lambda: block(inputs).sum().backward()) == 6 * product
    again = count_step_flops(lambda: checkpoint(block, inputs, use_reentrant=False).sum().backward())
    assert again == 8 * product


def attend(backend: SDPBackend | None, *, backward: bool, masked: bool = False) -> int:
    query = torch.randn(2, 4, 16, 8, requires_grad=True)
    key, value = (torch.randn(2, 4, 24, 8, requires_grad=True) for _ in range(2))
    mask = torch.zeros(16, 24) if masked else None

    def run() -> None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        if backward:
            out.sum().backward()

    with sdpa_kernel(backend or [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        return count_step_flops(run)


@pytest.mark.parametrize("masked", [False, True])
def test_fused_cpu_attention_counts_as_the_same_products_written_out(masked):
    forward = attend(SDPBackend.MATH, backward=False, masked=masked)
    assert forward > 0
    assert attend(None, backward=False, masked=masked) == forward
    backward = attend(SDPBackend.MATH, backward=True, masked=masked) - forward
    scores_again = forward // 2
    assert attend(None, backward=True, masked=masked) - forward == backward + scores_again


def test_the_counted_microbatch_really_runs(model):
    count(model)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("Tesla V100-SXM2-32GB", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_data_sheet_figures_belong_to_that_very_card(name, bf16):
    assert data_sheet_flops(name, torch.bfloat16) == (None if bf16 is None else pytest.approx(bf16))


def test_fp32_is_measured_against_tf32_only_where_it_is_allowed(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert data_sheet_flops("NVIDIA H100 80GB HBM3", torch.float32) == pytest.approx(66.9e12)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert data_sheet_flops("NVIDIA H100 80GB HBM3", torch.float32) == pytest.approx(494.7e12)


def test_a_cpus_peak_is_measured_once_and_a_matrix_product_stays_near_it():
    peak, source = peak_flops(torch.device("cpu"), torch.float32)
    assert "measured" in source
    assert peak_flops(torch.device("cpu"), torch.float32) == (peak, source)
    assert 1e8 < peak < 1e14


def test_utilisation_is_executed_flops_over_what_the_time_allows():
    assert mfu(3e9, 2.0, 6e9) == pytest.approx(0.25)
