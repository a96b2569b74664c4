"""LTE on every layout of processes against copies of a model that one plain process trains in turn."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from continual.batches import Batch
from continual.method import Term
from launch.training.objective import accumulate
from parallel.engine import Engine
from parallel.exchange import HeadExchange
from parallel.hosted import HostedEngine
from parallel.runtime import start
from parallel.tensor import split_model
from parallel.vocabulary import summed_cross_entropy
from parallel.zero import ParallelConfig
from relora.convert import LoraConfig, low_rank_modules, prepare_base_, to_low_rank
from relora.dense import DenseGradients
from relora.hosted import host_heads
from relora.lte import Exchange, LteConfig, SyncReset, keep_synced_
from relora.optimizer import OptimizerConfig, parameter_groups
from relora.precision import MergePrecision
from relora.sync import HeadSync
from tests.slow_heads import SlowSyncs

SEQUENCES, LENGTH, VOCABULARY, STEPS, EVERY, RANK, ALPHA = 4, 16, 67, 6, 2, 3, 6.0
RATE = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-4}  # Adam amplifies rounding of gradients near eps by lr / eps
WORDS = (0.5, 2.0)


def _model(head, lte=None):
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
    shared = lte is not None and lte.exchange == Exchange.shared
    rank = (lte and lte.rank_of(head)) or RANK
    to_low_rank(model, LoraConfig(rank=rank, alpha=ALPHA), seed=1, head=0 if shared else head, train_down=not shared)
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
def _plain(heads, **settings):
    """Losses by head and step; the base weights, factors and dense parameters of each head at the end."""
    config = LteConfig(heads=heads, **{"sync_every": EVERY, **settings})
    models = [_model(head, config) for head in range(heads)]
    optimizers = [torch.optim.AdamW(_groups(model), betas=RATE["betas"], eps=RATE["eps"]) for model in models]
    slow = SlowSyncs(models, optimizers, config, steps=STEPS)
    losses = [[] for _ in models]
    for step in range(1, STEPS + 1):
        for head, model in enumerate(models):
            losses[head].append(_gradients(model, _batches(head)[step - 1]))
        if config.dense == "all_reduced":
            for parameters in slow.full_rank:
                mean = sum(parameter.grad for parameter in parameters) / heads
                for parameter in parameters:
                    parameter.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        slow.advance(step)
    dense = [
        {n: p.detach() for n, p in model.named_parameters() if "down" not in n or "down_proj" in n} for model in models
    ]
    return losses, slow.shared, [dict(low_rank_modules(model)) for model in models], dense


def _gradients(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    return loss.item()


# ---- the real one


def _engine(runtime, zero, config, dtype=torch.float32):
    model = _model(runtime.head.index, config)
    keep_synced_(model, config)
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


def _exchange(runtime, config):
    return HeadExchange(runtime, heads=config.heads, choice=config.exchange, compression=config.compression)


def _loss(engine, runtime, ids):
    share = len(ids) // runtime.data.size
    mine = ids[runtime.data.index * share :][:share]
    logits = engine(input_ids=mine, use_cache=False).logits[:, :-1]
    return summed_cross_entropy(engine.model, logits.flatten(0, 1), mine[:, 1:].flatten()) / ids[:, 1:].numel()


def _trained(world, heads, tensor, zero, settings, dtype=torch.float32):
    """Losses, reports, what this process holds, layers' exact weights, and the outputs right after the last sync."""
    config = LteConfig(heads=heads, **{"sync_every": EVERY, **settings})
    with start(tensor=tensor, heads=heads) as runtime:
        engine = _engine(runtime, zero, config, dtype)
        others = _exchange(runtime, config)
        syncs = HeadSync(engine.model, config, engine.store, others, seed=3, scale=LoraConfig(alpha=ALPHA).scale)
        if config.dense == "all_reduced":
            engine.share_dense(DenseGradients(others, alike=engine.store.masters_alike))
        losses, reports, bits = [], [], []
        for step, ids in enumerate(_batches(runtime.head.index), 1):
            loss = _loss(engine, runtime, ids)
            engine.backward(loss)
            losses.append(loss.item())
            assert engine.step(RATE["lr"], lambda norm: None).refused is None
            ended = syncs.advance(step, len(reports) + 1, lambda _: [list(WORDS)], everything=step == STEPS)
            for report, said in ended:
                assert said == [list(WORDS)] * heads
                reports.append(report)
                bits.append(_base_bits(engine, dense=report.fragment in (None, config.fragments - 1)))
        with torch.no_grad():
            output = _loss(engine, runtime, _batches(0)[0]).item()
        held = {
            kind: {name: (region, part.detach().clone()) for name, (region, part) in parts.items()}
            for kind, parts in engine.store.held().items()
        }
        wholes = {name: engine.store.whole_weight(layer) for name, layer in low_rank_modules(engine.model).items()}
        engine.close()
        return losses, reports, held, wholes, bits, output, others.sent


def _base_bits(engine, *, dense):
    """Every layer's base weight here, and its extra bits; and the dense parameters' masters if they are wanted."""
    held = []
    for layer in low_rank_modules(engine.model).values():
        part = engine.store.base(layer)
        held += [part.weight.clone()] + ([] if part.extra_bits is None else [part.extra_bits.clone()])
    factors = {id(f) for layer in low_rank_modules(engine.model).values() for f in (layer.down, layer.up)}
    full = [p for p in engine.model.parameters() if p.requires_grad and id(p) not in factors]
    return held + [engine.store.master(p).clone() for p in full if dense]


LAYOUTS = {"one": (2, 1), "data2": (4, 1), "tensor2": (4, 2)}
WAYS = (Exchange.factors, Exchange.dense)
CASES = [  # by any three of the four choices nothing is left out; of all four, every second one is
    (layout, zero, reset, WAYS[(first + second + third) % 2])
    for (first, layout), (second, zero), (third, reset) in itertools.product(
        enumerate(LAYOUTS), enumerate((0, 2, 3)), enumerate(SyncReset)
    )
]


def _of_head(results, count, head):
    return results[head * (count // 2) : (head + 1) * (count // 2)]


@pytest.mark.parametrize(
    ("layout", "zero", "reset", "exchange"), CASES, ids=lambda value: getattr(value, "value", str(value))
)
def test_heads_of_processes_are_copies_trained_in_turn(on_processes, layout, zero, reset, exchange):
    count, tensor = LAYOUTS[layout]
    results = on_processes(_trained, count, 2, tensor, zero, {"reset": reset, "exchange": exchange})
    losses, weights, layers, dense = _plain(2, reset=reset)
    for head in range(2):
        mine = _of_head(results, count, head)
        of_data = mine if tensor == 1 else mine[:1]
        assert [sum(step) for step in zip(*(r[0] for r in of_data), strict=True)] == pytest.approx(
            losses[head], abs=1e-5
        )
        for _, _, held, wholes, *_ in mine:
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


MORE = {
    "delayed": ("data2", 2, {"sync_every": 3, "delay": 1, "exchange": "factors"}),
    "delayed fragments": ("data2", 3, {"sync_every": 4, "fragments": 2, "delay": 1, "reset": "factors"}),
    "nesterov": ("tensor2", 2, {"outer": "nesterov", "outer_lr": 0.7, "outer_momentum": 0.9, "exchange": "dense"}),
    "shared": ("tensor2", 3, {"exchange": "shared"}),
    "shared factors": ("data2", 1, {"exchange": "shared", "reset": "factors", "adam": "clear"}),
    "all reduced": ("data2", 0, {"dense": "all_reduced"}),
    "all reduced in partitions": ("data2", 2, {"dense": "all_reduced", "reset": "factors"}),
    "all reduced in pieces": ("tensor2", 3, {"dense": "all_reduced"}),
    "ranks": ("tensor2", 0, {"ranks": [2, 4], "exchange": "factors"}),
}


@pytest.mark.parametrize("name", MORE)
def test_so_they_are_with_other_settings(on_processes, name):
    layout, zero, settings = MORE[name]
    count, tensor = LAYOUTS[layout]
    results = on_processes(_trained, count, 2, tensor, zero, settings)
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    losses, weights, _, _ = _plain(2, **plain)
    for head in range(2):
        mine = _of_head(results, count, head)
        of_data = mine if tensor == 1 else mine[:1]
        summed = [sum(step) for step in zip(*(r[0] for r in of_data), strict=True)]
        assert summed == pytest.approx(losses[head], abs=1e-5)
        for name_, whole in mine[0][3].items():
            torch.testing.assert_close(whole.double(), weights[name_], rtol=1e-5, atol=1e-5)
    _check_syncs(results, count)


def _together(world, heads, settings):
    """Of heads that share processes: losses by head and step, exact weights, and of each hosted head what it holds."""
    config = LteConfig(heads=heads, **{"sync_every": EVERY, **settings})
    with start(heads=heads) as runtime:
        others = _exchange(runtime, config)
        model = _model(others.hosted[0], config)
        keep_synced_(model, config)
        host_heads(model, others.hosted, seed=1)
        engine = HostedEngine(
            model.train(), _groups(model), runtime=runtime, betas=RATE["betas"], eps=RATE["eps"], max_grad_norm=1.0
        )
        syncs = HeadSync(model, config, engine.store, others, seed=3, scale=LoraConfig(alpha=ALPHA).scale)
        if config.dense == "all_reduced":
            engine.share_dense(DenseGradients(others, alike=True))
        losses, syncs_done, count = [], 0, len(others.hosted)
        for step in range(1, STEPS + 1):
            ids = torch.cat([_batches(head)[step - 1] for head in others.hosted])
            batch = Batch(inputs={"input_ids": ids}, labels=ids)
            targets = [batch.targets // count] * count
            part = accumulate(
                engine,
                Term(name="task", batch=batch),
                targets=targets,
                microbatch_size=SEQUENCES,
                device=runtime.device,
            )
            losses.append(part.tolist())
            results = engine.step(RATE["lr"], [lambda norm: None] * count)
            assert all(result.refused is None for result in results)
            words = [list(WORDS)] * count
            syncs_done += len(syncs.advance(step, syncs_done + 1, lambda _, w=words: w, everything=step == STEPS))
        held = [
            {name: part.clone() for name, (_, part) in engine.store.held(place)["model"].items()}
            for place in range(count)
        ]
        wholes = {name: engine.store.whole_weight(layer) for name, layer in syncs.layers.items()}
        engine.close()
        return list(zip(*losses, strict=True)), wholes, held, others.sent


HOSTED = [
    *((2, 1, {"reset": reset, "exchange": way}) for reset in ("none", "factors") for way in ("factors", "dense")),
    (3, 1, {"exchange": "shared", "reset": "factors", "adam": "clear"}),
    (2, 1, {"sync_every": 4, "fragments": 2, "delay": 1, "reset": "factors"}),
    (2, 1, {"dense": "all_reduced"}),
    (4, 2, {"outer": "nesterov", "outer_lr": 0.7, "outer_momentum": 0.9, "exchange": "dense"}),
]  # fmt: skip


@pytest.mark.parametrize(("heads", "count", "settings"), HOSTED, ids=str)
def test_heads_that_share_processes_are_copies_trained_in_turn(runtime, on_processes, heads, count, settings):
    results = [_together(runtime, heads, settings)] if count == 1 else on_processes(_together, count, heads, settings)
    losses, weights, layers, dense = _plain(heads, **settings)
    for process, (told, wholes, held, sent) in enumerate(results):
        assert (sent == 0) == (count == 1)
        for name, whole in wholes.items():
            torch.testing.assert_close(whole.double(), weights[name], rtol=1e-5, atol=1e-5)
        for head, (mine, own) in enumerate(zip(told, held, strict=True), process * heads // count):
            assert list(mine) == pytest.approx(losses[head], abs=1e-5)
            for name, layer in layers[head].items():
                for leaf in ("down", "up"):
                    there = getattr(layer, leaf).detach()
                    torch.testing.assert_close(own[f"{name}.{leaf}"], there, rtol=1e-5, atol=1e-5)
            for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
                torch.testing.assert_close(own[name], dense[head][name], rtol=1e-5, atol=1e-5)


def _check_syncs(results, count):
    """Equal bits and equal functions after syncs, bytes as planned, reports equal on all heads."""
    for ours, theirs in zip(_of_head(results, count, 0), _of_head(results, count, 1), strict=True):
        for here, there in zip(ours[4], theirs[4], strict=True):
            assert all(torch.equal(one, two) for one, two in zip(here, there, strict=True))
        assert ours[5] == pytest.approx(theirs[5], abs=1e-6), "right after a sync all heads compute the same function"
    for result in results:
        for report, first in zip(result[1], results[0][1], strict=True):
            assert (report.delta_norms, report.cosine_mean) == (first.delta_norms, first.cosine_mean)
    assert sum(report.bytes for report in results[0][1]) == sum(result[6] for result in _of_head(results, count, 0))


@pytest.mark.parametrize("exchange", [Exchange.factors, Exchange.dense])
@pytest.mark.parametrize("zero", [0, 3])
def test_bf16_bases_keep_every_bit_and_stay_equal(on_processes, zero, exchange):
    results = on_processes(_trained, 4, 2, 1, zero, {"exchange": exchange}, torch.bfloat16)
    _check_syncs(results, 4)
    exact = _plain(2)[1]
    start_weights = {name: layer.base() for name, layer in low_rank_modules(_model(0)).items()}
    for name, whole in results[0][3].items():
        moved = (exact[name].float() - start_weights[name]).norm()
        assert (whole - exact[name]).norm() < 0.1 * moved, "bf16 only disturbs what is trained"


def _rank(difference):
    values = torch.linalg.svdvals(difference.double())
    return int((values > 1e-4 * values[0]).sum())


def test_without_resets_the_rank_is_bounded_by_heads_and_with_them_it_grows(on_processes):
    before = {name: layer.base() for name, layer in low_rank_modules(_model(0)).items()}
    cases = [({}, 1), ({"reset": "factors"}, STEPS // EVERY), ({"sync_every": 3, "delay": 1}, 1)]
    for settings, draws in cases:
        wholes = on_processes(_trained, 2, 2, 1, 0, settings)[0][3]
        ranks = [_rank(wholes[name] - weight) for name, weight in before.items()]
        bound = 2 * RANK * draws
        full = [min(weight.shape) for weight in before.values()]
        assert ranks == [min(bound, most) for most in full]


def test_the_sums_of_a_report_are_those_of_the_changes(on_processes):
    """Norms and cosines from Gram matrices, or from pieces of dense changes, against the plain changes."""
    settings = [{"reset": "factors", "exchange": way} for way in ("factors", "dense")]
    reports = [on_processes(_trained, 4, 2, 2, 3, one)[0][1][0] for one in settings]
    assert [report.by_factors for report in reports] == [14, 0]
    changes = []
    for head in range(2):
        model = _model(head)
        optimizer = torch.optim.AdamW(_groups(model), betas=RATE["betas"], eps=RATE["eps"])
        for ids in _batches(head)[:EVERY]:
            _gradients(model, ids)
            optimizer.step()
            optimizer.zero_grad()
        changes.append(torch.cat([layer.delta().flatten() for layer in low_rank_modules(model).values()]))
    for report in reports:
        assert report.delta_norms == pytest.approx([one.norm().item() for one in changes], rel=1e-4)
        cosine = F.cosine_similarity(*changes, dim=0).item()
        assert report.cosine_mean == pytest.approx(cosine, abs=1e-4)
        mean = sum(changes) / 2
        assert report.shrinkage == pytest.approx((mean.norm() / (sum(report.delta_norms) / 2)).item(), rel=1e-4)


_COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor", "reduce",
                "barrier", "all_to_all_single", "reduce_scatter", "all_gather_object", "send", "recv")  # fmt: skip


def _partners(world, zero):
    """Whom this process talked to in steps without a sync, and in one with a sync."""
    with start(heads=2) as runtime:
        config = LteConfig(heads=2, sync_every=1)
        engine = _engine(runtime, zero, config)
        syncs = HeadSync(engine.model, config, engine.store, _exchange(runtime, config), seed=3, scale=float)
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
        syncs.advance(1, 1, lambda _: [[1.0]], everything=False)
        try:
            for name in _COLLECTIVES:
                setattr(dist, name, noting(name))
            update(3)
            update(4)
            between = set(met)
            syncs.advance(2, 2, lambda _: [[1.0]], everything=False)
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


def _refusing(world, zero, dtype):
    """Updates of two heads that share dense gradients, the second of which refuses the first one."""
    config = LteConfig(heads=2, dense="all_reduced")
    with start(heads=2) as runtime:
        engine = _engine(runtime, zero, config, dtype)
        engine.share_dense(DenseGradients(_exchange(runtime, config), alike=engine.store.masters_alike))
        told, masters = [], []
        for number, ids in enumerate(_batches(runtime.head.index)[:2]):
            engine.backward(_loss(engine, runtime, ids))
            refuses = number == 0 and runtime.head.index == 1
            told.append(engine.step(RATE["lr"], lambda norm, no=refuses: "too odd" if no else None).refused)
            masters.append(_base_bits(engine, dense=True))
        engine.close()
        return told, masters


@pytest.mark.parametrize(("zero", "dtype"), [(0, torch.bfloat16), (2, torch.bfloat16), (3, torch.float32)])
def test_heads_that_share_dense_gradients_refuse_together_and_stay_equal(on_processes, zero, dtype):
    first, second = on_processes(_refusing, 2, zero, dtype)
    assert first[0] == ["another head refused it", None]
    assert second[0] == ["too odd", None]
    for ours, theirs in zip(first[1], second[1], strict=True):
        assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(*first[1], strict=True)), "the second one updates"
