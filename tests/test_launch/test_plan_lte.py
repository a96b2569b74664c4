"""What `plan` says of LTE's heads against engines that really train and sync, and what it says of links."""

import json

import pytest
import torch

from continual.batches import Batch
from launch import exits, train
from launch.plan import main
from launch.planning.estimate import Layout, cost
from launch.planning.microbatch import Ledger, run_microbatch
from launch.planning.plan_links import study
from launch.planning.skeleton import Skeletons
from launch.planning.sync_estimate import WORDS
from launch.training.objective import summed_loss
from launch.training.phase import make_engine, make_phase
from launch.training.recomputation import Checkpointing
from launch.watching.records import read_records
from parallel.exchange import HeadExchange
from parallel.link_model import Link
from parallel.runtime import start
from relora.convert import prepare_base_
from relora.dense import DenseGradients
from relora.lte import DenseSync
from relora.sync import HeadSync
from tests.test_launch.test_plan import LENGTH, LOW_RANK, MODEL, SEQUENCES, VOCABULARY, configured, live_tensors

HEADS = 2
SYNCED = [*MODEL, "lora.rank=8", "lte=heads", f"lte.heads={HEADS}", "lte.sync_every=2", "evaluation.every=2"]
SYNCED += ["checkpoint.every=2"]


def measured(runtime, words, tensor):
    """Of one process: bytes it keeps, the most in a microbatch and in a sync besides, and sent in a period."""
    with start(tensor=tensor, heads=HEADS) as meshed:
        config, hf_config = configured(words)
        lte, head = config.lte, meshed.head.index
        before = live_tensors()  # held, so that no address comes twice
        phase = make_phase(config, hf_config, step=0, fresh=True, tensor=tensor, heads=[head])
        engine = make_engine(phase, config, meshed)
        others = HeadExchange(meshed, heads=HEADS, choice=lte.exchange, compression=lte.compression)
        if lte.dense == DenseSync.all_reduced:
            engine.share_dense(DenseGradients(others, alike=engine.store.masters_alike))
        syncs = HeadSync(engine.model, lte, engine.store, others, seed=0, scale=config.lora.scale)
        ids = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH))
        batch = Batch(inputs={"input_ids": ids}, labels=ids)
        before[ids.untyped_storage().data_ptr()] = ids
        said = [1.0] * WORDS

        def accumulate():
            engine.backward(summed_loss(engine.model, batch, ids.device, engine) / 100)

        def update(step):
            for _ in range(config.training.global_batch_size // meshed.batch.size // SEQUENCES):
                accumulate()
            engine.step(1e-3, lambda norm: None)
            known = list(live_tensors().values()) if step == 2 * lte.sync_every else []
            with Ledger(known) as ledger:
                syncs.advance(step, step, lambda fragment: [said], everything=False)
            return ledger.peak

        for step in range(1, lte.sync_every + 1):
            update(step)
        sent = others.sent
        for step in range(lte.sync_every + 1, 2 * lte.sync_every + 1):
            in_sync = update(step)
        sent = others.sent - sent
        if lte.delay:
            update(2 * lte.sync_every + 1)  # a sync sets out
        accumulate()
        after = live_tensors()
        resident = sum(one.untyped_storage().nbytes() for place, one in after.items() if place not in before)
        with Ledger(list(after.values())) as ledger:
            accumulate()
        step = 2 * lte.sync_every + 2
        syncs.advance(step, step, lambda fragment: [said], everything=True)
        engine.close()
        return resident, ledger.peak, in_sync, sent


def planned(words, layout):
    config, hf_config = configured(words)
    return cost(config, Skeletons(config, hf_config), layout, low_rank=True, on_gpu=False)


CASES = {
    "gathered": (0, 1, 1, ["lte.exchange=factors"]),
    "compressed": (2, 1, 2, ["lte.exchange=dense", "lte.compression=int8", "lte.reset=factors", "training.dtype=bf16"]),
    "outer": (3, 1, 2, ["lte.outer=nesterov", "lte.outer_lr=0.7", "lte.outer_momentum=0.9", "lte.compression=bf16"]),
    "shared": (2, 1, 2, ["lte.exchange=shared", "training.dtype=bf16"]),
    "every step": (1, 1, 1, ["lte.dense=all_reduced", "lte.exchange=dense"]),
    "delayed": (2, 1, 1, ["lte.delay=1", "lte.exchange=factors"]),
}


@pytest.mark.parametrize("name", CASES)
def test_memory_and_bytes_of_heads_are_an_engines(on_processes, name):
    stage, tensor, data, more = CASES[name]
    words = [*SYNCED, *more, f"parallel.zero_stage={stage}", f"parallel.tensor={tensor}"]
    plan = planned(words, Layout(zero_stage=stage, tensor=tensor, data=data, heads=HEADS))
    answers = on_processes(measured, HEADS * tensor * data, words, tensor)
    resident, in_microbatch, in_sync = (max(answer[index] for answer in answers) for index in range(3))
    total = plan.footprint.resident + plan.footprint.on_host
    if name == "delayed":  # what it brings may not have come yet
        assert 0.995 * resident <= total <= 1.15 * resident
    else:
        assert total == pytest.approx(resident, rel=0.005)
        assert in_sync <= plan.sync.in_sync <= 2 * in_sync
    if name != "shared":  # DeepSpeed's stage 3, once met in a process, has all linear layers keep their inputs
        assert 0.99 * in_microbatch <= plan.in_microbatch <= 1.3 * in_microbatch
    config, _ = configured(words)
    gradients = 0 if plan.sync.gradients is None else plan.sync.gradients.bytes * config.lte.sync_every
    assert sum(answer[3] for answer in answers) == HEADS * (plan.sync.bytes + gradients)


@pytest.mark.parametrize("reset", ["none", "factors"])
def test_a_microbatch_computes_with_what_the_last_sync_left(reset):
    words = [*SYNCED, f"lte.reset={reset}"]
    config, hf_config = configured(words)
    plan = Skeletons(config, hf_config).get(
        low_rank=True, tensor=1, sequences=SEQUENCES, checkpointing=Checkpointing.none
    )
    model = make_phase(config, hf_config, step=0, fresh=True, tensor=1).model.train()
    prepare_base_(model, config.torch_dtype, config.merge_precision)
    real = run_microbatch(model, sequences=SEQUENCES, length=LENGTH)
    for part in ("saved", "at_loss", "in_backward"):
        assert getattr(plan.microbatch, part) == pytest.approx(getattr(real, part), rel=0.01), part
    assert plan.microbatch.forward_flops == real.forward_flops
    assert plan.microbatch.backward_flops == real.backward_flops
    layer = 2 * 8 * (4 * (64 + 64) + 3 * (64 + 176)) * SEQUENCES * LENGTH  # one product with all factors of a block
    plain = planned(LOW_RANK, Layout(zero_stage=0, tensor=1, data=2)).microbatch.forward_flops
    assert real.forward_flops - plain == (4 * layer if reset == "none" else 0)


def told(words, path):
    assert main([*words, "--json", str(path)]) == exits.DONE
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_plan_of_heads_is_printed_and_written(capsys, tmp_path):
    found = told([*SYNCED, "plan.link_bandwidth=0.1", "plan.link_latency=30"], tmp_path / "plan.json")
    text = capsys.readouterr().out
    for part in (
        "2 processes, heads 2 x data 1",
        "factors of the last sync",
        "sync: sent by a head, factors",
        "on that link, 2 heads",
        "LTE takes less time for a step than",
        "internet, 100 Mbit/s",
    ):
        assert part in text
    assert found["low rank"]["heads"] == 2
    assert found["full rank"]["heads"] == 1
    links = found["links"]
    assert list(links["bytes_per_step"]) == ["2", "8", "32", "100"]
    assert links["bytes_per_step"]["2"]["LTE"] == found["low rank"]["sync"]["bytes"] / 2
    names = {"LTE", "DiLoCo", "ReLoRA, DDP", "full rank, DDP"}
    assert {one["method"] for one in links["asked"]} == names
    assert set(links["crossovers"]) == names - {"LTE"}
    assert len(links["scenarios"]) == 5 * 4 * len(names)


def test_rare_delayed_and_rounded_syncs_wait_less():
    layout = Layout(zero_stage=0, tensor=1, data=1, heads=HEADS)

    def lte(*more):
        config, hf_config = configured([*SYNCED, "lte.exchange=factors", *more])
        skeletons = Skeletons(config, hf_config)
        run = cost(config, skeletons, layout, low_rank=True)
        links = study(config, skeletons, run, link=Link(bandwidth=1e6, latency=0.03), gpu_flops=1.0, step_seconds=0.2)
        return next(one for one in links.asked if one.method == "LTE")

    plain = lte()
    assert lte("lte.sync_every=20", "evaluation.every=20", "checkpoint.every=20").idle_share < plain.idle_share
    assert lte("lte.delay=1").step_seconds < plain.step_seconds
    assert lte("lte.compression=int8").step_seconds < plain.step_seconds
    assert plain.step_seconds > 0.2
    assert plain.tokens_per_second == pytest.approx(8 * LENGTH / plain.step_seconds)


def test_full_rank_heads_are_diloco_beside_ddp(tmp_path):
    words = [*SYNCED, "lora=none", "lte.outer=nesterov", "lte.outer_lr=0.7", "lte.outer_momentum=0.9"]
    found = told([word for word in words if not word.startswith("lora.")], tmp_path / "plan.json")
    assert set(found["links"]["bytes_per_step"]["2"]) == {"DiLoCo", "full rank, DDP"}
    entries = found["full rank"]["parameters"]["model"]
    assert found["full rank"]["sync"]["sent"]["dense parameters"] == 4 * entries
    assert found["full rank"]["device"]["outer momentum"] == 4 * entries


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan.link_latency=3"], "plan.link_latency has no effect without plan.link_bandwidth"),
        (["plan.link_bandwidth=0"], "plan.link_bandwidth must be above 0 Gbit/s"),
        (["plan.link_bandwidth=1", "plan.link_latency=-1"], "plan.link_latency must be 0 ms or more"),
        (["plan.gpu_flops=1", "plan.step_seconds=1"], "plan.gpu_flops has no effect with plan.step_seconds"),
        (["lte=none", "plan.step_seconds=1"], "plan.step_seconds has no effect without heads"),
        (["plan.processes=1"], "plan.processes=1 must be a multiple of lte.heads=2"),
        (["plan.processes=3"], "lte.heads=2 x parallel.tensor=1 must divide the number of processes"),
    ],
)
def test_words_about_links_that_mean_nothing_are_one_message(capsys, words, message):
    base = LOW_RANK if words[0] == "lte=none" else SYNCED
    assert main([*base, *words]) == exits.REFUSED
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def trained(_, words):
    return train.main(words)


def test_a_run_counts_the_bytes_that_were_planned(on_processes, tiny, tmp_path):
    words = [word for word in tiny if not word.startswith(("relora.", "schedule.restart", "training.steps"))]
    words += ["lte=heads", "lte.sync_every=4", "lte.compression=int8", "training.steps=4", "evaluation.every=0"]
    assert set(on_processes(trained, HEADS, words)) == {exits.DONE}
    (sync,) = [one for one in read_records(tmp_path / "run" / "metrics.jsonl") if one.get("event") == "sync"]
    assert sync["bytes"] == told(words, tmp_path / "plan.json")["low rank"]["sync"]["bytes"]
