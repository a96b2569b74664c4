"""Reading, checking and pruning; how processes write together is in test_saving.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from parallel.checkpoint import (
    CheckpointConfig,
    list_checkpoints,
    manifest_text,
    newest_checkpoint,
    open_checkpoint,
    prune_checkpoints,
    read_checkpoint,
)
from parallel.parts import DamagedCheckpoint, StoredParts, write_parts
from parallel.regions import Region, whole
from parallel.saving import Saver
from relora.errors import ConfigError


@pytest.fixture
def write(tmp_path, runtime):
    """Write a checkpoint of one process."""

    def write(step, value=1.0):
        tensors = {
            "model": {"weight": torch.full((3, 2), value), "bits": torch.arange(4, dtype=torch.int16)},
            "optimizer": {"weight/step": torch.tensor(5.0), "none": torch.zeros(0, 3)},
        }
        held = {kind: {name: (whole(t), t) for name, t in named.items()} for kind, named in tensors.items()}
        Saver(tmp_path, runtime, CheckpointConfig(keep=99)).save(step, held, {"step": step}, best=None)
        return tmp_path / f"step_{step:08d}"

    return write


def test_what_was_written_is_read_back_bit_for_bit(write, tmp_path):
    read = read_checkpoint(write(7, value=1 / 3))
    assert read.state == {"step": 7}
    assert read.names("model") == ["bits", "weight"]
    assert read.names("generators") == []
    assert torch.equal(read.whole("model", "weight"), torch.full((3, 2), 1 / 3))
    assert read.dtype("model", "bits") == torch.int16
    assert torch.equal(read.whole("optimizer", "weight/step"), torch.tensor(5.0))
    assert read.whole("optimizer", "none").shape == read.shape("optimizer", "none") == (0, 3)
    assert (tmp_path / "latest").read_text() == "step_00000007\n"


def test_no_file_of_a_checkpoint_is_a_pickle(write):
    names = {path.name for path in write(1).iterdir()}
    assert names == {"model-0.safetensors", "optimizer-0.safetensors", "state.json", "manifest.json"}


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_taken(write, tmp_path, harm):
    write(1)
    newer = write(2)
    victim = newer / ("manifest.json" if harm == "manifest" else "model-0.safetensors")
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
    assert str(victim) in problems[0]
    with pytest.raises(DamagedCheckpoint, match=victim.name):
        read_checkpoint(newer)


def test_whichever_bit_of_a_manifest_is_changed_the_previous_checkpoint_is_taken(write, tmp_path):
    write(1)
    victim = write(2) / "manifest.json"
    data = victim.read_bytes()
    for place in range(len(data)):
        victim.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        taken, problems = newest_checkpoint(tmp_path)
        assert taken.state == {"step": 1}
        assert "manifest.json" in problems[0]
        with pytest.raises(DamagedCheckpoint):
            open_checkpoint(victim.parent)


@pytest.mark.parametrize("harm", ["remove", "empty", "truncate"])
def test_a_file_that_is_lost_after_the_check_is_named(write, harm):
    folder = write(1)
    checkpoint = open_checkpoint(folder)
    victim = folder / "model-0.safetensors"
    if harm == "remove":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[: 0 if harm == "empty" else -4])
    with pytest.raises(DamagedCheckpoint, match="model-0"):
        checkpoint.whole("model", "weight")


def test_a_step_can_be_written_again_over_a_damaged_one(write, tmp_path):
    damaged = write(3)
    (damaged / "model-0.safetensors").write_bytes(b"")
    write(3, value=2.0)
    taken, problems = newest_checkpoint(tmp_path)
    assert problems == []
    assert taken.whole("model", "weight").eq(2.0).all()


def test_the_newest_and_the_best_are_kept(write, tmp_path):
    for step in (1, 2, 3, 4):
        write(step)
    prune_checkpoints(tmp_path, keep=2, kept=["step_00000001"])
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000001", "step_00000003", "step_00000004"]


def test_a_removal_that_is_interrupted_leaves_no_half_of_a_checkpoint(write, tmp_path, monkeypatch):
    for step in (1, 2):
        write(step)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        prune_checkpoints(tmp_path, keep=1, kept=[])
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002"]
    prune_checkpoints(tmp_path, keep=1, kept=[])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000002"]


def test_a_closed_checkpoint_holds_no_file(write):
    folder = write(1)
    checkpoint = read_checkpoint(folder)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    checkpoint.whole("model", "weight")
    assert str(folder) in Path("/proc/self/maps").read_text()
    checkpoint.close()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert checkpoint.whole("model", "weight").eq(1).all()


@pytest.mark.parametrize("version", [2, 99])
def test_a_checkpoint_of_another_format_stops_a_run_that_would_begin_anew_over_it(write, tmp_path, version):
    folder = write(1)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    text = manifest_text(files, version) if version > 2 else json.dumps({"format": version, "files": files})
    (folder / "manifest.json").write_text(text)
    for read in (read_checkpoint, open_checkpoint, lambda folder: newest_checkpoint(tmp_path)):
        with pytest.raises(ConfigError, match=rf"step_00000001 has format {version}, .*or begin anew in another run"):
            read(folder)


@pytest.mark.parametrize(("key", "value"), [("every", -1), ("keep", 0)])
def test_impossible_settings_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"checkpoint.{key}"):
        CheckpointConfig(**{key: value})


# Parts of a tensor of 8 x 6 as other layouts left them: by name of the layout, the regions in files of their own.
SHAPE = (8, 6)
ROWS = [Region(SHAPE, 0, ((0, 4),)), Region(SHAPE, 0, ((4, 8),))]
COLUMNS = [Region(SHAPE, 1, ((0, 3),)), Region(SHAPE, 1, ((3, 6),))]
PACKED = [Region(SHAPE, 0, ((0, 2), (4, 6))), Region(SHAPE, 0, ((2, 4), (6, 8)))]
STORED = {
    "whole": [Region(SHAPE)],
    "flat": [Region(SHAPE).flat(0, 20), Region(SHAPE).flat(20, 20), Region(SHAPE).flat(40, 8)],
    "rows": ROWS,
    "columns": COLUMNS,
    "packed": PACKED,
    "flat columns": [cut.flat(start, 12) for cut in COLUMNS for start in (0, 12)],
    "flat packed": [cut.flat(start, count) for cut in PACKED for start, count in ((0, 17), (17, 7))],
    "one of them replicated": [*ROWS, ROWS[0]],
}
WANTED = {
    **STORED,
    "four rows": [Region(SHAPE, 0, ((start, start + 2),)) for start in range(0, 8, 2)],
    "other flats": [Region(SHAPE).flat(start, 7) for start in range(0, 42, 7)],
    "flats of rows": [cut.flat(start, 5) for cut in ROWS for start in (0, 5, 10, 15)],
    "nothing": [Region(SHAPE).flat(48, 0), COLUMNS[0].flat(24, 0)],
}


def stored_as(folder, regions, tensor):
    names = [f"model-{index}.safetensors" for index in range(len(regions))]
    for name, region in zip(names, regions, strict=True):
        write_parts(folder / name, {"weight": (region, region.take(tensor))})
    return StoredParts(folder, names)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("wanted", WANTED)
def test_every_part_is_read_from_every_layout(tmp_path, stored, wanted):
    tensor = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = stored_as(tmp_path, STORED[stored], tensor)
    assert torch.equal(parts.whole("weight"), tensor)
    for region in WANTED[wanted]:
        read, expected = parts.part("weight", region), region.take(tensor)
        assert read.shape == expected.shape
        assert read.dtype == expected.dtype
        assert torch.equal(read, expected)


@pytest.mark.parametrize("stored", [name for name in STORED if len(STORED[name]) == len(set(STORED[name])) > 1])
def test_a_tensor_whose_parts_are_not_all_there_is_refused(tmp_path, stored):
    regions = STORED[stored][1:]
    parts = stored_as(tmp_path, regions, torch.zeros(SHAPE))
    with pytest.raises(DamagedCheckpoint, match="only some parts of weight"):
        parts.whole("weight")
    with pytest.raises(DamagedCheckpoint, match="only some parts of weight"):
        parts.part("weight", Region(SHAPE).flat(0, 30))


@pytest.mark.parametrize(("stored", "wanted"), [
    (Region((64, 1 << 18)), Region((64, 1 << 18), 0, ((3, 4),))),
    (Region((64, 1 << 18)).flat(0, 1 << 24), Region((64, 1 << 18)).flat(5, 1000)),
    (Region((64, 1 << 18)), Region((64, 1 << 18), 0, ((3, 5),)).flat(7, 1000)),
])  # fmt: skip
def test_no_more_of_a_file_is_read_than_is_asked_for(tmp_path, stored, wanted):
    parts = stored_as(tmp_path, [stored], torch.zeros(stored.shape))
    before = resident_bytes()
    part = parts.part("weight", wanted)
    assert float(part.sum()) == 0
    assert resident_bytes() - before < 16 << 20
    assert float(parts.whole("weight").sum()) == 0
    assert resident_bytes() - before > 60 << 20


def resident_bytes():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def test_names_and_shapes_of_another_model_are_refused(write):
    checkpoint = read_checkpoint(write(1))
    with pytest.raises(ConfigError, match="holds no weights: it is of another model"):
        checkpoint.whole("model", "weights")
    with pytest.raises(ConfigError, match=r"weight is \(3, 2\) there and \(2, 3\) here"):
        checkpoint.part("model", "weight", Region((2, 3)))


def test_a_counter_that_parameters_share_is_written_under_each_name(tmp_path):
    step = torch.tensor(3.0)
    write_parts(tmp_path / "optimizer-0.safetensors", {name: (whole(step), step) for name in ("a/step", "b/step")})
    parts = StoredParts(tmp_path, ["optimizer-0.safetensors"])
    assert parts.whole("a/step") == parts.whole("b/step") == 3.0
