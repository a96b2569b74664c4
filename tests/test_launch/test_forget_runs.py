"""Streams with requests to forget, trained by the real command: audits, exact resume, other layouts, bad input."""

import json

import pytest

from launch import exits, train
from launch.reports.history import read_history
from launch.reports.stream_tables import audit_table, report_table
from launch.watching.stage_records import read_stream
from tests.stream_runs import BATCHES, same_end, steps_of

TASKS = [
    "{name: base, kind: classification, data: digits, classes: ['0', '1', '2', '3'], "
    "steps: 120, lr: 1.0e-2, full_rank: true}",
    "{name: two, kind: forget, data: digits, classes: ['2'], steps: 8}",
    "{name: one, kind: forget, data: digits, classes: ['1'], steps: 8}",
]
SETTINGS = [
    "lora.dense=[]",
    "training.global_batch_size=32",
    "continual.gs_lora.alpha=11",
    "continual.gs_lora.groups=matrix",
    "continual.gs_lora.prototype_retain=0.1",
    "continual.gs_lora.prototype_forget=0.05",
    "continual.gs_lora.prototype_bound=0.5",
]


def words(folder, *more, tasks=TASKS, method="gs_lora", settings=SETTINGS):
    shape = [word for word in BATCHES if not word.startswith(("lora.dense", "evaluation.sequences"))]
    stream = [f"continual.tasks=[{', '.join(tasks)}]", f"continual.method={method}"]
    return [*shape, "evaluation.sequences=null", *settings, *stream, f"run.dir={folder}", *more]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forgetting") / "run"
    assert train.main(words(folder)) == exits.DONE
    return folder


def test_each_request_is_audited_in_the_summary_the_events_and_the_tables(undisturbed):
    summary = summary_of(undisturbed)
    assert list(summary["audits"]) == ["two", "one"]
    tasks, matrix = summary["tasks"], summary["matrix"]

    def score(row, task):
        return matrix[row][tasks.index(task)]

    for row, name in ((1, "two"), (2, "one")):
        audit = summary["audits"][name]
        assert audit["forgotten_before"] == score(row - 1, f"{name}/forgotten") > 0.5
        assert audit["forgotten_after"] == score(row, f"{name}/forgotten")
        assert audit["retained_before"] == score(row - 1, f"{name}/retained")
        assert audit["retained_after"] == score(row, f"{name}/retained")
        assert audit["drop"] == audit["forgotten_before"] - audit["forgotten_after"]
        assert 0 <= audit["h_mean"] <= 1
    assert summary["audits"]["one"]["earlier_after"] == score(2, "one/earlier")
    stream = read_stream(read_history(undisturbed).events)
    assert {stage.task: stage.audit for stage in stream.stages if stage.audit} == summary["audits"]
    columns, rows = audit_table(stream)
    assert {"Acc_f before", "Acc_f after", "Acc_r before", "Acc_r after", "Acc_old", "drop", "H-mean"} <= {*columns}
    assert [row[0] for row in rows] == ["two", "one"]
    assert {"groups", "zero_groups", "zero_share"} <= {*report_table(stream)[0]}
    assert [stage.report.get("groups") for stage in stream.stages] == [None, 6, 6]


def test_what_was_forgotten_on_purpose_counts_in_no_mean_and_in_no_forgetting(undisturbed):
    summary = summary_of(undisturbed)
    base = summary["tasks"].index("base")
    events = [one for one in read_history(undisturbed).events if one["event"] == "stage"]
    counted = {event["task"]: event["scores"]["base"]["samples"] for event in events if event["index"] >= 0}
    rest = {event["task"]: event["scores"]["one/retained"] for event in events if event["index"] >= 0}
    assert counted["base"] > counted["two"] > counted["one"] > 0
    last = summary["matrix"][2][base]
    assert summary["last_accuracy"] == last == rest["one"]["accuracy"]
    assert counted["one"] == rest["one"]["samples"]


def test_measures_of_groups_are_in_the_records_of_low_rank_steps(undisturbed):
    records = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "event" not in record]
    assert all(("groups/zero" in record) == (record["task"] != "base") for record in steps)
    assert all(record["loss"] == pytest.approx(record["loss/retain"] + record["loss/forget"]) for record in steps[120:])


def test_a_run_stopped_inside_requests_and_between_them_ends_as_the_undisturbed_one(undisturbed, tmp_path):
    folder = tmp_path / "run"
    for stop in (120, 125, 128, 133):
        assert train.main(words(folder, f"training.stop_after={stop}")) == exits.PREEMPTED
    assert train.main(words(folder)) == exits.DONE
    assert steps_of(folder) == steps_of(undisturbed)
    assert summary_of(folder)["audits"] == summary_of(undisturbed)["audits"]
    assert same_end(folder, undisturbed)


def test_a_request_that_is_appended_later_is_audited_against_the_model_it_finds(undisturbed, tmp_path):
    folder = tmp_path / "run"
    assert train.main(words(folder, tasks=TASKS[:1])) == exits.DONE
    assert train.main(words(folder)) == exits.DONE
    assert steps_of(folder) == steps_of(undisturbed)
    ours, theirs = summary_of(folder), summary_of(undisturbed)
    assert ours["audits"] == theirs["audits"]
    assert same_end(folder, undisturbed)


def test_where_tasks_are_known_what_is_retained_competes_within_the_task_that_taught_it(tmp_path):
    def teach(name, first, second, more=""):
        return (
            f"{{name: {name}, kind: classification, data: digits, classes: ['{first}', '{second}'], steps: 40{more}}}"
        )

    tasks = [teach("a", 0, 1, ", full_rank: true"), teach("b", 2, 3), TASKS[2].replace("steps: 8", "steps: 4")]
    more = ["continual.scenario=task", "optimizer.lr=5e-3", "lora.dense=[head]"]
    assert train.main(words(tmp_path / "run", *more, tasks=tasks)) == exits.DONE
    summary = summary_of(tmp_path / "run")
    (event,) = (one for one in read_history(tmp_path / "run").events if one["event"] == "stage" and one["index"] == 1)
    right = {name: round(score["samples"] * score["accuracy"]) for name, score in event["scores"].items()}
    assert right["a"] > 50
    assert right["one/retained"] == right["a"] + right["b"] - right["one/forgotten"]
    assert summary["matrix"][0][summary["tasks"].index("one/retained")] is None


SHORT = [TASKS[0].replace("steps: 120, lr: 1.0e-2", "steps: 4"), *TASKS[1:]]
"""On other layouts sums are rounded otherwise, and long training at a high rate makes much of that."""


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "run"
    assert train.main(words(folder, tasks=SHORT)) == exits.DONE
    return folder


def assert_same_numbers(folder, other):
    ours, theirs = steps_of(folder), steps_of(other)
    assert [one[:2] for one in ours] == [one[:2] for one in theirs]
    assert [one[2] for one in ours] == pytest.approx([one[2] for one in theirs], rel=1e-5)
    assert summary_of(folder)["matrix"] == summary_of(other)["matrix"]
    assert summary_of(folder)["audits"] == summary_of(other)["audits"]
    reports = [[stage.report for stage in read_stream(read_history(one).events).stages[1:]] for one in (folder, other)]
    for here, there in zip(*reports, strict=True):
        assert here["zeroed"] == there["zeroed"]
        assert 0 < there["zero_groups"] < there["groups"]
        assert dict(here["norms"]) == pytest.approx(dict(there["norms"]), rel=1e-5)


def _train(_, overrides):
    return train.main(overrides)


@pytest.mark.parametrize(("size", "layout"), [(2, ["parallel=zero2"]), (4, ["parallel=zero3", "parallel.tensor=2"])])
def test_several_processes_forget_as_one_does(on_processes, short, tmp_path, size, layout):
    folder = tmp_path / "run"
    assert on_processes(_train, size, words(folder, *layout, tasks=SHORT)) == [exits.DONE] * size
    assert_same_numbers(folder, short)


def test_a_run_stopped_in_a_request_goes_on_elsewhere(on_processes, short, tmp_path):
    folder, layout = tmp_path / "run", ["parallel=zero3", "parallel.tensor=2"]
    assert train.main(words(folder, "training.stop_after=10", tasks=SHORT)) == exits.PREEMPTED
    there = words(folder, *layout, "training.stop_after=15", tasks=SHORT)
    assert on_processes(_train, 4, there) == [exits.PREEMPTED] * 4
    assert train.main(words(folder, tasks=SHORT)) == exits.DONE
    assert_same_numbers(folder, short)


def test_a_language_model_forgets_documents_and_is_audited_by_its_loss(tmp_path):
    for name, word in (("keep", "sand"), ("drop", "moon")):
        lines = [f"{word} {number * 7919 % 97} {word}\n" for number in range(400)]
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    keep, drop = tmp_path / "keep.txt", tmp_path / "drop.txt"
    measured = f"validation: {keep}, steps: 20"
    tasks = [
        f"{{name: text, kind: causal_lm, data: [{keep}, {drop}], {measured}, full_rank: true}}",
        f"{{name: moon, kind: forget, data: {drop}, retain: {keep}, {measured}}}",
    ]
    shape = ["hidden_size=32", "intermediate_size=32", "num_hidden_layers=1", "num_attention_heads=2"]
    line = [
        *(f"model.config.{word}" for word in shape),
        *("continual=custom", "relora=none", "lora.rank=4", "lora.dense=[]", "training.global_batch_size=8"),
        *("data.sequence_length=32", "schedule.warmup_steps=1", "schedule.restart_warmup_steps=0"),
        *("evaluation.every=0", "evaluation.sequences=16", "optimizer.lr=1e-2", "continual.save_models=false"),
        *("continual.method=gs_lora", "continual.gs_lora.bound=5.0", f"continual.tasks=[{', '.join(tasks)}]"),
        *(f"run.dir={tmp_path / 'run'}", f"data.cache={tmp_path / 'cache'}"),
    ]
    assert train.main(line) == exits.DONE
    audit = summary_of(tmp_path / "run")["audits"]["moon"]
    assert audit["forgotten_rise"] > 0.5 > 5 * audit["retained_rise"]
    assert audit["forgotten_rise"] == audit["forgotten_loss_after"] - audit["forgotten_loss_before"]


FORGET = TASKS[1]


@pytest.mark.parametrize(
    ("tasks", "more", "said"),
    [
        ([TASKS[0], FORGET.replace("'2'", "'eleven'")], [], "has no class eleven"),
        ([TASKS[0], FORGET.replace("'2'", "'7'")], [], "no task before it has taught class 7"),
        ([TASKS[0], FORGET.replace("['2']", "['0', '1', '2', '3']")], [], "nothing would be retained"),
        ([TASKS[0], FORGET.replace("steps", "retain: [], steps")], [], "nothing would be retained"),
        ([TASKS[0], FORGET.replace("steps", "retain: ['2', '0'], steps")], [], "class 2 is to be forgotten too"),
        ([TASKS[0], FORGET, FORGET.replace("two", "again")], [], "class 2 is forgotten already"),
        ([TASKS[0], FORGET.replace("classes: ['2'], ", "")], [], "name the classes that are to be forgotten"),
        ([TASKS[0].replace("1.0e-2", "0.0"), FORGET], [], "lr must be a number above 0"),
        ([TASKS[0], FORGET.replace("steps: 8", "steps: 8, full_rank: true")], [], "forgets with low-rank factors"),
        (TASKS, ["continual.gs_lora.beta=0"], "continual.gs_lora.beta must be above 0"),
        (TASKS, ["continual.gs_lora.groups=head"], "groups"),
        (TASKS, ["relora.every=4"], "restarts draw anew"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_name(tmp_path, capsys, tasks, more, said):
    settings = ["relora=relora"] if "relora.every=4" in more else []
    assert (
        train.main(words(tmp_path / "run", *settings, *more, tasks=tasks, settings=["lora.dense=[]"])) == exits.REFUSED
    )
    error = " ".join(capsys.readouterr().err.split())
    assert said in error, error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["sequential", "replay", "inflora", "joint", "per_task"])
def test_methods_that_do_not_forget_refuse_requests(tmp_path, capsys, method):
    assert train.main(words(tmp_path / "run", method=method, settings=["lora.dense=[]"])) == exits.REFUSED
    error = " ".join(capsys.readouterr().err.split())
    assert f"continual.method={method}" in error
    assert "two" in error
    assert not (tmp_path / "run").exists()
