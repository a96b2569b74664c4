import errno
import json
import os

import pytest
import torch

from parallel import checkpoint
from parallel.checkpoint import (
    CheckpointConfig,
    DamagedCheckpoint,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from relora.errors import ConfigError


def write(root, step, value=1.0):
    tensors = {"model": {"weight": torch.full((3, 2), value), "bits": torch.arange(4, dtype=torch.int16)}}
    return write_checkpoint(root, step, tensors=tensors, state={"step": step})


def test_what_was_written_is_read_back_bit_for_bit(tmp_path):
    read = read_checkpoint(write(tmp_path, 7, value=1 / 3))
    assert read.state == {"step": 7}
    assert torch.equal(read.tensors("model")["weight"], torch.full((3, 2), 1 / 3))
    assert read.tensors("model")["bits"].dtype == torch.int16
    assert (tmp_path / "latest").read_text() == "step_00000007\n"


def test_files_have_the_permissions_that_the_umask_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        modes = {path.stat().st_mode & 0o777 for path in write(tmp_path, 1).iterdir()}
    finally:
        os.umask(before)
    assert modes == {0o640}


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    names = {path.name for path in write(tmp_path, 1).iterdir()}
    assert names == {"model.safetensors", "state.json", "manifest.json"}


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_taken(tmp_path, harm):
    write(tmp_path, 1)
    newer = write(tmp_path, 2)
    victim = newer / ("manifest.json" if harm == "manifest" else "model.safetensors")
    data = bytearray(victim.read_bytes())
    if harm == "remove":
        victim.unlink()
    elif harm == "flip":
        data[-3] ^= 1
        victim.write_bytes(data)
    else:
        victim.write_bytes(data[: len(data) // 2])
    taken, problems = newest_checkpoint(tmp_path)
    assert taken.state == {"step": 1}
    assert len(problems) == 1
    assert "step_00000002" in problems[0]
    with pytest.raises(DamagedCheckpoint, match="step_00000002"):
        read_checkpoint(newer)


def test_an_interrupted_write_is_invisible_and_swept_away_later(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_publish", killed)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)  # a kill -9 tidies nothing
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert (tmp_path / ".step_00000002.partial").is_dir()
    assert newest_checkpoint(tmp_path)[0].state == {"step": 1}
    prune_checkpoints(tmp_path, keep=2, best=None)
    assert not (tmp_path / ".step_00000002.partial").exists()
    assert newest_checkpoint(tmp_path)[0].state == {"step": 1}


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_one_clear_message_and_harms_nothing(tmp_path, monkeypatch, wrapped):
    write(tmp_path, 1)
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*_):
        if wrapped:  # the form in which safetensors hands it on
            raise RuntimeError("Error: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ConfigError, match=r"step 2 could not be written.*No space left.*untouched"):
        write(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert newest_checkpoint(tmp_path)[0].state == {"step": 1}


def test_another_error_while_writing_is_not_called_a_disk_error(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        write(tmp_path, 1)


def test_a_step_can_be_written_again_over_a_damaged_one(tmp_path):
    damaged = write(tmp_path, 3)
    (damaged / "model.safetensors").write_bytes(b"")
    write(tmp_path, 3, value=2.0)
    taken, problems = newest_checkpoint(tmp_path)
    assert problems == []
    assert taken.tensors("model")["weight"].eq(2.0).all()


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    prune_checkpoints(tmp_path, keep=2, best="step_00000001")
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000001", "step_00000003", "step_00000004"]


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    folder = write(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(DamagedCheckpoint, match="format 99"):
        read_checkpoint(folder)


@pytest.mark.parametrize(("key", "value"), [("every", -1), ("keep", 0)])
def test_impossible_settings_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"checkpoint.{key}"):
        CheckpointConfig(**{key: value})
