"""Streams of tasks, trained by the real command on scikit-learn's digits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from launch import exits, export, train
from tests.stream_runs import TASKS, event_of, rows_of, runs_by_method, same_end, steps_of, words


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return runs_by_method(tmp_path_factory.mktemp("streams"))


def test_a_stream_measures_each_task_after_each_and_keeps_a_model_of_every_boundary(undisturbed):
    folder = undisturbed("sequential")
    matrix = rows_of(folder)
    assert [[score is not None for score in row] for row in matrix] == [
        [True, False, False],
        [True, True, False],
        [True] * 3,
    ]
    summary = json.loads((folder / "summary.json").read_text())
    assert {"average_accuracy", "forgetting", "bwt", "fwt"} <= summary.keys()
    assert sorted(path.name for path in (folder / "tasks").iterdir()) == ["01_one", "02_two", "03_three"]
    model = AutoModelForImageClassification.from_pretrained(folder / "tasks" / "02_two")
    assert model.config.id2label == dict(enumerate("012345"))
    assert model(pixel_values=torch.zeros(1, 1, 8, 8)).logits.shape == (1, 6)


def test_a_task_has_its_own_rate_and_joint_training_keeps_the_warm_start_apart(tmp_path):
    folder, tasks = tmp_path / "run", [TASKS[0].replace("steps: 4", "steps: 4, lr: 0.5"), *TASKS[1:]]
    line = words(
        folder, "schedule=constant", "schedule.warmup_steps=0", "optimizer.lr=0.25", tasks=tasks, method="joint"
    )
    assert train.main([word for word in line if word != "schedule.warmup_steps=1"]) == exits.DONE
    assert [(task, lr) for _, task, _, lr in steps_of(folder)] == [("one", 0.5)] * 4 + [("joint", 0.25)] * 8


def test_a_stream_without_a_warm_start_is_measured_against_where_it_began(tmp_path):
    folder = tmp_path / "run"
    assert train.main(words(folder, tasks=[TASKS[0].replace(", full_rank: true", ""), TASKS[1]])) == exits.DONE
    spectra = [json.loads(line) for line in (folder / "spectra.jsonl").read_text().splitlines()]
    assert [max(one["numerical_rank"] for one in spectra if one["restart"] == merges) for merges in (1, 2)] == [4, 8]


def test_a_model_per_task_keeps_its_score(tmp_path):
    assert train.main(words(tmp_path / "run", method="per_task")) == exits.DONE
    rows = rows_of(tmp_path / "run")
    assert rows[1][0] == rows[2][0] == rows[0][0]
    assert rows[2][1] == rows[1][1]


@pytest.mark.parametrize("method", ["sequential", "replay", "ewc", "inflora", "i_lora", "o_lora", "gs_lora"])
def test_a_run_stopped_inside_a_task_and_between_tasks_ends_as_the_undisturbed_one(undisturbed, tmp_path, method):
    folder = tmp_path / "run"
    for stop in (3, 6, 8):
        assert train.main(words(folder, f"training.stop_after={stop}", method=method)) == exits.PREEMPTED
    assert train.main(words(folder, method=method)) == exits.DONE
    assert steps_of(folder) == steps_of(undisturbed(method))
    assert rows_of(folder) == rows_of(undisturbed(method))
    assert same_end(folder, undisturbed(method))


def test_a_process_ends_after_the_task_that_it_was_given_and_trains_nothing_when_asked_again(
    undisturbed, tmp_path, capsys
):
    folder = tmp_path / "run"
    for name, told in (("three", "is the last task: name one of one, two"), ("four", "is no task of this stream")):
        assert train.main(words(folder, f"continual.stop_after={name}", method="sequential")) == exits.REFUSED
        assert f"continual.stop_after={name} {told}" in capsys.readouterr().err
    for _ in range(2):
        assert train.main(words(folder, "continual.stop_after=one", method="sequential")) == exits.PREEMPTED
        assert "stopped by continual.stop_after=one after step 4" in " ".join(capsys.readouterr().out.split())
        assert [path.name for path in (folder / "checkpoints").glob("step_*")] == ["step_00000004"]
    assert train.main(words(folder, method="sequential")) == exits.DONE
    assert steps_of(folder) == steps_of(undisturbed("sequential"))
    assert same_end(folder, undisturbed("sequential"))


def _losing(run):
    """A fold that loses the update."""
    for layer in run.conversion.low_rank.values():
        run.engine.store.write(layer.up, torch.zeros(run.engine.store.shape(layer.up)))


@pytest.mark.parametrize(("dtype", "rounding"), [("fp32", 1e-5), ("bf16", 0.02)])
def test_a_fold_leaves_the_outputs_as_they_are_and_tells_when_it_does_not(
    tmp_path, monkeypatch, capsys, dtype, rounding
):
    def difference(folder):
        line = words(folder, f"training.dtype={dtype}", "optimizer.lr=3e-2", tasks=TASKS[:2])
        assert train.main(line) == exits.DONE
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [one["report"] for one in events if one.get("event") == "stage"][-1]["fold_difference"]

    assert difference(tmp_path / "sound") < rounding
    assert "do not trust" not in capsys.readouterr().out
    monkeypatch.setattr("launch.training.stages.fold", _losing)
    monkeypatch.setattr("launch.training.fold_check.ALLOWED", {torch.float32: 1e-3, torch.bfloat16: 0.03})
    assert difference(tmp_path / "broken") > 0.03
    assert "do not trust this task's model" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("method", ["sequential", "ewc", "i_lora"])
def test_a_task_appended_later_continues_as_if_it_had_always_been_there(undisturbed, tmp_path, method):
    folder = tmp_path / "run"
    assert train.main(words(folder, tasks=TASKS[:2], method=method)) == exits.DONE
    assert train.main(words(folder, method=method)) == exits.DONE
    assert steps_of(folder) == steps_of(undisturbed(method))
    assert same_end(folder, undisturbed(method))


def test_going_back_to_a_task_trains_it_again_to_the_same_end_and_keeps_what_was_there(undisturbed, tmp_path):
    folder = tmp_path / "run"
    assert train.main(words(folder)) == exits.DONE
    assert train.main(words(folder, "continual.restart_from=two")) == exits.DONE
    assert [path.name for path in sorted((folder / "checkpoints" / "abandoned").iterdir())] == [
        "step_00000008",
        "step_00000012",
    ]
    assert same_end(folder, undisturbed("inflora"))


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ([TASKS[0], TASKS[1].replace("steps: 4", "steps: 5"), TASKS[2]], "continual.tasks.two: its steps changed"),
        ([TASKS[0]], "two has been trained already, and is not in the list any more"),
    ],
)
def test_a_task_that_has_begun_cannot_change(tmp_path, capsys, tasks, said):
    folder = tmp_path / "run"
    assert train.main(words(folder, "training.stop_after=6", method="sequential")) == exits.PREEMPTED
    before = (folder / "metrics.jsonl").read_text()
    assert train.main(words(folder, tasks=tasks, method="sequential")) == exits.REFUSED
    assert said in " ".join(capsys.readouterr().err.split())
    assert (folder / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("tasks", "more", "said"),
    [
        ([TASKS[0], TASKS[1].replace("'2'", "'1'")], [], "1"),
        ([TASKS[0], TASKS[1].replace("'2'", "'eleven'")], [], "eleven"),
        ([TASKS[1], TASKS[0]], [], "only the first tasks of a stream may train at full rank"),
        ([TASKS[0].replace("kind", "kynd")], [], "did you mean kind?"),
        (TASKS, ["training.steps=5"], "training.steps=5 has no effect on a stream"),
        (TASKS, ["continual.replay.ratio=2.0"], "continual.replay.ratio has no effect"),
        (TASKS, ["continual.method=inflra"], "continual.method must be one of"),
        (TASKS, ["continual.method=joint", "continual.logits=task"], "continual.logits=task has no effect with"),
        (TASKS, ["continual.ewc.strength=2.0"], "continual.ewc.strength has no effect with continual.method=inflora"),
        (TASKS, ["continual.method=ewc", "relora=relora"], "continual.method=ewc keeps to one draw of factors"),
        (TASKS, ["training.stop_after=12"], "has no effect on a stream of 12 steps"),
        (TASKS, ["lte=heads", "lte.reset=factors"], "lte.reset=factors draws `down` at random"),
        (TASKS, ["lte=heads", "lte.exchange=shared"], "lte.exchange=shared draws `down` at random"),
        (TASKS, ["lte=heads", "continual.method=per_task"], "choose lte=none, or one of sequential"),
        (TASKS, ["lte=heads"], "a stream needs heads with processes of their own"),
        (TASKS, ["lora=none"], "continual.method=inflora works on low-rank factors"),
        (TASKS, ["continual.method=i_lora", "relora=relora"], "i_lora keeps to one draw of factors"),
        (TASKS, ["continual.method=i_lora", "continual.replay.ratio=0.3"], "continual.replay.ratio=0.3 makes 2.4"),
    ],
)
def test_a_stream_that_cannot_be_trained_is_refused_by_name_before_anything_is_written(
    tmp_path, capsys, tasks, more, said
):
    folder = tmp_path / "run"
    if "lora=none" in more:
        line = [word for word in words(folder, *more, tasks=tasks) if not word.startswith("lora.")]
    else:
        line = words(folder, *more, tasks=tasks)
    assert train.main(line) == exits.REFUSED
    error = " ".join(capsys.readouterr().err.split())
    assert said in error, error
    assert not folder.exists()


def test_the_matrix_and_the_written_models_are_those_of_the_chosen_adapter(undisturbed, tmp_path):
    long_term, working = undisturbed("i_lora"), tmp_path / "working"
    assert train.main(words(working, "continual.i_lora.evaluate=working", method="i_lora")) == exits.DONE
    assert steps_of(working) == steps_of(long_term)
    written = {}
    for folder in (long_term, working):
        assert abs(event_of(folder, "final")["merge_difference"]) < 1e-5
        assert export.main([f"run.dir={folder}", f"export.out={tmp_path / folder.name / 'export'}"]) == exits.DONE
        files = [folder / "final", folder / "tasks" / "03_three", tmp_path / folder.name / "export"]
        written[folder], *others = (load_file(one / "model.safetensors") for one in files)
        for other in others:
            assert all(torch.equal(other[name], value) for name, value in written[folder].items())
    differing = {name for name in written[working] if not torch.equal(written[working][name], written[long_term][name])}
    trained = tuple(f"{one}.weight" for one in ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "classifier"))
    assert differing == {name for name in written[working] if name.endswith(trained)}
