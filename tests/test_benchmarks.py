"""The benchmarks: their arithmetic, their rules, and that the documents show the figures of the JSON files."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import linear, model, model_page, model_turns, parallel, quality, runs, step
from benchmarks.outcome import document, markdown, paired_ratio, read_document
from benchmarks.parallel_layouts import entries
from benchmarks.parallel_tables import sent
from benchmarks.parallel_traffic import ALL_GATHER, ALL_REDUCE, DATA, REDUCE_SCATTER, TENSOR, ring
from benchmarks.quality_methods import QUICK, methods
from benchmarks.quality_picture import draw
from benchmarks.runs import Job, Result, RunFailed, read_result, run_all
from benchmarks.step_variants import Shape
from launch import exits, train
from launch.config import load
from parallel.runtime import start
from relora import choice

ROOT = Path(__file__).parent.parent


@pytest.fixture
def study(corpus):
    """The quick study on a small corpus, with three rates and two seeds."""
    overrides = (*QUICK.overrides, f"data.path=[{corpus}]", f"data.cache={corpus.parent / 'cache'}")
    return replace(QUICK, rates=3, seeds=(0, 1), extensions=1, overrides=overrides)


def outcome(loss):
    return Result(val_loss=loss, tokens=3072, restarts=0, seconds=1.0, curve=[(0, 5.0), (1536, loss + 1), (3072, loss)])


def test_a_table_has_lines_of_one_length_and_numbers_to_the_right():
    lines = markdown(["name", "n"], [["a", "1"], ["long name", "1,000"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2] == "| a         |     1 |"


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({1.0: 3.0, 2.0: 2.0, 4.0: 3.0}, None),
        ({1.0: 1.0, 2.0: 2.0, 4.0: 3.0}, 0.5),
        ({1.0: 3.0, 2.0: 2.0, 4.0: 1.0}, 8.0),
    ],
)
def test_a_sweep_goes_on_beyond_a_best_rate_at_its_edge_only(losses, expected):
    assert quality.next_rate(losses) == expected


def test_low_rank_methods_and_control_train_equally_many_parameters(study):
    trainable = {method.key: method.trainable for method in methods(study)}
    low_rank = {trainable[key] for key in ("lora", "lora_warm", "relora_4", "relora_warm_4")}
    assert len(low_rank) == 1
    assert trainable["control"] == pytest.approx(low_rank.pop(), rel=0.01)
    assert trainable["full"] > 2 * trainable["control"]


def test_every_run_of_a_study_has_a_folder_of_its_own_and_settings_that_compose(study, tmp_path):
    jobs = [method.job(tmp_path, rate, seed) for method in methods(study) for rate in (0.001, 0.002) for seed in (0, 1)]
    assert len({job.folder for job in jobs}) == len(jobs)
    for job in jobs[::4]:
        assert load(job.overrides).training.skip_sigma == 0


def test_each_method_gets_its_best_rate_and_the_other_seeds_run_at_it_alone(study, tmp_path, monkeypatch):
    made = []

    def pretend(jobs, *, workers):
        made.extend(job.folder for job in jobs)
        rates = [float(job.folder.name.split("_")[1].split("-seed")[0]) for job in jobs]
        return [outcome(1.0 + abs(rate - 0.008)) for rate in rates]

    monkeypatch.setattr(quality, "run_all", pretend)
    found = quality.sweep(study, tmp_path, workers=1)
    names = sorted(folder.name for folder in made if folder.parent.name == "full")
    # Its sweep is 0.001, 0.002, 0.004; the best lies at the edge, so 0.008 is tried, and is better.
    assert names == ["lr_0.001-seed_0", "lr_0.002-seed_0", "lr_0.004-seed_0", "lr_0.008-seed_0", "lr_0.008-seed_1"]
    assert len(made) == len(set(made))
    rows = {row["method"]: row for row in quality.results(study, found)["rows"]}
    assert rows["full rank"]["best_rate"] == 0.008
    assert rows["full rank"]["best_is_at_edge"]


def test_a_row_has_the_mean_and_half_of_the_range_over_seeds(study):
    method = methods(study)[0]
    losses = {(0.001, 0): 3.0, (0.002, 0): 2.0, (0.004, 0): 2.5, (0.002, 1): 2.2}
    results = quality.results(study, {(method, *at): outcome(loss) for at, loss in losses.items()})
    (row,) = results["rows"]
    assert (row["best_rate"], row["best_is_at_edge"], row["seeds"]) == (0.002, False, 2)
    assert row["val_loss"] == pytest.approx(2.1)
    assert row["val_loss_half_range"] == pytest.approx(0.1)
    assert "2.100 +- 0.100" in quality.tables(results)


def test_the_picture_is_drawn_from_the_document(study, tmp_path):
    chosen = methods(study)
    found = {(method, 0.001, seed): outcome(2.0 + seed / 10) for method in chosen for seed in (0, 1)}
    document = json.loads(json.dumps(quality.results(study, found)))
    draw(document, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_read_and_not_repeated(tiny, tmp_path, monkeypatch):
    assert train.main(tiny) == exits.DONE
    monkeypatch.setattr(runs.subprocess, "run", None)
    job = Job(folder=tmp_path / "run", overrides=tuple(word for word in tiny if not word.startswith("run.dir")))
    (result,) = run_all([job], workers=2)
    assert result == read_result(job.folder)
    assert (result.tokens, result.restarts) == (20 * 4 * 32, 2)
    assert [tokens for tokens, _ in result.curve] == [0, 10 * 4 * 32, 20 * 4 * 32]


def test_a_failed_run_is_named_with_its_log(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(runs.sys, "executable", "false")
    with pytest.raises(RunFailed, match=r"exit code 1: see .*bad\.log"):
        run_all([Job(folder=tmp_path / "bad", overrides=tuple(tiny[:-1]))], workers=1)


def test_times_are_compared_turn_by_turn():
    times = {"a": [1.0, 10.0, 2.0], "b": [2.0, 20.0, 4.0]}  # the second turn met a busy machine
    assert paired_ratio(times["a"], times["b"]) == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert paired_ratio([3.0], [2.0])["high"] == 1.5


def test_layouts_are_those_that_the_processes_allow_and_each_stands_once():
    one, two, six = (entries(count, stages=[0, 2], tensor=[1, 2, 4]) for count in (1, 2, 6))
    assert [entry.name for entry in one] == ["ReLoRA, one process", "full rank, one process", "ReLoRA, ZeRO 2"]
    assert [entry.name for entry in two[2:]] == [
        "ReLoRA, ddp",
        "ReLoRA, ZeRO 2",
        "ReLoRA, tensor 2",
        "ReLoRA, ZeRO 2, tensor 2",
        "full rank, ddp",
    ]
    assert {(entry.layout.tensor, entry.layout.data) for entry in six} == {(1, 1), (1, 6), (2, 3)}
    for chosen in (one, two, six):
        assert len({entry.name for entry in chosen}) == len(chosen)


def test_a_ring_sends_a_sum_twice_and_everything_else_once():
    assert ring(ALL_REDUCE, 1000, 2) == ring(REDUCE_SCATTER, 1000, 2) + ring(ALL_GATHER, 1000, 2) == 1000
    assert ring(ALL_GATHER, 1000, 4) == 750


def test_a_batch_that_no_layout_can_share_is_refused_before_any_process_starts(monkeypatch, capfd):
    monkeypatch.setattr(parallel.subprocess, "run", None)
    assert parallel.main(["--batch", "3", "--microbatch", "1", "--processes", "1", "2"]) == exits.REFUSED
    assert "must be a multiple of the 2 processes" in capfd.readouterr().err


TINY = Shape(model="llama_tiny", rank=4, batch=2, sequence=16, dtype="fp32", microbatch=1)


@pytest.mark.slow
def test_trainers_of_whole_models_compute_alike_and_their_memory_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "_SECONDS", 0.0)
    with start() as runtime:
        rows = {row["variant"]: row for row in model_turns.measure(TINY, runtime, tmp_path, repetitions=1)}
    full, theirs, *ours = rows.values()
    assert (full["variant"], theirs["variant"]) == (model_turns.FULL, model_turns.PEFT)
    assert {row["trainable"] for row in ours} == {theirs["trainable"]}
    assert rows["Accrete, addmm"]["flops"] == rows["Accrete, factored"]["flops"] == theirs["flops"]
    assert full["state_bytes"] == pytest.approx(16 * full["trainable"], rel=0.001)  # weights, gradients, moments
    frozen = full["trainable"] - (theirs["trainable"] - _factor_entries())
    assert theirs["state_bytes"] == pytest.approx(16 * theirs["trainable"] + 4 * frozen, rel=0.001)
    assert rows["Accrete, merged"]["peak_bytes"] > rows["Accrete, addmm"]["peak_bytes"] + 3.9 * frozen
    assert full["to_full"]["speed"]["median"] == 1
    assert all(row["side_by_side"] and row["mfu"] > 0 for row in rows.values())


def _factor_entries():
    """Of rank 4 on the seven linear layers of four blocks."""
    width, inner = 192, 512
    return 4 * 4 * (4 * 2 * width + 3 * (width + inner))


def test_a_model_without_room_is_said_in_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(model_turns, "has_room", lambda device, size: False)
    with start() as runtime:
        rows = model_turns.measure(TINY, runtime, tmp_path, repetitions=1)
        study = document(
            "model", runtime.device, settings={"clock": "processor", "threads": 1}, sets=[{**SET, "rows": rows}]
        )
    assert model_page.tables(study).count("memory does not suffice") == len(rows) == 3


SET = {"model": "llama_tiny", "dtype": "fp32", "rank": 4, "batch": 2, "sequence": 16, "microbatch": 1}


def test_the_page_says_which_gpu_models_were_not_measured_until_they_are():
    settings = {"clock": "processor", "threads": 1}
    study = document("model", torch.device("cpu"), settings=settings, sets=[{**SET, "rows": []}])
    text = model_page.page([study], model.GPU)
    assert all(f"| {one['model']}, {one['batch']} x {one['sequence']} " in text for one in model.GPU)
    assert text.count("not measured") == 3 * len(model.GPU)
    gpu = {**study, "machine": {**study["machine"], "device": "some GPU"}, "settings": {**settings, "clock": "wall"}}
    assert "not measured" not in (both := model_page.page([study, gpu], model.GPU))
    assert both.startswith("## some GPU")


@pytest.mark.slow
def test_the_benchmark_of_layouts_compares_equal_trainers_and_counts_what_the_plan_says(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "parallel.json"
    shape = ["--sequence", "16", "--repetitions", "1", "--processes", "2"]
    assert parallel.main(["--quick", *shape, "--json", str(file)]) == exits.DONE
    (found,) = read_document(file)["sets"]
    rows = {row["name"]: row for row in found["rows"]}
    for row in rows.values():
        assert row["loss"] == pytest.approx(rows[f"{row['method']}, one process"]["loss"], abs=1e-4)
        on_data = [flow for flow in row["step"] if flow["axis"] == DATA]
        gathered = [flow for flow in on_data if flow["kind"] == ALL_GATHER]
        on_tensor = [flow for flow in row["step"] if flow["axis"] == TENSOR]
        plan = row["planned"]["step"]
        assert sent(gathered) == pytest.approx(plan["data axis: weights"], rel=0.01)
        assert sent(on_data) - sent(gathered) == pytest.approx(plan["data axis: gradients"], rel=0.01, abs=200)
        planned = plan["tensor axis: activations"] + plan["tensor axis: factor gradients"]
        assert sent(on_tensor) == pytest.approx(planned, abs=200)  # norms and losses travel, too
    assert sent(rows["ReLoRA, ddp"]["step"]) < 0.1 * sent(rows["full rank, ddp"]["step"])
    restarts = [flow["handed"] for flow in rows["ReLoRA, ZeRO 3"]["restart"]]
    assert sum(restarts) < 0.05 * rows["full rank, ZeRO 3"]["peak_bytes"], "factors travel, the base does not"
    assert rows["ReLoRA, tensor 2"]["peak_bytes"] < rows["ReLoRA, one process"]["peak_bytes"]
    assert "| ReLoRA, ZeRO 3, tensor 2 |" in capfd.readouterr().out


@pytest.mark.slow
def test_the_quality_study_runs_all_methods_at_the_same_tokens(tmp_path):
    words = ["--quick", "--json", str(tmp_path / "q.json"), "--picture", str(tmp_path / "q.png")]
    assert quality.main([*words, "--runs", str(tmp_path / "runs")]) == exits.DONE
    rows = read_document(tmp_path / "q.json")["rows"]
    assert [row["restarts"] for row in rows] == [0, 0, 0, 0, 2, 1]
    assert {row["tokens"] for row in rows} == {12 * 4 * 64}
    for row in rows:
        assert row["val_perplexity"] == pytest.approx(math.exp(row["val_loss"]))
    assert (tmp_path / "q.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_step_benchmark_runs_and_its_variants_train_alike(tmp_path, capfd):
    file = tmp_path / "step.json"
    shape = ["--batch", "1", "--sequence", "16", "--rank", "4", "--repetitions", "2"]
    assert step.main(["--quick", *shape, "--json", str(file)]) == exits.DONE
    rows = {row["variant"]: row for row in read_document(file)["rows"]}
    full, ours, *theirs = rows.values()
    assert all(row["trainable"] == ours["trainable"] for row in theirs)
    assert ours["trainable"] < full["trainable"]
    assert all(row["flops"] == ours["flops"] for row in theirs)
    assert all(row["peak_bytes"] > 4 * full["trainable"] for row in rows.values())
    assert "of a ReLoRA step" in capfd.readouterr().out


@pytest.mark.parametrize("module", [linear, model, parallel, quality, step])
def test_the_documents_show_the_figures_of_the_json_files(module):
    name = module.__name__.rpartition(".")[2]
    shown = (ROOT / "docs" / "results" / f"{name}.md").read_text(encoding="utf-8").splitlines()
    for line in module.tables(read_document(ROOT / "benchmarks" / "results" / f"{name}.json")).splitlines():
        assert line in shown
