"""What a run records of its stages, and what reports make of it."""

import math

import pytest

from launch.report import report
from launch.reports import stream_figures
from launch.reports.history import read_histories, read_history
from launch.reports.stream_groups import group_streams
from launch.reports.stream_heat import matrix_figure
from launch.reports.stream_tables import audit_table, matrix_table, outcome_table
from launch.watching.console import SilentConsole
from launch.watching.records import append_records
from launch.watching.stage_notes import note_stage, restore_stages
from launch.watching.stage_records import Score, StageRecord, read_stream, stream_of
from launch.watching.trackers.config import Images
from launch.watching.trackers.tracker import Tracker
from launch.watching.watch import Watch

ROWS = [[0.1, 0.1], [0.9, 0.2], [0.6, 0.8]]


def records(shift=0.0):
    return [
        StageRecord(
            step=10 * (index + 1),
            task="ab"[index] if index >= 0 else "",
            index=index,
            scores={
                task: Score(loss=1.0, accuracy=value + shift, samples=5) for task, value in zip("ab", row, strict=True)
            },
            seconds=3.0,
            method_bytes=100,
        )
        for index, row in enumerate(ROWS, start=-1)
    ]


def make_run(folder, stages, method="replay", seed=0):
    folder.mkdir()
    append_records(folder / "metrics.jsonl", {"step": 1, "tokens": 1, "loss": 2.0, "lr": 0.1})
    append_records(folder / "metrics.jsonl", *({"event": "stage", **stage.values()} for stage in stages))
    (folder / "config.yaml").write_text(f"continual: {{method: {method}}}\nrun: {{seed: {seed}}}\n")
    return folder


def test_a_stream_is_read_back_as_it_was_recorded(tmp_path):
    stream = read_stream(read_history(make_run(tmp_path / "run", records())).events)
    assert stream == stream_of(records())
    told = stream.summary()
    assert told["matrix"] == ROWS[1:]
    assert told["forgetting"] == pytest.approx(0.3)
    assert told["fwt"] == pytest.approx(0.1)


def test_language_models_are_judged_by_their_loss():
    stages = records()
    for stage in stages:
        stage.scores = {task: Score(loss=2.0, perplexity=math.exp(2.0), accuracy=0.5) for task in "ab"}
    stream = stream_of(stages)
    assert stream.score == "loss"
    assert not stream.matrix.higher_is_better


def test_joint_training_learns_all_and_an_audited_stage_nothing():
    before, first, second = records()
    joint = StageRecord(step=10, task="joint", index=0, scores=second.scores, learns=["a", "b"])
    assert stream_of([before, joint]).summary()["last_accuracy"] == pytest.approx(0.7)
    second.audit = {"request": "b", "new": 1, "by_class": {"3": 0.5}, "forgotten_before": 0.9}
    stream = stream_of([before, first, second])
    assert stream.matrix.learned == [0, None]
    second.audit["unlearned"] = ["a"]
    assert stream_of([before, first, second]).matrix.learned == [None, None]
    assert stream.summary()["audits"] == {"b": second.audit}
    columns, rows = audit_table(stream)
    assert columns == ["stage", "Acc_f before", "new"]
    assert rows == [["b", 0.9, 1]]


def test_runs_that_differ_in_the_seed_alone_are_one_row(tmp_path):
    folders = [
        make_run(tmp_path / "one", records()),
        make_run(tmp_path / "two", records(0.1), seed=1),
        make_run(tmp_path / "short", records()[:2], seed=2),
        make_run(tmp_path / "other", records(), method="ewc"),
    ]
    groups = group_streams(read_histories(folders))
    assert [(group.name, len(group.streams), group.runs) for group in groups] == [("replay", 2, 3), ("ewc", 1, 1)]
    _, rows = outcome_table(groups)
    assert rows[0][:4] == ["replay", "2 of 3", 2, "75.0 (7.1)"]
    assert rows[1][:4] == ["ewc", 1, 2, "70.0"]
    assert matrix_table(groups[0])[1][2] == ["b", "65.0 (7.1)", "85.0 (7.1)"]
    assert [text.get_text() for text in matrix_figure(groups).axes[1].texts][-2:] == ["60.0", "80.0"]
    assert [axes.get_title(loc="left") for axes in stream_figures.curves_figure(groups).axes[:2]] == ["a", "b"]
    bars = stream_figures.forgetting_figure(groups).axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx([0.3, 0.3])
    names = {file.name for file in report(folders, tmp_path / "out")}
    assert {"matrix.png", "tasks.png", "forgetting.png", "stage_costs.png", "streams.md"} <= names
    assert "| replay | 2 of 3 | 2 | 75.0 (7.1) |" in (tmp_path / "out/streams.md").read_text()


class Told(Tracker):
    def __init__(self):
        self.logged, self.tables, self.pictures = [], [], []

    def log(self, record):
        self.logged.append(record)

    def matrix(self, columns, rows):
        self.tables.append((columns, rows))

    def figures(self, figures):
        self.pictures.append({name: figure.shape[2] for name, figure in figures.items()})


def test_everybody_hears_of_a_stage_and_a_branch_gets_what_was_before_it(tmp_path):
    told = Told()
    watch = Watch(metrics=tmp_path / "m.jsonl", console=SilentConsole(), tracker=told, device="cpu", log_every=1)
    note_stage(watch, records()[:1])
    assert told.tables == []
    note_stage(watch, records())
    assert told.logged[-1]["tasks/a/accuracy"] == 0.6
    assert told.logged[-1]["stream/forgetting"] == pytest.approx(0.3)
    assert told.tables == [(["after", "a", "b"], [["a", 0.9, 0.2], ["b", 0.6, 0.8]])]
    assert told.pictures == []
    restore_stages(watch, records())
    assert read_stream(read_history_events(tmp_path)) == stream_of(records())
    told.images = Images.end
    note_stage(watch, records())
    assert told.pictures == [{"matrix": 4}]


def read_history_events(folder):
    (folder / "m.jsonl").rename(folder / "metrics.jsonl")
    events = read_history(folder).events
    assert sorted(event["index"] for event in events) == [-1, 0, 1]
    return events
