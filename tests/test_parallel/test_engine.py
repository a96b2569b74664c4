import copy
import math

import pytest
import torch
from torch import nn

from parallel.engine import Engine, ParallelConfig, deepspeed_config
from relora.errors import ConfigError
from relora.optimizer import Moments

LR = 1e-2
SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8}


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 3))
    model[0].weight.requires_grad_(False)
    return model.to(dtype)


def make_groups(model):
    return [
        {"name": "a", "params": [model[0].bias, model[3].bias], "weight_decay": 0.0},
        {"name": "b", "params": [model[2].weight, model[2].bias, model[3].weight], "weight_decay": 0.1},
    ]


def make_engine(model, max_grad_norm=0.05):
    return Engine(model, make_groups(model), microbatch_size=4, max_grad_norm=max_grad_norm, **SETTINGS)


def inputs(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 6, generator=generator).to(dtype) for _ in range(count)]


def run_step(engine, batches, multiplier=1.0, admit=lambda norm: None):
    for x in batches:
        engine.backward(engine(input=x).float().square().mean() / len(batches))
    return engine.step(LR * multiplier, admit)


def test_an_fp32_step_equals_plain_adamw_with_clipping_accumulation_and_the_given_rate(runtime):
    model = make_model()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(make_groups(plain), lr=LR, **SETTINGS)
    engine = make_engine(model)
    batches = inputs(6)
    for index, multiplier in enumerate((0.5, 1.0)):
        part = batches[3 * index : 3 * index + 3]
        result = run_step(engine, part, multiplier)
        for x in part:
            (plain(x).square().mean() / 3).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        for group in optimizer.param_groups:
            group["lr"] = LR * multiplier
        optimizer.step()
        optimizer.zero_grad()
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-6)
        assert norm > 0.05, "the test must exercise clipping"
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_bf16_step_updates_fp32_masters_that_small_updates_accumulate_in(runtime):
    model = make_model(torch.bfloat16)
    engine = make_engine(model, max_grad_norm=1.0)
    weight = model[2].weight
    before = engine.store.master(weight).clone()
    for _ in range(3):
        run_step(engine, inputs(2, torch.bfloat16), multiplier=1e-3)
    after = engine.store.master(weight)
    assert after.dtype == torch.float32
    assert (after != before).all(), "updates of 1e-5 are kept in fp32"
    assert torch.equal(weight, after.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_value_is_what_the_next_forward_and_the_next_update_start_from(runtime, dtype):
    model = make_model(dtype)
    engine = make_engine(model)
    run_step(engine, inputs(1, dtype))
    weight = model[3].weight
    value = torch.full(weight.shape, 0.3)
    engine.store.write(weight, value)
    assert torch.equal(weight.detach(), value.to(dtype))
    run_step(engine, inputs(1, dtype), multiplier=0.0)
    torch.testing.assert_close(engine.store.master(weight), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_live_views_of_exactly_one_parameter(runtime, dtype):
    model = make_model(dtype)
    engine = make_engine(model)
    store = engine.store
    trained = [model[0].bias, model[3].bias, model[2].weight, model[2].bias, model[3].weight]
    assert store.moments(model[2].weight) is None, "nothing is there before the first update"
    run_step(engine, inputs(1, dtype))
    assert all(float(store.moments(p).exp_avg_sq.abs().sum()) > 0 for p in trained)
    store.moments(model[2].bias).exp_avg.zero_()
    zeroed = [not store.moments(p).exp_avg.any() for p in trained]
    assert zeroed == [False, False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_written_into_a_fresh_engine_continues_the_same_run(runtime, dtype):
    first = make_model(dtype)
    engine = make_engine(first)
    run_step(engine, inputs(2, dtype))
    second = make_model(dtype)
    other = make_engine(second)
    with torch.no_grad():
        second[0].weight.copy_(first[0].weight)
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        if ours.requires_grad:
            other.store.write(theirs, engine.store.master(ours).clone())
            m = engine.store.moments(ours)
            other.store.write_moments(
                theirs, Moments(exp_avg=m.exp_avg.clone(), exp_avg_sq=m.exp_avg_sq.clone(), step=m.step.clone())
            )
    for _ in range(2):
        run_step(engine, inputs(2, dtype))
        run_step(other, inputs(2, dtype))
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_refused_update_changes_nothing_and_clears_the_gradients(runtime, dtype):
    model, twin = make_model(dtype), make_model(dtype)
    engine, plain = make_engine(model), make_engine(twin)
    before = [p.clone() for p in model.parameters()]
    seen = []
    result = run_step(engine, inputs(1, dtype), admit=lambda norm: seen.append(norm) or "too large")
    assert result.refused == "too large"
    assert seen == [result.grad_norm]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    run_step(engine, inputs(2, dtype))
    run_step(plain, inputs(2, dtype))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_not_finite_are_put_to_the_gate_and_never_reach_the_weights(runtime, dtype):
    model = make_model(dtype)
    engine = make_engine(model)
    bad = inputs(1, dtype)[0]
    bad[0, 0] = math.nan
    result = run_step(engine, [bad], admit=lambda norm: None if math.isfinite(norm) else "not finite")
    assert result.refused
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert run_step(engine, inputs(1, dtype)).refused is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_closed_engine_leaves_a_model_that_another_engine_can_train(runtime, dtype):
    model = make_model(dtype)
    engine = make_engine(model)
    run_step(engine, inputs(1, dtype))
    engine.close()
    fresh = make_model(dtype)
    fresh.load_state_dict(model.state_dict())
    again, reference = make_engine(model), make_engine(fresh)
    run_step(again, inputs(2, dtype))
    run_step(reference, inputs(2, dtype))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_the_engine_dictionary_sums_bf16_gradients_in_fp32_and_never_accumulates_by_itself():
    config = deepspeed_config(bf16=True, microbatch_size=2, max_grad_norm=0.5)
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["gradient_clipping"] == 0.5
    assert config["managed_gradient_accumulation"] is False
    assert "bf16" not in deepspeed_config(bf16=False, microbatch_size=2, max_grad_norm=0.5)


@pytest.mark.parametrize("key", ["zero_stage", "tensor"])
def test_degrees_that_need_more_processes_are_refused_by_name(key):
    with pytest.raises(ConfigError, match=f"parallel.{key}"):
        ParallelConfig(**{key: 3})
