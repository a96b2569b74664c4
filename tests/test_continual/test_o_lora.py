"""O-LoRA: its penalty and gradient against autograd, what it remembers, and what it does to training."""

import numpy as np
import pytest
import torch

from continual.method import Method
from continual.methods.o_lora import OLora, OLoraConfig, extended, overlap
from relora.errors import ConfigError
from tests.continual_streams import images, texts, trainee


def span(columns, d=10, seed=0):
    draw = torch.randn(d, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(draw).Q.float()


def test_the_penalty_is_the_mean_share_of_rows_in_the_span_and_its_gradient_that_of_autograd():
    draw = torch.Generator().manual_seed(1)
    downs = {"a": torch.randn(3, 10, generator=draw) * 7, "b": torch.randn(5, 6, generator=draw) / 9}
    bases = {"a": span(4), "b": span(2, d=6)}
    leaves = {name: one.double().requires_grad_() for name, one in downs.items()}
    shares = [
        np.square(bases[name].double().numpy().T @ row).sum() / np.square(row).sum()
        for name, one in downs.items()
        for row in one.double().numpy()
    ]
    slow = sum(
        ((row / row.norm()) @ bases[name].double()).square().sum() for name, one in leaves.items() for row in one
    ) / len(shares)
    slow.backward()
    penalty, gradients = overlap(downs, bases)
    assert float(penalty) == pytest.approx(np.mean(shares), rel=1e-12)
    for name, one in leaves.items():
        torch.testing.assert_close(gradients[name].double(), one.grad, rtol=1e-5, atol=1e-9)
        assert (gradients[name] * downs[name]).sum(1).abs().max() < 1e-6, "it turns rows and leaves their lengths"
    scaled, _ = overlap({name: 1e-3 * one for name, one in downs.items()}, bases)
    twice, _ = overlap(
        {**downs, **{name + "2": one for name, one in downs.items()}}, bases | {"a2": bases["a"], "b2": bases["b"]}
    )
    assert float(scaled) == pytest.approx(float(penalty), rel=1e-6)
    assert float(twice) == pytest.approx(float(penalty), rel=1e-6)


def test_a_basis_grows_by_what_is_new_and_stops_at_everything():
    basis, rows = torch.zeros(10, 0), []
    for task in range(6):
        down = torch.randn(3, 10, generator=torch.Generator().manual_seed(task)) * 10.0**-task
        rows.append(down)
        basis = extended(basis, down)
        k = min(10, 3 * (task + 1))
        assert basis.shape == (10, k)
        assert (basis.T @ basis - torch.eye(k)).abs().max() < 1e-6
        for one in rows:
            assert ((one - one @ basis @ basis.T).norm() / one.norm()) < 2e-6
    known = extended(span(4), span(4).T[:2] * 5)
    assert torch.equal(known, span(4)), "nothing new"
    penalty, gradients = overlap({"a": rows[0]}, {"a": basis})
    assert float(penalty) == pytest.approx(1, abs=1e-6)
    assert not gradients["a"].any(), "with nothing left it pulls nowhere"


def test_a_tasks_update_turns_away_from_earlier_ones_and_those_are_what_was_folded():
    ends, given = {}, {}
    for strength in (1e-9, 20.0):
        on, method = trainee(images), OLora(OLoraConfig(strength=strength))
        stage = on.stages[0]
        method.begin_stage(on, stage)
        for step in range(4):
            on.update(method, stage, step)
        given = {name: layer.down.detach().clone() for name, layer in on.layers.items()}
        method.end_stage(on, stage)
        for name, down in given.items():
            basis = method.state().tensors[f"basis.{name}"]
            assert basis.shape == (down.shape[1], 2)
            torch.testing.assert_close(down @ basis @ basis.T, down, rtol=0, atol=1e-6)
        on.fold(method)
        on.optimizer.state.clear()
        method.begin_stage(on, on.stages[1])
        first = None
        for step in range(40):
            on.update(method, on.stages[1], step)
            first = method.measures()["overlap"] if first is None else first
        ends[strength] = method.measures()["overlap"]
        assert 0 < first < 1
    assert ends[20.0] < 0.2 * ends[1e-9], ends


@pytest.mark.parametrize("make", [images, texts])
def test_a_stage_resumes_bit_for_bit(make):
    config, ends = OLoraConfig(strength=2.0), []
    for interrupted in (False, True):
        on, method = trainee(make), OLora(config)
        on.train(method, on.stages[0])
        for step in range(3):
            if interrupted:
                kept = method.state()
                method = OLora(config)
                method.load(kept)
            on.update(method, on.stages[1], step)
        method.end_stage(on, on.stages[1])
        ends.append((method.report(), {name: one.detach().clone() for name, one in on.trainable().items()}))
    assert ends[0][0] == ends[1][0]
    assert ends[0][0]["full"] == []
    assert all(torch.equal(value, ends[1][1][name]) for name, value in ends[0][1].items())


def test_the_first_low_rank_task_trains_as_without_it():
    ends = []
    for method in (OLora(OLoraConfig()), Method()):
        on = trainee(images)
        for step in range(3):
            on.update(method, on.stages[0], step)
        ends.append([one.detach().clone() for one in on.trainable().values()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_a_strength_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"continual\.o_lora\.strength"):
        OLoraConfig(strength=0.0)
