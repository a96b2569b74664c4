"""Every path of a low-rank layer against the dense layer that it stands for: values and all gradients.

`fused` needs a place where kernels run: test_kernels.py starts its tests in Triton's interpreter, and on a GPU.
"""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from relora.convert import LoraConfig, low_rank_modules, prepare_base_, to_low_rank
from relora.errors import ConfigError
from relora.hosted import HostedLinear, host_heads
from relora.linear import LowRankLinear, standing_in
from relora.merged import form, formed_weights
from relora.paths import ForwardPath, through_weight
from relora.precision import MergePrecision
from relora.quantised import BaseFormat

DEVICE = os.environ.get("KERNEL_DEVICE", "cpu")
FUSED = [ForwardPath.fused] if "KERNEL_DEVICE" in os.environ else []
PATHS = [ForwardPath.factored, ForwardPath.addmm, ForwardPath.merged, *FUSED]
SHAPES = [(1, 1, 1, 1), (7, 5, 3, 6), (33, 17, 2, 9), (8, 24, 8, 3)]  # in, out, rank, tokens; the last: rank x many
KINDS = ["linear", "no_bias", "conv1d"]
SCALING = 0.75


@pytest.fixture(autouse=True)
def _device():
    with torch.device(DEVICE):
        yield


def exact(path):
    """The most exact dtype of a path, and the error that it may leave."""
    return (torch.float32, 2e-6) if path == ForwardPath.fused else (torch.float64, 1e-13)


def make(kind, shape, path, dtype=torch.float64, dropout=0.0):
    torch.manual_seed(sum(shape))
    inputs, outputs, rank, _ = shape
    module = Conv1D(outputs, inputs) if kind == "conv1d" else nn.Linear(inputs, outputs, bias=kind == "linear")
    layer = LowRankLinear.from_module(module.to(dtype), adapter_rank=rank, scaling=SCALING, dropout=dropout)
    nn.init.normal_(layer.up, std=0.3)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    layer.path = path
    return layer


def passes(layer, x, weighting, step=0):
    """The output and the gradients of input, factors and bias of one update."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    with formed_weights(layer, seed=0, step=step):
        y = layer(x)
        (y.double() * weighting).sum().backward()
    gradients = {name: one.grad for name, one in layer.named_parameters() if one.requires_grad}
    return {"y": y.detach(), "x": x.grad, **gradients}


def dense(layer, x, weighting):
    """The same by one dense weight in float64."""
    down, up, x = (one.detach().double().requires_grad_() for one in (layer.down, layer.up, x))
    bias = None if layer.bias is None else layer.bias.detach().double().requires_grad_()
    plain = layer.extra_bits is None and layer.quantised is None
    exact = layer.matrix.detach().double() if plain else layer.base().double()
    y = F.linear(x, exact + layer.scaling * up @ down, bias)
    (y * weighting).sum().backward()
    found = {"y": y.detach(), "x": x.grad, "down": down.grad, "up": up.grad}
    return found if bias is None else {**found, "bias": bias.grad}


def check(ours, wanted, tolerance):
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        error = (ours[name].double() - value).norm() / value.norm().clamp_min(1e-30)
        assert error < tolerance, f"{name}: off by {error:.2e}"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_the_dense_layers(path, kind, shape):
    inputs, outputs, _, tokens = shape
    for dtype, tolerance in {exact(path), (torch.float32, 2e-6)}:
        layer = make(kind, shape, path, dtype)
        x = torch.randn(2, tokens, inputs, dtype=dtype)
        weighting = torch.randn(2, tokens, outputs, dtype=torch.float64)
        check(passes(layer, x, weighting), dense(layer, x, weighting), tolerance)


def test_the_shapes_take_both_ways_to_the_factors_gradients():
    chosen = {through_weight(2 * tokens, outputs, inputs, rank) for inputs, outputs, rank, tokens in SHAPES}
    assert chosen == {False, True}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_they_are_as_near_as_its_digits(path, kind):
    layer = make(kind, (96, 80, 8, 24), path, torch.float32)
    layer.split_base_()
    prepare_base_(layer, torch.bfloat16, MergePrecision.split)
    x, weighting = torch.randn(24, 96).bfloat16(), torch.randn(24, 80, dtype=torch.float64)
    check(passes(layer, x, weighting), dense(layer, x, weighting), 8e-3)


@pytest.mark.parametrize("path", [ForwardPath.factored, ForwardPath.addmm])
@pytest.mark.parametrize("form", [BaseFormat.int8, BaseFormat.nf4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_weight_is_the_dense_weight_that_its_codes_stand_for(path, form, kind):
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)):
        for dropout in (0.0, 0.3):
            layer = make(kind, (97, 65, 4, 24), path, dtype, dropout)
            layer.quantise_base_(form, remainder=True)
            x, weighting = torch.randn(24, 97, dtype=dtype), torch.randn(24, 65, dtype=torch.float64)
            if dropout:
                ours = passes(layer, x, weighting)
                assert all(value.isfinite().all() for value in ours.values())
                continue
            check(passes(layer, x, weighting), dense(layer, x, weighting), tolerance)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("frozen", ["down", "up", "bias", "x"])
def test_what_is_frozen_gets_no_gradient_and_the_others_get_theirs(path, frozen):
    dtype, tolerance = exact(path)
    layer = make("linear", SHAPES[1], path, dtype)
    x = torch.randn(6, 7, dtype=dtype)
    weighting = torch.randn(6, 5, dtype=torch.float64)
    wanted = dense(layer, x, weighting)
    if frozen == "x":
        with formed_weights(layer, seed=0, step=0):
            (layer(x) * weighting).sum().backward()
        ours = {name: one.grad for name, one in layer.named_parameters() if one.requires_grad}
        del wanted["x"], wanted["y"]
    else:
        getattr(layer, frozen).requires_grad_(False)
        ours = passes(layer, x, weighting)
        del wanted[frozen]
    check(ours, wanted, tolerance)


@pytest.mark.parametrize("kept", ["both", "up"])
@pytest.mark.parametrize("path", PATHS[1:])
def test_what_the_last_sync_merged_is_taken_off(path, kept):
    found, (dtype, tolerance) = [], exact(path)
    for one in (ForwardPath.factored, path):
        layer = make("linear", SHAPES[1], one, dtype)
        layer.down.requires_grad_(kept == "both")
        layer.keep_synced_()
        torch.manual_seed(3)
        layer.synced_up.normal_()
        if kept == "both":
            layer.synced_down.normal_()
        found.append(passes(layer, torch.randn(6, 7, dtype=dtype), torch.randn(6, 5, dtype=torch.float64)))
    check(found[1], found[0], tolerance)


@pytest.mark.parametrize("path", [ForwardPath.addmm, *FUSED])
def test_it_drops_what_the_factored_path_drops(path):
    found, (dtype, tolerance) = [], exact(path)
    for one in (ForwardPath.factored, path):
        layer = make("linear", SHAPES[2], one, dtype, dropout=0.4)
        torch.manual_seed(3)
        x, weighting = torch.randn(9, 33, dtype=dtype), torch.randn(9, 17, dtype=torch.float64)
        found.append(passes(layer, x, weighting))
        layer.eval()
        check(passes(layer, x, weighting), dense(layer, x, weighting), tolerance)
    check(found[1], found[0], tolerance)


def test_merged_refuses_dropout():
    with pytest.raises(ConfigError, match=r"lora\.dropout=0\.1 .*lora\.forward=merged.*addmm"):
        LoraConfig(dropout=0.1, forward=ForwardPath.merged)


@pytest.mark.parametrize("path", PATHS)
def test_activation_checkpointing_recomputes_the_same(path):
    dtype, _ = exact(path)
    layer, x, weighting = (
        make("linear", SHAPES[2], path, dtype),
        torch.randn(9, 33).to(dtype),
        torch.randn(9, 17).double(),
    )
    wanted = passes(layer, x, weighting)
    plain, layer.forward = layer.forward, lambda x: checkpoint(plain, x, use_reentrant=False)
    ours = passes(layer, x, weighting)
    assert all(torch.equal(ours[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_computes_in_bfloat16_with_gradients_in_float32(path, kind):
    layer, x = make(kind, (96, 80, 8, 24), path, torch.float32), torch.randn(24, 96)
    weighting = torch.randn(24, 80, dtype=torch.float64)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = passes(layer, x, weighting)
    assert ours.pop("y").dtype == torch.bfloat16
    assert {one.dtype for one in ours.values()} == {torch.float32}
    wanted = dense(layer, x, weighting)
    del wanted["y"]
    check(ours, wanted, 1e-2)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_compiling_breaks_no_graph(path, autocast):
    torch._dynamo.reset()
    layer = make("linear", SHAPES[2], path, torch.float32)
    x, weighting = torch.randn(9, 33), torch.randn(9, 17).double()
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        wanted = passes(layer, x, weighting)
        layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
        check(
            passes(layer, x, weighting),
            {name: value.double() for name, value in wanted.items()},
            1e-2 if autocast else 1e-6,
        )


def saved_by(action):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        action()
    return kept


@pytest.mark.parametrize("path", [ForwardPath.addmm, *FUSED])
def test_it_keeps_the_input_and_the_small_activation_only(path):
    layer, x = make("linear", SHAPES[2], path, torch.float32), torch.randn(9, 33, requires_grad=True)
    for trains, sizes in ((True, [9 * 33, 9 * 2]), (False, [9 * 2])):
        layer.down.requires_grad_(trains)
        kept = saved_by(lambda: layer(x))
        weights = {one.data_ptr() for one in layer.parameters()}
        assert [one.numel() for one in kept if one.data_ptr() not in weights] == sizes


@pytest.mark.parametrize("path", [ForwardPath.factored, ForwardPath.addmm, *FUSED])
@pytest.mark.parametrize("dense_bias", [False, True])
def test_a_layer_of_several_heads_is_its_heads_side_by_side(path, dense_bias):
    class Model(nn.Sequential):
        pass

    dtype, tolerance = exact(path)
    model = Model(nn.Linear(7, 5)).to(dtype)
    model[0].bias.requires_grad_(dense_bias)
    layers = []
    to_low_rank(model, LoraConfig(rank=3, alpha=6.0, dense=["biases"] if dense_bias else []), seed=1)
    host_heads(model, [0, 1], seed=1)
    layer = model[0]
    assert isinstance(layer, HostedLinear)
    nn.init.normal_(layer.up)
    layer.path = path
    x, weighting = torch.randn(8, 7).to(dtype), torch.randn(8, 5).double()
    ours = passes(layer, x, weighting)
    for head in range(2):
        single = make("linear", SHAPES[1], path, dtype)
        single.scaling = layer.scaling
        for name, part in (("weight", layer.weight.data), ("down", layer.down.data[head]), ("up", layer.up.data[head])):
            getattr(single, name).data = part
        single.bias.data = layer.bias.data[head] if dense_bias else layer.bias.data
        layers.append(dense(single, x[4 * head : 4 * head + 4], weighting[4 * head : 4 * head + 4]))
    for name in ("y", "x"):
        check({name: ours[name]}, {name: torch.cat([one[name] for one in layers])}, tolerance)
    for name in ("down", "up", "bias")[: 2 + dense_bias]:
        check({name: ours[name]}, {name: torch.stack([one[name] for one in layers])}, tolerance)


def test_small_steps_of_a_cycle_are_not_lost_in_bfloat16():
    """Rounded to nearest, an update of 1e-4 of the weight would leave almost no trace in the formed weight."""
    layer = make("linear", (256, 256, 16, 1), ForwardPath.merged, torch.float32)
    layer.up.data *= 1e-4 / layer.delta_norm() * float(layer.base().norm())
    layer.weight.data = layer.weight.data.bfloat16()
    base, delta = layer.base(), layer.delta()
    nearest = (base + delta).bfloat16().float() - base
    seen = torch.stack([form(layer, key).float() for key in range(400)]).mean(0) - base
    assert float((nearest * delta).sum() / delta.square().sum()) < 0.5
    assert float((seen * delta).sum() / delta.square().sum()) == pytest.approx(1.0, abs=0.1)


def test_stand_ins_take_the_place_of_formed_weights_too():
    layer, x = make("linear", SHAPES[1], ForwardPath.merged), torch.randn(6, 7, dtype=torch.float64)
    other = (layer.down.detach() + 1, layer.up.detach() - 1)
    with formed_weights(layer, seed=0, step=0):
        with standing_in({layer: other}):
            replaced = layer(x)
        own = layer(x)
    weight = layer.weight + SCALING * other[1] @ other[0]
    torch.testing.assert_close(replaced, F.linear(x, weight, layer.bias), atol=1e-10, rtol=0)
    torch.testing.assert_close(own, F.linear(x, layer.weight + layer.delta().double(), layer.bias), atol=1e-6, rtol=0)


def test_formed_weights_are_within_one_place_repeat_by_step_and_are_gone_afterwards():
    path, dtype = ForwardPath.merged, torch.float32
    model = nn.Sequential(make("linear", SHAPES[2], path, dtype), make("conv1d", (17, 9, 2, 1), path, dtype))
    for layer in low_rank_modules(model).values():
        layer.split_base_()
    seen = []
    for step in (3, 3, 4):
        with formed_weights(model, seed=0, step=step):
            seen.append([layer.formed.clone() for layer in low_rank_modules(model).values()])
        assert all(layer.formed is None for layer in low_rank_modules(model).values())
    for layer, formed in zip(low_rank_modules(model).values(), seen[0], strict=True):
        exact = layer.base() + layer.delta()
        assert ((formed.float() - exact).abs() <= exact.abs() * 2**-7).all()
    assert all(itertools.starmap(torch.equal, zip(seen[0], seen[1], strict=True)))
    assert not any(itertools.starmap(torch.equal, zip(seen[0], seen[2], strict=True)))
