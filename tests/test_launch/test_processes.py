"""Whole runs on several processes: the same numbers on every layout, resumed on any, killed anywhere."""

import itertools
import math
import signal
import time
from contextlib import nullcontext

import pytest
from safetensors.torch import load_file

from launch import exits, train
from launch.config import load
from launch.training import loop
from launch.training.guard import TrainingDiverged
from launch.watching.records import read_records
from tests.processes import environment_of, free_port

SMOOTH = "optimizer.eps=0.0001"  # Adam amplifies rounding of gradients near eps by lr / eps
LAYOUTS = {
    "one": (1, []),
    "ddp": (2, []),
    "zero2": (2, ["parallel=zero2"]),
    "zero3": (4, ["parallel=zero3"]),
    "tensor2": (2, ["parallel.tensor=2"]),
    "zero3-tensor2": (4, ["parallel=zero3", "parallel.tensor=2"]),
    "zero1-tensor2-accumulating": (4, ["parallel=zero1", "parallel.tensor=2", "training.microbatch_size=1"]),
}


def _train(_, overrides):
    return train.main(overrides)


@pytest.fixture(scope="module")
def run_in(on_processes, tiny_in):
    """Train in a folder on a layout, on real processes; returns the exit code."""

    def call(folder, layout, *overrides):
        count, words = LAYOUTS[layout]
        line = [*tiny_in(folder), SMOOTH, *words, *overrides]
        codes = set(on_processes(_train, count, line)) if count > 1 else {train.main(line)}
        assert len(codes) == 1
        return codes.pop()

    return call


@pytest.fixture
def run(run_in, tmp_path):
    """Train in the folder `name` of the test."""
    return lambda name, *words: run_in(tmp_path / name, *words)


@pytest.fixture(scope="module")
def undisturbed(run_in, tmp_path_factory):
    """A function that gives the folder of a whole run on a layout, made when it is first asked for."""
    root, done = tmp_path_factory.mktemp("undisturbed"), set()

    def folder(layout):
        if layout not in done:
            assert run_in(root / layout, layout) == exits.DONE
            done.add(layout)
        return root / layout

    return folder


def _steps(folder):
    return [r for r in read_records(folder / "metrics.jsonl") if "event" not in r]


def _events(folder, *names):
    return [r for r in read_records(folder / "metrics.jsonl") if r.get("event") in names]


def _numbers(folder):
    """What the arithmetic decides, by step."""
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in _steps(folder)]


def _assert_same_run(folder, other, tolerance):
    ours, theirs = _numbers(folder), _numbers(other)
    assert [row[0] for row in ours] == [row[0] for row in theirs] == list(range(1, 21))
    for one, two in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, rel=tolerance, abs=tolerance)
    for kind, keys in (("evaluate", ["val_loss"]), ("restart", ["update_ratio", "pruned_count", "layers"])):
        for one, two in zip(_events(folder, kind), _events(other, kind), strict=True):
            assert [one[key] for key in keys] == pytest.approx([two[key] for key in keys], rel=max(tolerance, 1e-6))
    ours, theirs = (load_file(path / "final/model.safetensors") for path in (folder, other))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] - theirs[name]).abs().max() <= max(tolerance, 0) for name in ours)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_every_layout_gives_the_numbers_of_one_process(undisturbed, layout):
    many, one = undisturbed(layout), undisturbed("one")
    _assert_same_run(many, one, 1e-5)
    rows = [(folder / "spectra.jsonl").read_text().count("\n") for folder in (many, one)]
    assert rows[0] == rows[1]


def test_a_run_goes_on_on_any_other_layout_as_if_nothing_had_happened(run, undisturbed, tmp_path):
    chain = [("zero2", 3), ("one", 7), ("zero3", 11), ("tensor2", 13), ("zero3-tensor2", 17), ("zero2", None)]
    for layout, stop in chain:  # in the warm start, in each cycle, at a restart's distance
        words = [] if stop is None else [f"training.stop_after={stop}"]
        assert run("chain", layout, *words) == (exits.DONE if stop is None else exits.PREEMPTED)
    assert [r["step"] for r in _events(tmp_path / "chain", "resume")] == [3, 7, 11, 13, 17]
    _assert_same_run(tmp_path / "chain", undisturbed("one"), 1e-5)


@pytest.mark.parametrize(("layout", "dtype", "moments"), [
    ("zero2", "bf16", "full"), ("zero2", "bf16", "int8"),
    ("zero3-tensor2", "bf16", "full"), ("zero3-tensor2", "fp32", "full"),
])  # fmt: skip
def test_a_run_resumed_on_its_own_layout_is_bitwise_the_same(run, tmp_path, layout, dtype, moments):
    words = [f"training.dtype={dtype}", "lora.dropout=0.1", f"optimizer.moments={moments}"]
    assert run("whole", layout, *words) == exits.DONE
    for stop in (5, 12):  # where the warm start ends, and in a cycle
        assert run("parts", layout, *words, f"training.stop_after={stop}") == exits.PREEMPTED
    assert run("parts", layout, *words, "checkpoint.asynchronous=true") == exits.DONE
    _assert_same_run(tmp_path / "parts", tmp_path / "whole", 0.0)


def test_moments_in_8_bits_train_alike_on_all_stages_though_their_blocks_differ(run, tmp_path):
    for name in ("one", "zero3-tensor2"):
        assert run(name, name, "optimizer.moments=int8") == exits.DONE
    assert run("whole", "one") == exits.DONE
    ours, theirs, whole = (
        [r["loss"] for r in read_records(tmp_path / name / "metrics.jsonl") if "loss" in r]
        for name in ("one", "zero3-tensor2", "whole")
    )
    assert ours[0] == pytest.approx(whole[0], rel=1e-6)
    assert ours == pytest.approx(whole, rel=0.01)
    assert theirs == pytest.approx(ours, rel=0.01)
    assert ours[-1] != theirs[-1]
    assert ours[-1] < 0.8 * ours[0]


def test_the_model_at_the_end_is_the_one_that_was_trained_and_start_the_one_it_began_from(run, tmp_path):
    assert run("one", "one", "training.dtype=bf16") == exits.DONE
    assert run("many", "zero3-tensor2", "training.dtype=bf16") == exits.DONE
    summaries = [train.json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "many")]
    assert summaries[0]["val_loss"] == pytest.approx(summaries[1]["val_loss"], abs=3e-3)
    assert set(summaries[0]) == set(summaries[1])
    start = [load_file(tmp_path / name / "start/model.safetensors") for name in ("one", "many")]
    assert start[0].keys() == start[1].keys()
    assert all((start[0][name] - start[1][name]).abs().max() < 1e-2 for name in start[0])


class Job:
    """A run of several processes without a launcher, as srun would leave it."""

    def __init__(self, forker, tmp_path, count, overrides, slow=0.0, further=()):
        """`further` are words for the last process alone."""
        port, command = free_port(), [str(slow), *overrides]
        self.outputs = [tmp_path / f"output-{rank}" for rank in range(count)]
        self.processes = []
        for rank, output in enumerate(self.outputs):
            around = {"environment": environment_of(rank, count, port), "folder": tmp_path}
            words = [*command, *further] if rank == count - 1 else command
            with output.open("w") as file:
                self.processes.append(forker.start("tests.training:main", words, stdout=file, stderr=file, **around))

    def wait(self, seconds):
        """Exit codes, once all have ended."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

    def said(self):
        """Everything that was printed."""
        return "".join(output.read_text() for output in self.outputs)

    def close(self):
        for process in self.processes:
            process.kill()
            process.wait()


def _spoiled(runtime, words, kind):
    """Train with a process whose loss or gradients are not finite from step 7 on; how that ended."""
    steps, rank = itertools.count(), runtime.process_rank
    real = loop.accumulate

    def accumulate(engine, term, **options):
        spoils = next(steps) >= 6 and rank == 1
        plain = engine.backward
        if spoils and kind == "gradients":
            engine.backward = lambda loss: plain(loss * math.nan)
        try:
            parts = real(engine, term, **options)
        finally:
            engine.__dict__.pop("backward", None)
        return parts * math.nan if spoils and kind == "loss" else parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "accumulate", accumulate)
        patch.setattr("launch.training.suspects.gethostname", lambda: f"n{rank}")
        patch.setattr(train, "watched", lambda *_, **__: nullcontext())  # which would end this process
        try:
            train.run_command(load(words))
        except TrainingDiverged as error:
            return str(error), error.step, error.host
    return None


@pytest.mark.parametrize(("kind", "layout"), [("loss", "ddp"), ("gradients", "ddp"), ("gradients", "zero2")])
def test_the_machine_that_alone_has_numbers_that_are_not_finite_is_named(on_processes, tiny, tmp_path, kind, layout):
    folder = tmp_path / "spoiled"
    line = [word for word in tiny if not word.startswith("run.dir")]
    line += [f"run.dir={folder}", *LAYOUTS[layout][1], "training.max_skips=4", "checkpoint.every=1"]
    told = on_processes(_spoiled, 2, line, kind)
    assert {(step, host) for _, step, host in told} == {(10, "n1")}
    assert "Only n1 (process 1) had numbers that were not finite before the sum" in told[0][0]
    skips = _events(folder, "skip")
    assert [one.get("processes") for one in skips] == [[1] if kind == "loss" else None, [1], [1], [1]]
    assert max(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir()) == "step_00000006"


def _until(condition, job, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, job.said()
        assert all(process.poll() is None for process in job.processes), job.said()
        time.sleep(0.02)


def test_a_batch_that_the_processes_cannot_share_is_refused_once_and_nothing_is_written(forker, tiny, tmp_path):
    job = Job(forker, tmp_path, 2, [*tiny, f"run.dir={tmp_path / 'refused'}", "training.global_batch_size=5"])
    assert job.wait(60.0) == [exits.REFUSED] * 2
    assert job.said().count("error:") == 1, job.said()
    assert "training.global_batch_size must be a multiple of the 2 processes" in job.said()
    assert not (tmp_path / "refused").exists()


def test_processes_with_different_configurations_are_refused_once_and_nothing_is_written(forker, tiny, tmp_path):
    job = Job(forker, tmp_path, 2, [*tiny, f"run.dir={tmp_path / 'refused'}"], further=["optimizer.lr=0.02"])
    assert job.wait(60.0) == [exits.REFUSED] * 2
    assert job.said().count("error:") == 1, job.said()
    assert "the configuration must be the same on all 2 processes" in job.said()
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(("moment", "victim"), [("in a step", 2), ("in a save", 0)])
def test_a_killed_process_ends_the_run_with_one_message_and_the_next_start_resumes(
    forker, run, undisturbed, tiny_in, tmp_path, moment, victim
):
    folder = tmp_path / "killed"
    line = [*tiny_in(folder), SMOOTH, "parallel=zero3"]
    job = Job(forker, tmp_path, 4, line, slow=0.0 if moment == "in a step" else 0.6)
    try:
        if moment == "in a step":
            _until(lambda: (folder / "metrics.jsonl").exists() and len(_steps(folder)) >= 9, job)
        else:
            published = folder / "checkpoints" / "step_00000004"
            _until(published.exists, job)
            _until(lambda: list((folder / "checkpoints").glob(".step_00000005*")), job)
        job.processes[victim].send_signal(signal.SIGKILL)
        began = time.monotonic()
        codes = job.wait(20.0)
        assert time.monotonic() - began < 20.0
    finally:
        job.close()
    assert codes[victim] == -signal.SIGKILL
    assert all(code == exits.FAILED for rank, code in enumerate(codes) if rank != victim), job.said()
    reports = [text for line in job.said().splitlines() if (text := line.strip()).startswith("error:")]
    assert len(reports) == 1, job.said()
    assert f"process {victim}" in reports[0]
    assert "start the same command again" in reports[0]
    assert run("killed", "zero3") == exits.DONE
    assert _events(folder, "resume")
    _assert_same_run(folder, undisturbed("zero3"), 0.0)
