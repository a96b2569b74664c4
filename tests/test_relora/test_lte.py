"""LTE's mathematics without processes: the layer that keeps synced factors, and a sync of one head."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from relora.errors import ConfigError
from relora.initialize import draw_down
from relora.linear import LowRankLinear
from relora.lte import FactorAdam, LteConfig, SyncReset, bounded_layers, keep_synced_, sync, sync_due
from relora.precision import MergePrecision
from relora.restart import PlainStore

OUT, IN, RANK = 7, 5, 2


class _OneHead:
    """The access of a head that is alone."""

    count, index, sent = 1, 0, 0

    def __init__(self, factors):
        self._factors = factors

    def gather(self, own, *, alike):
        return [own]

    def mean(self, own, *, alike):
        return own, (own.double() @ own.double()).view(1, 1)

    def by_factors(self, factors, part, *, alike):
        return self._factors


def _model(reset=SyncReset.none, dropout=0.0):
    torch.manual_seed(0)
    layer = LowRankLinear.from_module(nn.Linear(IN, OUT), adapter_rank=RANK, scaling=2.0, dropout=dropout)
    layer.up.data.normal_()
    model = nn.Sequential(layer)
    keep_synced_(model, LteConfig(reset=reset))
    return model, layer, torch.randn(11, IN)


def test_synced_factors_are_taken_off_the_update_and_get_no_gradient():
    model, layer, x = _model()
    layer.synced_down.normal_()
    layer.synced_up.normal_()
    down, up = (factor.detach().clone().requires_grad_() for factor in (layer.down, layer.up))
    stale = 2.0 * layer.synced_up @ layer.synced_down
    expected = F.linear(x, layer.weight + 2.0 * up @ down - stale, layer.bias)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(layer.delta(), (2.0 * up @ down - stale).detach())
    for loss in (model(x).square().sum(), expected.square().sum()):
        loss.backward()
    torch.testing.assert_close(layer.down.grad, down.grad)
    torch.testing.assert_close(layer.up.grad, up.grad)
    assert layer.synced_down.grad is None


def test_dropout_hits_both_products_alike():
    model, layer, x = _model(dropout=0.5)
    layer.synced_down.copy_(layer.down)
    layer.synced_up.copy_(layer.up.detach())
    torch.testing.assert_close(model.train()(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("factors", [True, False])
@pytest.mark.parametrize("reset", SyncReset)
def test_a_sync_keeps_the_function_and_then_takes_up_only_what_is_new(reset, factors):
    model, layer, x = _model(reset)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    config = LteConfig(heads=1, reset=reset)
    for index in (1, 2, 3):
        model(x).square().sum().backward()
        optimizer.step()
        before, weight, delta = model(x).detach(), layer.weight.clone(), layer.delta()
        report, _ = sync(model, config, PlainStore(optimizer), _OneHead(factors), seed=4, sync_index=index)
        torch.testing.assert_close(model(x), before)
        torch.testing.assert_close(layer.weight, weight + delta)
        assert report.delta_norms == [pytest.approx(delta.norm().item(), rel=1e-5)]
        assert layer.delta().norm() < 1e-6
        assert (report.by_factors, report.shrinkage, report.cosine_mean) == (int(factors), pytest.approx(1.0), None)
        if reset == SyncReset.factors:
            assert torch.equal(layer.down, draw_down("0", (RANK, IN), seed=4, restart_index=index))
            assert not layer.up.any()
    assert optimizer.state[layer.up]["step"] == 3, "Adam is kept"


def test_only_the_factors_adam_state_is_cleared():
    model, layer, x = _model(SyncReset.factors)
    layer.bias.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    config = LteConfig(heads=1, reset=SyncReset.factors, adam=FactorAdam.clear)
    sync(model, config, PlainStore(optimizer), _OneHead(True), seed=4, sync_index=1)
    assert not optimizer.state[layer.up]["step"].any()
    assert not optimizer.state[layer.down]["exp_avg"].any()
    assert optimizer.state[layer.bias]["step"] == 1


def test_heads_draw_factors_of_their_own():
    draws = [draw_down("q", (RANK, IN), seed=0, head=head, restart_index=3) for head in range(3)]
    assert not any(torch.equal(draws[one], draws[other]) for one, other in ((0, 1), (0, 2), (1, 2)))


def test_a_product_is_formed_and_added_in_any_part():
    _, layer, _ = _model()
    down, up = layer.down.detach(), layer.up.detach()
    whole = layer.whole_base()
    before, delta = whole.weight.clone(), layer.product_part(down, up, whole)
    assert torch.equal(delta, layer.delta(down, up).view(-1))
    changed = layer.add_part_(MergePrecision.split, delta, None, whole)
    assert torch.equal(layer.weight.view(-1), before + delta)
    assert changed == delta.numel()


def test_a_sync_is_due_every_so_many_steps_and_after_the_last():
    config = LteConfig(sync_every=4)
    assert [step for step in range(11) if sync_due(config, step, 10)] == [4, 8, 10]


def test_layers_that_heads_cannot_fill_are_named():
    model, _, _ = _model()
    assert bounded_layers(model, LteConfig(heads=2)) == ["0"]
    assert bounded_layers(model, LteConfig(heads=3)) == []
    assert bounded_layers(model, LteConfig(heads=1, reset=SyncReset.factors)) == []


def test_settings_without_effect_are_refused():
    with pytest.raises(ConfigError, match=r"lte\.adam=clear has no effect"):
        LteConfig(adam=FactorAdam.clear)
