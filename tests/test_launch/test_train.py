"""Whole runs of the trainer, in this process."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import exits, export, train
from launch.config import load
from launch.evaluate import evaluate_folder
from launch.training import loop
from launch.watching.records import read_records
from parallel import output_loss
from parallel.checkpoint import newest_checkpoint
from relora.convert import low_rank_modules
from relora.spectrum import numerical_rank, singular_values

TIMED = {"tokens_per_second", "memory_bytes", "flops_per_second", "mfu", "seconds"}


def run(overrides, *more):
    return train.main([*overrides, *more])


def folder_of(overrides):
    return Path(next(word.partition("=")[2] for word in reversed(overrides) if word.startswith("run.dir=")))


def records(folder):
    """Everything but clock readings and what tells of attempts."""
    kept = [r for r in read_records(folder / "metrics.jsonl") if r.get("event") not in ("resume", "checkpoint")]
    return [{key: value for key, value in record.items() if key not in TIMED} for record in kept]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tiny_in, tmp_path_factory):
    """The folder of an uninterrupted run, only to be read."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(tiny_in(folder)) == exits.DONE
    return folder


def test_a_run_learns_restarts_and_leaves_everything_it_promises(tiny, tmp_path, capsys):
    assert run(tiny) == exits.DONE
    folder = folder_of(tiny)
    assert "status: done" in capsys.readouterr().out
    done = summary(folder)
    assert {"status", "steps", "tokens", "train_loss", "val_loss", "val_perplexity", "restarts", "syncs",
            "bytes_sent", "tokens_per_second", "peak_memory_bytes", "wall_seconds"} <= set(done)  # fmt: skip
    assert (done["status"], done["steps"], done["restarts"]) == ("done", 20, 2)
    assert done["tokens"] == 20 * 4 * 32
    lines = read_records(folder / "metrics.jsonl")
    steps = [line for line in lines if "event" not in line]
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes"} <= set(steps[0])
    first = next(line for line in lines if line.get("event") == "evaluate" and line["step"] == 0)
    assert first["val_loss"] == pytest.approx(math.log(257), abs=0.2)
    assert done["val_loss"] < first["val_loss"] - 1.0
    for name in ("config.yaml", "environment.json", "checkpoints/latest", "start/model.safetensors"):
        assert (folder / name).is_file(), name


def test_the_final_model_loads_alone_gives_the_same_loss_and_generates(tiny, undisturbed):
    folder, config = undisturbed, load(tiny)
    assert evaluate_folder(config, str(folder / "final"))["val_loss"] == pytest.approx(
        summary(folder)["val_loss"], abs=1e-6
    )
    final = next(line for line in read_records(folder / "metrics.jsonl") if line.get("event") == "final")
    assert abs(final["merge_difference"]) < 1e-5
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert not low_rank_modules(model)
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    inputs = tokenizer("The ship", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0])
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == 256
    assert text.startswith("The ship")
    assert len(text) > len("The ship")


def test_stopped_again_and_again_a_run_ends_with_the_very_metrics_of_the_undisturbed_one(tiny, undisturbed):
    # Inside the warm start, at the hand-over, at a restart, inside a cycle.
    for step in (3, 5, 10, 13):
        assert run(tiny, f"training.stop_after={step}") == exits.PREEMPTED
        assert summary(folder_of(tiny))["status"] == "stopped"
    assert run(tiny) == exits.DONE
    assert records(folder_of(tiny)) == records(undisturbed)
    ours, theirs = summary(folder_of(tiny)), summary(undisturbed)
    assert all(ours[key] == theirs[key] for key in ("train_loss", "val_loss", "tokens", "restarts"))
    weights = [load_file(folder / "final/model.safetensors") for folder in (folder_of(tiny), undisturbed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.parametrize("more", [
    ["training.dtype=bf16"],
    ["training.dtype=bf16", "relora.merge_precision=stochastic"],
    ["lora.base=nf4", "training.dtype=bf16"],
    ["lora.base=int8", "relora.merge_precision=nearest"],
    ["lora.dropout=0.2"],
    ["relora.reset=magnitude", "relora.prune_ratio=0.9"],
    ["relora=none"],
    ["lora=none"],
    ["training.microbatch_size=1"],
    ["optimizer.moments=int8"],
    ["optimizer.moments=int8", "training.dtype=bf16", "relora.reset=magnitude", "relora.prune_ratio=0.9"],
], ids=" ".join)  # fmt: skip
def test_every_kind_of_run_resumes_bitwise(tiny, tmp_path, more):
    if more in (["relora=none"], ["lora=none"]):
        tiny = [word for word in tiny if not word.startswith("relora.")]
    if more == ["lora=none"]:
        tiny = [word for word in tiny if not word.startswith("lora.")]
    other = [*tiny, *more, f"run.dir={tmp_path / 'whole'}"]
    assert run(other) == exits.DONE
    assert run(tiny, *more, "training.stop_after=12") == exits.PREEMPTED
    assert run(tiny, *more) == exits.DONE
    assert records(folder_of(tiny)) == records(folder_of(other))


def test_a_quantised_run_ends_with_the_model_that_it_trained_and_resumes_at_the_hand_over(tiny, tmp_path):
    tiny = [*tiny, "lora.base=nf4"]
    other = [*tiny, f"run.dir={tmp_path / 'whole'}"]
    assert run(other) == exits.DONE
    assert run(tiny, "training.stop_after=5") == exits.PREEMPTED
    assert run(tiny) == exits.DONE
    assert records(folder_of(tiny)) == records(folder_of(other))
    final = next(line for line in read_records(folder_of(tiny) / "metrics.jsonl") if line.get("event") == "final")
    assert abs(final["merge_difference"]) < 1e-5
    restarts = [line for line in read_records(folder_of(tiny) / "metrics.jsonl") if line.get("event") == "restart"]
    assert all(0 < line["base_error"] < 0.2 and line["lost_share"] < 1e-3 < line["base_shift"] for line in restarts)
    stored = newest_checkpoint(folder_of(tiny) / "checkpoints")[0]
    kinds = {name.rpartition("quantised.")[2]: stored.dtype("model", name) for name in stored.names("model")}
    assert kinds["codes"] == torch.uint8
    assert kinds["remainder"] == torch.int16
    assert not any(name.endswith("_proj.weight") for name in stored.names("model"))
    words = [f"run.dir={folder_of(tiny)}", f"export.out={tmp_path / 'adapter'}", "export.to=adapter"]
    assert export.main(words) == exits.DONE


def test_the_microbatch_is_only_a_memory_knob(tiny, undisturbed):
    assert run(tiny, "training.microbatch_size=1") == exits.DONE
    for ours, theirs in zip(records(folder_of(tiny)), records(undisturbed), strict=True):
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.parametrize("recomputed", ["full", "selective"])
def test_activation_checkpointing_changes_no_loss(tiny, undisturbed, recomputed):
    assert run(tiny, f"training.activation_checkpointing={recomputed}") == exits.DONE
    losses = [[r["loss"] for r in records(f) if "loss" in r] for f in (folder_of(tiny), undisturbed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_loss_in_chunks_changes_no_loss(tiny, undisturbed, monkeypatch):
    monkeypatch.setattr(output_loss, "_LOGITS", 257 * 10)
    assert run(tiny, "training.loss=auto", "training.microbatch_size=2") == exits.DONE
    for ours, theirs in zip(records(folder_of(tiny)), records(undisturbed), strict=True):
        for key in {"loss", "val_loss"} & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)


class Reads(TorchFunctionMode):
    """Counts what makes this process wait for its device: values of tensors that become numbers of Python."""

    NAMES = frozenset({"item", "tolist", "__float__", "__bool__", "__int__", "__index__", "cpu", "numpy"})

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_the_device_once_for_its_norm_and_losses_and_logging_adds_nothing(tiny, monkeypatch):
    found, real_update = [], loop.update

    def counted_update(run, clock):
        with Reads() as reads:
            real_update(run, clock)
        found.append(reads.names)

    monkeypatch.setattr(loop, "update", counted_update)
    assert run(tiny, "run.log_every=7", "training.microbatch_size=2") == exits.DONE
    assert len(found) == 20
    # Targets are counted before the batch is sent; the norm is waited for, and the losses are there by then.
    assert {tuple(names) for names in found} == {("__int__", "__float__", "tolist")}


def test_restarts_make_a_difference_and_plain_lora_stays_at_its_rank(tiny, tmp_path):
    plain = [word for word in tiny if not word.startswith("relora.")]
    ranks = {}
    for name, words in (("relora", [*tiny, "relora.warm_start_steps=0"]), ("lora", [*plain, "relora=none"])):
        assert run(words, f"run.dir={tmp_path / name}") == exits.DONE
        start, final = (load_file(tmp_path / name / part / "model.safetensors") for part in ("start", "final"))
        key = "model.layers.1.mlp.up_proj.weight"
        ranks[name] = numerical_rank(singular_values(final[key] - start[key]), float(start[key].norm()), merges=4)
    assert ranks["lora"] == 4
    assert 4 < ranks["relora"] <= 4 * 4  # three restarts in 20 steps


def test_a_finished_run_is_not_trained_again(tiny_in, undisturbed, capsys):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    assert run(tiny_in(undisturbed)) == exits.DONE
    assert "done already" in capsys.readouterr().out
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_named_and_the_run_ends_as_if_nothing_had_happened(tiny, undisturbed, capsys):
    assert run(tiny, "training.stop_after=12") == exits.PREEMPTED
    victim = folder_of(tiny) / "checkpoints/step_00000012/model-0.safetensors"
    victim.write_bytes(victim.read_bytes()[:-10])
    assert run(tiny) == exits.DONE
    assert "damaged checkpoint" in (out := capsys.readouterr().out)
    assert "step_00000012" in out
    assert "resuming from step_00000008" in out
    assert records(folder_of(tiny)) == records(undisturbed)


def test_zero_steps_build_evaluate_and_write_the_untrained_model(tiny):
    assert run(tiny, "training.steps=0", "relora.warm_start_steps=0") == exits.DONE
    assert summary(folder_of(tiny))["val_loss"] == pytest.approx(math.log(257), abs=0.2)
    start, final = (load_file(folder_of(tiny) / part / "model.safetensors") for part in ("start", "final"))
    assert all(torch.equal(start[name], final[name]) for name in start)


def test_tokens_decide_the_steps(tiny):
    words = [word for word in tiny if not word.startswith("training.steps")]
    assert run(words, "training.steps=null", f"training.tokens={20 * 4 * 32 - 1}", "training.stop_after=19") == 75
    assert load([*words, "training.steps=null", f"training.tokens={20 * 4 * 32 + 1}"]).total_steps == 21


def test_a_run_branches_off_a_checkpoint_of_another_one(tiny, undisturbed, capsys):
    where = undisturbed / "checkpoints"
    assert run(tiny, f"checkpoint.resume={where / 'step_00000020'}", "training.steps=25") == exits.DONE
    assert "training.steps changes from 20 to 25" in capsys.readouterr().out
    assert [r["step"] for r in records(folder_of(tiny)) if "event" not in r] == [21, 22, 23, 24, 25]
    assert (folder_of(tiny) / "start/model.safetensors").read_bytes() == (
        undisturbed / "start/model.safetensors"
    ).read_bytes()


def test_a_second_process_cannot_train_in_the_same_folder(tiny, capsys):
    from launch.training.run_folder import locked

    with locked(folder_of(tiny)):
        assert run(tiny) == exits.REFUSED
    assert "in use by another process" in capsys.readouterr().err


def test_a_full_disk_ends_with_one_message_and_the_run_continues_later(tiny, undisturbed, monkeypatch, capsys):
    from parallel import parts

    real, calls = parts.save_file, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 9:  # the fourth checkpoint, the warm start's among them: three files each
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(parts, "save_file", full)
    assert run(tiny) == exits.REFUSED
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "step 12 could not be written" in error
    monkeypatch.undo()
    assert run(tiny) == exits.DONE
    assert records(folder_of(tiny)) == records(undisturbed)


def test_a_spike_is_skipped_reported_and_too_many_end_the_run(tiny, monkeypatch, capsys):
    from launch.training import loop

    real, count = loop.accumulate, []

    def spiky(*args, **kwargs):
        count.append(1)
        loss = real(*args, **kwargs)
        return loss * math.nan if len(count) in (7, 9, 10) else loss

    monkeypatch.setattr(loop, "accumulate", spiky)
    assert run(tiny, "training.max_skips=3") == exits.FAILED
    skips = [r for r in records(folder_of(tiny)) if r.get("event") == "skip"]
    assert [r["step"] for r in skips] == [7, 9, 10]
    assert "3 of the last 128 updates were refused" in capsys.readouterr().err
    assert summary(folder_of(tiny))["status"] == "diverged"


FAMILIES = {
    "llama": {"num_key_value_heads": 1, "tie_word_embeddings": "true"},
    "gpt_neox": {},
    "qwen2": {"num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 1},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "gpt2": {"hidden_size": None, "intermediate_size": None, "num_hidden_layers": None, "num_attention_heads": None,
             "n_embd": 32, "n_layer": 2, "n_head": 2},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_family_trains_restarts_and_is_exported_without_loss(tiny, family, dtype):
    wanted = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    wanted |= {"model_type": family, "max_position_embeddings": 64} | FAMILIES[family]
    if family == "gpt2":
        wanted["max_position_embeddings"] = None
    values = ",".join(f"{key}:{value}" for key, value in wanted.items() if value is not None)
    words = [word for word in tiny if not word.startswith("model.config")]
    assert run(words, "model=custom", f"model.config={{{values}}}", f"training.dtype={dtype}") == exits.DONE
    folder = folder_of(tiny)
    lines = read_records(folder / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line and "event" not in line]
    assert losses[-1] < losses[0] - 0.5
    final = next(line for line in lines if line.get("event") == "final")
    assert abs(final["merge_difference"]) < (1e-5 if dtype == "fp32" else 2e-2)
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    assert model.config.model_type == family


def test_continued_pre_training_starts_from_the_given_weights(tiny, undisturbed, tmp_path):
    words = [word for word in tiny if not word.startswith("model.config")]
    more = ["model=pretrained", f"model.name_or_path={undisturbed / 'final'}"]
    assert run(words, *more) == exits.DONE
    before = next(r for r in records(folder_of(tiny)) if r.get("event") == "evaluate")
    assert before["val_loss"] == pytest.approx(summary(undisturbed)["val_loss"], abs=1e-6)
    assert summary(folder_of(tiny))["val_loss"] < before["val_loss"]


def test_a_run_starts_from_a_peft_adapter(tiny, undisturbed, tmp_path, capsys):
    from launch import export

    adapter = tmp_path / "adapter"
    assert export.main([f"run.dir={undisturbed}", "export.to=adapter", f"export.out={adapter}"]) == exits.DONE
    words = [word for word in tiny if not word.startswith("model.config")]
    words += ["model=pretrained", f"model.name_or_path={adapter / 'base'}", f"lora.init_from={adapter}"]
    assert run(words) == exits.REFUSED
    assert "relora.warm_start_steps=5: set that to 0" in capsys.readouterr().err
    words += ["relora.warm_start_steps=0", "lora.alpha=16"]
    assert run(words, "training.stop_after=7") == exits.PREEMPTED
    assert "14 layers start from the adapter" in capsys.readouterr().out
    before = next(r for r in records(folder_of(tiny)) if r.get("event") == "evaluate")
    assert before["val_loss"] == pytest.approx(summary(undisturbed)["val_loss"], abs=1e-5)
    (adapter / "adapter_model.safetensors").unlink()
    assert run(words) == exits.DONE, "a checkpoint brings its own factors"


def test_spectra_are_measured_at_each_restart_and_at_the_end(tiny):
    assert run(tiny, "evaluation.spectra=all") == exits.DONE
    lines = read_records(folder_of(tiny) / "spectra.jsonl")
    assert sorted({(line["step"], line["restart"]) for line in lines}) == [(10, 1), (15, 2), (20, 3)]
    assert len({line["module"] for line in lines}) == 14
    for line in lines:
        assert 1 <= line["numerical_rank"] <= 4 * line["restart"]
    last = [line["numerical_rank"] for line in lines if line["restart"] == 3]
    assert max(last) > 4


def test_the_executed_flops_fall_when_the_warm_start_ends(undisturbed):
    lines = [r for r in read_records(undisturbed / "metrics.jsonl") if "flops_per_second" in r]
    tokens = 4 * 32
    per_step = [line["flops_per_second"] / line["tokens_per_second"] * tokens for line in lines]
    assert per_step[0] > 0
    assert per_step[-1] != pytest.approx(per_step[0], rel=0.02)


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_an_eager_one(tiny_in, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU, and there is none")
    compiled, eager = tmp_path / "compiled", tmp_path / "eager"
    short = ["model.config.num_hidden_layers=1", "training.steps=12"]  # a layer more is seconds more for the compiler
    assert run([*tiny_in(compiled), *short], "training.compile=true") == exits.DONE
    assert run([*tiny_in(eager), *short]) == exits.DONE
    losses = [[r["loss"] for r in records(folder) if "loss" in r] for folder in (compiled, eager)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
