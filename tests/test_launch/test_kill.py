"""Killed at any moment, and started again by the same command: the very metrics of the undisturbed run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import exits
from launch.watching.records import read_records

ROOT = Path(__file__).parent.parent.parent
TIMED = {"tokens_per_second", "memory_bytes", "flops_per_second", "mfu", "seconds"}

pytestmark = pytest.mark.slow


@pytest.fixture
def start(forker):
    """Start the command in a process of its own, its output to `log`."""
    return lambda words, log: forker.start("launch.train:main", words, stdout=log, stderr=log)


def records(folder):
    kept = [r for r in read_records(folder / "metrics.jsonl") if r.get("event") not in ("resume", "checkpoint")]
    return [{key: value for key, value in record.items() if key not in TIMED} for record in kept]


def wait_for(condition, seconds=120):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "nothing happened in time"
        time.sleep(0.005)


def steps_done(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(forker, tiny_in, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with (folder / "log").open("w") as log:
        whole = forker.start("launch.train:main", tiny_in(folder / "whole"), stdout=log, stderr=log)
        assert whole.wait() == exits.DONE, (folder / "log").read_text()
    return records(folder / "whole")


def test_killed_inside_a_cycle_twice_and_while_a_checkpoint_is_written(start, tiny, tmp_path, undisturbed):
    folder = tmp_path / "run"
    moments = [
        lambda: steps_done(folder) >= 7,
        lambda: steps_done(folder) >= 11,
        lambda: any((folder / "checkpoints").glob(".step_*.partial")),
    ]
    with (tmp_path / "log").open("w") as log:
        for moment in moments:
            process = start(tiny, log)
            wait_for(lambda moment=moment, process=process: moment() or process.poll() is not None)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert start(tiny, log).wait() == exits.DONE, (tmp_path / "log").read_text()
    assert records(folder) == undisturbed


def test_killed_at_random_moments(start, tiny, tmp_path, undisturbed):
    folder, kills = tmp_path / "run", 0
    moments = random.Random(int(os.environ.get("ACCRETE_KILL_SEED", "0")))
    with (tmp_path / "log").open("w") as log:
        for _ in range(3):
            process = start(tiny, log)
            target = steps_done(folder) + moments.randrange(1, 8)
            wait_for(lambda target=target, process=process: steps_done(folder) >= target or process.poll() is not None)
            time.sleep(moments.random() * 0.05)
            kills += process.poll() is None
            process.kill()
            process.wait()
        assert start(tiny, log).wait() == exits.DONE, (tmp_path / "log").read_text()
    assert kills >= 1
    assert records(folder) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_finishes_the_step_writes_a_checkpoint_and_exits_75(start, tiny, tmp_path, number):
    folder = tmp_path / "run"
    words = [*tiny, "training.steps=5000", "checkpoint.every=0", "evaluation.every=0"]
    with (tmp_path / "log").open("w") as log:
        if number == signal.SIGTERM:  # once with all that Python does as a process ends
            line = [sys.executable, "-m", "launch.train", *words]
            process = subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        else:
            process = start(words, log)
        wait_for(lambda: steps_done(folder) >= 6 or process.poll() is not None)
        process.send_signal(number)
        assert process.wait(timeout=60) == exits.PREEMPTED, (tmp_path / "log").read_text()
    done = steps_done(folder)
    assert (folder / f"checkpoints/step_{done:08d}").is_dir()
    assert f"stopped by {number.name} after step {done}" in (tmp_path / "log").read_text()
