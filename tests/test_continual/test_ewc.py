"""EWC: the information against one backward pass a sample, the step against the objective that it stands for."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from continual.fisher import Labels, _SignedLoss, fisher_diagonal
from continual.method import Method, Term
from continual.methods.ewc import Ewc, EwcConfig
from relora.errors import ConfigError
from tests.continual_streams import images, texts, trainee


def per_sample_gradients(on, batch):
    """Of the loss summed over each sample's targets, by autograd, one after the other."""
    parameters = on.trainable()
    for row in range(len(batch)):
        one = batch.rows(torch.tensor([row]))
        logits = on.model(**one.inputs).logits.float()
        if one.labels.ndim == 1:
            loss = F.cross_entropy(logits, one.labels)
        else:
            loss = F.cross_entropy(logits[0, :-1], one.labels[0, 1:], ignore_index=-100, reduction="sum")
        yield dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("make", [images, texts])
def test_the_information_is_the_sum_of_each_samples_squared_gradients_over_its_targets(make):
    on = trainee(make)
    on.train(Method(), on.stages[0])
    stage = on.stages[0]
    found = fisher_diagonal(on, stage, labels=Labels.data, samples=10, group=1)
    batch = stage.data.train.batch(0, 10)
    each = list(per_sample_gradients(on, batch))
    for name, parameter in on.trainable().items():
        slow = sum(one[name].double().square() for one in each) / batch.targets
        torch.testing.assert_close(found[parameter].view_as(parameter).double(), slow, rtol=1e-4, atol=1e-12)
        mean = torch.stack([one[name] for one in each]).mean(0)
        assert not torch.allclose(slow, mean.double().square() * len(each) ** 2 / batch.targets, rtol=0.2, atol=0)


def test_grouped_samples_tell_the_same_on_average_over_all_signs():
    on = trainee(images)
    stage = on.stages[0]
    batch = stage.data.train.batch(0, 4)
    exact = fisher_diagonal(on, stage, labels=Labels.data, samples=4, group=1)
    one_pass = fisher_diagonal(on, stage, labels=Labels.data, samples=4, group=4)
    sums = {parameter: torch.zeros_like(value) for parameter, value in exact.items()}
    seen = False
    for signs in itertools.product([-1, 1], repeat=4):
        loss = _SignedLoss(on=on, signs=torch.tensor(signs), chances=None)
        found = on.gradients([Term(name="", batch=batch, weight=4.0, loss=loss)])
        seen |= all(torch.allclose(value.square() / 4, one_pass[one], rtol=1e-3) for one, value in found.items())
        for parameter, gradient in found.items():
            sums[parameter] += gradient.square() / 16 / 4
    assert seen, "one pass is one of these"
    for parameter, value in exact.items():
        torch.testing.assert_close(sums[parameter], value, rtol=1e-3, atol=1e-9)


def test_labels_of_the_model_are_drawn_from_its_distribution():
    on = trainee(images)
    batch = on.stages[0].data.train.batch(0, 1).rows(torch.zeros(4000, dtype=torch.int64))
    chances = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    drawn = []
    on.row_losses = lambda output, one: drawn.append(one.labels) or output.logits.sum(1)
    logits = on.model(**batch.inputs).logits
    _SignedLoss(on=on, signs=torch.ones(4000), chances=chances)(on.forward, batch)
    shares = torch.bincount(drawn[0], minlength=6) / 4000
    torch.testing.assert_close(shares, logits[0].softmax(0), rtol=0, atol=5e-4)
    masked = batch.among([2, 4], 6)
    _SignedLoss(on=on, signs=torch.ones(4000), chances=chances)(on.forward, masked)
    assert set(drawn[1].tolist()) == {2, 4}


def test_a_step_is_adams_followed_by_the_least_of_hold_and_distance_in_its_metric():
    on, slow = trainee(images), trainee(images)
    method = Ewc(EwcConfig(strength=50.0, samples=8))
    for one in (on, slow):
        one.train(Method(), one.stages[0])
    stage = on.stages[1]
    method.begin_stage(on, stage)
    information = fisher_diagonal(slow, slow.stages[0], labels=Labels.data, samples=8, group=1)
    names = list(slow.trainable())
    fisher = [information[one].view_as(one).double() for one in slow.trainable().values()]
    weights = [one.detach().double().clone() for one in slow.trainable().values()]
    anchors = [one.clone() for one in weights]
    first, second = [torch.zeros_like(one) for one in weights], [torch.zeros_like(one) for one in weights]
    on.optimizer.state.clear()
    for step in range(3):
        batch = stage.data.train.batch(step * 4, 4)
        loss = F.cross_entropy(slow.model(**batch.inputs).logits, batch.labels)
        gradients = torch.autograd.grad(loss, list(slow.trainable().values()))
        for i, gradient in enumerate(gradients):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            metric = ((second[i] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8) / 1e-2
            moved = weights[i] - first[i] / (1 - 0.9 ** (step + 1)) / metric
            # argmin over w of metric (w - moved)^2 + strength fisher (w - anchor)^2
            weights[i] = (metric * moved + 50 * fisher[i] * anchors[i]) / (metric + 50 * fisher[i])
        with torch.no_grad():
            for one, value in zip(slow.trainable().values(), weights, strict=True):
                one.copy_(value)
        on.update(method, stage, step)
    pulled = 0.0
    for name, value, anchor in zip(names, weights, anchors, strict=True):
        # Biases of keys have no gradient but rounding errors, which Adam blows up.
        torch.testing.assert_close(on.trainable()[name].detach().double(), value, rtol=1e-4, atol=1e-4)
        pulled = max(pulled, float((value - anchor).abs().max() / 3e-2))
    assert pulled > 0.1


def test_training_ends_where_the_losses_gradient_balances_the_hold():
    on = trainee(images, lr=3e-3)
    on.train(Method(), on.stages[0])
    method = Ewc(EwcConfig(strength=30.0, samples=None))
    stage = on.stages[1]
    on.global_batch = len(stage.data.train)
    on.optimizer.state.clear()
    on.optimizer.param_groups[0]["betas"] = (0.9, 0.95)
    method.begin_stage(on, stage)
    for step in range(1000):
        on.optimizer.param_groups[0]["lr"] = on.lr = 3e-3 * max(0.01, 1 - step / 900)
        on.update(method, stage, step)
    held, gradients = method.state().parts, on.gradients([Term(name="task", batch=stage.data.train.whole)])
    pulls, losses = [], []
    for name, parameter in on.trainable().items():
        fisher, anchor = held[f"fisher.{name}"][1], held[f"anchor.{name}"][1]
        pulls.append(30.0 * fisher * (parameter.detach().view(-1) - anchor))
        losses.append(gradients[parameter])
    assert (torch.cat(pulls) + torch.cat(losses)).norm() < 0.5 * torch.cat(losses).norm()
    assert torch.nn.functional.cosine_similarity(torch.cat(pulls), -torch.cat(losses), dim=0) > 0.9


@pytest.mark.parametrize("rank", [2, 0])
def test_the_first_task_is_kept_better_than_without_a_hold(rank):
    left = {}
    for name, method in (("ewc", Ewc(EwcConfig(strength=300.0))), ("none", Method())):
        on = trainee(images, rank=rank, lr=3e-3)
        on.train(Method(), on.stages[0])
        before = {key: one.detach().clone() for key, one in on.trainable().items()}
        on.train(method, on.stages[1])
        first = on.stages[0].data.train.whole
        with torch.no_grad():
            left[name] = float(on.row_losses(on.forward(first), first).mean())
        assert any(not torch.equal(before[key], one) for key, one in on.trainable().items())
    assert left["ewc"] < left["none"] - 0.02, left


@pytest.mark.parametrize("rank", [2, 0])
@pytest.mark.parametrize("make", [images, texts])
def test_a_stage_resumes_bit_for_bit_and_information_adds_up_with_decay(make, rank):
    config = EwcConfig(decay=0.5, samples=4, group=2, strength=10.0)
    ends = []
    for interrupted in (False, True):
        on, method = trainee(make, rank=rank), Ewc(config)
        on.train(method, on.stages[0])
        on.train(method, on.stages[1])
        if interrupted:
            kept = method.state()
            method = Ewc(config)
            method.load(kept)
        before = {name: part.clone() for name, (_, part) in method.state().parts.items()}
        on.optimizer.state.clear()
        method.begin_stage(on, on.stages[2])
        added = fisher_diagonal(on, on.stages[1], labels=Labels.data, samples=4, group=2)
        for name, parameter in on.trainable().items():
            now = method.state().parts[f"fisher.{name}"][1]
            torch.testing.assert_close(now, 0.5 * before[f"fisher.{name}"] + added[parameter])
        on.update(method, on.stages[2], 0)
        if interrupted:
            kept = method.state()
            method = Ewc(config)
            method.load(kept)
        on.update(method, on.stages[2], 1)
        method.end_stage(on, on.stages[2])
        ends.append((method.report(), {name: one.detach().clone() for name, one in on.trainable().items()}))
    assert ends[0][0] == ends[1][0]
    assert ends[0][0]["estimated_rise"] > 0
    assert all(torch.equal(value, ends[1][1][name]) for name, value in ends[0][1].items())


def test_after_a_warm_start_all_tasks_are_measured_on_what_trains_then():
    full, low = trainee(images, rank=0), trainee(images)
    method = Ewc(EwcConfig(samples=4))
    full.train(method, full.stages[0])
    full.train(method, full.stages[1])
    method.load(type(method.state())(values=method.state().values))  # its parts belong to weights that are frozen now
    method.begin_stage(low, low.stages[2])
    added = [fisher_diagonal(low, one, labels=Labels.data, samples=4, group=1) for one in low.stages[:2]]
    for name, parameter in low.trainable().items():
        torch.testing.assert_close(method.state().parts[f"fisher.{name}"][1], added[0][parameter] + added[1][parameter])


@pytest.mark.parametrize(
    "wrong", [{"strength": 0.0}, {"decay": 0.0}, {"decay": 1.5}, {"samples": 0}, {"group": 0}], ids=str
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"continual.ewc.{next(iter(wrong))}"):
        EwcConfig(**wrong)
