"""Cases of test_relora/test_kernels.py, which sets where they run: Triton decides it when it is imported."""

import os

import pytest
import torch

import relora.kernels.products
import relora.merged
from launch import exits, train
from launch.planning.flops import count_step_flops
from launch.watching.records import read_records
from parallel.output_loss import OutputLoss, loss_by
from parallel.vocabulary import IGNORED
from relora.choice import measure, shape_of
from relora.initialize import key_of
from relora.kernels.factor_gradients import factor_gradients, factor_gradients_twin
from relora.kernels.grouped import grouped, grouped_twin, groups_of
from relora.kernels.merge import merge, merge_twin
from relora.kernels.products import products, products_twin
from relora.linear import LowRankLinear
from relora.merged import form
from relora.paths import ForwardPath
from relora.precision import MergePrecision, join, split

DEVICE = os.environ["KERNEL_DEVICE"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
SHORT = ["training.steps=6", "relora.warm_start_steps=2", "relora.every=2", "model.config.num_hidden_layers=1"]
SHORT += ["lora.target_modules=[o_proj,down_proj]", "evaluation.sequences=1"]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape).to(device=DEVICE, dtype=dtype)


def near(ours, wanted, dtype):
    error = (ours.double() - wanted.double()).norm() / wanted.double().norm()
    assert ours.dtype == wanted.dtype
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("precision", MergePrecision)
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(1, 1, 1), (5, 7, 3), (70, 65, 20)])
@pytest.mark.parametrize("has_bits", [False, True])
def test_merge(precision, factors, rows, columns, rank, has_bits):
    if precision == MergePrecision.split and not has_bits:
        has_bits = True
    weight, bits = split(draw(rows, columns))
    left, right = draw(rows, rank, dtype=factors), draw(rank, columns, dtype=factors)
    arguments = (weight, bits if has_bits else None, left, right, 1e-2, precision)
    key = key_of(3, "merge", str(precision))  # above and below 2 ** 63
    (ours, rest), (wanted, wanted_rest) = merge(*arguments, key=key), merge_twin(*arguments, key=key)
    if precision == MergePrecision.split:
        exact = join(wanted, wanted_rest)
        assert torch.allclose(join(ours, rest), exact, rtol=1e-6, atol=1e-6)
    else:
        assert rest is None
        assert float((ours != wanted).float().mean()) < 1e-3  # where a product's last bit decides a rounding
        assert torch.allclose(ours.float(), wanted.float(), rtol=2**-7, atol=0)


def test_merge_in_float32_and_in_place():
    weight, left, right = draw(33, 70), draw(33, 5), draw(5, 70)
    wanted, _ = merge_twin(weight, None, left, right, 0.5, MergePrecision.split)
    ours, _ = merge(weight, None, left, right, 0.5, MergePrecision.split, in_place=True)
    assert ours is weight
    assert torch.allclose(ours, wanted, rtol=1e-5, atol=1e-5)
    weight, bits = split(draw(33, 70))
    wanted = join(*merge_twin(weight, bits, left, right, 0.5, MergePrecision.split))
    merge(weight, bits, left, right, 0.5, MergePrecision.split, in_place=True)
    assert torch.allclose(join(weight, bits), wanted, rtol=1e-5, atol=1e-5)


@DTYPES
@pytest.mark.parametrize(("rows", "columns", "depth", "rank"), [(1, 1, 1, 1), (70, 65, 33, 3), (64, 40, 50, 17)])
@pytest.mark.parametrize("turned", [False, True])
def test_products(dtype, rows, columns, depth, rank, turned):
    def one(*shape):
        return (
            draw(*reversed(shape), dtype=dtype).permute(*reversed(range(len(shape))))
            if turned
            else draw(*shape, dtype=dtype)
        )

    for heads, bias in (((), None), ((2,), draw(columns, dtype=dtype))):
        factors = (one(*heads, rows, depth), one(depth, columns), one(*heads, rows, rank), one(*heads, rank, columns))
        near(products(*factors, bias, 0.5), products_twin(*factors, bias, 0.5), dtype)


@DTYPES
@pytest.mark.parametrize("sizes", [(1, 1, 1), (70, 65, 3), (200, 40, 16)])
@pytest.mark.parametrize("heads", [(), (2,)])
def test_factor_gradients(dtype, sizes, heads):
    rows, columns, rank = sizes
    shapes = ((rows, columns), (columns, rank), (rows, rank))
    arguments = (*(draw(*heads, *shape, dtype=dtype) for shape in shapes), 0.5)
    first, again = factor_gradients(*arguments), factor_gradients(*arguments)
    for ours, wanted, repeated in zip(first, factor_gradients_twin(*arguments), again, strict=True):
        near(ours, wanted, dtype)
        assert torch.equal(ours, repeated)


def gradients(function, leaves, weighting):
    leaves = [one.detach().clone().requires_grad_() for one in leaves]
    y = function(*leaves)
    y.backward(weighting)
    return [y.detach(), *(one.grad for one in leaves)]


@DTYPES
@pytest.mark.parametrize(("counts", "inputs", "outputs", "rank"), [([1], 1, 1, 1), ([40, 0, 3, 70], 33, 65, 5)])
def test_grouped_heads(dtype, counts, inputs, outputs, rank):
    heads = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    heads = heads[torch.randperm(len(heads))].to(DEVICE)
    groups, weighting = groups_of(heads, len(counts)), draw(len(heads), outputs, dtype=dtype)
    leaves = [draw(len(heads), inputs), draw(len(counts), rank, inputs), draw(len(counts), outputs, rank)]
    leaves = [one.to(dtype) for one in leaves]
    ours = gradients(lambda x, down, up: grouped(x, down, up, groups, 0.5), leaves, weighting)
    exact = [one.double() for one in leaves]
    wanted = gradients(lambda x, down, up: grouped_twin(x, down, up, heads, 0.5), exact, weighting.double())
    for one, other in zip(ours, wanted, strict=True):
        near(one, other.to(dtype), dtype)


def test_grouped_heads_with_equal_runs_are_bmm():
    x, down, up = draw(2, 9, 7), draw(2, 3, 7), draw(2, 5, 3)
    heads = torch.arange(2, device=DEVICE).repeat_interleave(9)
    ours = grouped(x.flatten(0, 1), down, up, groups_of(heads, 2), 0.5)
    near(ours.view(2, 9, 5), torch.bmm(torch.bmm(x, down.mT) * 0.5, up.mT), torch.float32)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_merged_layer_is_formed_by_the_kernel_where_it_runs(transposed, monkeypatch):
    layer = LowRankLinear(torch.nn.Parameter(draw(70, 65)), None, adapter_rank=3, scaling=0.5, transposed=transposed)
    torch.nn.init.normal_(layer.up)
    layer.to(DEVICE).split_base_()
    ours = form(layer, 7)
    assert ours.shape == (layer.out_features, layer.in_features)
    monkeypatch.setattr(relora.merged, "run_on", lambda device: False)
    assert float((ours != form(layer, 7)).float().mean()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_ligers_loss(dtype, bias):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: pip install 'accrete[liger]'")
    head = torch.nn.Linear(16, 97, bias=bias).to(device=DEVICE, dtype=dtype)
    x, labels = draw(21, 16, dtype=dtype).requires_grad_(), torch.randint(97, (21,)).to(DEVICE)
    labels[3:5] = IGNORED
    found = []
    for kind in (OutputLoss.liger, OutputLoss.chunked):
        loss = loss_by(kind, x, head, labels)
        (loss * 0.3).backward()
        found.append([loss.detach(), *(one.grad for one in (x, *head.parameters()))])
        x.grad = None
        head.zero_grad()
    for ours, wanted in zip(*found, strict=True):
        near(ours, wanted, dtype)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_has_the_same_losses_by_fused_and_addmm(tiny, tmp_path, stage, monkeypatch):
    found, calls = [], []
    monkeypatch.setattr(relora.kernels.products, "products", lambda *args: calls.append(1) or products(*args))
    for forward in ("addmm", "fused"):
        assert not calls
        words = [f"lora.forward={forward}", f"parallel.zero_stage={stage}", f"run.dir={tmp_path / forward}"]
        assert train.main([*tiny, *SHORT, *words]) == exits.DONE
        lines = read_records(tmp_path / forward / "metrics.jsonl")
        found.append([line["loss"] for line in lines if "grad_norm" in line])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert calls


def test_flops_are_those_of_addmm():
    counts = []
    for path in (ForwardPath.addmm, ForwardPath.fused):
        for rank in (3, 20):  # in one pass, and in two
            layer = LowRankLinear(torch.nn.Parameter(draw(7, 5)), None, adapter_rank=rank, scaling=0.5)
            layer.path = path
            x = draw(9, 5).requires_grad_()
            counts.append(count_step_flops(lambda x=x, layer=layer: layer(x).sum().backward()))
    assert counts[:2] == counts[2:]


def test_a_measurement_times_fused():
    layer = LowRankLinear(torch.nn.Parameter(draw(24, 16)), None, adapter_rank=2, scaling=0.5)
    paths, shape = [ForwardPath.addmm, ForwardPath.fused], shape_of(layer, tokens=8, microbatches=1)
    assert measure(shape, paths, torch.device(DEVICE))[ForwardPath.fused] > 0
