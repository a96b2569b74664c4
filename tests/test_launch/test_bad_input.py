"""What a user can get wrong beyond the configuration: exit code 2, one line, and nothing lost."""

import json
import subprocess
import sys

import pytest

from launch import exits, train
from tests.processes import ROOT, plain_environment


@pytest.mark.parametrize(("more", "message"), [
    (["lora.rank=1000"], "lora.rank"),
    (["lora.target_modules=[no_such_layer]"], "lora.target_modules"),
    (["lora.target_modules=nothing_like_it"], "lora.target_modules"),
    (["data.path=[/no/such/file.txt]"], "data.path"),
    (["model.config.vocab_size=100"], "the tokenizer has 257 tokens, but the model's vocabulary only 100"),
    (["model.config.max_position_embeddings=16"], "data.sequence_length must be at most"),
    (["+model.config.hiden_size=3"], "model.config.hiden_size is not a setting of llama: did you mean hidden_size?"),
    (["model.config.model_type=lama"], "model.config.model_type 'lama'"),
    (["model.config.model_type=gemma2"], "model.attention=sdpa"),
    (["model.config.hidden_size=33"], "33"),
    (["checkpoint.resume=/no/such/folder"], "checkpoint.resume must be auto, never, or a checkpoint or run folder"),
    (["model=pretrained", "model.name_or_path=/no/such/model"], "model.name_or_path '/no/such/model' cannot be loaded"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_wrong_input_is_refused_before_anything_is_written(tiny, tmp_path, more, message, capsys):
    if more[0].startswith("model="):
        tiny = [word for word in tiny if not word.startswith("model.config")]
    assert train.main([*tiny, *more]) == exits.REFUSED
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00broken\xff"])
def test_empty_and_unreadable_data_are_refused(tiny, tmp_path, content, capsys):
    (tmp_path / "bad.txt").write_bytes(content)
    assert train.main([*tiny, f"data.path=[{tmp_path / 'bad.txt'}]"]) == exits.REFUSED
    error = capsys.readouterr().err
    assert "data.path" in error
    assert "bad.txt" in error


def test_another_configuration_in_the_same_folder_is_refused_with_what_differs(tiny, tmp_path, capsys):
    assert train.main([*tiny, "training.stop_after=8"]) == exits.PREEMPTED
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert train.main([*tiny, "optimizer.lr=0.5"]) == exits.REFUSED
    assert "optimizer.lr: 0.01 there, 0.5 here" in capsys.readouterr().err
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {path.name for path in before if before[path] != after[path]} <= {".lock"}


def test_resume_never_protects_a_folder_that_holds_a_run(tiny, capsys):
    assert train.main([*tiny, "training.stop_after=4"]) == exits.PREEMPTED
    assert train.main([*tiny, "checkpoint.resume=never"]) == exits.REFUSED
    assert "checkpoint.resume=never" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(tiny, tmp_path, capsys):
    assert train.main([*tiny, "training.stop_after=8"]) == exits.PREEMPTED
    source = tmp_path / "run/checkpoints/step_00000008"
    words = [*tiny, f"run.dir={tmp_path / 'other'}", f"checkpoint.resume={source}"]
    assert train.main([*words, "lora.rank=2"]) == exits.REFUSED
    assert "was made with lora.rank=4, this run has 2" in capsys.readouterr().err
    assert train.main([*words, "model.config.hidden_size=64"]) == exits.REFUSED
    assert "model.config.hidden_size=32" in capsys.readouterr().err


def test_a_damaged_checkpoint_that_was_named_is_refused_by_name(tiny, tmp_path, capsys):
    assert train.main([*tiny, "training.stop_after=8"]) == exits.PREEMPTED
    source = tmp_path / "run/checkpoints/step_00000008"
    (source / "state.json").write_text("{}")
    assert train.main([*tiny, f"run.dir={tmp_path / 'other'}", f"checkpoint.resume={source}"]) == exits.REFUSED
    assert "state.json" in capsys.readouterr().err


def test_data_that_changed_since_the_checkpoint_is_refused(tiny, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The same words again and again, then some others. " * 200)
    words = [*tiny, f"data.path=[{text}]", "data.validation_fraction=0.0", f"data.validation_path=[{text}]"]
    assert train.main([*words, "training.stop_after=8"]) == exits.PREEMPTED
    text.write_text("Other words. " * 900)
    assert train.main(words) == exits.REFUSED
    assert "the data has changed since" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "stopped"


def test_the_message_is_all_that_a_refused_command_says():
    """Libraries, too, are silent at the end of the process."""
    command = [sys.executable, "-m", "launch.train", "optimizer.moments=int4"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=plain_environment())
    assert (done.returncode, done.stdout) == (exits.REFUSED, "")
    assert done.stderr == "error: optimizer.moments: Invalid value 'int4', expected one of [full, int8]\n"
