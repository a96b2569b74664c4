"""Whole runs of LTE: what they leave, that they resume exactly, and what is refused."""

import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

from launch import exits, export, train
from launch.config import load
from launch.watching.records import read_records

HEADS = [
    "lte=heads",
    "lte.sync_every=4",
    "lora.rank=4",
    "evaluation.every=8",
    "checkpoint.every=4",
    "optimizer.eps=0.0001",
    "lora.dropout=0.1",
]

OUTER = ["lte.outer=nesterov", "lte.outer_lr=0.7", "lte.outer_momentum=0.9"]


def _train(_, overrides):
    return train.main(overrides)


@pytest.fixture
def run(on_processes, tiny, tmp_path):
    """Train in the folder `name` on so many processes; returns the exit code."""

    def call(name, count, *overrides):
        left = [word for word in tiny if not word.startswith(("run.dir", "relora.", "schedule.restart"))]
        line = [*left, *HEADS, f"run.dir={tmp_path / name}", *overrides]
        if "lora=none" in overrides:
            line = [word for word in line if not word.startswith("lora.")]
        codes = set(on_processes(_train, count, line)) if count > 1 else {train.main(line)}
        assert len(codes) == 1
        return codes.pop()

    return call


def _records(folder, *events):
    return [record for record in read_records(folder / "metrics.jsonl") if record.get("event") in (events or (None,))]


def _told(folder):
    """All that the arithmetic decides."""
    steps = [(r["step"], r["loss"], r["grad_norm"], r["lr"], r.get("head")) for r in _records(folder)]
    kept = [{k: v for k, v in record.items() if k != "seconds"} for record in _records(folder, "sync", "evaluate")]
    return steps, kept


def test_a_run_syncs_learns_and_leaves_what_it_promises(run, tmp_path):
    assert run("run", 2, "training.steps=18", "training.dtype=bf16") == exits.DONE
    folder = tmp_path / "run"
    syncs = _records(folder, "sync")
    assert [record["step"] for record in syncs] == [4, 8, 12, 16, 18], "every four steps, and after the last"
    assert {record["head"] for record in _records(folder)} == {0}
    for record in syncs:
        assert len(record["losses"]) == len(record["delta_norms"]) == 2
        assert record["loss"] == pytest.approx(sum(record["losses"]) / 2)
        assert record["losses"][0] != record["losses"][1], "heads train on sequences of their own"
        assert record["losses"][0] == _records(folder)[record["step"] - 1]["loss"]
        assert -1 <= record["cosine_mean"] <= 1
        assert 1 <= record["effective_rank"] <= 16, "two heads' factors of rank 4, now and at the last sync"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["syncs"], summary["bytes_sent"]) == (5, sum(record["bytes"] for record in syncs))
    assert summary["sync_seconds"] == pytest.approx(sum(record["seconds"] for record in syncs), abs=1e-3)
    assert summary["sync_share"] == pytest.approx(summary["sync_seconds"] / summary["wall_seconds"], abs=1e-3)
    spectra = read_records(folder / "spectra.jsonl")
    assert {(record["step"], record["restart"]) for record in spectra} == {(8, 2), (16, 4), (18, 5)}, "at evaluations"
    assert {record["numerical_rank"] for record in spectra} == {8}, "heads x rank, however many syncs there were"
    first, last = _records(folder, "evaluate")[0]["val_loss"], summary["val_loss"]
    assert last < first - 0.3
    final = _records(folder, "final")[0]
    assert abs(final["merge_difference"]) < 2e-3, "the heads' factors are in the base weight already"
    start, end = (load_file(folder / name / "model.safetensors") for name in ("start", "final"))
    assert start.keys() == end.keys()


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (2, ["lte.reset=none", "training.dtype=bf16"]),
        (4, ["lte.reset=factors", "lte.adam=clear", "parallel=zero3", "lte.exchange=dense"]),
        (4, ["lte.reset=none", "parallel=zero2", "parallel.tensor=2"]),
        (2, [*OUTER, "lte.fragments=2", "lte.delay=1", "lte.exchange=dense"]),
        (2, [*OUTER, "lora=none", "lte.compression=bf16"]),
        (4, ["lte.compression=int8", "parallel=zero2", "lte.exchange=dense"]),
        (2, ["lte.compression=fp8", "lte.exchange=factors", "lte.delay=2"]),
        (2, ["lte.reset=factors", "lte.adam=scale", "lte.adam_scale=0.5", "optimizer.moments=int8"]),
    ],
    ids=["plain-bf16", "zero3-dense", "zero2-tensor2", "overlapped", "diloco", "residuals", "primes", "8-bit-moments"],
)
def test_a_run_resumed_at_a_sync_is_bitwise_the_same(run, tmp_path, count, words):
    assert run("whole", count, *words) == exits.DONE
    for stop in (4, 12):
        assert run("parts", count, *words, f"training.stop_after={stop}") == exits.PREEMPTED
    assert run("parts", count, *words) == exits.DONE
    assert _told(tmp_path / "parts") == _told(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "final/model.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_heads_go_on_with_another_layout_inside(run, tmp_path):
    still = ["lora.dropout=0", "lte.reset=none"]
    assert run("whole", 2, *still) == exits.DONE
    assert run("chain", 2, *still, "training.stop_after=4") == exits.PREEMPTED
    assert run("chain", 4, *still, "parallel=zero3", "training.stop_after=12") == exits.PREEMPTED
    assert run("chain", 4, *still, "parallel=zero2", "parallel.tensor=2") == exits.DONE
    for ours, theirs in zip(_records(tmp_path / "chain"), _records(tmp_path / "whole"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_a_checkpoint_of_so_many_heads_goes_on_with_another_number(run, tmp_path):
    """Right after a sync they are one model: heads that go leave nothing behind, and new ones begin with it."""
    words = ["lora.dropout=0", "training.steps=16"]
    assert run("run", 2, *words, "training.stop_after=8") == exits.PREEMPTED
    assert run("run", 4, *words, "lte.heads=4", "training.stop_after=12") == exits.PREEMPTED
    assert run("run", 1, *words, "lte.heads=1") == exits.DONE
    records = _records(tmp_path / "run", "sync")
    assert [record["members"] for record in records] == [[0, 1], [0, 1], [0, 1, 2, 3], [0]]
    losses = [record["val_loss"] for record in _records(tmp_path / "run", "evaluate")]
    assert losses[-1] < losses[1] < losses[0]
    assert json.loads((tmp_path / "run/summary.json").read_text())["tokens"] == 16 * 128


def test_one_head_is_a_run_of_one_process_whose_export_is_the_merged_model(run, tmp_path):
    assert run("run", 1, "lte.heads=1", "lte.reset=factors", "training.steps=8") == exits.DONE
    folder = tmp_path / "run"
    words = [f"run.dir={folder}", "export.to=model", f"export.out={tmp_path / 'out'}"]
    assert export.main(words) == exits.DONE
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder / "final", tmp_path / "out"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [record["bytes"] for record in _records(folder, "sync")] == [0, 0]


def _asked(runtime, overrides):
    """As if the last process had got SIGTERM before its first step."""
    from launch.training.signals import StopRequest

    real = StopRequest.__bool__
    StopRequest.__bool__ = lambda self: runtime.process_rank == runtime.world_size - 1
    try:
        return train.main(overrides)
    finally:
        StopRequest.__bool__ = real


def test_a_stop_is_granted_at_the_next_sync(on_processes, tiny, tmp_path):
    left = [word for word in tiny if not word.startswith(("run.dir", "relora.", "schedule.restart"))]
    codes = on_processes(_asked, 2, [*left, *HEADS, f"run.dir={tmp_path / 'run'}"])
    assert codes == [exits.PREEMPTED] * 2
    assert len(_records(tmp_path / "run")) == 4
    assert (tmp_path / "run/checkpoints/step_00000004").is_dir()


def _diverging(runtime, overrides):
    """The second head's guard objects to everything."""
    from launch.training.guard import Guard

    real, watched = Guard.objection, train.watched
    train.watched = lambda *_, **__: nullcontext()  # it would end the process, and with it the pool
    if runtime.process_rank == 1:
        Guard.objection = lambda *_, **__: "loss is strange"
    try:
        return train.main(overrides)
    finally:
        Guard.objection, train.watched = real, watched


def test_a_head_that_diverges_ends_the_run_on_all(on_processes, tiny, tmp_path):
    left = [word for word in tiny if not word.startswith(("run.dir", "relora.", "schedule.restart"))]
    words = [*left, *HEADS, f"run.dir={tmp_path / 'run'}", "training.max_skips=6"]
    assert on_processes(_diverging, 2, words) == [exits.FAILED] * 2
    assert len(_records(tmp_path / "run")) == 8, "six refusals, and on to the next sync"
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "diverged"


@pytest.mark.parametrize(("words", "message"), [
    (["evaluation.every=25"], "evaluation.every must be a multiple of lte.sync_every=10"),
    (["checkpoint.every=15"], "checkpoint.every must be a multiple of lte.sync_every=10"),
    (["training.stop_after=5"], "training.stop_after must be a multiple of lte.sync_every=10"),
    (["lte.sync_every=0"], "lte.sync_every must be at least 1, got 0"),
    (["lte.heads=0"], "lte.heads must be at least 1, got 0"),
    (["lte.adam=clear"], "lte.adam=clear has no effect with lte.reset=none"),
    (["lte.merge_precision=nearest"], "lte.merge_precision=nearest has no effect with training.dtype=fp32"),
    (["lora=none", "lte.delay=1"], "lte.delay=1 has no effect with lora=none"),
    (["lte.ranks=[2,4]", "lte.exchange=shared"], "lte.ranks=[2, 4] cannot be with lte.exchange=shared"),
    (["lte.ranks=[2,4]", "lora.rank_pattern={q_proj: 2}"], "lte.ranks=[2, 4] has no place beside lora.rank_pattern"),
    (["lte=heads_relora", "relora.every=75"], "relora.every must be a multiple of lte.sync_every=10"),
    (["lte=heads_relora", "relora.warm_start_steps=75"], "relora.warm_start_steps must be a multiple of"),
    (["lte=heads_relora", "lte.reset=factors"], "lte.reset=factors cannot be with relora"),
    (["relora.every=5"], "relora"),
    (["lora.init_from=somewhere"], "lora.init_from=somewhere must be null with lte"),
    (["parallel.tensor=2"], "lte.heads=2 x parallel.tensor=2 must divide the number of processes, got 1"),
    (["parallel=zero2"], "parallel.zero_stage=2 needs heads with processes of their own"),
    (["lte.ranks=[2,4]"], "lte.ranks=[2, 4] needs heads with processes of their own"),
    (["training.loss=chunked"], "training.loss=chunked needs heads with processes of their own"),
    (["optimizer.moments=int8"], "optimizer.moments=int8 needs heads with processes of their own"),
    (["training.microbatch_size=3"], "training.microbatch_size must divide"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_what_cannot_be_is_refused_by_name(runtime, words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(["lte=heads", *words]) == exits.REFUSED
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_heads_do_without_relora_unless_asked():
    assert load(["lte=heads"]).relora is None
    assert load(["lte=heads_relora"]).relora is not None


WITH_RESTARTS = ["lte=heads_relora", "relora.every=8", "relora.warm_start_steps=4", "relora.warm_start_lr=0.001"]


@pytest.mark.parametrize(
    "words", [["relora.reset=zero"], ["relora.reset=magnitude", "relora.prune_ratio=0.9", "parallel=zero2"]]
)
def test_a_warm_start_of_all_then_heads_with_restarts_resumes_bitwise(run, tmp_path, words):
    words = [*WITH_RESTARTS, *words, "training.steps=24", "schedule.restart_warmup_steps=1"]
    assert run("whole", 4, *words) == exits.DONE
    for stop in (4, 16):
        assert run("parts", 4, *words, f"training.stop_after={stop}") == exits.PREEMPTED
    assert run("parts", 4, *words) == exits.DONE
    assert _told(tmp_path / "parts") == _told(tmp_path / "whole")
    folder = tmp_path / "whole"
    assert [record["step"] for record in _records(folder, "restart")] == [12, 20]
    assert [record["step"] for record in _records(folder, "sync")] == [8, 12, 16, 20, 24]
    ours, theirs = (load_file(tmp_path / name / "final/model.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_rank_that_heads_cannot_fill_is_told(run, capsys):
    assert run("bound", 1, "lte.heads=1", "training.steps=4", "run.save_final=false") == exits.DONE
    assert "never reaches full rank" in capsys.readouterr().out
    assert run("free", 1, "lte.heads=1", "training.steps=4", "lte.reset=factors") == exits.DONE
    assert "never reaches full rank" not in capsys.readouterr().out
