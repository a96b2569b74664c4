"""Parameter groups, and what a reset does to Adam."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from relora.convert import LoraConfig, to_low_rank
from relora.errors import ConfigError
from relora.initialize import keyed_generator
from relora.optimizer import (
    Moments,
    OptimizerConfig,
    Reset,
    clear_moments,
    kept,
    parameter_groups,
    prune_moments,
)

Build = Callable[..., nn.Module]
PRUNING = pytest.mark.parametrize("reset", [Reset.magnitude, Reset.random])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def _moments(shape: tuple[int, ...] = (16, 25), dtype: torch.dtype = torch.float32) -> Moments:
    generator = torch.Generator().manual_seed(0)
    return Moments(
        exp_avg=torch.randn(shape, generator=generator).to(dtype),
        exp_avg_sq=torch.rand(shape, generator=generator).to(dtype) + 0.1,
        step=torch.tensor(500.0),
    )


def _generator() -> torch.Generator:
    return keyed_generator(0, "prune")


def _prune(moments: Moments, reset: Reset, ratio: float) -> int:
    keep = kept(moments.exp_avg, reset, ratio, _generator())
    prune_moments(moments, keep)
    return keep.numel() - int(torch.count_nonzero(keep))


# ---- groups


def test_every_trainable_parameter_is_in_exactly_one_group(family: str, build: Build) -> None:
    model = build(family)
    conversion = to_low_rank(model, LoraConfig(rank=2), seed=0)
    groups = {group["name"]: group for group in parameter_groups(model, OptimizerConfig(weight_decay=0.1))}
    grouped = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    layers = conversion.low_rank.values()
    assert {id(p) for p in groups["down"]["params"]} == {id(layer.down) for layer in layers}
    assert {id(p) for p in groups["up"]["params"]} == {id(layer.up) for layer in layers}


def test_only_matrices_decay(build: Build) -> None:
    model = build("gpt_neox")
    to_low_rank(model, LoraConfig(rank=2), seed=0)
    for group in parameter_groups(model, OptimizerConfig(weight_decay=0.1)):
        assert group["weight_decay"] == (0.0 if group["name"] == "dense_no_decay" else 0.1)
        assert all((p.ndim > 1) == (group["name"] != "dense_no_decay") for p in group["params"])


def test_a_full_rank_model_has_no_empty_groups(build: Build) -> None:
    groups = parameter_groups(build(), OptimizerConfig(lr=0.5, betas=[0.8, 0.9], eps=1e-6))
    assert [group["name"] for group in groups] == ["dense", "dense_no_decay"]
    assert [(group["lr"], group["betas"], group["eps"]) for group in groups] == [(0.5, (0.8, 0.9), 1e-6)] * 2
    torch.optim.AdamW(groups)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "optimizer.lr must be above 0, got 0.0"),
        ({"betas": [0.9]}, "optimizer.betas must be two numbers in [0, 1)"),
        ({"betas": [0.9, 1.0]}, "optimizer.betas must be two numbers in [0, 1)"),
        ({"eps": 0.0}, "optimizer.eps must be above 0, got 0.0"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay must not be negative, got -0.1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        OptimizerConfig(**settings)


# ---- reset


def test_zero_clears_both_moments_and_the_step() -> None:
    moments = _moments()
    clear_moments(moments)
    assert not moments.exp_avg.any()
    assert not moments.exp_avg_sq.any()
    assert moments.step == 0


@PRUNING
@DTYPES
@pytest.mark.parametrize(("ratio", "count"), [(0.1, 40), (0.8, 320), (0.9, 360), (0.999, 400), (1.0, 400)])
def test_pruning_removes_exactly_its_share(reset: Reset, dtype: torch.dtype, ratio: float, count: int) -> None:
    """The reference draws in the state's dtype, and in bfloat16 0.999 is 1 and 0.8 is 0.805."""
    moments = _moments(dtype=dtype)
    assert _prune(moments, reset, ratio) == count
    assert torch.count_nonzero(moments.exp_avg == 0) == count
    assert torch.count_nonzero(moments.exp_avg_sq == 0) == count
    assert moments.step == 500


@PRUNING
def test_pruning_uses_one_mask_for_both_moments(reset: Reset) -> None:
    """The reference prunes them independently: exp_avg without exp_avg_sq moves by lr * exp_avg / eps."""
    moments = _moments()
    _prune(moments, reset, 0.9)
    assert torch.equal(moments.exp_avg == 0, moments.exp_avg_sq == 0)


def test_independent_masks_would_jump_and_ours_does_not() -> None:
    """Shows that the hazard is real: the same pruning with two masks, then one step without a gradient."""

    def jump(joint: bool) -> float:
        parameter = nn.Parameter(torch.zeros(16, 25))
        optimizer = torch.optim.Adam([parameter], lr=1e-3)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state, moments = optimizer.state[parameter], _moments()
        state["exp_avg"].copy_(moments.exp_avg)
        state["exp_avg_sq"].copy_(moments.exp_avg_sq)
        live = Moments(exp_avg=state["exp_avg"], exp_avg_sq=state["exp_avg_sq"], step=state["step"])
        if joint:
            _prune(live, Reset.random, 0.9)
        else:
            live.exp_avg.mul_(kept(live.exp_avg, Reset.random, 0.9, keyed_generator(0, "m")))
            live.exp_avg_sq.mul_(kept(live.exp_avg_sq, Reset.random, 0.9, keyed_generator(0, "v")))
        before = parameter.detach().clone()
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return (parameter.detach() - before).abs().max().item()

    assert jump(joint=False) > 100
    assert jump(joint=True) < 0.1


def test_magnitude_keeps_the_largest_first_moments() -> None:
    moments, before = _moments(), _moments()
    _prune(moments, Reset.magnitude, 0.9)
    survivors = before.exp_avg[moments.exp_avg != 0].abs()
    removed = before.exp_avg[moments.exp_avg == 0].abs()
    assert survivors.min() >= removed.max()
    assert torch.equal(moments.exp_avg_sq[moments.exp_avg != 0], before.exp_avg_sq[moments.exp_avg != 0])


def test_magnitude_is_exact_under_ties() -> None:
    mask = kept(torch.ones(7, 9), Reset.magnitude, 0.5, _generator())
    assert torch.count_nonzero(mask) == 63 - round(0.5 * 63)


def test_magnitude_works_beyond_2_to_the_24_entries() -> None:
    """torch.quantile, which others use, refuses such tensors in older versions of torch."""
    exp_avg = torch.zeros(2**24 + 5, dtype=torch.bfloat16)
    exp_avg[-3:] = 1.0
    mask = kept(exp_avg, Reset.magnitude, 1 - 3 / exp_avg.numel(), _generator())
    assert mask.nonzero().flatten().tolist() == [2**24 + 2, 2**24 + 3, 2**24 + 4]


def test_random_masks_repeat_by_generator() -> None:
    exp_avg = _moments().exp_avg
    first = kept(exp_avg, Reset.random, 0.5, keyed_generator(0, 1))
    assert torch.equal(first, kept(exp_avg, Reset.random, 0.5, keyed_generator(0, 1)))
    assert not torch.equal(first, kept(exp_avg, Reset.random, 0.5, keyed_generator(0, 2)))


def test_a_step_counter_shared_by_a_group_may_be_reset_by_each_of_its_parameters() -> None:
    step, first, second = torch.tensor(500.0), _moments(), _moments()
    first.step = second.step = step
    for moments in (first, second):
        clear_moments(moments)
    assert step == 0


def test_moments_may_be_views_into_a_flat_group() -> None:
    flat = [torch.ones(40), torch.ones(40)]
    view = [tensor.narrow(0, 10, 20).view(4, 5) for tensor in flat]
    moments = Moments(exp_avg=view[0], exp_avg_sq=view[1], step=torch.tensor(1.0))
    clear_moments(moments)
    assert [tensor.sum().item() for tensor in flat] == [20.0, 20.0]


def _first_moves(clear_step: bool, beta2: float) -> list[float]:
    """Train on noise for long, reset, and return the largest moves after that, in units of lr."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.zeros(200))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, beta2), weight_decay=0.0)

    def step() -> Tensor:
        before = parameter.detach().clone()
        parameter.grad = torch.randn(200, generator=generator)
        optimizer.step()
        return parameter.detach() - before

    for _ in range(2000):
        step()
    state = optimizer.state[parameter]
    counter = state["step"] if clear_step else state["step"].clone()
    live = Moments(exp_avg=state["exp_avg"], exp_avg_sq=state["exp_avg_sq"], step=counter)
    clear_moments(live)
    return [step().abs().max().item() / 1e-3 for _ in range(3)]


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_first_move_after_a_reset_is_one_learning_rate(beta2: float) -> None:
    assert _first_moves(clear_step=True, beta2=beta2)[0] == pytest.approx(1.0, abs=0.01)


def test_first_move_would_be_three_learning_rates_with_the_step_kept() -> None:
    """What the reference does; why `zero` clears the counter."""
    assert _first_moves(clear_step=False, beta2=0.999)[0] > 2.5
