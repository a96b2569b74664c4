"""Streams of tasks, trained by the real command on scikit-learn's digits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from launch import exits, train
from parallel.checkpoint import open_checkpoint

TASKS = [
    "{name: one, kind: classification, data: digits, classes: ['0', '1'], steps: 4, full_rank: true}",
    "{name: two, kind: classification, data: digits, classes: ['2', '3'], steps: 4}",
    "{name: three, kind: classification, data: digits, classes: ['4', '5'], steps: 4}",
]
BATCHES = [
    "model=vit_digits",
    "model.config.hidden_size=16",
    "model.config.intermediate_size=16",
    "model.config.num_hidden_layers=1",
    "model.config.num_attention_heads=2",
    "continual=custom",
    "relora=none",
    "lora.rank=4",
    "lora.dense=[head]",
    "training.global_batch_size=8",
    "schedule.warmup_steps=1",
    "schedule.restart_warmup_steps=0",
    "evaluation.every=0",
    "evaluation.sequences=16",
]


def words(folder, *more, tasks=TASKS, method="inflora"):
    stream = [f"continual.tasks=[{', '.join(tasks)}]", f"continual.method={method}"]
    return [*BATCHES, *stream, f"run.dir={folder}", *more]


def steps_of(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(one["step"], one["task"], one["loss"], one["lr"]) for one in records if "event" not in one]


def rows_of(folder):
    return json.loads((folder / "summary.json").read_text())["matrix"]


def same_end(one, other):
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    done = {}

    def run(method):
        if method not in done:
            done[method] = tmp_path_factory.mktemp("streams") / method
            assert train.main(words(done[method], method=method)) == exits.DONE
        return done[method]

    return run


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


@pytest.mark.parametrize("method", ["sequential", "replay", "inflora"])
def test_a_run_stopped_inside_a_task_and_between_tasks_ends_as_the_undisturbed_one(undisturbed, tmp_path, method):
    folder = tmp_path / "run"
    for stop in (3, 6, 8):
        assert train.main(words(folder, f"training.stop_after={stop}", method=method)) == exits.PREEMPTED
    assert train.main(words(folder, method=method)) == exits.DONE
    assert steps_of(folder) == steps_of(undisturbed(method))
    assert rows_of(folder) == rows_of(undisturbed(method))
    assert same_end(folder, undisturbed(method))


def test_a_task_appended_later_continues_as_if_it_had_always_been_there(undisturbed, tmp_path):
    folder = tmp_path / "run"
    assert train.main(words(folder, tasks=TASKS[:2], method="sequential")) == exits.DONE
    assert train.main(words(folder, method="sequential")) == exits.DONE
    assert steps_of(folder) == steps_of(undisturbed("sequential"))
    assert same_end(folder, undisturbed("sequential"))


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
        (TASKS, ["training.stop_after=12"], "has no effect on a stream of 12 steps"),
        (TASKS, ["lte=heads", "lte.reset=factors"], "lte.reset=factors draws `down` at random"),
        (TASKS, ["lte=heads", "lte.exchange=shared"], "lte.exchange=shared draws `down` at random"),
        (TASKS, ["lte=heads", "continual.method=per_task"], "choose lte=none, or one of sequential"),
        (TASKS, ["lte=heads"], "a stream needs heads with processes of their own"),
        (TASKS, ["lora=none"], "continual.method=inflora works on low-rank factors"),
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


def _train(_, overrides):
    return train.main(overrides)


def protected(folder):
    """By distinct input, the projection on what InfLoRA protects at the end of the run."""
    (last,) = (folder / "checkpoints").glob("step_00000012")
    checkpoint = open_checkpoint(last)
    names = [name for name in checkpoint.names("method") if name.startswith("whole/basis.")]
    return {name: (basis := checkpoint.whole("method", name)) @ basis.T for name in names}


def assert_same_numbers(folder, other, method):
    ours, theirs = steps_of(folder), steps_of(other)
    assert [one[:2] for one in ours] == [one[:2] for one in theirs]
    assert [one[2] for one in ours] == pytest.approx([one[2] for one in theirs], rel=1e-5)
    assert rows_of(folder) == rows_of(other)
    if method == "inflora":
        bases, expected = protected(folder), protected(other)
        assert bases.keys() == expected.keys() != set()
        for name, projection in bases.items():
            torch.testing.assert_close(projection, expected[name], atol=1e-5, rtol=0)


LAYOUTS = [
    ("inflora", 2, ["parallel=zero2"]),
    ("replay", 2, ["parallel=zero3"]),
    ("inflora", 4, ["parallel=zero3", "parallel.tensor=2"]),
]


@pytest.mark.parametrize(("method", "size", "layout"), LAYOUTS)
def test_several_processes_give_the_matrix_and_the_losses_of_one(
    on_processes, undisturbed, tmp_path, method, size, layout
):
    folder = tmp_path / "run"
    assert on_processes(_train, size, words(folder, *layout, method=method)) == [exits.DONE] * size
    assert_same_numbers(folder, undisturbed(method), method)


@pytest.mark.parametrize(("method", "size", "layout"), LAYOUTS[1:])
def test_a_run_stopped_in_the_second_task_goes_on_elsewhere(on_processes, undisturbed, tmp_path, method, size, layout):
    folder = tmp_path / "run"
    assert train.main(words(folder, "training.stop_after=6", method=method)) == exits.PREEMPTED
    there = words(folder, *layout, "training.stop_after=10", method=method)
    assert on_processes(_train, size, there) == [exits.PREEMPTED] * size
    assert train.main(words(folder, method=method)) == exits.DONE
    assert_same_numbers(folder, undisturbed(method), method)


@pytest.mark.parametrize("method", ["replay", "inflora"])
def test_heads_that_train_tasks_apart_sync_at_their_ends_and_resume_exactly(on_processes, tmp_path, method):
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    heads = ["lte=heads", "lte.heads=2", "lte.sync_every=3", "lte.outer=nesterov", "lte.outer_lr=0.7"]
    heads += ["lte.outer_momentum=0.5", "checkpoint.every=3"]
    assert on_processes(_train, 2, words(whole, *heads, method=method)) == [exits.DONE] * 2
    stopped = words(halted, *heads, "training.stop_after=6", method=method)
    assert on_processes(_train, 2, stopped) == [exits.PREEMPTED] * 2
    assert on_processes(_train, 2, words(halted, *heads, method=method)) == [exits.DONE] * 2
    assert steps_of(halted) == steps_of(whole)
    assert same_end(halted, whole)
    before, after = (load_file(whole / "tasks" / name / "model.safetensors") for name in ("02_two", "03_three"))
    name = next(name for name in before if name.endswith("query.weight") or name.endswith("q_proj.weight"))
    rank = int(torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3))
    assert rank <= 4 if method == "inflora" else rank > 4  # one `down` for all heads, or one for each
