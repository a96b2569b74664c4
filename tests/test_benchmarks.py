"""The benchmarks run, and their pure parts compute what their tables say."""

import json
import math

import pytest

from benchmarks import quality, step
from benchmarks.outcome import markdown
from benchmarks.quality_methods import QUICK, methods, trainable_parameters
from launch import exits


def test_a_sweep_goes_on_beyond_a_best_rate_at_an_edge_only():
    assert quality.next_rate({0.1: 3.0, 0.2: 2.0, 0.4: 2.5}) is None
    assert quality.next_rate({0.1: 3.0, 0.2: 2.0}) == 0.4
    assert quality.next_rate({0.1: 1.0, 0.2: 2.0}) == 0.05


def test_spread_is_the_mean_and_half_the_range():
    assert quality.spread([1.0, 2.0]) == (1.5, 0.5)
    assert quality.spread([3.0]) == (3.0, 0.0)


def test_the_control_trains_as_many_parameters_as_the_low_rank_runs():
    chosen = {method.key: method for method in methods(QUICK)}
    assert chosen["control"].trainable == pytest.approx(chosen["relora"].trainable, rel=0.02)
    assert chosen["lora"].trainable == chosen["relora"].trainable == chosen["relora_warm"].trainable
    assert chosen["full"].trainable > chosen["relora"].trainable
    assert trainable_parameters(chosen["full"].overrides) == chosen["full"].trainable


def test_ratios_are_taken_turn_by_turn():
    times = {"ours": [1.0, 4.0, 2.0], "other": [2.0, 2.0, 2.0]}
    assert step.ratio(times, "ours", "other")["median"] == 1.0
    assert step.ratio(times, "other", "ours")["median"] == 1.0
    assert step.ratio(times, "ours", "ours") == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_a_markdown_table_has_a_cell_for_each_header():
    assert markdown(["a", "b"], [["x", "1"]]) == "| a | b |\n|---|--:|\n| x | 1 |"


@pytest.mark.slow
def test_the_step_benchmark_measures_all_variants_side_by_side(runtime, tmp_path, capsys):
    shape = step.Shape(model="llama_tiny", rank=8, batch=1, sequence=32, dtype="fp32")
    times, facts = step.measure_times(shape, runtime.device, repetitions=2)
    assert all(len(values) == 2 and min(values) > 0 for values in times.values())
    flops = {fact["variant"]: fact["flops"] for fact in facts}
    assert flops["ReLoRA"] < flops["full rank"], "a frozen weight has no gradient"
    assert flops["ReLoRA"] == flops["PEFT LoRA, same engine"]
    outcome = step.results(shape, runtime.device, times, facts, dict.fromkeys(step.VARIANTS, 1))
    assert "One restart" in step.tables(outcome)


@pytest.mark.slow
def test_the_quality_study_runs_all_methods_and_writes_its_rows(tmp_path, capsys):
    words = ["--quick", "--json", str(tmp_path / "q.json"), "--picture", str(tmp_path / "q.png")]
    assert quality.main([*words, "--runs", str(tmp_path / "runs")]) == exits.DONE
    rows = json.loads((tmp_path / "q.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [
        "full rank", "control", "LoRA", "LoRA + warm start", "ReLoRA", "ReLoRA + warm start"
    ]  # fmt: skip
    assert len({row["tokens"] for row in rows}) == 1, "all see the same tokens"
    assert [row["restarts"] for row in rows] == [0, 0, 0, 0, 2, 1]
    for row in rows:
        assert row["val_perplexity"] == pytest.approx(math.exp(row["val_loss"]), rel=1e-6)
    assert (tmp_path / "q.png").stat().st_size > 10_000
