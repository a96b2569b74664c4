"""GS-LoRA on its plain twin: what its losses, its proximal step and its prototypes are, and what they do."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from continual.audit import audit
from continual.groups import Grouping, block_of, groups_of
from continual.method import TaskKind
from continual.methods.gs_lora import GsLora, GsLoraConfig
from relora.convert import low_rank_modules
from relora.errors import ConfigError
from tests.continual_streams import Fixed, images, texts, trainee


def request(make, *, steps=6):
    """A trainee, and a stage that retains what task 0 taught and forgets what task 1 did."""
    on = trainee(make)
    data = replace(on.stages[0].data, forget=Fixed(make(1)))
    stage = replace(on.stages[0], kind=TaskKind.forget, steps=steps, data=data)
    on.stages = [stage]
    return on, stage


def stir(on):
    """Factors that are not zero, as in the middle of training."""
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in on.layers.values():
            layer.up.normal_(std=0.1)
    return on


def losses_of(on, batch):
    """Each sample's mean loss per target, by plain torch."""
    logits = on.model(**batch.inputs).logits.double()
    if batch.labels.ndim == 1:
        return F.cross_entropy(logits, batch.labels, reduction="none")
    rows = zip(logits[:, :-1], batch.labels[:, 1:], strict=True)
    return torch.stack([F.cross_entropy(one, labels, ignore_index=-100) for one, labels in rows])


@pytest.mark.parametrize("grouping", list(Grouping))
def test_the_proximal_step_equals_its_closed_form_on_every_group(grouping):
    on, stage = request(images)
    stir(on)
    with torch.no_grad():
        for name, layer in on.layers.items():
            if ".layers.1." in name:
                layer.up.mul_(0.05), layer.down.mul_(0.05)
    method = GsLora(GsLoraConfig(alpha=2.0, warmup=0.0, groups=grouping))
    factors = {f"{name}.{of}": getattr(layer, of) for name, layer in on.layers.items() for of in ("down", "up")}
    before = {name: one.detach().double().clone() for name, one in factors.items()}
    on.step = 1
    method.after_step(on, stage)
    members = {}
    for name in before:
        layer, factor = name.rsplit(".", 1)
        key = {"block": ".".join(name.split(".")[:3]), "matrix": layer, "factor": f"{layer}.{factor}"}[grouping.value]
        members.setdefault(key, []).append(name)
    assert len(members) == {"block": 2, "matrix": 12, "factor": 24}[grouping.value]
    killed = 0
    for names in members.values():
        norm = math.sqrt(sum(float(before[name].square().sum()) for name in names))
        kept = max(0.0, 1.0 - 1e-2 * 2.0 * math.sqrt(sum(before[name].numel() for name in names)) / norm)
        killed += kept == 0.0
        for name in names:
            torch.testing.assert_close(factors[name].double(), kept * before[name], rtol=1e-6, atol=0.0)
    assert method.measures()["groups/zero"] == killed == len(members) // 2


@pytest.mark.parametrize("grouping", list(Grouping))
def test_zeroed_groups_are_exactly_zero_for_the_rest_of_the_task_and_change_no_layer(grouping):
    on, stage = request(images, steps=12)
    method = GsLora(GsLoraConfig(alpha=0.9, warmup=0.25, groups=grouping))
    method.begin_stage(on, stage)
    base = {name: layer.base().clone() for name, layer in on.layers.items()}
    zero = []
    for step in range(stage.steps):
        if step == 8:  # what is small dies, what is large does not
            with torch.no_grad():
                first = next(iter(on.layers.values()))
                first.up.mul_(1e-4)
                first.down.mul_(1e-4)
                if grouping is Grouping.block:
                    for name, layer in on.layers.items():
                        if block_of(name) == block_of(next(iter(on.layers))):
                            layer.up.mul_(1e-4), layer.down.mul_(1e-4)
        on.update(method, stage, step)
        zero.append(method.measures()["groups/zero"])
    method.end_stage(on, stage)
    assert zero == sorted(zero)
    assert zero[:3] == [0, 0, 0]
    report = method.report()
    assert 0 < report["zero_groups"] == zero[-1] < report["groups"]
    for group in groups_of(on.layers, grouping):
        norm = sum(float(one.detach().square().sum()) for one in group.parameters)
        assert (norm == 0.0) == (group.name in report["zeroed"])
        for one in group.parameters if norm == 0.0 else ():
            assert not on.store.moments(one).exp_avg.any()
    for name, layer in on.layers.items():
        dead = not layer.up.any() or not layer.down.any()
        assert dead == (not layer.delta().any())
        assert torch.equal(layer.base(), base[name])


def test_a_group_named_dead_does_not_come_back_although_its_gradient_is_there():
    on, stage = request(images)
    method = GsLora(GsLoraConfig(alpha=1e-6, warmup=0.0, groups=Grouping.factor))
    method.begin_stage(on, stage)
    on.update(method, stage, 0)
    name = next(iter(on.layers))
    with torch.no_grad():
        on.layers[name].up.zero_()
    on.store.moments(on.layers[name].up).exp_avg.zero_()
    method.dead.add(f"{name}.up")
    on.update(method, stage, 1)
    assert on.layers[name].up.grad.any()
    assert not on.layers[name].up.any()


def test_the_penalty_waits_for_its_warm_up():
    config = GsLoraConfig(alpha=0.5, warmup=0.3)
    assert [config.alpha_of(update, 10) for update in range(5)] == [0.0, 0.0, 0.0, 0.5, 0.5]
    assert GsLoraConfig(alpha=0.5, warmup=0.0).alpha_of(0, 10) == 0.5
    on, stage = request(images, steps=10)
    free, _ = request(images, steps=10)
    penalised, plain = GsLora(config), GsLora(GsLoraConfig(alpha=0.0))
    for step in range(4):
        for one, method in ((on, penalised), (free, plain)):
            one.update(method, stage, step)
        same = all(
            torch.equal(ours, theirs)
            for ours, theirs in zip(on.trainable().values(), free.trainable().values(), strict=True)
        )
        assert same == (step < 3)


@pytest.mark.parametrize("make", [images, texts])
def test_the_loss_and_its_gradients_are_those_of_the_definition(make):
    on, stage = request(make)
    stir(on)
    batch, forget = stage.data.train.batch(0, 4), stage.data.forget.batch(0, 4)
    own = losses_of(on, forget).detach()
    bound = float(own.sort().values[1:3].mean())  # some samples are beyond it
    method = GsLora(GsLoraConfig(beta=0.7, bound=bound))
    method.begin_stage(on, stage)
    terms = method.terms(on, stage, batch)
    assert [term.name for term in terms] == ["retain", "forget"]
    found = {one: value.clone() for one, value in on.gradients(terms).items()}
    weights = forget.row_targets / forget.targets
    retained = batch.row_targets / batch.targets
    total = (losses_of(on, batch) * retained).sum()
    total = total + 0.7 * ((bound - losses_of(on, forget)).clamp_min(0.0) * weights).sum()
    total.backward()
    for parameter in on.trainable().values():
        torch.testing.assert_close(found[parameter], parameter.grad.view(-1), rtol=1e-4, atol=1e-6)


def test_forgetting_stops_at_the_bound():
    reached = {}
    for bound in (1000.0, 4.0):
        on, stage = request(images, steps=100)
        method = GsLora(GsLoraConfig(beta=1.0, bound=bound, alpha=0.0))
        method.begin_stage(on, stage)
        for step in range(stage.steps):
            on.update(method, stage, step)
        with torch.no_grad():
            forgotten = losses_of(on, stage.data.forget.whole)
            kept = losses_of(on, stage.data.train.whole)
        reached[bound] = float(forgotten.min()), float(forgotten.max())
        assert bound > 4.0 or float(kept.max()) < 0.5
    assert reached[4.0][0] > 3.9
    assert 3 * reached[4.0][1] < reached[1000.0][0]
    beyond = GsLora(GsLoraConfig(bound=0.9 * float(forgotten.min())))
    beyond.begin_stage(on, stage)
    forget = beyond.terms(on, stage, stage.data.train.batch(0, 4))[1]
    assert not any(one.any() for one in on.gradients([forget]).values())


@pytest.mark.parametrize("make", [images, texts])
@pytest.mark.parametrize("forgets", [True, False])
def test_the_folded_model_equals_the_live_one(make, forgets):
    on, stage = request(make) if forgets else (one := trainee(make), one.stages[0])
    method = GsLora(GsLoraConfig(alpha=0.5, warmup=0.2, groups=Grouping.matrix))
    method.begin_stage(on, stage)
    for step in range(stage.steps):
        on.update(method, stage, step)
    method.end_stage(on, stage)
    on.model.eval()
    batch = make(2)
    with torch.no_grad():
        start = copy.deepcopy(on.model)
        live = on.model(**batch.inputs).logits
        on.fold(method)
        folded = on.model(**batch.inputs).logits
    assert (live - folded).abs().max() < 1e-5
    assert not any(layer.up.any() for layer in on.layers.values())
    moved = [
        not torch.equal(before.base(), after.base())
        for before, after in zip(low_rank_modules(start).values(), on.layers.values(), strict=True)
    ]
    assert sum(moved) == len(moved) - method.report()["zero_groups"]


def features(model, batch):
    """What enters the outputs, by the model's own parts."""
    return model.vit(**batch.inputs).last_hidden_state[:, 0].double()


def test_prototypes_are_class_means_of_the_model_before_the_task_and_their_losses_are_as_defined():
    on, stage = request(images)
    stir(on)
    config = GsLoraConfig(beta=0.7, bound=50.0, prototype_retain=0.3, prototype_forget=0.2, prototype_bound=0.05)
    method = GsLora(config)
    on.model.eval()
    with torch.no_grad():
        both = [(features(on.model, batch), batch.labels) for batch in (images(0), images(1))]
    rows, labels = torch.cat([one for one, _ in both]), torch.cat([one for _, one in both])
    means = torch.stack([rows[labels == label].mean(0) if (labels == label).any() else rows[0] for label in range(4)])
    on.model.train()
    method.begin_stage(on, stage)
    assert on.model.training
    torch.testing.assert_close(method.state().tensors["prototypes"][:4].double(), means, rtol=1e-5, atol=1e-6)
    stir(on)
    with torch.no_grad():
        for layer in on.layers.values():
            layer.up.mul_(3.0)
    batch, forget = stage.data.train.batch(0, 4), stage.data.forget.batch(0, 4)

    def apart(part):
        near, far = torch.softmax(means[part.labels], 1), torch.softmax(features(on.model, part), 1)
        return (near * (near / far).log()).sum(1)

    bound = float(apart(forget).detach().median()) + 1e-4
    method.config = replace(config, prototype_bound=bound)
    found = {one: value.clone() for one, value in on.gradients(method.terms(on, stage, batch)).items()}

    pushed = (bound - apart(forget)).clamp_min(0.0)
    assert 0 < int((pushed > 0).sum()) < len(pushed)
    total = losses_of(on, batch).mean() + 0.3 * apart(batch).mean()
    total = total + 0.7 * (50.0 - losses_of(on, forget)).clamp_min(0.0).mean() + 0.2 * pushed.mean()
    total.backward()
    for parameter in on.trainable().values():
        torch.testing.assert_close(found[parameter], parameter.grad.view(-1), rtol=1e-3, atol=1e-6)


def test_a_task_that_teaches_has_its_own_loss_and_the_penalty():
    on = trainee(images)
    method = GsLora(GsLoraConfig(alpha=50.0, warmup=0.0))
    batch = on.stages[0].data.train.batch(0, 4)
    (only,) = method.terms(on, on.stages[0], batch)
    assert (only.name, only.loss, only.weight) == ("task", None, 1.0)
    start = {name: layer.base().clone() for name, layer in on.layers.items()}
    on.train(method, on.stages[0])
    assert method.report()["zero_share"] == 1.0
    assert all(torch.equal(layer.base(), start[name]) for name, layer in on.layers.items())


@pytest.mark.parametrize("settings", [{}, {"prototype_retain": 0.3}])
def test_what_it_remembers_resumes_bit_for_bit(settings):
    on, stage = request(images)
    config = GsLoraConfig(alpha=0.6, warmup=0.0, groups=Grouping.factor, **settings)
    method = GsLora(config)
    method.begin_stage(on, stage)
    for step in range(3):
        on.update(method, stage, step)
    method.dead.add(groups_of(on.layers, Grouping.factor)[3].name)
    resumed, other = GsLora(config), copy.deepcopy(on)
    resumed.load(method.state())
    for step in range(3, 6):
        on.update(method, stage, step)
        other.update(resumed, stage, step)
    assert resumed.measures() == method.measures()
    pairs = zip(on.trainable().values(), other.trainable().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_a_block_is_the_outermost_number_in_a_name():
    assert block_of("model.layers.3.self_attn.q_proj") == "model.layers.3"
    assert block_of("model.layers.3.experts.7.up") == "model.layers.3"
    assert block_of("lm_head") == "lm_head"


def test_an_audit_is_by_accuracy_for_classifiers_and_by_loss_for_language_models():
    before, after = {"forgotten": 0.9, "retained": 0.95, "earlier": 0.1}, {"forgotten": 0.1, "retained": 0.9}
    told = audit(before, {**after, "earlier": 0.02}, accuracy=True)
    assert told == pytest.approx(
        {
            "forgotten_before": 0.9,
            "forgotten_after": 0.1,
            "retained_before": 0.95,
            "retained_after": 0.9,
            "earlier_after": 0.02,
            "drop": 0.8,
            "h_mean": 2 * 0.8 * 0.9 / 1.7,
        }
    )
    then, now = (
        {"forgotten": 1.0, "retained": 2.0},
        {"forgotten": 5.0, "retained": 2.1, "earlier a": 4.0, "earlier b": 6.0},
    )
    told = audit(then, now, accuracy=False)
    assert told["earlier_loss_after"] == 5.0
    assert (told["forgotten_rise"], told["retained_rise"]) == pytest.approx((4.0, 0.1))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"beta": 0.0}, "gs_lora.beta must be above 0"),
        ({"bound": -1.0}, "gs_lora.bound must be above 0"),
        ({"bound": math.inf}, "gs_lora.bound"),
        ({"alpha": -0.1}, "gs_lora.alpha must be at least 0"),
        ({"alpha": math.nan}, "gs_lora.alpha"),
        ({"warmup": 1.0}, "gs_lora.warmup"),
        ({"prototype_retain": -1.0}, "gs_lora.prototype_retain"),
        ({"prototype_bound": 1.0}, "need each other"),
        ({"prototype_forget": 0.1}, "need each other"),
        ({"prototype_forget": 0.1, "prototype_bound": 0.0}, "gs_lora.prototype_bound must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        GsLoraConfig(**wrong)
