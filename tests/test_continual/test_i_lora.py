"""I-LoRA: the moving average, the consistency loss with its gradients, and which adapter is measured."""

import copy

import numpy as np
import pytest
import torch

from continual.batches import Batch
from continual.methods.i_lora import Adapter, ILora, ILoraConfig, consistency
from continual.methods.replay import ReplayConfig
from relora.convert import low_rank_modules
from relora.errors import ConfigError
from tests.continual_streams import CLASSES, images, texts, trainee


def method_of(**settings):
    return ILora(ILoraConfig(**settings), ReplayConfig())


def factors_of(model):
    layers = low_rank_modules(model).items()
    return {f"{name}.{leaf}": getattr(layer, leaf) for name, layer in layers for leaf in ("down", "up")}


def averages_of(method, on):
    parts = method.state().parts
    assert {name.removeprefix("long_term/") for name in parts} == on.trainable().keys() > factors_of(on.model).keys()
    return {name: parts[f"long_term/{name}"][1].view(one.shape) for name, one in on.trainable().items()}


def seen_over_two_tasks(method, on):
    """What trains, after each update."""
    history = []
    for stage in on.stages[:2]:
        method.begin_stage(on, stage)
        for step in range(stage.steps):
            on.update(method, stage, step)
            history.append({name: one.detach().double().numpy().copy() for name, one in on.trainable().items()})
        method.end_stage(on, stage)
    return history


@pytest.mark.parametrize("decay", [0.6, 0.75, 0.99])
def test_the_long_term_adapter_is_the_weighted_sum_of_all_working_ones(decay):
    on, method = trainee(images), method_of(decay=decay)
    history = seen_over_two_tasks(method, on)
    keeps = [min(1 - 1 / number, decay) for number in range(1, len(history) + 1)]
    weights = [(1 - keep) * np.prod(keeps[number + 1 :]) for number, keep in enumerate(keeps)]
    assert sum(weights) == pytest.approx(1.0)
    for name, average in averages_of(method, on).items():
        expected = sum(weight * one[name] for weight, one in zip(weights, history, strict=True))
        assert np.abs(average.numpy() - expected).max() < 1e-6
    if decay == 0.99:  # so far a plain mean
        assert weights == pytest.approx([1 / len(history)] * len(history))


def test_the_long_term_adapter_moves_in_every_update_and_lags_behind():
    on, method = trainee(images), method_of(decay=0.9)
    method.begin_stage(on, on.stages[0])
    before = {name: one.clone() for name, one in averages_of(method, on).items()}
    assert all(torch.equal(one, before[name]) for name, one in on.trainable().items())
    for step in range(4):
        on.update(method, on.stages[0], step)
        after = {name: one.clone() for name, one in averages_of(method, on).items()}
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        factors = factors_of(on.model)
        assert moved >= {name for name in factors if name.endswith(".up") or step > 0}  # while up is zero, down stays
        assert any(torch.equal(after[name], one) for name, one in factors.items()) == (step == 0)
        before = after


def slow_gap(kept, states, batch):
    """The published loss in plain loops: means over layers and features, sums over what the loss counts."""
    total = 0.0
    for stable, state in zip(kept, states, strict=True):
        for row in range(len(batch)):
            if batch.labels.ndim == 1:
                mask = batch.inputs.get("attention_mask")
                places = range(state.shape[1]) if mask is None else mask[row].nonzero()[:, 0].tolist()
                share = 1 / len(places)
            else:
                places = [place - 1 for place in range(1, state.shape[1]) if batch.labels[row, place] != -100]
                share = 1.0
            for place in places:
                one, other = stable[row, place], state[row, place]
                chosen = torch.where(other > one, other, one)
                total = total + share * ((other - chosen) ** 2).mean() / len(states)
    return total


def with_values(model, values):
    other = copy.deepcopy(model)
    parameters = dict(other.named_parameters())
    for name, value in values.items():
        parameters[name].data.copy_(value)
    return other


@pytest.mark.parametrize("make", [images, texts])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_loss_and_all_gradients_equal_those_of_a_slow_plain_implementation(make, ratio):
    on, method = trainee(make), ILora(ILoraConfig(decay=0.9, consistency=30.0), ReplayConfig(ratio=ratio))
    on.train(method, on.stages[0])
    on.train(method, on.stages[1], steps=2)
    batch = on.stages[1].data.train.batch(8, 4)
    new, old = method.terms(on, on.stages[1], batch)
    on.optimizer.zero_grad()
    on.backward([new, old])
    method.after_backward(on, on.stages[1])

    slow, kept = copy.deepcopy(on.model), with_values(on.model, averages_of(method, on))
    slow.zero_grad()
    with torch.no_grad():
        stable = kept(**old.batch.inputs, output_hidden_states=True).hidden_states
    output = slow(**old.batch.inputs, output_hidden_states=True)
    gap = slow_gap(stable, output.hidden_states, old.batch) / old.batch.targets
    replay = on.row_losses(output, old.batch).sum() / old.batch.targets
    task = on.row_losses(slow(**batch.inputs), batch).sum() / batch.targets
    share = ratio / (1 + ratio)
    by_gap = torch.autograd.grad(30.0 * gap, list(factors_of(slow).values()), retain_graph=True)
    ((1 - share) * task + share * replay + 30.0 * gap).backward()

    assert method.measures()["consistency"] == pytest.approx(gap.item(), rel=1e-5)
    theirs = dict(slow.named_parameters())
    for name, parameter in on.trainable().items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-7)
    for by, whole in zip(by_gap, factors_of(slow).values(), strict=True):
        assert by.norm() > 1e-3 * whole.grad.norm()  # the gap has a say in the comparison


def test_padding_of_a_classified_text_takes_no_part_and_long_texts_count_as_much_as_short_ones():
    draw = torch.Generator().manual_seed(0)
    kept, states = ([torch.randn(3, 5, 4, generator=draw) for _ in range(2)] for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0]])
    batch = Batch(inputs={"attention_mask": mask}, labels=torch.tensor([0, 1, CLASSES - 1]))
    value = consistency(kept, states, batch)
    assert float(value) == pytest.approx(float(slow_gap(kept, states, batch)), rel=1e-6)
    states[0][1, 2:] += 10.0
    assert consistency(kept, states, batch) == value


@pytest.mark.parametrize("adapter", list(Adapter))
def test_the_measured_model_has_the_chosen_adapter_and_only_while_it_is_measured(adapter):
    on, method = trainee(images), method_of(evaluate=adapter)
    on.train(method, on.stages[0])
    inputs = on.stages[0].data.train.whole.inputs
    long_term = with_values(on.model, averages_of(method, on))
    with torch.no_grad():
        before, theirs = on.model(**inputs).logits, long_term(**inputs).logits
        with method.measured(on):
            measured = on.model(**inputs).logits
        after = on.model(**inputs).logits
    assert not torch.equal(before, theirs)
    assert torch.equal(measured, theirs if adapter is Adapter.long_term else before)
    assert torch.equal(after, before)


def test_at_full_rank_it_is_replay():
    on, method = trainee(images, rank=0), method_of()
    on.train(method, on.stages[0])
    terms = method.terms(on, on.stages[1], on.stages[1].data.train.batch(0, 4))
    assert [term.loss for term in terms] == [None, None]
    assert method.state().parts == {}
    assert method.state().values["updates"] == 0


@pytest.mark.parametrize("wrong", [{"decay": 0.0}, {"decay": 1.0}, {"consistency": -1.0}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ConfigError, match=rf"continual\.i_lora\.{next(iter(wrong))}"):
        ILoraConfig(**wrong)


def test_a_long_term_adapter_without_effect_is_refused():
    with pytest.raises(ConfigError, match=r"choose continual\.method=replay"):
        ILoraConfig(consistency=0.0, evaluate=Adapter.working)
