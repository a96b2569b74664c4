import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.watching.tracker import Tracker, TrackerConfig, TrackerMode, WandbTracker, _modes, open_tracker
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


ATTEMPT = """
import sys
from pathlib import Path
import numpy as np
from launch.watching.tracker import TrackerConfig, open_tracker

folder, run_id, first = Path(sys.argv[1]), sys.argv[2] or None, int(sys.argv[3])
tracker = open_tracker(
    TrackerConfig(project="study", group="pair", tags=["tiny"]),
    run_dir=folder, run_name="first", resolved={"lora": {"rank": 4}, "relora": None}, run_id=run_id,
)
for step in (first, first + 1):
    tracker.log({"step": step, "loss": 10.0 / step, "cycle": 0, "note": "words"})
tracker.event({"event": "restart", "step": first + 1, "layers": 28, "pruned_share": 0.5})
tracker.event({"event": "sync", "step": first + 1, "members": [0, 2], "losses": [2.5, 3.5], "ranks": {"q": 1.0}})
image = folder / "loss.png"
tracker.figures({"loss": image})
tracker.matrix(["after", "a"], [["a", 0.9]], lambda: np.zeros((4, 6, 4), dtype=np.uint8))
tracker.summary({"status": "done", "val_loss": 3.0, "matrix": [[1.0]]})
tracker.finish(0)
print(tracker.run_id)
"""


@pytest.fixture(scope="module")
def attempts(tmp_path_factory) -> tuple[Path, str, str]:
    """The folder of a run that was tracked offline in two attempts, and the ids that these had."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("run")
    Image.new("RGB", (8, 8), "white").save(folder / "loss.png")
    first = session(ATTEMPT, folder, "", 1)[-1]
    second = session(ATTEMPT, folder, first, 3)[-1]
    return folder, first, second


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


def logs(folder: Path) -> list[list[Any]]:
    return [list(read_log(path)) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]


def items(entries: Any) -> dict[str, Any]:
    return {entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}


def history(records: list[Any]) -> list[dict[str, Any]]:
    rows = [items(record.history.item) for record in records if record.HasField("history")]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def test_both_attempts_are_one_run(attempts):
    folder, first, second = attempts
    assert first == second
    runs = [record.run for records in logs(folder) for record in records if record.HasField("run")]
    assert {run.run_id for run in runs} == {first}
    assert len(logs(folder)) == 2


def test_the_run_carries_its_names_and_configuration(attempts):
    folder, _, _ = attempts
    for records in logs(folder):
        run = next(record.run for record in records if record.HasField("run"))
        assert (run.project, run.run_group, run.display_name, list(run.tags)) == (
            "study",
            "pair",
            "first",
            ["tiny"],
        )
        config = items(run.config.update)
        assert config["lora"] == {"rank": 4}
        assert config["relora"] is None


def test_numbers_are_logged_with_the_runs_own_step(attempts):
    folder, _, _ = attempts
    rows = [row for records in logs(folder) for row in history(records)]
    steps = [row for row in rows if "loss" in row]
    assert steps == [{"step": step, "loss": 10 / step, "cycle": 0} for step in (1, 2, 3, 4)]
    events = [row for row in rows if "restart/layers" in row]
    assert events == [{"step": step, "restart/layers": 28, "restart/pruned_share": 0.5} for step in (2, 4)]


def test_what_a_sync_tells_of_heads_has_their_names(attempts):
    folder, _, _ = attempts
    rows = [row for records in logs(folder) for row in history(records)]
    syncs = [row for row in rows if any(key.startswith("sync/") for key in row)]
    assert syncs == [{"step": step, "sync/losses/head_0": 2.5, "sync/losses/head_2": 3.5} for step in (2, 4)]


def test_step_is_the_x_axis_of_every_metric(attempts):
    folder, _, _ = attempts
    for records in logs(folder):
        metrics = [record.metric for record in records if record.HasField("metric")]
        assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in metrics)


def test_figures_and_summary_arrive(attempts):
    folder, _, _ = attempts
    for records, step in zip(logs(folder), (2, 4), strict=True):
        images = [row for row in history(records) if any(key.startswith("figures/loss") for key in row)]
        assert [row["step"] for row in images] == [step]
        summary = {}
        for record in records:
            if record.HasField("summary"):
                summary |= items(record.summary.update)
        assert summary["status"] == "done"
        assert summary["val_loss"] == 3.0
    assert len(list(folder.glob("wandb/offline-run-*/files/media/images/figures/loss*.png"))) == 2
    assert len(list(folder.glob("wandb/offline-run-*/files/media/images/figures/matrix*.png"))) == 2


def test_a_streams_matrix_arrives_as_a_table_and_a_picture(attempts):
    folder, _, _ = attempts
    for records, step in zip(logs(folder), (2, 4), strict=True):
        rows = [row for row in history(records) if any(key.startswith("stream/matrix") for key in row)]
        assert [row["step"] for row in rows] == [step]
    tables = [
        json.loads(path.read_text()) for path in folder.glob("wandb/offline-run-*/files/media/table/stream/*.json")
    ]
    assert [(table["columns"], table["data"]) for table in tables] == [(["after", "a"], [["a", 0.9]])] * 2


def test_without_an_answer_from_the_server_the_run_is_tracked_offline_under_its_id(tmp_path):
    code = """
import sys
from pathlib import Path
from launch.watching.tracker import TrackerConfig, open_tracker
config = TrackerConfig(mode="online", init_timeout_seconds=2)
said = []
tracker = open_tracker(config, run_dir=Path(sys.argv[1]), run_name="x", resolved={}, run_id="abcd1234", say=said.append)
tracker.log({"step": 1, "loss": 2.0})
tracker.finish(0)
print(len(said), said[0])
print(tracker.run_id)
"""
    key = "0123456789" * 4
    first, second = session(code, tmp_path, WANDB_API_KEY=key, WANDB_BASE_URL="http://127.0.0.1:9")[-2:]
    assert first.startswith("1 W&B could not start online: ")
    assert second == "abcd1234"
    (records,) = logs(tmp_path)
    assert history(records) == [{"step": 1, "loss": 2.0}]


def test_a_folder_that_cannot_be_written_only_ends_the_tracking(tmp_path):
    code = """
import sys
from pathlib import Path
from launch.watching.tracker import TrackerConfig, open_tracker
config = TrackerConfig(mode="offline", dir=sys.argv[1])
tracker = open_tracker(config, run_dir=Path(sys.argv[1]), run_name="x", resolved={}, run_id=None, say=print)
tracker.log({"step": 1})
tracker.finish(0)
print("trained on")
"""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    said = session(code, blocked)
    assert said[-1] == "trained on"
    assert said[0].startswith("W&B could not start offline: FileExistsError")


class Broken:
    """A W&B run whose service is gone."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.summary: Any = self

    def define_metric(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log(self, *args: Any) -> None:
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
    tracker = WandbTracker(wandb, Broken(error), "id", said.append)
    tracker.log({"step": 1})
    tracker.event({"event": "restart", "step": 1})
    tracker.summary({"a": 1})
    tracker.figures({"missing": Path("/nonexistent.png")})
    tracker.finish(1)
    assert len(said) == 1
    assert type(error).__name__ in said[0]


def test_an_error_of_our_own_is_not_kept_in():
    import wandb

    tracker = WandbTracker(wandb, Broken(ZeroDivisionError()), "id", print)
    with pytest.raises(ZeroDivisionError):
        tracker.log({"step": 1})


def test_without_a_tracker_everything_is_accepted_and_nothing_written(tmp_path):
    tracker = open_tracker(None, run_dir=tmp_path, run_name="x", resolved={}, run_id=None)
    assert type(tracker) is Tracker
    tracker.log({"step": 1})
    tracker.event({"event": "restart", "step": 1})
    tracker.figures({"loss": tmp_path / "none.png"})
    tracker.summary({})
    tracker.finish(0)
    assert tracker.run_id is None
    assert not list(tmp_path.iterdir())


def test_asking_for_wandb_without_having_it_is_an_error_with_a_way_out(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install wandb.*tracker=none"):
        open_tracker(TrackerConfig(), run_dir=tmp_path, run_name="x", resolved={}, run_id=None)


@pytest.mark.parametrize(
    ("mode", "environment", "modes"),
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
def test_the_mode_follows_the_configuration_then_the_environment(monkeypatch, mode, environment, modes):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    assert _modes(TrackerMode(mode), said.append) == modes
    assert bool(said) == (mode == "online" and not environment)


def test_a_key_in_netrc_counts_for_its_own_server_only(monkeypatch, tmp_path):
    file = tmp_path / "netrc"
    file.write_text("machine wandb.example.org login user password secret\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert _modes(TrackerMode.auto, print) == ["offline"]
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert _modes(TrackerMode.auto, print) == ["online", "offline"]


@pytest.mark.parametrize(("key", "value"), [("project", ""), ("init_timeout_seconds", 0.0)])
def test_impossible_values_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"tracker.{key}"):
        TrackerConfig(**{key: value})
