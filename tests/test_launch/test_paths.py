"""Which path a run's layers take: refused where impossible, measured once, kept for the run."""

import json

import pytest
import torch

import launch.training.paths
import relora.kernels.setting
from launch import exits, train
from launch.config import load
from launch.head_rules import check_hosted
from launch.training.paths import _allowed, check_device
from launch.watching.records import read_records
from parallel.checkpoint import open_checkpoint
from relora.choice import LayerShape, fastest, measure
from relora.errors import ConfigError
from relora.paths import ForwardPath

SHAPE = LayerShape(
    outputs=24,
    inputs=16,
    rank=2,
    tokens=32,
    microbatches=2,
    dtype="bfloat16",
    trains_down=False,
    transposed=True,
    extra_bits=True,
)


def losses(folder):
    return [line["loss"] for line in read_records(folder / "metrics.jsonl") if "grad_norm" in line]


def kept(folder):
    (newest,) = (folder / "checkpoints").glob("step_*12")
    return open_checkpoint(newest).state["run"]["paths"]


def favour(monkeypatch, path, seen=None):
    def pretend(shape, paths, device):
        if seen is not None:
            seen.append(shape)
        return {one: 1.0 - (one == path) / 2 for one in paths}

    monkeypatch.setattr(launch.training.paths, "measure", pretend)


@pytest.mark.parametrize(("more", "message"), [
    (["lora.dropout=0.1"], "lora.dropout=0.1 cannot be with lora.forward=merged"),
    (["parallel.zero_stage=3"], "lora.forward=merged would keep every layer whole"),
])  # fmt: skip
def test_merged_is_refused_where_it_cannot_be(more, message):
    with pytest.raises(ConfigError, match=message):
        load(["lora.forward=merged", *more])


@pytest.mark.parametrize("forward", ["merged", "auto"])
def test_heads_that_share_a_process_have_no_weight_to_merge_into(forward):
    config = load(["lte=heads", "lte.heads=2", f"lora.forward={forward}", "evaluation.every=0", "checkpoint.every=0"])
    with pytest.raises(ConfigError, match=f"lora.forward={forward} needs heads with processes of their own"):
        check_hosted(config, 2)


@pytest.mark.parametrize(("triton", "device", "message"), [
    (True, "cpu", "this process trains on the CPU: choose lora.forward=addmm"),
    (False, "cuda", "Triton is not installed: pip install 'accrete.triton.', or choose lora.forward=addmm"),
])  # fmt: skip
def test_fused_is_refused_where_kernels_cannot_run(monkeypatch, triton, device, message):
    monkeypatch.setattr(relora.kernels.setting, "has_triton", lambda: triton)
    monkeypatch.setattr(launch.training.paths, "has_triton", lambda: triton)
    with pytest.raises(ConfigError, match=f"lora.forward=fused needs Triton and a GPU, and {message}"):
        check_device(load(["lora.forward=fused"]), torch.device(device))


def test_a_run_by_fused_on_the_cpu_ends_before_a_folder_is_there(tiny, tmp_path, capsys):
    assert train.main([*tiny, "lora.forward=fused"]) == exits.REFUSED
    assert not (tmp_path / "run").exists()
    assert "lora.forward=fused needs Triton and a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_measures_fused_where_kernels_run(monkeypatch, device):
    monkeypatch.setattr(relora.kernels.setting, "has_triton", lambda: True)
    allowed = _allowed(load(["lora.forward=auto"]), torch.device(device))
    assert (ForwardPath.fused in allowed) == (device == "cuda")


@pytest.mark.parametrize(("dtype", "device", "measured"), [
    ("fp32", "cpu", True), ("bf16", "cpu", False), ("bf16", "cuda", True),
])  # fmt: skip
def test_auto_measures_merged_unless_torch_would_round_by_chance(monkeypatch, dtype, device, measured):
    monkeypatch.setattr(relora.kernels.setting, "has_triton", lambda: True)
    allowed = _allowed(load(["lora.forward=auto", f"training.dtype={dtype}"]), torch.device(device))
    assert (ForwardPath.merged in allowed) == measured


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_has_the_same_losses_by_every_path(tiny, tmp_path, dtype):
    found = {}
    for forward in ("factored", "addmm", "merged"):
        words = [*tiny, f"training.dtype={dtype}", f"lora.forward={forward}", f"run.dir={tmp_path / forward}"]
        assert train.main([*words, "training.microbatch_size=2"]) == exits.DONE
        found[forward] = losses(tmp_path / forward)
    for forward in ("addmm", "merged"):
        assert found[forward] == pytest.approx(found["factored"], rel=1e-4 if dtype == "fp32" else 2e-2)
    assert len({tuple(one) for one in found.values()}) == 3, "each path rounds in its own way"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_merged_run_resumes_bitwise(tiny, tmp_path, dtype):
    words = [*tiny, f"training.dtype={dtype}", "lora.forward=merged"]
    assert train.main([*words, f"run.dir={tmp_path / 'whole'}"]) == exits.DONE
    assert train.main([*words, "training.stop_after=12"]) == exits.PREEMPTED
    assert train.main(words) == exits.DONE
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_what_auto_has_taken_is_kept_when_the_clock_says_otherwise(tiny, tmp_path, monkeypatch, capsys):
    words = [*tiny, "lora.forward=auto", "checkpoint.every=12", f"data.cache={tmp_path / 'cache'}"]
    seen = []
    favour(monkeypatch, ForwardPath.merged, seen)
    assert train.main([*words, f"run.dir={tmp_path / 'whole'}"]) == exits.DONE
    assert "lora.forward=auto takes merged for 2 q_proj, 2 k_proj, " in capsys.readouterr().out
    assert {(shape.outputs, shape.inputs) for shape in seen} == {(32, 32), (64, 32), (32, 64)}
    assert len(seen) == 3, "layers of one shape are measured once"
    assert train.main([*words, "training.stop_after=12"]) == exits.PREEMPTED
    assert len(seen) == 3, "the table is read"
    assert set(kept(tmp_path / "run").values()) == {"merged"}
    (tmp_path / "cache" / launch.training.paths.TABLE).unlink()
    favour(monkeypatch, ForwardPath.factored, seen)
    assert train.main(words) == exits.DONE
    assert len(seen) == 3
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_damaged_table_is_measured_anew(tiny, tmp_path, monkeypatch):
    seen, table = [], tmp_path / "cache" / launch.training.paths.TABLE
    table.parent.mkdir()
    table.write_text("{")
    favour(monkeypatch, ForwardPath.addmm, seen)
    words = [*tiny, "lora.forward=auto", f"data.cache={table.parent}", "lora.dropout=0.1", "relora.warm_start_steps=0"]
    assert train.main(words) == exits.DONE
    assert len(seen) == 3
    (rows,) = json.loads(table.read_text()).values()
    assert {key: set(row) for key, row in rows.items()} == {one.key: {"factored", "addmm"} for one in seen}


def test_a_measurement_leaves_the_generators_alone_and_times_all_paths():
    before = torch.get_rng_state()
    paths = [ForwardPath.factored, ForwardPath.addmm, ForwardPath.merged]
    found = measure(SHAPE, paths, torch.device("cpu"))
    assert set(found) == set(paths)
    assert all(0 < seconds < 1 for seconds in found.values())
    assert torch.equal(before, torch.get_rng_state())
    assert SHAPE.key == "24x16 rank 2 tokens 32x2 bfloat16 transposed split down frozen"


def test_addmm_is_left_only_for_what_is_clearly_faster():
    times = {ForwardPath.factored: 1.1, ForwardPath.addmm: 1.0, ForwardPath.merged: 0.98}
    assert fastest(times) is ForwardPath.addmm
    assert fastest({**times, ForwardPath.merged: 0.9}) is ForwardPath.merged
