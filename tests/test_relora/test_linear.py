"""The layer against a slow, plain twin."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import relora.linear
from relora.initialize import key_of
from relora.linear import BasePart, LowRankLinear, standing_in
from relora.precision import MergePrecision, join

IN, OUT, RANK = 7, 5, 3


def _plain(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "conv1d":
        module = Conv1D(OUT, IN)
        nn.init.normal_(module.bias)
        return module
    return nn.Linear(IN, OUT, bias=kind == "linear")


def _wrapped(kind: str, dropout: float = 0.0, trained: bool = True) -> LowRankLinear:
    layer = LowRankLinear.from_module(_plain(kind), adapter_rank=RANK, scaling=0.25, dropout=dropout)
    if trained:
        nn.init.normal_(layer.up)
    return layer


def _slow_product(up: Tensor, down: Tensor, scaling: float) -> np.ndarray:
    """Multiply by three loops in float64."""
    product = np.zeros((up.shape[0], down.shape[1]))
    for o in range(up.shape[0]):
        for i in range(down.shape[1]):
            for r in range(up.shape[1]):
                product[o, i] += up[o, r].item() * down[r, i].item()
    return product * scaling


KINDS = pytest.mark.parametrize("kind", ["linear", "no_bias", "conv1d"])


@KINDS
def test_wrapping_leaves_the_function_unchanged(kind: str) -> None:
    x = torch.randn(2, 4, IN)
    # Not bit for bit: Conv1D adds its bias within the product.
    torch.testing.assert_close(_wrapped(kind, trained=False)(x), _plain(kind)(x), rtol=1e-6, atol=1e-6)


@KINDS
def test_wrapping_keeps_the_parameter_objects_and_their_names(kind: str) -> None:
    plain = _plain(kind)
    layer = LowRankLinear.from_module(plain, adapter_rank=RANK, scaling=1.0)
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert not layer.weight.requires_grad
    assert set(layer.state_dict()) == set(plain.state_dict()) | {"down", "up"}
    assert layer.down.shape == (RANK, IN)
    assert layer.up.shape == (OUT, RANK)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_equal_those_of_the_dense_layer(kind: str, dtype: torch.dtype) -> None:
    layer = _wrapped(kind).to(dtype)
    x = torch.randn(2, 4, IN, dtype=dtype, requires_grad=True)
    weighting = torch.randn(2, 4, OUT)
    (layer(x).float() * weighting).sum().backward()

    down, up = (part.detach().double().requires_grad_() for part in (layer.down, layer.up))
    x_slow = x.detach().double().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().double().requires_grad_()
    slow = F.linear(x_slow, layer.base().double() + 0.25 * up @ down, bias)
    (slow * weighting).sum().backward()

    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    pairs = [(layer(x), slow), (x.grad, x_slow.grad), (layer.down.grad, down.grad), (layer.up.grad, up.grad)]
    if bias is not None:
        pairs.append((layer.bias.grad, bias.grad))
    for ours, wanted in pairs:
        assert torch.allclose(ours.double(), wanted, **close)
    assert layer.weight.grad is None


@KINDS
def test_autocast_computes_in_bfloat16(kind: str) -> None:
    layer = _wrapped(kind)
    x = torch.randn(2, 4, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), layer(x), rtol=0.05, atol=0.05)


def test_dropout_touches_the_update_only_and_only_in_training() -> None:
    layer = _wrapped("linear", dropout=0.5)
    x = torch.randn(2, 4, IN)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    nn.init.zeros_(layer.up)
    assert torch.equal(layer(x), _plain("linear")(x))


def test_wrapping_keeps_the_training_mode() -> None:
    assert not LowRankLinear.from_module(nn.Linear(4, 4).eval(), adapter_rank=1, scaling=1.0).training


def test_both_factors_learn_within_two_steps() -> None:
    """The reference code zeroes both factors, and neither ever gets a gradient."""
    layer = _wrapped("linear", trained=False)
    optimizer = torch.optim.SGD([layer.down, layer.up], lr=0.1)
    learned = {"down": False, "up": False}
    for _ in range(2):
        layer(torch.randn(4, IN)).square().sum().backward()
        for name in learned:
            learned[name] |= bool(getattr(layer, name).grad.abs().max() > 0)
        optimizer.step()
        optimizer.zero_grad()
    assert learned == {"down": True, "up": True}


@KINDS
def test_delta_and_base_are_oriented_out_by_in(kind: str) -> None:
    layer = _wrapped(kind)
    assert layer.delta().shape == layer.base().shape == (OUT, IN)
    assert np.allclose(layer.delta().numpy(), _slow_product(layer.up, layer.down, 0.25), rtol=1e-6, atol=1e-7)
    x = torch.randn(3, IN)
    assert torch.allclose(F.linear(x, layer.base() + layer.delta(), layer.bias), layer(x), atol=1e-5)


def test_delta_norm_is_the_norm_of_the_delta() -> None:
    layer = _wrapped("linear")
    assert layer.delta_norm() == pytest.approx(float(layer.delta().norm()), rel=1e-5)


@KINDS
@pytest.mark.parametrize("block_entries", [1, 12, 1 << 22])
@pytest.mark.parametrize("store", ["float32", "split", "nearest"])
def test_merge_equals_a_loop_in_float64(
    kind: str, block_entries: int, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relora.linear, "BLOCK_ENTRIES", block_entries)
    layer = _wrapped(kind)
    precision = MergePrecision.split if store == "float32" else MergePrecision[store]
    if store == "split":
        layer.split_base_()
    if store != "float32":
        layer.to(torch.bfloat16)
    down, up = torch.randn(RANK, IN), torch.randn(OUT, RANK) * 0.01
    before, factors = layer.base().double().numpy(), copy.deepcopy((layer.down, layer.up))
    changed = layer.merge_(precision, down, up)
    wanted = before + _slow_product(up, down, 0.25)
    if store == "nearest":
        assert torch.equal(layer.base(), torch.from_numpy(wanted).float().to(torch.bfloat16).float())
    else:
        assert np.allclose(layer.base().numpy(), wanted, rtol=2e-7, atol=1e-9)
    assert changed == np.count_nonzero(layer.base().double().numpy() != before)
    assert torch.equal(layer.down, factors[0])
    assert torch.equal(layer.up, factors[1])


@KINDS
@pytest.mark.parametrize("block_entries", [7, 1 << 22])
@pytest.mark.parametrize("precision", MergePrecision)
def test_merging_in_parts_equals_merging_at_once(
    kind: str, block_entries: int, precision: MergePrecision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relora.linear, "BLOCK_ENTRIES", block_entries)
    layer, key = _wrapped(kind), key_of(0, "merge")
    if precision == MergePrecision.split:
        layer.split_base_()
    layer.to(torch.bfloat16)
    whole = copy.deepcopy(layer)
    changed = whole.merge_(precision, key=key)
    flat = layer.whole_base()
    cuts = [0, 1, IN + 2, IN * OUT // 2, IN * OUT, IN * OUT]
    for start, stop in itertools.pairwise(cuts):
        bits = None if flat.extra_bits is None else flat.extra_bits[start:stop].clone()
        part = BasePart(weight=flat.weight[start:stop].clone(), extra_bits=bits, start=start)
        changed -= layer.merge_(precision, key=key, part=part)
        assert torch.equal(part.weight, whole.weight.view(-1)[start:stop])
        if bits is not None:
            assert torch.equal(bits, whole.extra_bits.view(-1)[start:stop])
    assert changed == 0


def test_merge_takes_the_live_factors_by_default() -> None:
    layer = _wrapped("linear")
    wanted = layer.base() + layer.delta()
    layer.merge_(MergePrecision.nearest)
    assert torch.equal(layer.weight, wanted)


def test_stochastic_merge_stays_within_one_place_and_repeats() -> None:
    merged = []
    for _ in range(2):
        layer = _wrapped("linear").to(torch.bfloat16)
        exact = layer.base() + layer.delta()
        layer.merge_(MergePrecision.stochastic, key=key_of(0, "merge"))
        assert ((layer.base() - exact).abs() <= exact.abs() * 2**-7).all()
        merged.append(layer.base())
    assert torch.equal(*merged)


@pytest.mark.parametrize("setting", ["autocast", "medium"])
def test_merge_is_exact_whatever_precision_training_uses(setting: str) -> None:
    torch.manual_seed(0)
    layer = LowRankLinear.from_module(nn.Linear(64, 64), adapter_rank=32, scaling=1.0)
    nn.init.normal_(layer.up)
    wanted = layer.base().double() + layer.up.double() @ layer.down.double()
    try:
        torch.set_float32_matmul_precision("medium" if setting == "medium" else "highest")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting == "autocast"):
            layer.merge_(MergePrecision.split)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.allclose(layer.base().double(), wanted, rtol=1e-6, atol=1e-7)


@KINDS
def test_splitting_the_base_loses_nothing_and_survives_a_cast_and_a_state_dict(kind: str) -> None:
    layer = _wrapped(kind)
    exact = layer.base().clone()
    weight = layer.weight
    layer.split_base_()
    layer.to(torch.bfloat16)
    assert layer.weight is weight
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.base(), exact)
    state = layer.state_dict()
    restored = join(state["weight"], state["extra_bits"])
    assert torch.equal(restored.t() if layer.transposed else restored, exact)


def test_stand_ins_take_the_factors_place_in_the_forward_pass_only_and_leave_even_after_an_error() -> None:
    layer, other, x = _wrapped("linear"), _wrapped("linear"), torch.randn(3, IN)
    nn.init.normal_(other.up)
    nn.init.normal_(other.down)
    before, outputs = layer(x), []

    def fail() -> None:
        with standing_in({layer: (other.down, other.up)}):
            outputs.append(layer(x))
            assert layer.delta_norm() != other.delta_norm()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(outputs[0], other(x))
    assert not torch.equal(outputs[0], before)
    assert torch.equal(layer(x), before)
    assert layer.state_dict().keys() == other.state_dict().keys()
