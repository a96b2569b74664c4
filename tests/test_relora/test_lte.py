"""LTE's mathematics without processes: the layer that keeps synced factors, and a sync of one head."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from relora.errors import ConfigError
from relora.initialize import draw_down
from relora.linear import LowRankLinear
from relora.lte import LteConfig, SyncReset, keep_synced_
from relora.precision import MergePrecision

OUT, IN, RANK = 7, 5, 2


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


def test_fragments_end_in_turn_and_begin_so_much_earlier():
    config = LteConfig(sync_every=10, fragments=3, delay=2)
    assert {step: config.ending(step) for step in range(21) if config.ending(step) is not None} == {
        3: 0, 6: 1, 10: 2, 13: 0, 16: 1, 20: 2
    }  # fmt: skip
    assert [step for step in range(21) if config.beginning(step) is not None] == [1, 4, 8, 11, 14, 18]
    plain = LteConfig(sync_every=4)
    assert [step for step in range(13) if plain.beginning(step) is not None] == [4, 8, 12]


def test_factors_are_drawn_anew_at_every_so_many_th_sync():
    config = LteConfig(sync_every=4, fragments=2, reset="factors", reset_every=2)
    assert [step for step in (2, 4, 6, 8, 10, 12, 14, 16) if config.resets_at(step)] == [6, 8, 14, 16]
    assert not LteConfig(sync_every=4).resets_at(4)


REFUSED = [
    ({"adam": "clear"}, r"lte\.adam=clear has no effect with lte\.reset=none"),
    ({"reset_every": 2}, r"lte\.reset_every=2 has no effect with lte\.reset=none"),
    ({"reset": "factors", "adam_scale": 0.5}, "belong together"),
    ({"reset": "factors", "adam": "scale"}, "belong together"),
    ({"reset": "factors", "adam": "scale", "adam_scale": 1.0}, r"lte\.adam_scale must be between 0"),
    ({"outer_lr": 0.7}, r"have no effect with lte\.outer=none"),
    ({"outer": "sgd", "outer_momentum": 0.0}, r"lte\.outer_lr must be above 0"),
    ({"outer": "sgd", "outer_lr": 1.0, "outer_momentum": 1.0}, r"lte\.outer_momentum must be in \[0, 1\)"),
    ({"outer": "nesterov", "outer_lr": 1.0, "outer_momentum": 0.0}, "nesterov needs"),
    ({"fragments": 11}, r"lte\.fragments=11 must be at most lte\.sync_every=10"),
    ({"fragments": 2, "delay": 5}, r"lte\.delay=5 must be 0 or more, and below .* = 5 steps"),
    ({"ranks": [4]}, r"lte\.ranks must be 2 ranks of at least 1"),
]


@pytest.mark.parametrize(
    ("settings", "message"), REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_settings_that_cannot_be_or_have_no_effect_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LteConfig(**settings)
