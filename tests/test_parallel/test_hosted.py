"""The engine of several heads in one process against an engine for each."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from continual.batches import Batch
from continual.method import Term
from launch.training.objective import accumulate, mean_loss, side_by_side
from parallel.engine import Engine
from parallel.hosted import HostedEngine
from parallel.zero import ParallelConfig
from relora.convert import LoraConfig, prepare_base_, to_low_rank
from relora.hosted import host_heads
from relora.optimizer import OptimizerConfig, parameter_groups
from relora.precision import MergePrecision

HEADS, SHARE, LENGTH, VOCABULARY = 3, 4, 16, 67
RATE = {"betas": (0.9, 0.95), "eps": 1e-4}  # Adam amplifies rounding of gradients near eps by lr / eps
LOW = 0.3
"""A norm that clips every head, each by another factor."""


def _model(head):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        vocab_size=VOCABULARY,
        use_cache=False,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    to_low_rank(model, LoraConfig(rank=3, alpha=6.0), seed=1, head=head)
    return model


def _ready(model, dtype):
    prepare_base_(model, dtype, MergePrecision.split)
    return model.train(), parameter_groups(model, OptimizerConfig(weight_decay=0.1))


def _alone(runtime, head, dtype):
    model, groups = _ready(_model(head), dtype)
    sizes = {"microbatch_size": SHARE, "max_grad_norm": LOW}
    return Engine(model, groups, runtime=runtime, parallel=ParallelConfig(), regions={}, **RATE, **sizes)


def _together(runtime, dtype):
    model = _model(0)
    host_heads(model, range(HEADS), seed=1)
    model, groups = _ready(model, dtype)
    return HostedEngine(model, groups, runtime=runtime, max_grad_norm=LOW, **RATE)


def _batch(step):
    """Sequences of several documents, so that heads have other numbers of targets."""
    ids = torch.randint(0, VOCABULARY, (HEADS * SHARE, LENGTH), generator=torch.Generator().manual_seed(step))
    labels = ids.clone()
    labels[ids % 7 == 0] = -100
    return Batch(inputs={"input_ids": ids}, labels=labels)


def _of_head(batch, head):
    rows = slice(head * SHARE, (head + 1) * SHARE)
    return batch.rows(rows)


def _steps(runtime, engine, heads, steps, refuse=()):
    """Losses and norms by step, for the given heads; `refuse` holds pairs of a step and a head."""
    told = []
    for step in steps:
        batch = _batch(step)
        own = [_of_head(batch, head) for head in heads]
        batch = batch if len(heads) > 1 else own[0]
        targets = [one.targets for one in own]
        losses = accumulate(
            engine, Term(name="task", batch=batch), targets=targets, microbatch_size=2, device=runtime.device
        )
        admits = [lambda _, no=(step, head) in refuse: "strange" if no else None for head in heads]
        results = engine.step(0.01, admits) if len(heads) > 1 else [engine.step(0.01, admits[0])]
        told.append([(loss, one.grad_norm, one.refused) for loss, one in zip(losses.tolist(), results, strict=True)])
    return told


def _close(ours, theirs, tolerance=1e-5):
    for kind in ("model", "optimizer"):
        assert ours[kind].keys() == theirs[kind].keys()
        for name, (region, part) in ours[kind].items():
            assert region.shape == theirs[kind][name][0].shape
            there = theirs[kind][name][1].view_as(part)
            if name.endswith("/step"):
                assert part == there
            torch.testing.assert_close(part, there, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_each_head_clips_refuses_and_counts_for_itself(runtime):
    refused = {(2, 1), (3, 0), (3, 2)}
    together = _together(runtime, torch.float32)
    told = _steps(runtime, together, range(HEADS), range(4), refused)
    for head in range(HEADS):
        alone = _alone(runtime, head, torch.float32)
        mine = _steps(runtime, alone, [head], range(4), refused)
        for here, there in zip(told, mine, strict=True):
            assert here[head] == (
                pytest.approx(there[0][0], abs=1e-5),
                pytest.approx(there[0][1], rel=1e-4),
                there[0][2],
            )
        _close(together.store.held(head), alone.store.held())
        steps = [step for name, (_, step) in together.store.held(head)["optimizer"].items() if name.endswith("/step")]
        assert {float(step) for step in steps} == {3.0}
        alone.close()


def test_a_refused_head_is_left_bit_for_bit_and_the_others_move(runtime):
    engine = _together(runtime, torch.float32)
    _steps(runtime, engine, range(HEADS), [0])
    before = [
        {
            (kind, name): part.clone()
            for kind, named in engine.store.held(head).items()
            for name, (_, part) in named.items()
        }
        for head in range(HEADS)
    ]
    _steps(runtime, engine, range(HEADS), [1], {(1, 1)})
    for head in range(HEADS):
        moved = [
            name
            for (kind, name), was in before[head].items()
            if not torch.equal(engine.store.held(head)[kind][name][1], was)
        ]
        assert bool(moved) == (head != 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_engines_apart_hold_one_engine_takes_over_and_back(runtime, dtype):
    engines = [_alone(runtime, head, dtype) for head in range(HEADS)]
    for head, engine in enumerate(engines):
        _steps(runtime, engine, [head], range(2))
    together = _together(runtime, dtype)
    together.store.load(*(_reading(engine.store.held()) for engine in engines))
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for head, engine in enumerate(engines):
        _close(together.store.held(head), engine.store.held(), 0.0)
    _steps(runtime, together, range(HEADS), range(2, 4))
    for head, engine in enumerate(engines):
        _steps(runtime, engine, [head], range(2, 4))
        _close(together.store.held(head), engine.store.held(), tolerance)
        engine.store.load(_reading(together.store.held(head)))
        _close(engine.store.held(), together.store.held(head), 0.0)
        engine.close()


def _reading(held):
    """As a checkpoint of what was held then."""
    kept = {(kind, name): part.clone() for kind, named in held.items() for name, (_, part) in named.items()}
    return lambda kind, name, region: None if (kind, name) not in kept else kept[kind, name].view(region.shape)


def test_heads_take_turns_at_validation_and_count_nothing_twice(runtime):
    together = _together(runtime, torch.float32)
    _steps(runtime, together, range(HEADS), range(2))
    engines = [_alone(runtime, head, torch.float32) for head in range(HEADS)]
    batches = [_of_head(_batch(step), 0) for step in range(HEADS + 2)]
    batches[-1] = batches[-1].rows(torch.arange(1))
    both = side_by_side(batches[-2:], HEADS)
    assert both.targets == batches[-2].targets + batches[-1].targets
    assert len(both) == HEADS * SHARE
    sums = 0.0
    for head, engine in enumerate(engines):
        engine.store.load(_reading(together.store.held(head)))
        sums += sum(mean_loss(engine.model, [one], runtime.device) * one.targets for one in batches[head::HEADS])
        engine.close()
    expected = sums / sum(one.targets for one in batches)
    assert mean_loss(together.model, batches, runtime.device) == pytest.approx(expected, abs=1e-6)
