"""The profiler's switch: a trace of the steps that were asked for, and numbers that do not change."""

import gzip
import json

import pytest

from launch import exits, train
from launch.config import load
from launch.watching.profiling import SKIPPED
from launch.watching.records import read_records
from relora.errors import ConfigError


def losses(folder):
    return [line["loss"] for line in read_records(folder / "metrics.jsonl") if "grad_norm" in line]


def test_the_trace_has_the_steps_that_were_asked_for_and_changes_no_loss(tiny, tmp_path):
    words = ["training.steps=8", "relora.warm_start_steps=0", "relora.every=10", "evaluation.every=0"]
    assert train.main([*tiny, *words]) == exits.DONE
    assert train.main([*tiny, *words, "run.profile_steps=2", f"run.dir={tmp_path / 'profiled'}"]) == exits.DONE
    folder = tmp_path / "profiled/profile"
    assert {path.name for path in folder.iterdir()} == {"trace_0.json.gz", "operations_0.txt"}
    with gzip.open(folder / "trace_0.json.gz", "rt") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]
    steps = {name for name in names if name.startswith("ProfilerStep#")}
    assert steps == {f"ProfilerStep#{SKIPPED + number}" for number in range(2)}
    assert "Optimizer.step#_GatedAdamW.step" in names
    assert "_AddmmBackward" in (folder / "operations_0.txt").read_text()
    assert losses(tmp_path / "profiled") == losses(tmp_path / "run")


def test_more_steps_than_the_run_has_are_refused():
    with pytest.raises(ConfigError, match=r"run.profile_steps=398 begins after three steps"):
        load(["run.profile_steps=398"])
