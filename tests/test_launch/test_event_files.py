"""TensorBoard's files, written by a tracker alone and by a whole run, and read back by TensorBoard itself."""

import shutil
import sys

import numpy as np
import pytest
import yaml

from launch import exits, train
from launch.watching.trackers.config import TrackerConfig, TrackerKind
from launch.watching.trackers.event_files import open_event_files
from launch.watching.trackers.tracker import Level
from relora.errors import ConfigError

CONFIG = TrackerConfig(kind=TrackerKind.tensorboard)


def read(folder):
    """What TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    shown.Reload()
    return shown


def texts(shown, name):
    return [event.tensor_proto.string_val[0].decode() for event in shown.Tensors(f"{name}/text_summary")]


def test_what_a_run_tells_is_read_back_by_tensorboard(tmp_path):
    said = []
    tracker = open_event_files(CONFIG, tmp_path, step=0, resolved={"lora": {"rank": 4}}, say=said.append)
    tracker.log({"step": 1, "loss": 2.5, "note": "words"})
    tracker.event({"event": "sync", "step": 2, "members": [0, 2], "losses": [2.5, 3.5]})
    tracker.figures({"matrix": np.full((4, 6, 4), 7, dtype=np.uint8)})
    tracker.matrix(["after", "a|b"], [["a|b", 0.9]])
    tracker.alert("updates are refused", "5 of 128", Level.warning)
    tracker.summary({"status": "done", "val_loss": 3.0})
    tracker.finish()
    shown = read(tmp_path)
    found = {name: [(one.step, one.value) for one in shown.Scalars(name)] for name in shown.Tags()["scalars"]}
    assert found == {
        "loss": [(1, 2.5)],
        "sync/losses/head_0": [(2, 2.5)],
        "sync/losses/head_2": [(2, 3.5)],
        "summary/val_loss": [(2, 3.0)],
    }
    (image,) = shown.Images("figures/matrix")
    assert (image.step, image.height, image.width) == (2, 4, 6)
    assert yaml.safe_load(texts(shown, "config")[0]) == {"lora": {"rank": 4}}
    assert texts(shown, "stream/matrix") == ["| after | a\\|b |\n| --- | --- |\n| a\\|b | 0.9 |\n"]
    assert texts(shown, "alerts") == ["**warning: updates are refused** 5 of 128"]
    assert '"status": "done"' in texts(shown, "summary")[0]
    assert said == []


def test_a_folder_that_cannot_be_written_only_ends_the_tracking(tmp_path):
    said = []
    (tmp_path / "file").touch()
    assert open_event_files(CONFIG, tmp_path / "file/below", step=0, resolved={}, say=said.append) is None
    assert len(said) == 1
    assert said[0].startswith("TensorBoard's files cannot be written: NotADirectoryError")


def test_asking_for_tensorboard_without_having_it_is_an_error_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install tensorboard.*tracker=none"):
        open_event_files(CONFIG, tmp_path, step=0, resolved={}, say=print)


def test_a_resumed_run_shows_steps_once_that_it_does_again(tiny, tmp_path):
    words = [*tiny, "lora.target_modules=[q_proj]", "tracker=tensorboard"]
    assert train.main([*words, "training.stop_after=11"]) == exits.PREEMPTED
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000011")
    assert train.main(words) == exits.DONE
    shown = read(tmp_path / "run/tensorboard")
    assert len(list((tmp_path / "run/tensorboard").glob("events.*"))) == 2
    assert [one.step for one in shown.Scalars("loss")] == list(range(1, 21))
    assert [one.step for one in shown.Scalars("restart/layers")] == [10, 15]
    assert [one.step for one in shown.Images("figures/spectra")] == [20]
    assert {f"figures/{name}" for name in ("loss", "learning_rate", "rank")} <= set(shown.Tags()["images"])
    assert yaml.safe_load(texts(shown, "config")[0])["lora"]["rank"] == 4
    assert not (tmp_path / "run/tracker_id").exists()
