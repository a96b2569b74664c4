"""Replay: the law of the reservoir, what is served again, and how much it counts."""

import numpy as np
import pytest
import torch

from continual.methods.replay import Replay, ReplayConfig
from continual.reservoir import Balance, Reservoir
from relora.errors import ConfigError
from tests.continual_streams import Fixed, images, stages, texts, trainee


def filled(size, *, seed=0, blocks=(30, 50, 20)):
    one = Reservoir(size)
    for stage, count in enumerate(blocks):
        one.offer(stage, np.arange(count), seed)
    return one


def entries(reservoir):
    return reservoir.tensors()["reservoir"]


def test_a_reservoir_equals_algorithm_r_step_by_step():
    whole, by_one = Reservoir(7), Reservoir(7)
    whole.offer(0, np.arange(100), 3)
    for number in range(100):
        by_one.offer(0, np.array([number]), 3)
    assert torch.equal(entries(whole), entries(by_one))
    assert len(torch.unique(entries(whole), dim=0)) == 7
    assert not torch.equal(entries(whole)[:, 1], torch.arange(7))


def test_every_offered_sample_is_kept_with_the_same_chance():
    counts, trials = np.zeros(100), 2000
    offsets = {0: 0, 1: 30, 2: 80}
    for seed in range(trials):
        for stage, identity in entries(filled(10, seed=seed)).tolist():
            counts[offsets[stage] + identity] += 1
    expected = trials / 10
    variance = expected * 0.9
    assert ((counts - expected) ** 2 / variance).sum() < 100 + 4 * 200**0.5
    assert abs(counts[:30].sum() / counts.sum() - 0.3) < 0.01


def test_what_is_kept_depends_on_the_seed_and_the_sequence_only():
    assert torch.equal(entries(filled(10)), entries(filled(10)))
    assert not torch.equal(entries(filled(10)), entries(filled(10, seed=1)))


@pytest.mark.parametrize("size", [5, None])
@pytest.mark.parametrize("balance", list(Balance))
def test_an_epoch_of_replay_serves_everything_and_shares_make_the_whole(size, balance):
    course, one = stages(images), Reservoir(size)
    for stage in course[:2]:
        one.offer_stage(stage, 4, 0)
    count = 2 * len(one) if balance is Balance.samples else 32
    whole = one.slots(np.arange(count), course, balance=balance, key=1)
    halves = [one.slots(part, course, balance=balance, key=1) for part in np.split(np.arange(count), 2)]
    assert sorted(whole.labels.tolist()) == sorted(torch.cat([half.labels for half in halves]).tolist())
    seen = torch.unique(whole.inputs["pixel_values"].flatten(1), dim=0)
    assert len(seen) == (32 if size is None else 5)
    if balance is Balance.tasks:
        assert int((whole.labels < 2).sum()) == count // 2


def test_without_a_size_only_what_was_served_comes_back():
    course, one = stages(images, steps=2), Reservoir(None)
    one.offer_stage(course[0], 4, 0)
    assert len(one) == 8
    assert one.tensors() == {}
    served = course[0].data.train.batch(0, 8).inputs["pixel_values"].flatten(1)
    again = one.slots(np.arange(8), course, balance=Balance.samples, key=1).inputs["pixel_values"].flatten(1)
    assert torch.equal(torch.unique(served, dim=0), torch.unique(again, dim=0))


def test_with_one_replayed_sample_for_each_new_one_the_loss_is_the_mean_over_both():
    on, method = trainee(images), Replay(ReplayConfig())
    on.train(method, on.stages[0])
    batch = on.stages[1].data.train.batch(0, 4)
    new, old = method.terms(on, on.stages[1], batch)
    assert (new.weight, old.weight, len(old.batch)) == (0.5, 0.5, 4)
    assert set(old.batch.labels.tolist()) <= {0, 1}
    assert [term.name for term in Replay(ReplayConfig()).terms(on, on.stages[0], batch)] == ["task"]


def test_replay_keeps_the_loss_of_the_first_task_lower():
    left = {}
    for name, second in (("replay", None), ("none", Replay(ReplayConfig()))):  # the other one remembers nothing
        on, method = trainee(images), Replay(ReplayConfig(size=8))
        on.train(method, on.stages[0])
        on.train(second or method, on.stages[1])
        first = on.stages[0].data.train.whole
        with torch.no_grad():
            left[name] = float(on.row_losses(on.forward(first), first).mean())
    assert left["replay"] < left["none"]


@pytest.mark.parametrize("size", [5, None])
@pytest.mark.parametrize("make", [images, texts])
def test_a_memory_resumes_bit_for_bit(make, size):
    config = ReplayConfig(size=size, ratio=0.5)
    on, method = trainee(make), Replay(config)
    on.train(method, on.stages[0])
    on.train(method, on.stages[1])
    resumed = Replay(config)
    resumed.load(method.state())
    on.step += 1
    batch = on.stages[2].data.train.batch(4, 4)
    pairs = [one.terms(on, on.stages[2], batch)[1] for one in (method, resumed)]
    assert len(pairs[0].batch) == 2
    for name, value in pairs[0].batch.inputs.items():
        assert torch.equal(value, pairs[1].batch.inputs[name])


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"ratio": 0.0}, {"ratio": float("inf")}, {"weight": 1.0}, {"weight": 0.0}]
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"continual.replay.{next(iter(wrong))}"):
        ReplayConfig(**wrong)


def test_a_ratio_that_processes_cannot_share_is_refused():
    assert ReplayConfig(ratio=0.5).samples(8, 4) == 4
    with pytest.raises(ConfigError, match="multiple of 8/8"):
        ReplayConfig(ratio=0.5).samples(8, 8)
    with pytest.raises(ConfigError, match=r"ratio=0\.3"):
        ReplayConfig(ratio=0.3).samples(8)


def test_a_sample_of_a_stream_is_its_identity():
    one = Fixed(images(0))
    assert torch.equal(one.at(one.identities(3, 2)).labels, one.batch(3, 2).labels)
