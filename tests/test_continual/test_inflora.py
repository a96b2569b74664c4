"""InfLoRA on whole models, against the published algorithm step by step; its subspaces alone: test_subspace.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from continual.input_moments import rows_that_count
from continual.methods.inflora import InfLora, InfLoraConfig
from continual.subspace import Energy, Spans
from relora.convert import LoraConfig, to_low_rank
from tests.continual_streams import images, model_of, stages, texts
from tests.plain_trainee import PlainTrainee
from tests.slow_inflora import SlowInfLora

TASKS = 5
SHARES = {"pictures": {"activation": (0.97, 0.995), "reference": (0.995, 0.9999)},
          "texts": {"activation": (0.9, 0.98), "reference": (0.97, 0.999)}}  # fmt: skip


def pictures(task):
    batch = images(task)
    return replace(batch, labels=batch.labels % 6)


def trainee_of(make, rank=2):
    """As InfLoRA has it: `down` is frozen."""
    model = model_of(make, rank=0)
    to_low_rank(model, LoraConfig(rank=rank, alpha=4.0), seed=0, train_down=False)
    return PlainTrainee(model, stages(make, count=TASKS), global_batch=4, lr=3e-2)


@torch.no_grad()
def inputs_of(on, batch):
    """All rows that enter each layer, by hooks of the test's own."""
    found, mask = {}, rows_that_count(batch)

    def hook(name):
        def look(_, arguments):
            rows = arguments[0] if mask is None else arguments[0][mask]
            found[name] = rows.reshape(-1, arguments[0].shape[-1]).numpy()

        return look

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in on.layers.items()]
    on.forward(batch)
    for one in hooks:
        one.remove()
    return found


def protected_by(method, source):
    subspace = method.subspaces[source]
    return subspace.onto_protected(torch.eye(subspace.features, dtype=torch.float64)).numpy()


@torch.no_grad()
def outputs_on(layer, onto):
    """The layer's outputs on the protected subspace, less the bias, which trains beside."""
    bias = 0 if layer.bias is None else layer.bias
    return layer(torch.from_numpy(onto).float()) - bias


@pytest.mark.parametrize("energy", Energy)
@pytest.mark.parametrize("make", [pictures, texts])
def test_factors_and_subspaces_equal_the_published_ones_task_by_task_and_training_leaves_what_is_protected(
    make, energy
):
    first, final = SHARES[make.__name__][energy.value]
    config = InfLoraConfig(energy=energy, threshold=first, final_threshold=final)
    on, method, rank = trainee_of(make), InfLora(config), 2
    settings = {"reference": energy is Energy.reference, "threshold": first, "final": final, "tasks": TASKS}
    slow = {name: SlowInfLora(one.down.shape[1], **settings) for name, one in on.layers.items()}
    kept = set()
    for stage in on.stages:
        on.optimizer.state.clear()
        before = inputs_of(on, stage.data.train.whole)
        method.begin_stage(on, stage)
        for name, layer in on.layers.items():
            free = layer.down.shape[1] - round(np.trace(slow[name].protected()))
            rows = slow[name].design(before[name], min(rank, free))
            ours = layer.down.detach().double().numpy()
            assert not ours[free:].any(), "where no direction is free a row is zero"
            np.testing.assert_allclose(np.abs((ours[:free] * rows).sum(1) * 3), 1, atol=2e-4, err_msg=name)
            np.testing.assert_allclose(ours.T @ ours, rows.T @ rows, atol=2e-4, err_msg=name)
        held = {name: outputs_on(layer, slow[name].protected()) for name, layer in on.layers.items()}
        for step in range(stage.steps):
            on.update(method, stage, step)
        for name, layer in on.layers.items():
            assert layer.up.abs().max() > 1e-2 or not layer.down.any(), "it has learned"
            assert (outputs_on(layer, slow[name].protected()) - held[name]).abs().max() < 1e-5
        after = inputs_of(on, stage.data.train.whole)
        method.end_stage(on, stage)
        for name, source in method.sources.items():
            slow[name].update(after[name])
            np.testing.assert_allclose(protected_by(method, source), slow[name].protected(), atol=2e-5, err_msg=name)
            kept.add((slow[name].kept, method.subspaces[source].spans))
        with torch.no_grad():
            live = on.forward(stage.data.train.whole).logits
            on.fold(method)
            folded = on.forward(stage.data.train.whole).logits
        assert (live - folded).abs().max() < 1e-5
    assert {spans for _, spans in kept} == set(Spans), "both kinds of basis were met"


@pytest.mark.parametrize(("make", "together"), [(pictures, [3]), (texts, [3, 2])])
def test_layers_that_share_an_input_share_a_basis_and_a_factor(make, together):
    on, method = trainee_of(make), InfLora(InfLoraConfig())
    method.begin_stage(on, on.stages[0])
    groups = {}
    for name, source in method.sources.items():
        groups.setdefault(source, []).append(on.layers[name].down)
    assert sorted((len(one) for one in groups.values() if len(one) > 1), reverse=True) == sorted(together * 2)[::-1]
    for first, *others in groups.values():
        assert all(torch.equal(first, other) for other in others)
    on.train(method, on.stages[0])
    assert set(method.subspaces) == set(groups)
