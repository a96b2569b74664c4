"""Whole runs of heads that share processes, against the same runs with a process for each head."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from launch import exits, train
from launch.training.guard import Guard
from launch.watching.records import read_records

HEADS = [
    "lte=heads",
    "lte.sync_every=4",
    "lora.rank=4",
    "evaluation.every=8",
    "checkpoint.every=4",
    "optimizer.eps=0.0001",
    "training.steps=12",
    "training.microbatch_size=1",
    "data.document_mask=true",
]


def _train(_, overrides):
    return train.main(overrides)


@pytest.fixture
def run(on_processes, tiny, tmp_path):
    """Train in the folder `name` on so many processes; returns the exit code."""

    def call(name, count, *overrides):
        left = [word for word in tiny if not word.startswith(("run.dir", "relora.", "schedule.restart", "training.st"))]
        line = [*left, *HEADS, f"run.dir={tmp_path / name}", *overrides]
        if "lora=none" in overrides:
            line = [word for word in line if not word.startswith("lora.")]
        codes = set(on_processes(_train, count, line)) if count > 1 else {train.main(line)}
        assert len(codes) == 1
        return codes.pop()

    return call


def _same_run(ours, theirs):
    """Losses, norms, syncs and final weights agree to rounding."""
    mine, other = (
        [r for r in read_records(one / "metrics.jsonl") if r.get("event") != "resume"] for one in (ours, theirs)
    )
    assert [(r["step"], r.get("event")) for r in mine] == [(r["step"], r.get("event")) for r in other]
    for here, there in zip(mine, other, strict=True):
        for key in ("loss", "losses", "val_loss", "delta_norms", "update_ratio", "grad_norm", "head", "members"):
            assert (key in here) == (key in there)
            if key in here:
                assert here[key] == pytest.approx(there[key], rel=1e-4, abs=1e-5), (here["step"], key)
    final, others = (load_file(one / "final/model.safetensors") for one in (ours, theirs))
    assert final.keys() == others.keys()
    for name, value in final.items():
        # Batched products round in another order, and Adam makes 1e-2 a step of any gradient.
        torch.testing.assert_close(value, others[name], rtol=1e-5, atol=3e-5)


def test_fragments_on_their_way_between_heads_in_one_process(run, tmp_path):
    words = ["lte.fragments=2", "lte.delay=1", "lte.weight=tokens", "lte.compression=bf16"]
    assert run("apart", 2, *words) == exits.DONE
    assert run("together", 1, *words) == exits.DONE
    _same_run(tmp_path / "together", tmp_path / "apart")
    assert json.loads((tmp_path / "together/summary.json").read_text())["bytes_sent"] == 0


def test_a_run_goes_on_with_heads_together_and_apart_again(run, tmp_path):
    assert run("apart", 2) == exits.DONE
    for count, stop in ((2, 4), (1, 8)):
        assert run("chain", count, f"training.stop_after={stop}") == exits.PREEMPTED
    assert run("chain", 2) == exits.DONE
    _same_run(tmp_path / "chain", tmp_path / "apart")


def test_a_warm_start_then_heads_with_restarts_in_one_process(run, tmp_path):
    words = [
        "lte=heads_relora",
        "relora.every=4",
        "relora.warm_start_steps=4",
        "relora.warm_start_lr=0.001",
        "relora.reset=magnitude",
        "relora.prune_ratio=0.9",
        "schedule.restart_warmup_steps=1",
        "lte.dense=all_reduced",
    ]
    assert run("apart", 2, *words) == exits.DONE
    assert run("together", 1, *words, "training.stop_after=8") == exits.PREEMPTED
    assert run("together", 1, *words) == exits.DONE
    _same_run(tmp_path / "together", tmp_path / "apart")


@pytest.mark.parametrize("words", [["training.dtype=bf16"], ["lora=none"]], ids=" ".join)
def test_a_run_of_heads_in_one_process_resumes_bitwise(run, tmp_path, words):
    assert run("whole", 1, *words) == exits.DONE
    assert run("parts", 1, *words, "training.stop_after=8") == exits.PREEMPTED
    assert run("parts", 1, *words) == exits.DONE
    ours, theirs = (load_file(tmp_path / name / "final/model.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_head_of_several_that_diverges_ends_the_run_at_the_next_sync(run, tmp_path, monkeypatch):
    calls = itertools.count()
    monkeypatch.setattr(Guard, "objection", lambda *_, **__: "loss is strange" if next(calls) % 2 else None)
    assert run("run", 1, "training.max_skips=6") == exits.FAILED
    records = read_records(tmp_path / "run/metrics.jsonl")
    assert [r["step"] for r in records if "event" not in r] == list(range(1, 9)), "six refusals, and on to the sync"
    assert {(r["event"], r["head"]) for r in records if r.get("event") == "skip"} == {("skip", 1)}
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "diverged"


def test_another_number_of_heads_goes_on_in_one_process(run, tmp_path):
    assert run("run", 1, "training.stop_after=4") == exits.PREEMPTED
    assert run("run", 1, "lte.heads=4", "training.stop_after=8") == exits.PREEMPTED
    assert run("run", 1, "lte.heads=1") == exits.DONE
    records = read_records(tmp_path / "run/metrics.jsonl")
    assert [len(r["members"]) for r in records if r.get("event") == "sync"] == [2, 4, 1]
    losses = [r["val_loss"] for r in records if r.get("event") == "evaluate"]
    assert losses == sorted(losses, reverse=True)
