"""Whole runs followed by W&B, offline: every attempt under one id, pictures, files, alerts and heads included."""

import json
import os
import signal
import socket
import time
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch import exits, train
from launch.config import load, resolved
from launch.training import loop
from launch.training.audience import _ask, names_of
from launch.training.guard import Guard
from launch.training.requests import Wish, waiting
from launch.training.run_folder import RunFolder
from launch.watching.trackers.config import HeadRuns, SystemMetrics, TrackerConfig, TrackerMode
from launch.watching.trackers.names import Names
from launch.watching.trackers.opening import Opening, open_trackers
from launch.watching.trackers.tag_commands import TagCommands
from parallel.runtime import start
from tests.test_launch.test_tracker import history, logs, of_kind


def test_a_resumed_run_goes_on_under_the_same_id_and_nothing_leaves_the_run_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    words = [*tiny, "lora.target_modules=[q_proj]", "tracker=wandb", "tracker.images=restarts", "tracker.artifacts=all"]
    assert train.main([*words, "training.stop_after=3", "checkpoint.every=0"]) == exits.PREEMPTED
    first = (tmp_path / "run/tracker_id").read_text()
    assert train.main(words) == exits.DONE
    assert (tmp_path / "run/tracker_id").read_text() == first
    attempts = list((tmp_path / "run/wandb").glob(f"offline-run-*-{first.strip()}"))
    assert len(attempts) == 2
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"run"}
    pictures = {path.name for path in Path(tmp_path / "run/report").glob("*.png")}
    assert {"loss.png", "learning_rate.png", "spectra.png", "rank.png"} <= pictures
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "done"
    _, records = logs(tmp_path / "run", first.strip())
    drawn = [row["step"] for row in history(records) if any(key.startswith("figures/spectra/") for key in row)]
    assert drawn == [10, 15, 20, 20], "at each restart, at the end, and in the report"
    artifacts = [one for one in of_kind(records, "artifact") if one.type in ("checkpoint", "model")]
    steps = [json.loads(one.metadata)["step"] for one in artifacts if one.type == "checkpoint"]
    assert steps == [4, 5, 8, 12, 16, 20]
    files = {file.path for one in artifacts if one.type == "model" for file in one.manifest.contents}
    assert {"model.safetensors", "config.json"} <= files
    assert of_kind(records, "alert") == []


def test_perplexities_of_a_stream_are_read_back_as_curves_and_the_matrix_as_a_heat_map(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    corpus = next(word for word in tiny if word.startswith("data.path=")).removeprefix("data.path=")
    tasks = ", ".join(f"{{name: {name}, kind: causal_lm, data: {corpus}, steps: 3}}" for name in ("one", "two"))
    dropped = ("data.path=", "training.steps=", "relora.")
    words = [*(word for word in tiny if not word.startswith(dropped)), "continual=custom", f"continual.tasks=[{tasks}]"]
    assert train.main([*words, "relora=none", "schedule.restart_warmup_steps=0", "tracker=wandb"]) == exits.DONE
    folder = tmp_path / "run"
    (records,) = logs(folder)
    curve = {row["step"]: row["tasks/one/perplexity"] for row in history(records) if "tasks/one/perplexity" in row}
    stages = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = {one["step"]: one["scores"]["one"]["perplexity"] for one in stages if one.get("event") == "stage"}
    assert curve == told
    assert list(curve) == [0, 3, 6]
    forgetting = [row["stream/forgetting"] for row in history(records) if "stream/forgetting" in row]
    assert forgetting == [json.loads((folder / "summary.json").read_text())["forgetting"]]
    media = folder / "wandb" / "latest-run" / "files" / "media"
    tables = [json.loads(path.read_text()) for path in media.glob("table/stream/*.json")]
    assert sorted(len(table["data"]) for table in tables) == [1, 2]
    assert all(table["columns"] == ["after", "one", "two"] for table in tables)
    assert len(list(media.glob("images/figures/matrix*.png"))) >= 2


def _alerts(records):
    return [(alert.title, alert.level) for alert in of_kind(records, "alert")]


def test_refused_updates_give_an_alert_at_half_of_what_ends_the_run_and_the_end_another(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Guard, "objection", lambda *_, **__: "loss is strange")
    assert train.main([*tiny, "tracker=wandb", "training.max_skips=5"]) == exits.FAILED
    (records,) = logs(tmp_path / "run")
    assert _alerts(records) == [("updates are refused", "WARN"), ("training failed", "ERROR")]
    first, last = of_kind(records, "alert")
    assert first.text.startswith("step 3: 3 of the last 128 updates were refused; 5 end the run")
    assert last.text.startswith("after step 5: TrainingDiverged: 5 of the last 128")
    assert [one.exit_code for one in of_kind(records, "exit")] == [exits.FAILED]


HEADS = ["lte=heads", "lte.heads=2", "lte.sync_every=4", "evaluation.every=8", "tracker=wandb", "tracker.heads=apart"]


def _without_cycles(tiny):
    return [word for word in tiny if not word.startswith(("relora.", "schedule.restart"))]


def test_heads_apart_have_runs_in_one_group_and_a_stop_from_outside_gives_one_alert(tiny, tmp_path, monkeypatch):
    real = loop.evaluate

    def signalled(run):
        os.kill(os.getpid(), signal.SIGUSR1)
        return real(run)

    monkeypatch.setattr(loop, "evaluate", signalled)  # after step 8; the next sync is at 12
    assert train.main([*_without_cycles(tiny), *HEADS]) == exits.PREEMPTED
    run_id = (tmp_path / "run/tracker_id").read_text().strip()
    (run,), (head,) = (logs(tmp_path / "run", name) for name in (run_id, f"{run_id}-head-1"))
    named = [of_kind(records, "run")[0] for records in (run, head)]
    assert [(one.run_group, one.display_name, one.job_type) for one in named] == [
        ("run", "first", "train"),
        ("run", "first-head-1", "head"),
    ]
    assert _alerts(run) == [("training stopped", "WARN")]
    assert of_kind(run, "alert")[0].text == "by SIGUSR1 after step 12, with a checkpoint"
    assert _alerts(head) == []
    rows = {row["step"]: row for row in history(head)}
    assert list(rows) == list(range(1, 13))
    assert set(rows[1]) == {"step", "tokens", "loss", "lr", "grad_norm"}
    syncs = {row["step"]: row for row in history(run) if "sync/loss" in row}
    assert list(syncs) == [4, 8, 12]
    assert [rows[step]["loss"] for step in syncs] == [row["sync/losses/head_1"] for row in syncs.values()]


def _on_two_machines(runtime, folder):
    """What is opened where, for processes of one head and for processes of a head each."""
    real = socket.gethostname
    socket.gethostname = lambda: f"machine-{runtime.process_rank}"
    more = []
    try:
        with start(heads=2) as apart:
            for place, heads, choice in ((runtime, [0], "together"), (apart, [apart.head.index], "apart")):
                config = TrackerConfig(mode=TrackerMode.offline, system_metrics=SystemMetrics.nodes)
                config.heads = HeadRuns(choice)
                opening = Opening(config=config, run_dir=folder / choice, resolved={}, step=0, say=print)
                names = Names(run_id=choice, name="x", group="g", job_type="train")
                tracker, others = open_trackers(opening, names, place, heads)
                tracker.log({"step": 1, "loss": float(runtime.process_rank)})
                tracker.finish()
                more.append(others)
    finally:
        socket.gethostname = real
    return more


def test_processes_on_other_machines_have_runs_for_their_heads_or_only_for_the_machines_load(on_processes, tmp_path):
    assert on_processes(_on_two_machines, 2, tmp_path) == [[{}, {}]] * 2
    found = {}
    for name in ("together", "together-node-1", "apart", "apart-head-1"):
        (records,) = logs(tmp_path / name.split("-")[0], name)
        assert of_kind(records, "stats"), "each is the only one on its machine"
        found[name] = of_kind(records, "run")[0].job_type, [row["loss"] for row in history(records)]
    assert found == {
        "together": ("train", [0.0]),
        "together-node-1": ("node", []),
        "apart": ("train", [0.0]),
        "apart-head-1": ("head", [1.0]),
    }
    assert sum(len(logs(tmp_path / name)) for name in ("together", "apart")) == 4


def test_names_follow_what_runs_have_in_common(tmp_path):
    def named(path, *words):
        config = load([*words, "tracker=wandb"])
        names = names_of(config, config.tracker, RunFolder(path=path, resume=None, finished=False, notices=[]), "id")
        return names.group, names.name, names.job_type

    assert named(tmp_path / "mine", "run.name=x") == (None, "x", "train")
    (tmp_path / "sweep.json").write_text("{}")
    assert named(tmp_path / "003", "run.name=x") == (tmp_path.name, "x-003", "train")
    assert named(tmp_path / "003", "tracker.group=g", "tracker.name=n") == ("g", "n", "train")
    elastic = ["lte=elastic", "lte.heads=3", "training.global_batch_size=12", "relora=none"]
    one, other, third = (
        named(tmp_path / folder, *elastic, f"lte.meeting={address}", f"run.seed={seed}")
        for folder, address, seed in (("a/head-a", "m:1", 0), ("b/head-b", "10.0.0.1:1", 0), ("c/head-c", "m:1", 1))
    )
    assert one[0] == other[0] != third[0], "the same training, wherever its heads are"
    assert (one[1:], other[1]) == (("first-head-a", "head"), "first-head-b")


@pytest.mark.parametrize(("words", "message"), [
    (["tracker=wandb", "tracker.heads=apart"], "tracker.heads=apart has no effect on a run without lte.heads"),
    (["tracker=wandb", "tracker.artifacts=final", "run.save_final=false"], "tracker.artifacts=final sends final/"),
    (["tracker=tensorboard", "tracker.project=x"], "has no effect as it is: choose one of tracker=wandb"),
    (["tracker=tensorboard", "+tracker.notes=x"], "tracker.notes has no effect with tracker=tensorboard"),
    (["tracker=wandb", "tracker.finish_timeout_seconds=0"], "tracker.finish_timeout_seconds must be above 0, got 0"),
    (["tracker=wandb", f"tracker.tags=[{'x' * 65}]"], "tracker.tags must have 1 to 64 characters each"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_settings_of_a_tracker_that_would_have_no_effect_are_refused(words, message, capsys):
    assert train.main(words) == exits.REFUSED
    assert message in capsys.readouterr().err


class OnServer:
    """A run as W&B's API gives it, and what somebody does to it there."""

    def __init__(self, *tags):
        self.tags, self.sent, self.error = list(tags), [], None

    def update(self):
        if self.error is not None:
            raise self.error
        self.sent.append(list(self.tags))


def test_tags_become_requests_of_the_run_and_what_fails_on_the_way_is_tried_again(tmp_path):
    run = OnServer("mine", "checkpoint", "restart")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(resolved(load(["relora=none"]))))
    said: list[str] = []
    commands = TagCommands(
        lambda: run, [wish.value for wish in Wish], partial(_ask, tmp_path, said.append), said.append
    )
    run.error = ConnectionResetError("lost")
    commands.look()
    run.tags = ["mine", "checkpoint", "restart"]  # as the server still has them
    commands.look()
    assert waiting(tmp_path) == [], "a tag that cannot be taken away is not obeyed"
    assert len(said) == 1
    assert said.pop().startswith(
        "W&B's tags cannot be read or changed, which is tried again: ConnectionResetError: lost"
    )
    run.tags, run.error = ["mine", "checkpoint", "restart"], None
    commands.look()
    assert waiting(tmp_path) == ["checkpoint"]
    assert run.sent == [["mine"]]
    assert [text.partition(" has no meaning")[0] for text in said] == [
        "tag in W&B: checkpoint",
        "tag in W&B: restart",
        f"tag in W&B: {tmp_path}: restart",
    ]


def test_tags_are_looked_for_until_the_run_ends():
    looks = []
    commands = TagCommands(lambda: looks.append(1) or OnServer(), ["stop"], print, print, every_seconds=0.01)
    commands.start()
    limit = time.monotonic() + 20
    while len(looks) < 3 and time.monotonic() < limit:
        time.sleep(0.01)
    commands.stop()
    assert len(looks) >= 3
    time.sleep(0.1)
    after = len(looks)
    time.sleep(0.1)
    assert len(looks) == after


def test_a_run_that_is_offline_says_that_tags_cannot_be_seen(tmp_path):
    said: list[str] = []
    config = TrackerConfig(mode=TrackerMode.offline, tag_commands=True)
    opening = Opening(config=config, run_dir=tmp_path, resolved={}, step=0, say=said.append, ask=print)
    opening.open(Names(run_id="id", name="x", group=None, job_type="train"), system_metrics=False).finish()
    assert said == ["tracker.tag_commands needs a run that is online, and this one is not: `accrete tell` works"]
