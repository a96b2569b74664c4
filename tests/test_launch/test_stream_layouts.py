"""Streams on several processes: the numbers of one, on any layout, also when a run moves between them."""

import pytest
import torch
from safetensors.torch import load_file

from launch import exits, train
from parallel.checkpoint import open_checkpoint
from tests.stream_runs import rows_of, runs_by_method, same_end, steps_of, words


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return runs_by_method(tmp_path_factory.mktemp("streams"))


def _train(_, overrides):
    return train.main(overrides)


def protected(folder):
    """By distinct input, the projection on what InfLoRA protects at the end of the run."""
    (last,) = (folder / "checkpoints").glob("step_00000012")
    checkpoint = open_checkpoint(last)
    names = [name for name in checkpoint.names("method") if name.startswith("whole/basis.")]
    return {name: (basis := checkpoint.whole("method", name)) @ basis.T for name in names}


def assert_same_numbers(folder, other, method):
    ours, theirs = steps_of(folder), steps_of(other)
    assert [one[:2] for one in ours] == [one[:2] for one in theirs]
    assert [one[2] for one in ours] == pytest.approx([one[2] for one in theirs], rel=1e-5)
    assert rows_of(folder) == rows_of(other)
    if method == "inflora":
        bases, expected = protected(folder), protected(other)
        assert bases.keys() == expected.keys() != set()
        for name, projection in bases.items():
            torch.testing.assert_close(projection, expected[name], atol=1e-5, rtol=0)


LAYOUTS = [
    ("inflora", 2, ["parallel=zero2"]),
    ("replay", 2, ["parallel=zero3"]),
    ("inflora", 4, ["parallel=zero3", "parallel.tensor=2"]),
    ("i_lora", 2, ["parallel=zero2"]),
    ("i_lora", 4, ["parallel=zero3", "parallel.tensor=2"]),
    ("ewc", 2, ["parallel=zero2"]),
    ("ewc", 4, ["parallel=zero3", "parallel.tensor=2"]),
    ("o_lora", 2, ["parallel=zero2"]),
    ("o_lora", 4, ["parallel=zero3", "parallel.tensor=2"]),
]


@pytest.mark.parametrize(("method", "size", "layout"), LAYOUTS)
def test_several_processes_give_the_matrix_and_the_losses_of_one(
    on_processes, undisturbed, tmp_path, method, size, layout
):
    folder = tmp_path / "run"
    assert on_processes(_train, size, words(folder, *layout, method=method)) == [exits.DONE] * size
    assert_same_numbers(folder, undisturbed(method), method)


@pytest.mark.parametrize(("method", "size", "layout"), [LAYOUTS[1], LAYOUTS[2], LAYOUTS[6]])
def test_a_run_stopped_in_the_second_task_goes_on_elsewhere(on_processes, undisturbed, tmp_path, method, size, layout):
    folder = tmp_path / "run"
    assert train.main(words(folder, "training.stop_after=6", method=method)) == exits.PREEMPTED
    there = words(folder, *layout, "training.stop_after=10", method=method)
    assert on_processes(_train, size, there) == [exits.PREEMPTED] * size
    assert train.main(words(folder, method=method)) == exits.DONE
    assert_same_numbers(folder, undisturbed(method), method)


@pytest.mark.parametrize("method", ["replay", "inflora"])
def test_heads_that_train_tasks_apart_sync_at_their_ends_and_resume_exactly(on_processes, tmp_path, method):
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    heads = ["lte=heads", "lte.heads=2", "lte.sync_every=3", "lte.outer=nesterov", "lte.outer_lr=0.7"]
    heads += ["lte.outer_momentum=0.5", "checkpoint.every=3"]
    assert on_processes(_train, 2, words(whole, *heads, method=method)) == [exits.DONE] * 2
    stopped = words(halted, *heads, "training.stop_after=6", method=method)
    assert on_processes(_train, 2, stopped) == [exits.PREEMPTED] * 2
    assert on_processes(_train, 2, words(halted, *heads, method=method)) == [exits.DONE] * 2
    assert steps_of(halted) == steps_of(whole)
    assert same_end(halted, whole)
    before, after = (load_file(whole / "tasks" / name / "model.safetensors") for name in ("02_two", "03_three"))
    name = next(name for name in before if name.endswith("query.weight") or name.endswith("q_proj.weight"))
    rank = int(torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3))
    assert rank <= 4 if method == "inflora" else rank > 4  # one `down` for all heads, or one for each
