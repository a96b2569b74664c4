"""Syncs of several heads, which live in threads here, against heads that are copies with private base weights."""

import threading

import pytest
import torch
from torch import nn

from relora.convert import LoraConfig, low_rank_modules, to_low_rank
from relora.heads import Way
from relora.initialize import draw_down
from relora.lte import Exchange, LteConfig, bounded_layers, keep_synced_
from relora.restart import PlainStore
from relora.sync import HeadSync
from tests.slow_heads import SlowSyncs

WIDTH, RANK, ALPHA, STEPS = 12, 2, 4.0, 11


class _Table:
    """Where the threads of all heads meet."""

    def __init__(self, heads):
        self.barrier, self.told = threading.Barrier(heads, timeout=10), {}

    def swap(self, head, value):
        self.told[head] = value
        self.barrier.wait()
        everyone = dict(sorted(self.told.items()))
        self.barrier.wait()
        return everyone


class _Heads:
    """Access from one thread to the heads of the others."""

    def __init__(self, table, count, head, factors=True, members=None):
        self.count, self.hosted, self.sent, self.factors = count, [head], 0, factors
        self.table, self.head = table, head

    def by_factors(self, factors, part, *, alike):
        return self.factors

    def exchange(self, parcels, words, *, background=False):
        delivery = _Delivery(self, parcels, words[0])
        if background:  # what is asked for later must be what there is now
            delivery.results = [delivery.carry(parcel) for parcel in parcels]
        return delivery


class _Delivery:
    def __init__(self, heads, parcels, words):
        self.heads, self.parcels, self.results = heads, iter(parcels), None
        told = heads.table.swap(heads.head, list(words))
        self.members, self.words = list(told), list(told.values())
        self.weights = [one[0] / sum(w[0] for w in self.words) for one in self.words]
        self.sums = torch.zeros(heads.count, heads.count, dtype=torch.float64)

    def carry(self, parcel):
        (own,) = parcel.own()
        padded = torch.zeros(parcel.entries)
        padded[: own.numel()] = own
        everyone = list(self.heads.table.swap(self.heads.head, padded).values())
        if parcel.way is Way.gather:
            return everyone
        if parcel.replicas:
            stacked = torch.stack(everyone).double()
            self.sums += stacked @ stacked.t()
        return [sum(w * one.double() for w, one in zip(self.weights, everyone, strict=True)).float()]

    def result(self):
        return self.results.pop(0) if self.results is not None else self.carry(next(self.parcels))

    def products(self):
        return self.sums


def _model(head, config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    shared = config.exchange == Exchange.shared
    lora = LoraConfig(rank=config.rank_of(head) or RANK, alpha=ALPHA, target_modules=["0", "3"])
    to_low_rank(model, lora, seed=1, head=0 if shared else head, train_down=not shared)
    return model


def _optimizer(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, eps=1e-4)


def _update(model, optimizer, head, step):
    generator = torch.Generator().manual_seed(100 * step + head)
    x, y = torch.randn(2, 8, WIDTH, generator=generator)
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _slow(heads, config, weights=None):
    models = [_model(head, config) for head in range(heads)]
    optimizers = [_optimizer(model) for model in models]
    syncs = SlowSyncs(models, optimizers, config, steps=STEPS, weights=weights)
    losses = []
    for step in range(1, STEPS + 1):
        losses.append(
            [_update(model, one, h, step) for h, (model, one) in enumerate(zip(models, optimizers, strict=True))]
        )
        syncs.advance(step)
    return losses, syncs


def _train(table, head, model, config, factors, weight, results):
    optimizer = _optimizer(model)
    heads = _Heads(table, config.heads, head, factors)
    syncs = HeadSync(model, config, PlainStore(optimizer), heads, seed=3, scale=LoraConfig(alpha=ALPHA).scale)
    losses, reports = [], []
    for step in range(1, STEPS + 1):
        losses.append(_update(model, optimizer, head, step))
        ended = syncs.advance(step, len(reports) + 1, lambda _: [[weight, 7.0]], everything=step == STEPS)
        reports += [report for report, words in ended]
    results[head] = losses, model, reports


def _fast(config, factors=True, weights=None):
    table, results = _Table(config.heads), {}
    models = [_model(head, config) for head in range(config.heads)]
    for model in models:
        keep_synced_(model, config)
    threads = [
        threading.Thread(
            target=_train, args=(table, head, model, config, factors, weights[head] if weights else 1.0, results)
        )
        for head, model in enumerate(models)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[head] for head in range(config.heads)]


SETTINGS = {
    "plain": {},
    "factors": {"reset": "factors"},
    "cleared": {"reset": "factors", "adam": "clear"},
    "scaled": {"reset": "factors", "adam": "scale", "adam_scale": 0.25},
    "seldom": {"reset": "factors", "reset_every": 2},
    "fragments": {"fragments": 2},
    "delayed": {"delay": 2},
    "delayed factors": {"delay": 2, "reset": "factors"},
    "delayed seldom": {"delay": 1, "fragments": 2, "reset": "factors", "reset_every": 2, "adam": "clear"},
    "nesterov": {"outer": "nesterov", "outer_lr": 0.7, "outer_momentum": 0.9},
    "delayed sgd": {"outer": "sgd", "outer_lr": 0.5, "outer_momentum": 0.8, "delay": 1},
    "shared": {"exchange": "shared"},
    "shared factors": {"exchange": "shared", "reset": "factors", "delay": 1},
    "ranks": {"ranks": [1, 2, 4]},
    "ranks by dense": {"ranks": [1, 2, 4], "reset": "factors", "exchange": "dense"},
}


@pytest.mark.parametrize("exchange", ["factors", "dense"])
@pytest.mark.parametrize("name", SETTINGS)
def test_heads_are_copies_with_private_base_weights(name, exchange):
    config = LteConfig(heads=3, sync_every=4, **{"exchange": exchange, **SETTINGS[name]})
    losses, slow = _slow(3, config)
    results = _fast(config, factors=exchange == "factors")
    for head, (mine, model, _) in enumerate(results):
        assert mine == pytest.approx([step[head] for step in losses], abs=1e-5)
        for layer, weight in slow.shared.items():
            torch.testing.assert_close(low_rank_modules(model)[layer].weight.double(), weight, rtol=1e-5, atol=1e-6)
            for leaf in ("down", "up"):
                expected = getattr(slow.layers[head][layer], leaf)
                torch.testing.assert_close(
                    getattr(low_rank_modules(model)[layer], leaf), expected, rtol=1e-4, atol=1e-5
                )
        for parameters, parameter in zip(slow.dense, _dense(model), strict=True):
            torch.testing.assert_close(parameter, parameters[head], rtol=1e-5, atol=1e-6)


def _dense(model):
    low = low_rank_modules(model).values()
    factors = {id(factor) for layer in low for factor in (layer.down, layer.up)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in factors]


@pytest.mark.parametrize("name", ["plain", "factors", "shared"])
def test_heads_count_by_their_weights(name):
    config = LteConfig(heads=3, sync_every=4, weight="tokens", **{"exchange": "factors", **SETTINGS[name]})
    weights = [100.0, 50.0, 10.0]
    losses, slow = _slow(3, config, [weight / 160 for weight in weights])
    for head, (mine, model, reports) in enumerate(_fast(config, weights=weights)):
        assert mine == pytest.approx([step[head] for step in losses], abs=1e-5)
        for layer, weight in slow.shared.items():
            torch.testing.assert_close(low_rank_modules(model)[layer].weight.double(), weight, rtol=1e-5, atol=1e-6)
        assert reports[0].weights == pytest.approx([weight / 160 for weight in weights])


@pytest.mark.parametrize("name", ["plain", "factors", "fragments", "nesterov"])
def test_after_any_sync_the_heads_hold_the_very_same_base_weights(name):
    config = LteConfig(heads=3, sync_every=4, exchange="factors", **SETTINGS[name])
    models = [model for _, model, _ in _fast(config)]
    for name, layer in low_rank_modules(models[0]).items():
        assert all(torch.equal(low_rank_modules(model)[name].weight, layer.weight) for model in models[1:])
    x = torch.randn(5, WIDTH)
    outputs = [model(x) for model in models]
    assert all((output - outputs[0]).abs().max() < 1e-6 for output in outputs), "the last sync is of everything"


@pytest.mark.parametrize("factors", [True, False])
@pytest.mark.parametrize("reset", ["none", "factors"])
def test_a_sync_keeps_the_function_and_then_takes_up_only_what_is_new(reset, factors):
    config = LteConfig(heads=1, sync_every=1, reset=reset)
    model = _model(0, config)
    keep_synced_(model, config)
    optimizer = _optimizer(model)
    heads = _Heads(_Table(1), 1, 0, factors)
    syncs = HeadSync(model, config, PlainStore(optimizer), heads, seed=4, scale=LoraConfig(alpha=ALPHA).scale)
    layer, x = low_rank_modules(model)["3"], torch.randn(5, WIDTH)
    for step in (1, 2, 3):
        _update(model, optimizer, 0, step)
        before, weight, delta = model(x).detach(), layer.weight.clone(), layer.delta()
        squared = sum(one.delta().square().sum() for one in low_rank_modules(model).values())
        ((report, _),) = syncs.advance(step, step, lambda _: [[1.0]], everything=False)
        torch.testing.assert_close(model(x), before)
        torch.testing.assert_close(layer.weight, weight + delta)
        assert layer.delta().norm() < 1e-6
        assert report.delta_norms == [pytest.approx(squared.sqrt().item(), rel=1e-5)]
        assert (report.by_factors, report.shrinkage, report.cosine_mean) == (2 * factors, pytest.approx(1.0), None)
        if reset == "factors":
            assert torch.equal(layer.down, draw_down("3", (RANK, WIDTH), seed=4, restart_index=step))
            assert not layer.up.any()
    assert optimizer.state[layer.up]["step"] == 3, "Adam is kept"


def _sgd_head(table, head, model, config, results):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    heads = _Heads(table, config.heads, head)
    syncs = HeadSync(model, config, PlainStore(optimizer), heads, seed=3, scale=LoraConfig(alpha=ALPHA).scale)
    for step in range(1, STEPS + 1):
        _update(model, optimizer, head, step)
        syncs.advance(step, step, lambda _: [[1.0]], everything=False)
    results[head] = model


def test_with_a_sync_after_every_step_of_sgd_heads_are_one_layer_with_the_mean_of_products():
    """W + s/N sum_n up_n down_n, of which each head's factors follow the gradient of that head's batch."""
    config = LteConfig(heads=3, sync_every=1)

    def layer_of(head):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
        to_low_rank(model, LoraConfig(rank=RANK, alpha=ALPHA, target_modules=["0"]), seed=1, head=head)
        return model

    table, results, models = _Table(3), {}, [layer_of(head) for head in range(3)]
    start, scale = models[0][0].weight.detach().double(), models[0][0].scaling
    pairs = [(model[0].down.detach().double(), model[0].up.detach().double()) for model in models]
    for model in models:
        keep_synced_(model, config)
    threads = [
        threading.Thread(target=_sgd_head, args=(table, head, model, config, results))
        for head, model in enumerate(models)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for step in range(1, STEPS + 1):
        weight = start + scale / 3 * sum(up @ down for down, up in pairs)
        for head, (down, up) in enumerate(pairs):
            x, y = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(100 * step + head)).double()
            gradient = 2 / y.numel() * (x @ weight.t() - y).t() @ x
            pairs[head] = down - 0.1 * scale * up.t() @ gradient, up - 0.1 * scale * gradient @ down.t()
    expected = start + scale / 3 * sum(up @ down for down, up in pairs)
    assert (expected - start).norm() > 0.05 * start.norm()
    for model in results.values():
        torch.testing.assert_close(model[0].weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_fragments_take_turns_and_all_layers_end_together():
    config = LteConfig(heads=2, sync_every=4, fragments=2, delay=1)
    reports = _fast(config)[0][2]
    assert [(report.fragment, report.layers) for report in reports] == [(0, 1), (1, 1)] * 2 + [(0, 1), (None, 2)]


def test_what_the_heads_share_bounds_the_rank_unless_factors_are_drawn_anew():
    model = _model(0, LteConfig())
    for settings, bounded in (
        ({"heads": 5}, True),
        ({"heads": 6}, False),
        ({"heads": 6, "exchange": "shared"}, True),
        ({"heads": 2, "ranks": [6, 5]}, True),
        ({"heads": 2, "ranks": [6, 6]}, False),
        ({"heads": 1, "reset": "factors"}, False),
    ):
        assert bool(bounded_layers(model, LteConfig(**settings))) == bounded
