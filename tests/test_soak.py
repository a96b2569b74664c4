"""The soak's own parts: what it draws, damages, counts and compares. Its runs take too long for a test."""

import json
import math
import random
import signal
import subprocess

import pytest

from benchmarks.outcome import write_document
from benchmarks.soak import tables, words_of
from benchmarks.soak_faults import HERE, LAUNCHER, Plan
from benchmarks.soak_run import LocalRun, differences, numbers_of
from launch.config import load
from launch.jobs.attempt import VARIABLE
from parallel.checkpoint import manifest_text, read_checkpoint
from parallel.parts import DamagedCheckpoint


def drawn(seed):
    plan = Plan([*HERE, LAUNCHER], seed)
    return [plan.next() for _ in range(200)]


def test_a_seed_draws_the_same_faults_again_and_every_kind_among_them():
    assert drawn(3) == drawn(3) != drawn(4)
    assert {fault.name for fault, _, _ in drawn(3)} == {fault.name for fault in [*HERE, LAUNCHER]}
    assert any(steps is None for _, steps, _ in drawn(3))


def test_the_run_is_one_that_trains(tmp_path):
    config = load(words_of(tmp_path, 150))
    assert config.training.steps == 150
    assert config.relora is not None


@pytest.fixture
def run(tmp_path):
    return LocalRun(tmp_path / "run", [], [])


def metrics(run, *steps, loss=1.0):
    run.folder.mkdir(exist_ok=True)
    rows = [{"step": step, "tokens": 1, "loss": loss, "seconds": random.random()} for step in steps]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_steps_that_a_resumed_run_does_again_are_counted(run):
    assert run.look() == 0
    metrics(run, *range(1, 18))
    assert run.look() == 17
    metrics(run, *range(1, 11))
    assert run.look() == 10
    assert run.repeated == 7


def test_runs_are_the_same_only_to_the_last_bit_of_records_and_weights(run, tmp_path):
    for name, loss, weights in (
        ("a", 0.1, b"w"),
        ("b", 0.1, b"w"),
        ("c", 0.1, b"v"),
        ("d", math.nextafter(0.1, 1), b"w"),
    ):
        one = LocalRun(tmp_path / name, [], [])
        metrics(one, 1, 2, loss=loss)
        (one.folder / "final").mkdir()
        (one.folder / "final/model").write_bytes(weights)
        (one.folder / "spectra.jsonl").touch()
    a, b, c, d = (numbers_of(tmp_path / name) for name in "abcd")
    assert differences(a, b) == []
    assert [told.split(":")[0] for told in differences(a, c)] == ["final"]
    assert [told.split(":")[0] for told in differences(a, d)] == ["records"]


def test_processes_are_found_and_killed_and_a_damaged_checkpoint_is_one(run, tmp_path):
    newest = run.folder / "checkpoints/step_00000005"
    newest.mkdir(parents=True)
    (newest / "manifest.json").write_text(manifest_text({}))
    environment = {VARIABLE: str(run.folder / "job/attempt_001"), "RANK": "1"}
    victim = subprocess.Popen(["sleep", "60"], env=environment)
    assert run.launchers() == [victim.pid]
    (damage,) = (fault for fault in HERE if fault.name == "damage")
    assert damage.strike(run, random.Random(0))
    assert victim.wait() == -signal.SIGKILL
    assert not damage.strike(run, random.Random(0)), "there was nobody to kill"
    with pytest.raises(DamagedCheckpoint):
        read_checkpoint(newest)


def test_the_page_counts_what_was_survived(tmp_path):
    settings = {"launcher": "torchrun", "processes": 2, "seed": 0}
    faults = [{"name": "process", "told": "a training process is killed", "count": 3}]
    counts = {"runs": 2, "attempts": 7, "starts": 3, "steps": 300, "repeated": 12}
    results = {"settings": settings, "faults": faults, **counts, "seconds": 60.0, "undisturbed_seconds": 20.0}
    write_document(tmp_path / "soak.json", results)
    page = tables(json.loads((tmp_path / "soak.json").read_text()))
    assert "| together" in page
    assert [line.split("|")[2].strip() for line in page.splitlines() if "by giving the command again" in line] == ["1"]
