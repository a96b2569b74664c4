"""LTE on every layout of processes against copies of a model that one plain process trains in turn."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from parallel.collectives import sum_over
from parallel.engine import Engine
from parallel.exchange import HeadExchange
from parallel.runtime import start
from parallel.sync_traffic import SyncedLayer, factors_are_fewer, layer_bytes, sync_bytes
from parallel.tensor import split_model
from parallel.vocabulary import summed_cross_entropy
from parallel.zero import ParallelConfig
from relora.convert import LoraConfig, low_rank_modules, prepare_base_, to_low_rank
from relora.initialize import draw_down
from relora.lte import Exchange, FactorAdam, LteConfig, SyncReset, keep_synced_, sync
from relora.optimizer import OptimizerConfig, parameter_groups
from relora.precision import MergePrecision

SEQUENCES, LENGTH, VOCABULARY, STEPS, EVERY, RANK = 4, 16, 67, 6, 2, 3
RATE = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-4}  # Adam amplifies rounding of gradients near eps by lr / eps
WORDS = (0.5, 2.0)


def _model(head):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=49,
        vocab_size=VOCABULARY,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.use_cache = False
    to_low_rank(model, LoraConfig(rank=RANK, alpha=6.0), seed=1, head=head)
    return model


def _batches(head):
    """SEQUENCES sequences for each step of a head."""
    generator = torch.Generator().manual_seed(5 + head)
    return [torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator) for _ in range(STEPS)]


def _groups(model):
    return parameter_groups(
        model, OptimizerConfig(lr=RATE["lr"], betas=list(RATE["betas"]), eps=RATE["eps"], weight_decay=0.1)
    )


# ---- the slow implementation: no synced factors, but a private base weight for each head


@functools.cache
def _plain(heads, reset, adam):
    """Losses by head and step; the base weights, factors and dense parameters of each head at the end."""
    models = [_model(head) for head in range(heads)]
    optimizers = [torch.optim.AdamW(_groups(model), betas=RATE["betas"], eps=RATE["eps"]) for model in models]
    shared = {name: layer.weight.detach().double() for name, layer in low_rank_modules(models[0]).items()}
    merged = [{name: torch.zeros_like(weight) for name, weight in shared.items()} for _ in models]
    losses = [[] for _ in models]
    for step in range(1, STEPS + 1):
        for head, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            losses[head].append(_update(model, optimizer, _batches(head)[step - 1]))
        if step % EVERY == 0:
            _plain_sync(models, optimizers, shared, merged, reset, adam, step // EVERY)
    dense = [
        {n: p.detach() for n, p in model.named_parameters() if "down" not in n or "down_proj" in n} for model in models
    ]
    return losses, shared, [dict(low_rank_modules(model)) for model in models], dense


def _update(model, optimizer, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def _plain_sync(models, optimizers, shared, merged, reset, adam, index):
    layers = [low_rank_modules(model) for model in models]
    for name, weight in shared.items():
        products = [one[name].scaling * one[name].up.double() @ one[name].down.double() for one in layers]
        weight.add_(sum(now - before[name] for now, before in zip(products, merged, strict=True)) / len(models))
        for head, one in enumerate(layers):
            layer, state = one[name], optimizers[head].state
            if reset == SyncReset.none:
                merged[head][name] = products[head]
            else:
                products[head].zero_()
                layer.down.copy_(draw_down(name, layer.down.shape, seed=3, head=head, restart_index=index))
                layer.up.zero_()
                for value in [*state[layer.down].values(), *state[layer.up].values()] if adam == "clear" else []:
                    value.zero_()
            layer.weight.copy_(weight - products[head])
    factors = {id(factor) for layer in layers[0].values() for factor in (layer.down, layer.up)}
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        if parameters[0].requires_grad and id(parameters[0]) not in factors:
            mean = torch.stack([p.detach() for p in parameters]).mean(0)
            for parameter in parameters:
                parameter.copy_(mean)


# ---- the real one


def _engine(runtime, zero, reset, dtype, lora_heads):
    model = _model(runtime.head.index)
    keep_synced_(model, LteConfig(heads=lora_heads, reset=reset))
    regions = split_model(model, runtime.tensor)
    prepare_base_(model, dtype, MergePrecision.split)
    model.train()
    return Engine(
        model,
        _groups(model),
        runtime=runtime,
        parallel=ParallelConfig(zero_stage=zero, tensor=runtime.tensor.size),
        regions=regions,
        betas=RATE["betas"],
        eps=RATE["eps"],
        microbatch_size=SEQUENCES // runtime.data.size,
        max_grad_norm=1.0,
    )


def _loss(engine, runtime, ids):
    share = len(ids) // runtime.data.size
    mine = ids[runtime.data.index * share :][:share]
    logits = engine(input_ids=mine, use_cache=False).logits[:, :-1]
    return summed_cross_entropy(engine.model, logits.flatten(0, 1), mine[:, 1:].flatten()) / ids[:, 1:].numel()


def _trained(world, heads, tensor, zero, reset, exchange, adam="keep", dtype=torch.float32):
    """Losses, reports, what this process holds, layers' exact weights, and the outputs right after the last sync."""
    with start(tensor=tensor, heads=heads) as runtime:
        engine = _engine(runtime, zero, reset, dtype, heads)
        config = LteConfig(heads=heads, reset=reset, exchange=exchange, adam=FactorAdam(adam))
        others = HeadExchange(runtime, exchange)
        losses, reports, bits = [], [], []
        for step, ids in enumerate(_batches(runtime.head.index), 1):
            loss = _loss(engine, runtime, ids)
            engine.backward(loss)
            losses.append(loss.item())
            assert engine.step(RATE["lr"], lambda norm: None).refused is None
            if step % EVERY == 0:
                sent = others.sent
                index = step // EVERY
                report, said = sync(engine.model, config, engine.store, others, seed=3, sync_index=index, words=WORDS)
                assert said == [list(WORDS)] * heads
                reports.append((report, others.sent - sent, _planned(engine, config, runtime)))
                bits.append(_base_bits(engine))
        with torch.no_grad():
            output = _loss(engine, runtime, _batches(0)[0]).item()
        held = {
            kind: {name: (region, part.detach().clone()) for name, (region, part) in parts.items()}
            for kind, parts in engine.store.held().items()
        }
        wholes = {name: engine.store.whole_weight(layer) for name, layer in low_rank_modules(engine.model).items()}
        engine.close()
        return losses, reports, held, wholes, bits, output


def _planned(engine, config, runtime):
    layers = low_rank_modules(engine.model).values()
    data, whole = runtime.data.size, engine.store.masters_alike
    sizes, factors = [], set()
    for layer in layers:
        down, up = engine.store.factors(layer)
        factors |= {id(layer.down), id(layer.up)}
        part = engine.store.base(layer).weight
        alike = not hasattr(layer.weight, "ds_id")
        sizes.append(SyncedLayer(factors=down.numel() + up.numel(), part=part.numel(), alike=alike))
    dense = [p for p in engine.model.parameters() if p.requires_grad and id(p) not in factors]
    entries = sum(engine.store.master(p).numel() for p in dense)
    return sync_bytes(config, sizes, data=data, dense=-(-entries // data) if whole else entries, words=len(WORDS))


def _base_bits(engine):
    """Every layer's base weight here, and its extra bits; and the dense parameters' masters."""
    held = []
    for layer in low_rank_modules(engine.model).values():
        part = engine.store.base(layer)
        held += [part.weight.clone()] + ([] if part.extra_bits is None else [part.extra_bits.clone()])
    factors = {id(f) for layer in low_rank_modules(engine.model).values() for f in (layer.down, layer.up)}
    dense = [p for p in engine.model.parameters() if p.requires_grad and id(p) not in factors]
    return held + [engine.store.master(p).clone() for p in dense]


LAYOUTS = {"one": (2, 1), "data2": (4, 1), "tensor2": (4, 2)}
CASES = [
    (layout, zero, reset, exchange)
    for (layout, zero), reset, exchange in itertools.product(
        [
            ("one", 0),
            ("one", 2),
            ("one", 3),
            ("data2", 0),
            ("data2", 2),
            ("data2", 3),
            ("tensor2", 0),
            ("tensor2", 2),
            ("tensor2", 3),
        ],
        SyncReset,
        (Exchange.factors, Exchange.dense),
    )
]


def _of_head(results, count, head):
    return results[head * (count // 2) : (head + 1) * (count // 2)]


@pytest.mark.parametrize(
    ("layout", "zero", "reset", "exchange"), CASES, ids=lambda value: getattr(value, "value", str(value))
)
def test_heads_of_processes_are_copies_trained_in_turn(on_processes, layout, zero, reset, exchange):
    count, tensor = LAYOUTS[layout]
    results = on_processes(_trained, count, 2, tensor, zero, reset, exchange)
    losses, weights, layers, dense = _plain(2, reset, "keep")
    for head in range(2):
        mine = _of_head(results, count, head)
        of_data = mine if tensor == 1 else mine[:1]
        assert [sum(step) for step in zip(*(r[0] for r in of_data), strict=True)] == pytest.approx(
            losses[head], abs=1e-5
        )
        for _, _, held, wholes, _, _ in mine:
            for name, whole in wholes.items():
                torch.testing.assert_close(whole.double(), weights[name], rtol=1e-5, atol=1e-5)
            for name, (region, part) in held["model"].items():
                leaf = name.rpartition(".")[2]
                if leaf in ("down", "up"):
                    expected = region.take(getattr(layers[head][name.rpartition(".")[0]], leaf).detach())
                elif name in dense[head] and name.removesuffix(".weight") not in layers[head]:
                    expected = region.take(dense[head][name])
                else:
                    continue
                torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    _check_syncs(results, count)


def _check_syncs(results, count):
    """Equal bits and equal functions after syncs, bytes as planned, reports equal on all heads."""
    for ours, theirs in zip(_of_head(results, count, 0), _of_head(results, count, 1), strict=True):
        for here, there in zip(ours[4], theirs[4], strict=True):
            assert all(torch.equal(one, two) for one, two in zip(here, there, strict=True))
        assert ours[5] == pytest.approx(theirs[5], abs=1e-6), "right after a sync all heads compute the same function"
    for result in results:
        for report, sent, planned in result[1]:
            assert sent == planned
            first = results[0][1][report.sync - 1][0]
            assert (report.delta_norms, report.cosine_mean) == (first.delta_norms, first.cosine_mean)
    for number, (report, _, _) in enumerate(results[0][1]):
        assert report.bytes == sum(result[1][number][1] for result in _of_head(results, count, 0))


def test_new_draws_may_start_with_cleared_adam_state(on_processes):
    results = on_processes(_trained, 2, 2, 1, 2, SyncReset.factors, Exchange.auto, "clear")
    losses = _plain(2, SyncReset.factors, "clear")[0]
    assert [result[0] for result in results] == [pytest.approx(one, abs=1e-5) for one in losses]
    assert losses != _plain(2, SyncReset.factors, "keep")[0]


@pytest.mark.parametrize("exchange", [Exchange.factors, Exchange.dense])
@pytest.mark.parametrize("zero", [0, 3])
def test_bf16_bases_keep_every_bit_and_stay_equal(on_processes, zero, exchange):
    results = on_processes(_trained, 4, 2, 1, zero, SyncReset.none, exchange, "keep", torch.bfloat16)
    _check_syncs(results, 4)
    exact = _plain(2, SyncReset.none, "keep")[1]
    start_weights = {name: layer.base() for name, layer in low_rank_modules(_model(0)).items()}
    for name, whole in results[0][3].items():
        moved = (exact[name].float() - start_weights[name]).norm()
        assert (whole - exact[name]).norm() < 0.1 * moved, "bf16 only disturbs what is trained"


def _rank(difference):
    values = torch.linalg.svdvals(difference.double())
    return int((values > 1e-4 * values[0]).sum())


def test_without_resets_the_rank_is_bounded_by_heads_and_with_them_it_grows(on_processes):
    before = {name: layer.base() for name, layer in low_rank_modules(_model(0)).items()}
    for reset in SyncReset:
        wholes = on_processes(_trained, 2, 2, 1, 0, reset, Exchange.auto)[0][3]
        ranks = [_rank(wholes[name] - weight) for name, weight in before.items()]
        bound = 2 * RANK * (1 if reset == SyncReset.none else STEPS // EVERY)
        full = [min(weight.shape) for weight in before.values()]
        assert ranks == [min(bound, most) for most in full]


def test_the_sums_of_a_report_are_those_of_the_changes(on_processes):
    """Norms and cosines from Gram matrices, or from pieces of dense changes, against the plain changes."""
    reports = [on_processes(_trained, 4, 2, 2, 3, SyncReset.factors, way)[0][1][0][0] for way in ("factors", "dense")]
    assert [report.by_factors for report in reports] == [14, 0]
    changes = []
    for head in range(2):
        model = _model(head)
        optimizer = torch.optim.AdamW(_groups(model), betas=RATE["betas"], eps=RATE["eps"])
        for ids in _batches(head)[:EVERY]:
            _update(model, optimizer, ids)
        changes.append(torch.cat([layer.delta().flatten() for layer in low_rank_modules(model).values()]))
    for report in reports:
        assert report.delta_norms == pytest.approx([one.norm().item() for one in changes], rel=1e-4)
        cosine = F.cosine_similarity(*changes, dim=0).item()
        assert report.cosine_mean == pytest.approx(cosine, abs=1e-4)
        mean = sum(changes) / 2
        assert report.shrinkage == pytest.approx((mean.norm() / (sum(report.delta_norms) / 2)).item(), rel=1e-4)


def _talk(world, heads, alike):
    with start(heads=heads) as runtime:
        others = HeadExchange(runtime, Exchange.auto)
        own = torch.arange(7.0) + 10.0**others.index
        if not alike:
            own += 100 * runtime.data.index
        mean, products = others.mean(own, alike=alike)
        sent = others.sent
        told = others.gather(own, alike=alike)
        shares = sum_over(runtime.batch, products.clone()) / runtime.data.size
        return mean, torch.stack(told), sent, others.sent - sent, shares


@pytest.mark.parametrize(("heads", "count", "alike"), [(3, 3, True), (2, 4, True), (2, 4, False)])
def test_a_mean_is_made_in_order_of_heads_and_every_byte_counts(on_processes, heads, count, alike):
    data = count // heads
    values = torch.stack([torch.arange(7.0) + 10.0**head for head in range(heads)])
    of_data = [values + (0 if alike else 100 * index) for index in range(data)]
    length = -(-7 // data) if alike else 7
    for rank, (mean, told, sent_mean, sent_all, shares) in enumerate(on_processes(_talk, count, heads, alike)):
        mine = of_data[rank % data]
        assert torch.equal(mean, (mine.double().sum(0) / heads).float())
        assert torch.equal(told, mine)
        assert sent_mean == 2 * (heads - 1) * -(-length // heads) * 4
        assert sent_all == (heads - 1) * length * 4
        torch.testing.assert_close(shares, sum(one.double() @ one.double().t() for one in of_data) / data)


def test_the_crossover_is_where_heads_times_rank_reaches_twice_the_harmonic_size():
    for heads, (out, inputs) in itertools.product((2, 4, 8), ((64, 64), (128, 32))):
        crossover = 2 * out * inputs / (out + inputs) / heads
        for rank in range(1, 65):
            fewer = factors_are_fewer(heads, factors=rank * (out + inputs), part=out * inputs)
            assert fewer == (rank <= crossover)
    layer = SyncedLayer(factors=4 * 128, part=64 * 64, alike=True)
    for data in (1, 4):
        configs = {way: LteConfig(heads=8, exchange=way, reset="factors") for way in Exchange}
        by = {way.value: layer_bytes(config, layer, data=data) for way, config in configs.items()}
        assert by == {"auto": 7 * 2048 / data, "factors": 7 * 2048 / data, "dense": 2 * 7 * 2048 / data}


_COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor", "reduce",
                "barrier", "all_to_all_single", "reduce_scatter", "all_gather_object", "send", "recv")  # fmt: skip


def _partners(world, zero):
    """Whom this process talked to in steps without a sync, and in one with a sync."""
    with start(heads=2) as runtime:
        engine = _engine(runtime, zero, SyncReset.none, torch.float32, 2)
        config, others = LteConfig(heads=2), HeadExchange(runtime, Exchange.auto)
        met, real = set(), {name: getattr(dist, name) for name in _COLLECTIVES}

        def noting(name):
            def call(*args, group=None, **kwargs):
                met.update(dist.get_process_group_ranks(group or dist.group.WORLD))
                return real[name](*args, group=group, **kwargs)

            return call

        def update(step):
            engine.backward(_loss(engine, runtime, _batches(runtime.head.index)[step]))
            engine.step(RATE["lr"], lambda norm: None)

        for step in range(3):  # stage 3 sets itself up together with everybody in its first steps
            update(step)
        sync(engine.model, config, engine.store, others, seed=3, sync_index=1)
        try:
            for name in _COLLECTIVES:
                setattr(dist, name, noting(name))
            update(3)
            update(4)
            between = set(met)
            sync(engine.model, config, engine.store, others, seed=3, sync_index=2)
        finally:
            for name in _COLLECTIVES:
                setattr(dist, name, real[name])
        engine.close()
        return between, met, set(runtime.model.ranks)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_heads_do_not_talk_between_syncs(on_processes, zero):
    for between, ever, head in on_processes(_partners, 4, zero):
        assert between == head
        assert ever > head
