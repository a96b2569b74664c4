"""Checkpoints that several real processes write together."""

import errno
import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from parallel import parts, writing
from parallel.checkpoint import CheckpointConfig, newest_checkpoint, open_checkpoint, read_checkpoint
from parallel.collectives import barrier, gather_objects
from parallel.regions import Region, even_range, whole
from parallel.runtime import start
from parallel.saving import Saver, share_out
from relora.errors import ConfigError
from tests.processes import environment_of, free_port

SHAPES = {"embed": (50, 8), "layer.qkv": (24, 8), "layer.out": (8, 16), "norm": (8,), "head": (50, 8)}
ALWAYS = CheckpointConfig(keep=9)


def tensors_of(step=0):
    """Whole tensors by kind, the same on every process."""
    generator = torch.Generator().manual_seed(step)
    model = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}
    optimizer = {f"{name}/exp_avg": torch.randn(SHAPES[name], generator=generator) for name in SHAPES}
    optimizer |= {f"{name}/step": torch.tensor(float(step)) for name in SHAPES}
    return {"model": model, "optimizer": optimizer}


def cut_of(name, shape, axis):
    """What tensor parallelism leaves of a tensor on a process: rows, packed rows, columns, or everything."""
    if len(shape) < 2:
        return Region(shape)
    if name.startswith("layer.qkv"):
        blocks = [even_range(shape[0], 3, block) for block in range(3)]
        pairs = [(begin, even_range(stop - begin, axis.size, axis.index)) for begin, stop in blocks]
        return Region(shape, 0, tuple((begin + a, begin + b) for begin, (a, b) in pairs))
    dim = 1 if name.startswith("layer.out") else 0
    return Region(shape, dim, (even_range(shape[dim], axis.size, axis.index),))


def held_by(meshed, step=0, flat=True):
    """What a process holds: the model cut by the tensor axis, the optimizer's state cut flat by the data axis, too."""
    held = {kind: {} for kind in ("model", "optimizer", "generators")}
    for kind, named in tensors_of(step).items():
        for name, tensor in named.items():
            region = cut_of(name, tuple(tensor.shape), meshed.tensor)
            if flat and kind == "optimizer" and tensor.ndim:
                size = -(-region.numel // meshed.data.size)
                begin = min(size * meshed.data.index, region.numel)
                region = region.flat(begin, min(size, region.numel - begin))
            held[kind][name] = region, region.take(tensor).clone()
    state = torch.tensor([meshed.process_rank], dtype=torch.uint8)
    held["generators"] = {f"cpu/{meshed.process_rank}": (whole(state), state)}
    return held


def parts_of(folder):
    """Every part of a checkpoint: kind, name, region, rank, bytes."""
    rows = []
    for path in folder.glob("*.safetensors"):
        kind, _, rank = path.stem.rpartition("-")
        with safe_open(path, framework="pt") as file:
            for name, region in json.loads(file.metadata()["regions"]).items():
                tensor = file.get_tensor(name)
                rows.append((kind, name, json.dumps(region), int(rank), tensor.numel() * tensor.element_size()))
    return rows


def _save(runtime, root, tensor, asynchronous):
    with start(tensor=tensor) as meshed:
        saver = Saver(Path(root), meshed, CheckpointConfig(keep=9, asynchronous=asynchronous))
        for step in (1, 2):
            saver.save(step, held_by(meshed, step), {"step": step, "rank": meshed.process_rank}, best=None)
        saver.wait()
        return saver.published(), saver.published()


def _read(runtime, folder, tensor, flat):
    with start(tensor=tensor) as meshed:
        checkpoint = open_checkpoint(Path(folder))
        for kind, named in held_by(meshed, 2, flat).items():
            for name, (region, expected) in named.items():
                if kind != "generators":
                    assert torch.equal(checkpoint.part(kind, name, region), expected), (kind, name, region)
    return True


@pytest.mark.parametrize(
    ("count", "tensor", "asynchronous"), [(2, 1, False), (2, 2, True), (4, 2, False), (4, 1, True)]
)
def test_what_one_layout_wrote_any_other_reads_bit_for_bit(
    on_processes, tmp_path, runtime, count, tensor, asynchronous
):
    results = on_processes(_save, count, str(tmp_path), tensor, asynchronous)
    assert results == [(["step_00000001", "step_00000002"], [])] + [([], [])] * (count - 1)
    checkpoint = read_checkpoint(tmp_path / "step_00000002")
    assert checkpoint.state == {"step": 2, "rank": 0}
    for kind, named in tensors_of(2).items():
        assert checkpoint.names(kind) == sorted(named)
        for name, tensor_ in named.items():
            assert checkpoint.dtype(kind, name) == tensor_.dtype
            assert torch.equal(checkpoint.whole(kind, name), tensor_), (kind, name)
    assert [int(checkpoint.whole("generators", f"cpu/{rank}")) for rank in range(count)] == list(range(count))
    for other in (2, 4):
        for degree in (1, 2):
            assert all(on_processes(_read, other, str(checkpoint.folder), degree, degree == 1))
    assert _read(runtime, checkpoint.folder, 1, flat=True)


def test_every_part_is_written_once_and_the_work_is_shared(on_processes, tmp_path):
    on_processes(_save, 4, str(tmp_path), 2, False)
    written = parts_of(tmp_path / "step_00000002")
    distinct = [row[:3] for row in written]
    assert len(distinct) == len(set(distinct))
    loads = [sum(row[4] for row in written if row[3] == rank) for rank in range(4)]
    assert max(loads) - min(loads) <= max(row[4] for row in written)
    replicated = [row[3] for row in written if row[0] == "model"]
    assert len(set(replicated)) == 4  # of two processes with the same weights neither is idle
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000001", "step_00000002", "latest"}


def test_parts_are_shared_out_once_each_and_evenly():
    replicated = [("model", f"{size}", Region((size,)), size) for size in range(1, 41)]
    own = [("optimizer", "all", Region((400,)).flat(100 * rank, 100), 200 * (rank == 3)) for rank in range(4)]
    shares = share_out([[*replicated, own[rank]] for rank in range(4)])
    assert all(("optimizer", "all") in share for share in shares)
    names = [name for share in shares for kind, name in share if kind == "model"]
    assert sorted(names, key=int) == [f"{size}" for size in range(1, 41)]
    loads = [sum(int(name) for kind, name in share if kind == "model") for share in shares]
    assert max(loads[:3]) - min(loads[:3]) <= 1
    assert loads[3] == pytest.approx(loads[0] - 200, abs=2)  # who has more of its own gets less of the rest


def test_empty_ends_of_a_flat_tensor_are_written_by_nobody():
    region = Region((4,))
    held = [[("model", "short", flat, 2 * flat.numel)] for flat in (region.flat(0, 4), region.flat(4, 0))]
    assert share_out(held) == [{("model", "short")}, set()]
    assert share_out([[("model", "empty", Region((0, 3)), 0)]]) == [{("model", "empty")}]


def test_a_tensor_of_which_a_part_is_held_by_nobody_is_never_written():
    with pytest.raises(AssertionError, match="no process holds some part of model weight"):
        share_out([[("model", "weight", Region((4,)).flat(0, 3), 12)]])


def save(saver, step, best=None):
    named = {"weight": torch.full((3, 2), float(step))}
    saver.save(step, {"model": {name: (whole(t), t) for name, t in named.items()}}, {"step": step}, best=best)


class Gate:
    """Lets a thread begin to write a file only when it is opened."""

    def __init__(self, monkeypatch):
        self.opened, self.reached = threading.Event(), threading.Event()
        real = writing.write_parts

        def gated(*args):
            self.reached.set()
            assert self.opened.wait(30)
            real(*args)

        monkeypatch.setattr(writing, "write_parts", gated)


def _change_while_writing(runtime, root):
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        saver = Saver(Path(root), runtime, CheckpointConfig(keep=9, asynchronous=True))
        for step in (1, 2):  # the second one uses the memory of the first one's copies
            held = held_by(runtime, step)
            state = {"history": [step]}
            saver.save(step, held, state, best=None)
            assert gate.reached.wait(30)
            state["history"].append("later")
            for named in held.values():
                for _, tensor in named.values():
                    tensor.zero_()
            assert not (Path(root) / f"step_{step:08d}").exists()
            gate.opened.set()
            saver.wait()
            gate.opened.clear()
            gate.reached.clear()
        return saver.published()


@pytest.mark.parametrize("count", [1, 2])
def test_what_changes_while_a_checkpoint_is_written_does_not_reach_it(on_processes, runtime, tmp_path, count):
    if count == 1:
        _change_while_writing(runtime, tmp_path)
    else:
        assert on_processes(_change_while_writing, 2, str(tmp_path))[0] == ["step_00000001", "step_00000002"]
    for step in (1, 2):
        checkpoint = read_checkpoint(tmp_path / f"step_{step:08d}")
        assert checkpoint.state == {"history": [step]}
        for kind, named in tensors_of(step).items():
            assert all(torch.equal(checkpoint.whole(kind, name), tensor) for name, tensor in named.items())


def _change_of_layout(runtime, root):
    saver = Saver(Path(root), runtime, CheckpointConfig(keep=9, asynchronous=True))
    exchanged = []
    with pytest.MonkeyPatch.context() as patch:
        from parallel import saving

        patch.setattr(saving, "gather_objects", lambda _, value: exchanged.append(value) or gather_objects(_, value))
        for step, flat in ((1, True), (2, True), (3, False)):
            saver.save(step, held_by(runtime, step, flat), {}, best=None)
        saver.wait()
    return sum(isinstance(value, list) for value in exchanged)


def test_who_holds_what_is_exchanged_once_for_each_layout(on_processes, tmp_path):
    assert on_processes(_change_of_layout, 2, str(tmp_path)) == [2, 2]
    checkpoint = read_checkpoint(tmp_path / "step_00000003")
    assert torch.equal(checkpoint.whole("optimizer", "head/exp_avg"), tensors_of(3)["optimizer"]["head/exp_avg"])


def _failing(runtime, root, culprit, error, asynchronous):
    saver = Saver(Path(root), runtime, CheckpointConfig(keep=9, asynchronous=asynchronous))
    saver.save(1, held_by(runtime, 1), {"step": 1}, best=None)
    saver.wait()
    with pytest.MonkeyPatch.context() as patch:
        if runtime.process_rank == culprit:

            def broken(*args, **kwargs):
                raise error

            patch.setattr(parts, "save_file", broken)
        try:
            saver.save(2, held_by(runtime, 2), {"step": 2}, best=None)
            saver.wait()
        except (ConfigError, RuntimeError) as caught:
            message = type(caught).__name__, str(caught)
    barrier(runtime)
    before = newest_checkpoint(Path(root))[0].state, sorted(path.name for path in Path(root).iterdir())
    saver.save(3, held_by(runtime, 3), {"step": 3}, best=None)  # and it can go on
    saver.wait()
    return message, before, saver.published()


FULL = OSError(errno.ENOSPC, "No space left on device")
WRAPPED = RuntimeError("Error: I/O error: No space left on device (os error 28)")  # as safetensors hands it on


@pytest.mark.parametrize(("culprit", "error", "asynchronous"), [(1, FULL, False), (0, WRAPPED, False), (1, FULL, True)])
def test_a_full_disk_of_one_process_is_one_message_on_all_and_harms_nothing(
    on_processes, tmp_path, culprit, error, asynchronous
):
    results = on_processes(_failing, 2, str(tmp_path), culprit, error, asynchronous)
    messages = [message for message, _, _ in results]
    assert messages[0] == messages[1]
    assert messages[0][0] == "ConfigError"
    assert "step 2 could not be written" in messages[0][1]
    assert "No space left on device" in messages[0][1]
    assert "untouched" in messages[0][1]
    assert [before for _, before, _ in results] == [({"step": 1}, ["latest", "step_00000001"])] * 2
    assert results[0][2] == ["step_00000001", "step_00000003"]


def test_a_defect_is_not_called_a_disk_error_and_ends_the_other_processes_too(on_processes, tmp_path):
    results = on_processes(_failing, 2, str(tmp_path), 1, RuntimeError("a defect"), False)
    assert results[1][0] == ("RuntimeError", "a defect")
    assert results[0][0] == ("RuntimeError", "process 1 could not write its part of a checkpoint: a defect")


def _unable_to_report(runtime, root, culprit):
    saver = Saver(Path(root), runtime, ALWAYS)
    with pytest.MonkeyPatch.context() as patch:
        if runtime.process_rank == culprit:

            def full(*args):
                raise FULL

            patch.setattr(writing, "write_parts", full)
            patch.setattr(writing, "write_atomically", full)
        with pytest.raises(ConfigError, match="No space left"):
            saver.save(1, held_by(runtime), {}, best=None)
    barrier(runtime)
    return [path.name for path in Path(root).iterdir()]


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_disk_too_full_for_a_report_keeps_nobody_waiting(on_processes, tmp_path, culprit):
    assert on_processes(_unable_to_report, 2, str(tmp_path), culprit, seconds=20) == [[], []]


@pytest.mark.timeout(20)
def test_a_disk_too_full_for_anything_keeps_one_process_waiting_no_more(runtime, tmp_path):
    assert _unable_to_report(runtime, tmp_path, 0) == []


def test_a_part_that_never_comes_is_named_when_the_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "PATIENCE_SECONDS", 0.05)
    draft = writing.Draft(
        root=tmp_path, step=1, token="t", rank=0, world_size=3, mode=0o600, parts={}, state="{}", keep=1
    )
    thread = writing.Writing(draft, lambda name: None)
    thread.start()
    thread.join(20)
    assert thread.outcome.refusal
    assert "process 1 of 3 has written no part of the checkpoint of step 1" in thread.outcome.error
    assert list(tmp_path.iterdir()) == []


def dying():
    """One process of the next test."""
    root, culprit, function = sys.argv[1:]
    with start() as runtime:
        saver = Saver(Path(root), runtime, ALWAYS)
        saver.save(1, held_by(runtime, 1), {"step": 1}, best=None)
        if runtime.process_rank == int(culprit):
            setattr(writing, function, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        try:
            saver.save(2, held_by(runtime, 2), {"step": 2}, best=None)
        finally:
            print("survived", flush=True)
            os._exit(3)


@pytest.mark.parametrize(("culprit", "function"), [(1, "write_parts"), (0, "publish")])
def test_a_process_that_dies_in_a_save_ends_the_others_and_leaves_the_old_checkpoint(
    forker, tmp_path, culprit, function
):
    root, port, running = tmp_path / "checkpoints", free_port(), []
    with (tmp_path / "output").open("ab") as output:
        for rank in range(3):
            around = {"environment": environment_of(rank, 3, port), "stdout": output, "stderr": output}
            running.append(forker.start("tests.test_parallel.test_saving:dying", [root, culprit, function], **around))
        codes = [process.wait(60) for process in running]
    expected = [-signal.SIGKILL if rank == culprit else 3 for rank in range(3)]
    assert codes == expected, (tmp_path / "output").read_text()
    taken, problems = newest_checkpoint(root)
    assert (taken.state, problems) == ({"step": 1}, [])
    assert [path.name for path in root.glob(".step_*")] != []  # what the dead one was writing


def test_what_interrupted_writes_left_behind_is_swept_away_at_the_next_start(tmp_path, runtime, monkeypatch):
    save(Saver(tmp_path, runtime, ALWAYS), 1)

    def killed(*args):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "publish", killed)
        patch.setattr(writing, "rmtree", lambda *args, **kwargs: None)  # a kill -9 tidies nothing
        with pytest.raises(RuntimeError, match="killed"):
            save(Saver(tmp_path, runtime, ALWAYS), 2)
    assert len(list(tmp_path.glob(".step_00000002.*.partial"))) == 1
    assert newest_checkpoint(tmp_path)[0].state == {"step": 1}
    Saver(tmp_path, runtime, ALWAYS)
    assert list(tmp_path.glob(".step_*")) == []
    assert newest_checkpoint(tmp_path)[0].state == {"step": 1}


def test_the_newest_and_the_best_are_kept(tmp_path, runtime):
    for keep_best, expected in ((True, [1, 3, 4]), (False, [3, 4])):
        saver = Saver(tmp_path, runtime, CheckpointConfig(keep=2, keep_best=keep_best))
        for step in (1, 2, 3, 4):
            save(saver, step, best="step_00000001")
        assert sorted(path.name for path in tmp_path.glob("step_*")) == [f"step_{step:08d}" for step in expected]
        assert saver.published() == [f"step_{step:08d}" for step in (1, 2, 3, 4)]


def test_files_have_the_permissions_that_the_umask_asks_for(tmp_path, runtime):
    before = os.umask(0o027)
    try:
        save(Saver(tmp_path, runtime, ALWAYS), 1)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "step_00000001").iterdir()} == {0o640}
