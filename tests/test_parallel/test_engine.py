import copy
import math

import pytest
import torch
from torch import nn

from parallel.engine import Engine
from parallel.zero import ParallelConfig

LR = 1e-2
SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8}
STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


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


def make_engine(runtime, model, max_grad_norm=0.05, stage=0):
    return Engine(
        model,
        make_groups(model),
        runtime=runtime,
        parallel=ParallelConfig(zero_stage=stage),
        regions={},
        microbatch_size=4,
        max_grad_norm=max_grad_norm,
        **SETTINGS,
    )


def weights(engine):
    """Copies of everything that a forward pass uses, by name."""
    return {name: part.clone().flatten() for name, (_, part) in engine.store.held()["model"].items()}


def master(engine, name):
    """A copy of what the optimizer updates."""
    held = engine.store.held()
    part = held["optimizer"].get(f"{name}/master", held["model"][name])[1]
    return part.clone().flatten()


def copied(engine):
    """Everything that a checkpoint would keep, as `load` wants to read it."""
    held = {
        kind: {name: part.clone() for name, (_, part) in parts.items()} for kind, parts in engine.store.held().items()
    }
    return lambda kind, name, region: held[kind].get(name)


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def inputs(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 6, generator=generator).to(dtype) for _ in range(count)]


def run_step(engine, batches, multiplier=1.0, admit=lambda norm: None):
    for x in batches:
        engine.backward(engine(input=x).float().square().mean() / len(batches))
    return engine.step(LR * multiplier, admit)


@STAGES
def test_an_fp32_step_equals_plain_adamw_with_clipping_accumulation_and_the_given_rate(runtime, stage):
    model = make_model()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(make_groups(plain), lr=LR, **SETTINGS)
    engine = make_engine(runtime, model, stage=stage)
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
        ours = weights(engine)
        for name, theirs in plain.named_parameters():
            torch.testing.assert_close(ours[name], theirs.detach().flatten(), rtol=1e-6, atol=1e-7)


@STAGES
@pytest.mark.parametrize("limit", [0.0, 5.0])
def test_the_norm_before_clipping_is_told_and_nothing_else_clips(runtime, stage, limit):
    """DeepSpeed clips to 1 where its configuration does not say."""
    model = make_model()
    engine = make_engine(runtime, model, max_grad_norm=limit, stage=stage)
    plain = copy.deepcopy(make_model())
    optimizer = torch.optim.AdamW(make_groups(plain), lr=LR, **SETTINGS)
    (20 * plain(inputs(1)[0]).square().mean()).backward()
    norm = nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
    if limit:
        nn.utils.clip_grad_norm_(plain.parameters(), limit)
    optimizer.step()
    engine.backward(20 * engine(input=inputs(1)[0]).square().mean())
    assert engine.step(LR, lambda norm: None).grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert norm > 5.0
    ours = weights(engine)
    for name, theirs in plain.named_parameters():
        torch.testing.assert_close(ours[name], theirs.detach().flatten(), rtol=1e-5, atol=1e-7)


@STAGES
def test_a_bf16_step_updates_fp32_masters_that_small_updates_accumulate_in(runtime, stage):
    model = make_model(torch.bfloat16)
    engine = make_engine(runtime, model, max_grad_norm=1.0, stage=stage)
    before = master(engine, "2.weight")
    for _ in range(3):
        run_step(engine, inputs(2, torch.bfloat16), multiplier=1e-3)
    after = master(engine, "2.weight")
    assert after.dtype == torch.float32
    assert (after != before).all(), "updates of 1e-5 are kept in fp32"
    assert torch.equal(weights(engine)["2.weight"], after.bfloat16())


@DTYPES
@STAGES
def test_a_written_value_is_what_the_next_forward_and_the_next_update_start_from(runtime, dtype, stage):
    model = make_model(dtype)
    engine = make_engine(runtime, model, stage=stage)
    run_step(engine, inputs(1, dtype))
    value = torch.full((3, 4), 0.3)
    engine.store.write(model[3].weight, value)
    assert torch.equal(weights(engine)["3.weight"], value.flatten().to(dtype))
    with torch.no_grad():
        x = inputs(1, dtype)[0]
        inner = model[:3](x)
        torch.testing.assert_close(engine(input=x), inner @ value.to(dtype).T + model[3](torch.zeros_like(inner)))
    run_step(engine, inputs(1, dtype), multiplier=0.0)
    torch.testing.assert_close(master(engine, "3.weight"), value.flatten())


@DTYPES
@STAGES
def test_moments_are_live_views_of_exactly_one_parameter(runtime, dtype, stage):
    model = make_model(dtype)
    engine = make_engine(runtime, model, stage=stage)
    store = engine.store
    trained = [model[0].bias, model[3].bias, model[2].weight, model[2].bias, model[3].weight]
    assert store.moments(model[2].weight) is None, "nothing is there before the first update"
    run_step(engine, inputs(1, dtype))
    assert all(float(store.moments(p).exp_avg_sq.abs().sum()) > 0 for p in trained)
    store.moments(model[2].bias).exp_avg.zero_()
    zeroed = [not store.moments(p).exp_avg.any() for p in trained]
    assert zeroed == [False, False, False, True, False]


@DTYPES
@STAGES
def test_state_loaded_into_a_fresh_engine_continues_the_same_run(runtime, dtype, stage):
    engine = make_engine(runtime, make_model(dtype), stage=stage)
    run_step(engine, inputs(2, dtype))
    other = make_engine(runtime, make_model(dtype), stage=stage)
    other.store.load(copied(engine))
    for _ in range(2):
        run_step(engine, inputs(2, dtype))
        run_step(other, inputs(2, dtype))
    assert equal(weights(engine), weights(other))


@DTYPES
@STAGES
def test_a_refused_update_changes_nothing_and_clears_the_gradients(runtime, dtype, stage):
    engine = make_engine(runtime, make_model(dtype), stage=stage)
    plain = make_engine(runtime, make_model(dtype), stage=stage)
    before = weights(engine)
    seen = []
    result = run_step(engine, inputs(1, dtype), admit=lambda norm: seen.append(norm) or "too large")
    assert result.refused == "too large"
    assert seen == [result.grad_norm]
    assert equal(before, weights(engine))
    run_step(engine, inputs(2, dtype))
    run_step(plain, inputs(2, dtype))
    assert equal(weights(engine), weights(plain))


@DTYPES
@STAGES
def test_gradients_that_are_not_finite_are_put_to_the_gate_and_never_reach_the_weights(runtime, dtype, stage):
    engine = make_engine(runtime, make_model(dtype), stage=stage)
    bad = inputs(1, dtype)[0]
    bad[0, 0] = math.nan
    result = run_step(engine, [bad], admit=lambda norm: None if math.isfinite(norm) else "not finite")
    assert result.refused
    assert not math.isfinite(result.grad_norm)
    assert all(torch.isfinite(part).all() for part in weights(engine).values())
    assert run_step(engine, inputs(1, dtype)).refused is None


@DTYPES
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_closed_engine_leaves_a_model_that_another_engine_can_train(runtime, dtype, stage):
    model = make_model(dtype)
    engine = make_engine(runtime, model, stage=stage)
    run_step(engine, inputs(1, dtype))
    engine.close()
    fresh = make_model(dtype)
    fresh.load_state_dict(model.state_dict())
    again, reference = make_engine(runtime, model, stage=stage), make_engine(runtime, fresh, stage=stage)
    run_step(again, inputs(2, dtype))
    run_step(reference, inputs(2, dtype))
    assert equal(weights(again), weights(reference))
