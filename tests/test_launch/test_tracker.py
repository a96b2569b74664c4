import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from launch.watching.trackers.config import Artifacts, SystemMetrics, TrackerConfig, TrackerMode
from launch.watching.trackers.modes import modes
from launch.watching.trackers.names import Names, Seat, seats
from launch.watching.trackers.opening import Opening
from launch.watching.trackers.queued import QueuedTracker
from launch.watching.trackers.tracker import Level, Tracker
from launch.watching.trackers.wandb_run import WandbTracker
from relora.errors import ConfigError

ROOT = Path(__file__).parents[2]


def session(code: str, *arguments: object, **environment: str) -> list[str]:
    """Run code in a process of its own, as an attempt at a run is; returns what it printed."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    clean |= {"NETRC": "/nonexistent", "WANDB_ERROR_REPORTING": "false", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=clean,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def attempt(folder: Path, first: int) -> None:
    """Track two steps and all that there is, offline."""
    import numpy as np

    config = TrackerConfig(
        project="study", tags=["tiny"], notes="a sentence", artifacts=Artifacts.all, mode=TrackerMode.offline
    )
    said: list[str] = []
    opening = Opening(
        config=config, run_dir=folder, resolved={"lora": {"rank": 4}, "relora": None}, step=first - 1, say=said.append
    )
    names = Names(run_id="abcd1234", name="first", group="pair", job_type="train")
    tracker = opening.open(names, system_metrics=True)
    head = opening.open(names.of_head(1), system_metrics=False)
    for step in (first, first + 1):
        tracker.log({"step": step, "loss": 10.0 / step, "cycle": 0, "note": "words"})
        head.log({"step": step, "loss": 20.0 / step})
    tracker.event({"event": "restart", "step": first + 1, "layers": 28, "pruned_share": 0.5})
    tracker.event({"event": "sync", "step": first + 1, "members": [0, 2], "losses": [2.5, 3.5], "ranks": {"q": 1.0}})
    tracker.figures({"loss": folder / "loss.png", "matrix": np.zeros((4, 6, 4), dtype=np.uint8)})
    tracker.matrix(["after", "a"], [["a", 0.9]])
    tracker.checkpoint(folder / "checkpoints/step_00000002", 2)
    tracker.model(folder / "final")
    tracker.alert("updates are refused", "5 of the last 128", Level.warning)
    tracker.summary({"status": "done", "val_loss": 3.0, "matrix": [[1.0]]})
    head.finish(0)
    tracker.finish(0)
    assert not said


@pytest.fixture(scope="module")
def attempts(tmp_path_factory) -> Path:
    """The folder of a run that was tracked offline in two attempts."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("run")
    Image.new("RGB", (8, 8), "white").save(folder / "loss.png")
    checkpoint = folder / "checkpoints/step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"format": 1, "files": {"a": {"bytes": 3}, "b": {"bytes": 4}}}')
    (folder / "final/deep").mkdir(parents=True)
    (folder / "final/model.safetensors").write_bytes(b"weights")
    (folder / "final/deep/file").write_bytes(b"more")
    for first in (1, 3):
        attempt(folder, first)
        time.sleep(1)  # W&B's folders are named after the second
    return folder


def read_log(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format, a protobuf message in each entry."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, block, header = path.read_bytes(), 32768, 7
    at, parts = header, b""
    while at + header <= len(data):
        if block - at % block < header:  # the rest of a block that cannot hold a header is padding
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + header])
        parts += data[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):  # a full entry, or the last part of one
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def logs(folder: Path, run_id: str = "*") -> list[list[Any]]:
    """The records of all attempts that have ended; W&B's service may still be writing the last ones."""
    return [ended(path) for path in sorted(folder.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))]


def ended(path: Path) -> list[Any]:
    limit = time.monotonic() + 30
    while not of_kind(records := list(read_log(path)), "exit"):
        assert time.monotonic() < limit, f"{path} has no end"
        time.sleep(0.05)
    return records


def items(entries: Any) -> dict[str, Any]:
    return {entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}


def history(records: list[Any]) -> list[dict[str, Any]]:
    rows = [items(record.history.item) for record in records if record.HasField("history")]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def of_kind(records: list[Any], kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records if record.HasField(kind)]


RUN = "abcd1234"


def test_both_attempts_are_one_run(attempts):
    assert len(logs(attempts, RUN)) == 2
    assert {run.run_id for records in logs(attempts, RUN) for run in of_kind(records, "run")} == {RUN}


def test_the_run_carries_its_names_and_configuration(attempts):
    for records in logs(attempts, RUN):
        run = of_kind(records, "run")[0]
        named = (run.project, run.run_group, run.display_name, run.job_type, run.notes, list(run.tags))
        assert named == ("study", "pair", "first", "train", "a sentence", ["tiny"])
        config = items(run.config.update)
        assert config["lora"] == {"rank": 4}
        assert config["relora"] is None


def test_a_head_of_the_same_process_has_a_run_of_its_own_in_the_group(attempts):
    for records, first in zip(logs(attempts, f"{RUN}-head-1"), (1, 3), strict=True):
        run = of_kind(records, "run")[0]
        assert (run.run_group, run.display_name, run.job_type) == ("pair", "first-head-1", "head")
        assert history(records) == [{"step": step, "loss": 20 / step} for step in (first, first + 1)]


def test_one_run_of_a_machine_has_its_load(attempts):
    assert [bool(of_kind(records, "stats")) for records in logs(attempts, RUN)] == [True, True]
    assert [bool(of_kind(records, "stats")) for records in logs(attempts, f"{RUN}-head-1")] == [False, False]


def test_a_manifest_is_kept_beyond_its_checkpoint_and_a_model_is_not_copied(attempts):
    for records in logs(attempts, RUN):
        checkpoint, model = [one for one in of_kind(records, "artifact") if one.type in ("checkpoint", "model")]
        assert (checkpoint.name, checkpoint.type) == (f"checkpoint-{RUN}", "checkpoint")
        assert set(checkpoint.aliases) == {"latest", "step_00000002"}
        folder = attempts.resolve() / "checkpoints/step_00000002"
        assert json.loads(checkpoint.metadata) == {"step": 2, "path": str(folder), "files": 2, "bytes": 7}
        (file,) = checkpoint.manifest.contents
        kept = Path(file.local_path)
        assert kept.read_text() == (folder / "manifest.json").read_text()
        assert kept.is_relative_to(attempts.resolve() / "wandb")
        assert (model.name, set(model.aliases)) == (f"model-{RUN}", {"latest", "final"})
        told = {file.path: file.local_path for file in model.manifest.contents}
        final = attempts.resolve() / "final"
        assert told == {name: str(final / name) for name in ("model.safetensors", "deep/file")}


def test_an_alert_arrives(attempts):
    for records in logs(attempts, RUN):
        alerts = [(alert.title, alert.text, alert.level) for alert in of_kind(records, "alert")]
        assert alerts == [("updates are refused", "5 of the last 128", "WARN")]


def test_numbers_are_logged_with_the_runs_own_step(attempts):
    rows = [row for records in logs(attempts, RUN) for row in history(records)]
    steps = [row for row in rows if "loss" in row]
    assert steps == [{"step": step, "loss": 10 / step, "cycle": 0} for step in (1, 2, 3, 4)]
    events = [row for row in rows if "restart/layers" in row]
    assert events == [{"step": step, "restart/layers": 28, "restart/pruned_share": 0.5} for step in (2, 4)]


def test_what_a_sync_tells_of_heads_has_their_names(attempts):
    rows = [row for records in logs(attempts, RUN) for row in history(records)]
    syncs = [row for row in rows if any(key.startswith("sync/") for key in row)]
    assert syncs == [{"step": step, "sync/losses/head_0": 2.5, "sync/losses/head_2": 3.5} for step in (2, 4)]


def test_step_is_the_x_axis_of_every_metric(attempts):
    for records in logs(attempts, RUN):
        metrics = [record.metric for record in records if record.HasField("metric")]
        assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in metrics)


def test_figures_and_summary_arrive(attempts):
    for records, step in zip(logs(attempts, RUN), (2, 4), strict=True):
        images = [row for row in history(records) if any(key.startswith("figures/loss") for key in row)]
        assert [row["step"] for row in images] == [step]
        summary = {}
        for record in records:
            if record.HasField("summary"):
                summary |= items(record.summary.update)
        assert summary["status"] == "done"
        assert summary["val_loss"] == 3.0
    assert len(list(attempts.glob("wandb/offline-run-*/files/media/images/figures/loss*.png"))) == 2
    assert len(list(attempts.glob("wandb/offline-run-*/files/media/images/figures/matrix*.png"))) == 2


def test_a_streams_matrix_arrives_as_a_table_and_a_picture(attempts):
    for records, step in zip(logs(attempts, RUN), (2, 4), strict=True):
        rows = [row for row in history(records) if any(key.startswith("stream/matrix") for key in row)]
        assert [row["step"] for row in rows] == [step]
    tables = [
        json.loads(path.read_text()) for path in attempts.glob("wandb/offline-run-*/files/media/table/stream/*.json")
    ]
    assert [(table["columns"], table["data"]) for table in tables] == [(["after", "a"], [["a", 0.9]])] * 2


PHASES = """
import json, os, sys, time
from pathlib import Path
from launch.watching.trackers.config import TrackerConfig
from launch.watching.trackers.names import Names
from launch.watching.trackers.opening import Opening
from launch.watching.trackers.tracker import Level
from tests.wandb_server import Server

root, names = Path(sys.argv[1]), Names(run_id="abcd1234", name="x", group=None, job_type="train")
server = Server()
os.environ.update(server.environment)

def opening(folder, **more):
    config = TrackerConfig(init_timeout_seconds=2 if folder != "lost" else 60, finish_timeout_seconds=2, **more)
    said = []
    return Opening(config=config, run_dir=root / folder, resolved={}, step=0, say=said.append), said

def phase(folder, mode="online"):
    opened, said = opening(folder, mode=mode)
    tracker = opened.open(names, system_metrics=False)
    tracker.log({"step": 1, "loss": 2.0})
    began = time.monotonic()
    head = opened.open(names.of_head(1), system_metrics=False)
    waited = time.monotonic() - began
    tracker.finish(0)
    head.finish(0)
    return {"said": said, "ids": [tracker.run_id, head.run_id], "waited": waited}

told = {}
(root / "blocked").touch()
told["blocked"] = phase("blocked", mode="offline")
told["refused"] = phase("refused")
server.silent.set()
server.listen()
told["silent"] = phase("silent")
server.silent.clear()
opened, said = opening("lost", tag_commands=True)
opened.commands, asked = ["stop", "restart"], []
opened.ask = asked.append
tracker = opened.open(names, system_metrics=False)
commands = tracker._inner._commands
server.tags = ["mine", "stop"]
commands.look()
commands.look()
told["tags"] = [asked, server.tags, list(said)]
server.silent.set()
began = time.monotonic()
for step in range(2000):
    tracker.log({"step": step, "loss": 1.0})
tracker.alert("a", "b", Level.warning)
logged = time.monotonic()
tracker.finish(1)
told["lost"] = {"said": said, "logged": logged - began, "finished": time.monotonic() - logged}
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def phases(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """What became of runs whose folder or server was not as it should be, one after the other in one process."""
    folder = tmp_path_factory.mktemp("phases")
    return folder, json.loads(session(PHASES, folder)[-1])


def test_a_folder_that_cannot_be_written_only_ends_the_tracking(phases):
    told = phases[1]["blocked"]
    assert told["said"][0].startswith("W&B could not start offline: FileExistsError")
    assert told["ids"] == [RUN, f"{RUN}-head-1"]


@pytest.mark.parametrize("phase", ["refused", "silent"])
def test_without_an_answer_from_the_server_the_run_is_tracked_offline_under_its_id(phases, phase):
    folder, told = phases[0] / phase, phases[1][phase]
    assert len(told["said"]) == 1
    assert told["said"][0].startswith("W&B could not start online: ")
    assert told["waited"] < 2, "what has failed is not waited for again"
    (records,) = logs(folder, RUN)
    assert history(records) == [{"step": 1, "loss": 2.0}]
    assert len(logs(folder, f"{RUN}-head-1")) == 1


def test_a_network_that_is_lost_later_keeps_nobody_waiting_and_records_are_on_disk(phases):
    told = phases[1]["lost"]
    assert told["logged"] < 1
    assert told["finished"] < 15
    (path,) = phases[0].glob("lost/wandb/run-*/*.wandb")
    steps = [row["step"] for row in history(list(read_log(path)))]
    assert steps == list(range(len(steps)))


def test_tags_of_a_run_on_a_server_are_obeyed_once_and_taken_away(phases):
    asked, left, said = phases[1]["tags"]
    assert (asked, left, said) == (["stop"], ["mine"], ["tag in W&B: stop"])


class Broken:
    """A W&B run whose service is gone."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.summary: Any = self

    def define_metric(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log(self, *args: Any) -> None:
        raise self.error

    def alert(self, **kwargs: Any) -> None:
        raise self.error

    def update(self, *args: Any) -> None:
        raise self.error

    def finish(self, exit_code: int) -> None:
        raise self.error


def _mailbox_error() -> Exception:
    from wandb.sdk.mailbox import MailboxClosedError

    return MailboxClosedError("closed")


def _wandb_error() -> Exception:
    from wandb.errors import CommError

    return CommError("gone")


@pytest.mark.parametrize(
    "error", [ConnectionResetError("lost"), _wandb_error(), _mailbox_error()], ids=lambda e: type(e).__name__
)
def test_a_failure_of_wandb_is_told_once_and_ends_nothing(error):
    import wandb

    said: list[str] = []
    tracker = WandbTracker(wandb, Broken(error), TrackerConfig(), "id", "offline", said.append)
    tracker.log({"step": 1})
    tracker.event({"event": "restart", "step": 1})
    tracker.summary({"a": 1})
    tracker.figures({"missing": Path("/nonexistent.png")})
    tracker.matrix(["after"], [["a"]])
    tracker.alert("a", "b", Level.failure)
    tracker.finish(1)
    assert len(said) == 1
    assert type(error).__name__ in said[0]


def test_an_error_of_our_own_is_not_kept_in():
    import wandb

    inner = WandbTracker(wandb, Broken(ZeroDivisionError()), TrackerConfig(), "id", "offline", print)
    with pytest.raises(ZeroDivisionError):
        inner.log({"step": 1})
    tracker = QueuedTracker(inner, print, finish_seconds=10)
    tracker.log({"step": 1})
    with pytest.raises(ZeroDivisionError):
        tracker.finish()


class Stuck(Tracker):
    """A tracker that never comes back from its first call."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.released = Event()

    def log(self, record: Any) -> None:
        self.calls.append(record)
        self.released.wait()

    def leave(self) -> None:
        self.released.set()


def test_training_does_not_wait_for_a_tracker_that_is_stuck():
    said: list[str] = []
    inner = Stuck()
    tracker = QueuedTracker(inner, said.append, finish_seconds=0.3, most=5)
    began = time.monotonic()
    for step in range(100):
        tracker.log({"step": step})
    assert time.monotonic() - began < 0.25
    tracker.finish()
    assert 0.25 < time.monotonic() - began < 5
    assert [text.split(":")[0] for text in said] == [
        "the tracker does not keep up",
        "the tracker has not ended within 0.3 s, and is left behind",
    ]
    assert inner.released.is_set()
    assert inner.calls[0] == {"step": 0}


def test_all_calls_reach_a_tracker_in_order_and_one_that_does_nothing_takes_them_all(tmp_path):
    calls: list[Any] = []

    class Noted(Tracker):
        def __getattribute__(self, name: str) -> Any:
            plain = super().__getattribute__(name)
            return (lambda *args: calls.append((name, *args)) or plain(*args)) if callable(plain) else plain

    told = [
        ("log", {"step": 1}),
        ("event", {"event": "restart", "step": 1}),
        ("figures", {"loss": tmp_path / "none.png"}),
        ("matrix", ["after"], [["a"]]),
        ("checkpoint", tmp_path, 1),
        ("model", tmp_path),
        ("alert", "title", "text", Level.failure),
        ("summary", {"a": 1}),
        ("finish", 1),
    ]
    tracker = QueuedTracker(Noted(), print, finish_seconds=10)
    for name, *args in told:
        getattr(tracker, name)(*args)
    assert calls == told
    methods = {name for name, value in vars(Tracker).items() if callable(value)}
    assert methods == {"leave", *(name for name, *_ in told)}, "each has its turn"
    assert not list(tmp_path.iterdir())


def test_each_machine_has_one_process_that_samples_its_load():
    hosts, nobody = ["a", "a", "b", "b", "c"], [[], [], [], [], []]
    plain = Seat(heads=[], node=None, samples=False)
    main = Seat(heads=[], node=None, samples=True)
    assert seats(hosts, nobody, SystemMetrics.none) == [plain] * 5
    assert seats(hosts, nobody, SystemMetrics.first) == [main, *[plain] * 4]
    node_1, node_2 = (Seat(heads=[], node=number, samples=True) for number in (1, 2))
    assert seats(hosts, nobody, SystemMetrics.nodes) == [main, plain, node_1, plain, node_2]


def test_heads_apart_have_a_run_each_by_their_first_process_and_the_first_head_is_the_run_itself():
    hosts, heads = ["a", "a", "b", "b"], [[0, 1], [], [2, 3], []]
    found = seats(hosts, heads, SystemMetrics.nodes)
    assert [(seat.heads, seat.node, seat.samples) for seat in found] == [
        ([1], None, True),
        ([], None, False),
        ([2, 3], None, True),
        ([], None, False),
    ]


def test_asking_for_wandb_without_having_it_is_an_error_with_a_way_out(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    opening = Opening(config=TrackerConfig(), run_dir=tmp_path, resolved={}, step=0, say=print)
    with pytest.raises(ConfigError, match=r"pip install wandb.*tracker=none"):
        opening.open(Names(run_id="a", name="x", group=None, job_type="train"), system_metrics=True)


def test_a_disabled_run_keeps_its_id_and_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    opening = Opening(config=TrackerConfig(), run_dir=tmp_path, resolved={}, step=0, say=print)
    tracker = opening.open(Names(run_id="a", name="x", group=None, job_type="train"), system_metrics=True)
    tracker.checkpoint(tmp_path, 1)
    tracker.finish()
    assert (type(tracker), tracker.run_id, list(tmp_path.iterdir())) == (Tracker, "a", [])


@pytest.mark.parametrize(
    ("mode", "environment", "wanted"),
    [
        ("auto", {}, ["offline"]),
        ("auto", {"WANDB_API_KEY": "k"}, ["online", "offline"]),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, ["offline"]),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, ["disabled"]),
        ("offline", {"WANDB_API_KEY": "k"}, ["offline"]),
        ("offline", {"WANDB_API_KEY": "k", "WANDB_MODE": "online"}, ["offline"]),
        ("online", {"WANDB_API_KEY": "k"}, ["online", "offline"]),
        ("online", {}, ["offline"]),
    ],
)
def test_the_mode_follows_the_configuration_then_the_environment(monkeypatch, mode, environment, wanted):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    assert modes(TrackerMode(mode), said.append) == wanted
    assert bool(said) == (mode == "online" and not environment)


def test_a_key_in_netrc_counts_for_its_own_server_only(monkeypatch, tmp_path):
    file = tmp_path / "netrc"
    file.write_text("machine wandb.example.org login user password secret\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert modes(TrackerMode.auto, print) == ["offline"]
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert modes(TrackerMode.auto, print) == ["online", "offline"]


@pytest.mark.parametrize(("key", "value"), [("project", ""), ("init_timeout_seconds", 0.0)])
def test_impossible_values_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"tracker.{key}"):
        TrackerConfig(**{key: value})
