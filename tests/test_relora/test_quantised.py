"""Quantised base weights: what they store, what passes make of it, and what merges keep."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from relora.choice import LayerShape, measure, shape_of
from relora.convert import LoraConfig, merged_state_dict, prepare_base_, to_low_rank
from relora.errors import ConfigError
from relora.linear import LowRankLinear
from relora.optimizer import OptimizerConfig, parameter_groups
from relora.paths import ForwardPath
from relora.precision import MergePrecision
from relora.quantised import _NF4, BLOCK, BaseFormat, QuantisedBase
from relora.restart import PlainStore, ReloraConfig, restart

FORMS = [BaseFormat.int8, BaseFormat.nf4]
LEVELS = {BaseFormat.int8: torch.arange(-127.0, 128.0), BaseFormat.nf4: torch.tensor(_NF4)}
SHAPES = [(1, 1), (5, 64), (7, 65), (3, 190)]


def weight_of(shape):
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[0]).unsqueeze(1)
    weight[-1, :BLOCK] = 0
    return weight


def slowly(weight, form):
    """The nearest level of each entry times its block's scale, block by block."""
    result = torch.empty_like(weight)
    for row, values in enumerate(weight):
        for first in range(0, len(values), BLOCK):
            block = values[first : first + BLOCK]
            scale = (block.abs().max() / LEVELS[form][-1]).bfloat16().float()
            nearest = (block.unsqueeze(1) - scale * LEVELS[form]).abs().argmin(1)
            result[row, first : first + BLOCK] = scale * LEVELS[form][nearest]
    return result


def test_the_levels_of_nf4_are_quantiles_of_a_normal_distribution():
    """QLoRA's appendix E: 8 steps on the negative side, 9 on the positive one, zero among the levels."""
    last = 1 - (1 / 32 + 1 / 30) / 2
    negative = norm.ppf(np.linspace(1 - last, 0.5, 8))
    positive = norm.ppf(np.linspace(0.5, last, 9))[1:]
    found = np.concatenate([negative, positive])
    assert np.abs(found / np.abs(found).max() - _NF4).max() < 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_entry_is_the_nearest_level_of_its_block(form, shape):
    weight = weight_of(shape)
    assert torch.equal(QuantisedBase(weight, form, remainder=False).weight(), slowly(weight, form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_remainder_brings_the_weight_back_to_the_stated_precision(form, shape):
    weight = weight_of(shape)
    base = QuantisedBase(weight, form, remainder=True)
    assert (base.exact() - weight).norm() <= base.eps / 2 * weight.norm()
    assert base.eps < 4e-5
    without = QuantisedBase(weight, form, remainder=False)
    assert torch.equal(without.exact(), base.weight())
    assert (without.exact() - weight).norm() <= without.eps / 2 * weight.norm()


@pytest.mark.parametrize("form", FORMS)
def test_an_update_of_zero_moves_nothing(form):
    for remainder in (True, False):
        base = QuantisedBase(weight_of((7, 65)), form, remainder=remainder)
        before, seen = base.exact(), base.weight()
        taken = base.add_(lambda rows: torch.zeros(7, 65)[rows])
        assert torch.equal(base.weight(), seen)
        assert float(taken.moved) == 0
        if remainder:  # float32 has hardly more places than codes and remainder together
            assert (base.exact() - before).norm() <= base.eps / 2 * before.norm()
        else:
            assert torch.equal(base.exact(), before)
            assert (float(taken.changed), float(taken.lost)) == (0, 0)


def test_a_scale_moves_only_when_it_no_longer_fits():
    weight = torch.linspace(-1, 0.9, 128).view(2, 64)
    base = QuantisedBase(weight, BaseFormat.nf4, remainder=True)
    scales = base.scales.clone()
    grown = torch.zeros_like(weight)
    grown[0, 0], grown[1, -1] = -0.002, 0.3
    base.add_(lambda rows: grown[rows])
    assert torch.equal(base.scales == scales, torch.tensor([[True], [False]]))
    assert (base.exact() - (weight + grown)).abs().max() < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_that_is_not_finite_does_not_turn_into_one_that_is(form):
    weight = torch.ones(2, BLOCK)
    weight[0, 3], weight[1, 3] = float("nan"), float("inf")
    assert not QuantisedBase(weight, form, remainder=False).weight().isfinite().all(1).any()


def merged_twenty_times(form, *, remainder):
    """Updates that sum to 0.1 % of |W|: the share W took up, the relative error, and the last merge's report."""
    torch.manual_seed(0)
    layer = LowRankLinear.from_module(nn.Linear(192, 256, bias=False), adapter_rank=4, scaling=1.0)
    factors = [(torch.randn(4, 192), torch.randn(256, 4)) for _ in range(20)]
    total = sum((up @ down for down, up in factors), torch.zeros(256, 192))
    shrink = 1e-3 * layer.weight.norm() / total.norm()
    layer.quantise_base_(form, remainder=remainder)
    start = layer.quantised.exact().double()
    for down, up in factors:
        taken = layer.requantise_(down, up * shrink)
    wanted = (total * shrink).double()
    moved = layer.quantised.exact().double() - start
    return float((moved * wanted).sum() / wanted.norm() ** 2), float((moved - wanted).norm() / wanted.norm()), taken


@pytest.mark.parametrize(("form", "tolerance"), [(BaseFormat.int8, 1e-3), (BaseFormat.nf4, 1e-2)])
def test_twenty_merges_of_a_thousandth_of_the_weight_are_kept_with_the_remainder(form, tolerance):
    share, error, taken = merged_twenty_times(form, remainder=True)
    assert share == pytest.approx(1, abs=1e-4)
    assert error < tolerance
    assert float(taken.lost / taken.update) ** 0.5 < tolerance


@pytest.mark.parametrize("form", FORMS)
def test_twenty_merges_of_a_thousandth_of_the_weight_are_lost_without_it(form):
    share, error, taken = merged_twenty_times(form, remainder=False)
    assert abs(share) < 0.01
    assert error == pytest.approx(1, abs=0.01)
    assert float(taken.lost / taken.update) ** 0.5 == pytest.approx(1, abs=0.01), "and the report says so"


@pytest.mark.parametrize("form", FORMS)
def test_passes_keep_no_copy_of_the_weight(form):
    for path in (ForwardPath.factored, ForwardPath.addmm):
        layer = LowRankLinear.from_module(nn.Linear(128, 192), adapter_rank=2, scaling=1.0)
        layer.quantise_base_(form, remainder=True)
        layer.path = path
        kept = []

        def keep(tensor, kept=kept):
            kept.append(tensor)
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(torch.randn(4, 128, requires_grad=True)).sum()
        own = {one.data_ptr() for one in layer.buffers()}
        assert max(one.nbytes for one in kept if one.data_ptr() not in own) < 192 * 128
        assert layer.quantised.codes.data_ptr() in {one.data_ptr() for one in kept}


def test_only_the_remainder_stays_on_the_host():
    base = QuantisedBase(torch.randn(4, 64), BaseFormat.nf4, remainder=True)
    base.to(device="meta")
    assert {name for name, one in base.named_buffers() if one.is_meta} == {"codes", "scales", "pairs"}
    assert base.remainder.device.type == "cpu"
    assert set(base.state_dict()) == {"codes", "scales", "remainder"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_restart_merges_what_was_learned_and_reports_what_quantising_did(family, build, train, tokens):
    model = build(family)
    layers = to_low_rank(model, LoraConfig(rank=2, alpha=4.0), seed=3).low_rank
    prepare_base_(model, torch.float32, MergePrecision.split, BaseFormat.nf4)
    assert not any(name.endswith("_proj.weight") for name, _ in model.named_parameters())
    optimizer = torch.optim.AdamW(parameter_groups(model, OptimizerConfig(lr=0.01)))
    train(model, optimizer, 5)
    exact = {name: layer.quantised.exact() for name, layer in layers.items()}
    deltas = {name: layer.delta() for name, layer in layers.items()}
    report = restart(model, ReloraConfig(), PlainStore(optimizer), seed=3, restart_index=1)
    for name, layer in layers.items():
        delta = deltas[name].t() if layer.transposed else deltas[name]
        assert (layer.quantised.exact() - (exact[name] + delta)).norm() < 1e-4 * exact[name].norm()
        assert not layer.up.any()
    assert 0.05 < report.base_error < 0.15
    assert report.lost_share < 1e-3
    assert report.base_shift > 0.01
    assert report.changed_share > 0.9
    logits = model(input_ids=tokens).logits
    weights = merged_state_dict(model)
    plain = build(family)
    assert set(weights) == set(plain.state_dict())
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(input_ids=tokens).logits, logits, atol=1e-5, rtol=1e-5)


def test_paths_are_measured_on_a_stand_in_with_codes():
    layer = LowRankLinear.from_module(nn.Linear(64, 64), adapter_rank=2, scaling=1.0)
    layer.quantise_base_(BaseFormat.int8, remainder=False)
    shape = shape_of(layer, tokens=4, microbatches=1)
    assert isinstance(shape, LayerShape)
    assert "int8" in shape.key
    times = measure(shape, [ForwardPath.factored, ForwardPath.addmm], torch.device("cpu"))
    assert all(0 < seconds < 10 for seconds in times.values())


def test_the_merged_path_is_refused():
    with pytest.raises(ConfigError, match=r"lora.base=nf4 cannot be with lora.forward=merged"):
        LoraConfig(base=BaseFormat.nf4, forward=ForwardPath.merged)
