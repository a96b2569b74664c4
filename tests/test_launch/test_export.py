"""Exports of real runs, against what the trainer wrote and what PEFT makes of them."""

import json
import shutil
import weakref
from pathlib import Path

import peft
import pytest
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from launch import exits, export, train
from launch.config import to_typed
from launch.models import snapshot
from launch.models.description import describe, description_of
from launch.models.forms import write_folder
from launch.models.model import ModelConfig, build_model, model_config, name_special_tokens, save_model
from launch.models.snapshot import Snapshot
from parallel.checkpoint import Checkpoint, CheckpointConfig, read_checkpoint
from parallel.regions import Region, even_range, whole
from parallel.runtime import start
from parallel.saving import Saver
from relora.adapter import load_adapter_
from relora.convert import to_low_rank
from relora.errors import ConfigError

GPT2 = "model.config={model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 2, n_positions: 64, resid_pdrop: 0.0,\
 embd_pdrop: 0.0, attn_pdrop: 0.0}"
RUNS = {
    "relora": [],
    "bf16": ["training.dtype=bf16"],
    "gpt2": ["model=custom", GPT2, "lora.rank_pattern={c_fc:3}", "lora.scaling=rslora", "lora.alpha=6"],
    "plain": ["relora=none"],
    "full": ["lora=none"],
}
DROPPED = {"gpt2": ("model.",), "plain": ("relora.",), "full": ("relora.", "lora.")}
TOKENS = torch.arange(60).reshape(2, 30) + 40


@pytest.fixture(scope="module")
def finished():
    """Run folders by name."""
    return {}


@pytest.fixture
def run_of(tiny, tmp_path_factory, finished, capsys):
    """The folder of a finished run, trained when it is first asked for."""

    def run_of(name):
        if name not in finished:
            folder = tmp_path_factory.mktemp(name) / "run"
            words = [word for word in tiny if not word.startswith(DROPPED.get(name, ("none",)))]
            more = [*RUNS[name], "checkpoint.keep=9", f"run.dir={folder}"]
            assert train.main([*words, *more]) == exits.DONE
            finished[name] = folder
            capsys.readouterr()
        return finished[name]

    return run_of


@pytest.fixture
def write(tmp_path):
    """Export into a new folder and return it."""

    def write(run_dir, *words):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert export.main([f"run.dir={run_dir}", f"export.out={out}", *words]) == exits.DONE
        return out

    return write


@pytest.fixture
def refusal(capsys):
    """The message of an export that is refused."""

    def refusal(*words):
        assert export.main(list(words)) == exits.REFUSED
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    return refusal


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits.float()


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def live(run_dir, step):
    """The model that was being trained at a checkpoint, factors and all."""
    checkpoint = read_checkpoint(run_dir / f"checkpoints/step_{step:08d}")
    tensors = {name: checkpoint.whole("model", name) for name in checkpoint.names("model")}
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(run_dir / "start"))
    if any(name.endswith(".down") for name in tensors):
        to_low_rank(model, to_typed(OmegaConf.create(checkpoint.state["config"])).lora, seed=9)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    return model


def same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_the_last_checkpoint_as_a_model_is_bitwise_the_final_one(run_of, write, name):
    out, final = write(run_of(name)), run_of(name) / "final"
    ours, theirs = load_file(out / "model.safetensors"), load_file(final / "model.safetensors")
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)
    for file in sorted(path.name for path in final.iterdir() if path.suffix == ".json"):
        assert json.loads((out / file).read_text()) == json.loads((final / file).read_text()), file
    same(logits(loaded(out)), logits(loaded(final)))


def _share_out(runtime, source, root):
    """Write a checkpoint again as processes hold it that share a model by rows, and its optimizer's state flat, too."""
    checkpoint = read_checkpoint(Path(source))
    with start(tensor=2) as meshed:
        held = {"model": {}, "optimizer": {}}
        for kind, parts in held.items():
            for name in checkpoint.names(kind):
                tensor = checkpoint.whole(kind, name)
                region = whole(tensor)
                if tensor.ndim == 2 and not name.endswith("down"):
                    region = Region(region.shape, 0, (even_range(len(tensor), 2, meshed.tensor.index),))
                if kind == "optimizer" and tensor.ndim:
                    first, last = even_range(region.numel, 2, meshed.data.index)
                    region = region.flat(first, last - first)
                parts[name] = region, region.take(tensor)
        Saver(Path(root), meshed, CheckpointConfig()).save(20, held, checkpoint.state, best=None)


@pytest.mark.parametrize(("name", "form"), [("bf16", "model"), ("gpt2", "svd"), ("relora", "adapter")])
def test_how_processes_shared_a_checkpoint_makes_no_difference(run_of, write, on_processes, tmp_path, name, form):
    copy = tmp_path / "copy"
    shutil.copytree(run_of(name), copy, ignore=shutil.ignore_patterns("checkpoints"))
    on_processes(_share_out, 4, str(run_of(name) / "checkpoints/step_00000020"), str(copy / "checkpoints"))
    assert len(list(copy.glob("checkpoints/*/model-*.safetensors"))) == 4
    one, other = (write(folder, f"export.to={form}") for folder in (run_of(name), copy))
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert files
    assert all((one / file).read_bytes() == (other / file).read_bytes() for file in files)


@pytest.mark.parametrize("name", ["relora", "bf16", "gpt2"])
@pytest.mark.parametrize("pretrained", [False, True])
def test_train_can_write_from_a_checkpoint_what_it_wrote_from_memory(run_of, tmp_path, name, pretrained):
    final = run_of(name) / "final"
    checkpoint = read_checkpoint(run_of(name) / "checkpoints/step_00000020")
    config = to_typed(OmegaConf.create(checkpoint.state["config"]))
    if pretrained:
        source = tmp_path / "source"
        AutoModelForCausalLM.from_pretrained(final).save_pretrained(source)
        generation = GenerationConfig.from_pretrained(source)
        generation.top_k = 7
        generation.do_sample = True
        generation.save_pretrained(source)
        config.model = ModelConfig(name_or_path=str(source))
    tokenizer = AutoTokenizer.from_pretrained(final)
    hf_config = model_config(config.model, vocab_size=len(tokenizer), sequence_length=config.data.sequence_length)
    name_special_tokens(hf_config, tokenizer)
    model = build_model(config.model, hf_config, seed=0)
    save_model(model, tmp_path / "memory", tokenizer, dtype=config.torch_dtype)
    (tmp_path / "written").mkdir()  # of an earlier attempt
    snapshot = Snapshot(checkpoint, hf_config, config.lora)
    write_folder(snapshot, describe(config.model, hf_config, tokenizer), tmp_path / "written", config.torch_dtype)
    one, other = (tmp_path / folder for folder in ("memory", "written"))
    assert {path.name: path.stat().st_mode for path in one.iterdir()} == {
        path.name: path.stat().st_mode for path in other.iterdir()
    }
    for path in one.glob("*.json"):
        assert json.loads(path.read_text()) == json.loads((other / path.name).read_text()), path.name
    assert (other / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()


@pytest.mark.parametrize("step", [4, 8, 16])  # in the warm start, in the first cycle, in the third
def test_an_earlier_checkpoint_as_a_model_computes_what_was_trained(run_of, write, step):
    out = write(run_of("relora"), f"export.checkpoint=step_{step:08d}")
    same(logits(loaded(out)), logits(live(run_of("relora"), step)))


def test_without_start_and_final_a_model_is_described_by_the_configuration(run_of, write, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run_of("relora") / "checkpoints", bare / "checkpoints")
    out, final = write(bare), run_of("relora") / "final"
    assert (out / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in final.iterdir()}
    assert json.loads((out / "config.json").read_text()) == json.loads((final / "config.json").read_text())
    assert (
        AutoTokenizer.from_pretrained(out)("a ship").input_ids
        == AutoTokenizer.from_pretrained(final)("a ship").input_ids
    )


def test_large_models_are_written_in_several_files(run_of, write, monkeypatch):
    monkeypatch.setattr(snapshot, "SHARD_BYTES", 40_000)
    real, read, alive = Checkpoint.whole, [], []

    def counted(*args):
        read.append(weakref.ref(tensor := real(*args)))
        alive.append(sum(value.nbytes for reference in read if (value := reference()) is not None))
        return tensor

    monkeypatch.setattr(Checkpoint, "whole", counted)
    out = write(run_of("relora"))
    assert max(alive) < 40_000 + 2 * 32_896  # a file's, and twice the largest tensor
    assert sum(path.stat().st_size for path in out.glob("*.safetensors")) > 130_000
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 50_000 for path in files)
    assert torch.equal(logits(loaded(out)), logits(loaded(run_of("relora") / "final")))


def test_the_type_of_the_weights_can_be_chosen(run_of, write):
    exact = load_file(write(run_of("bf16"), "export.dtype=fp32") / "model.safetensors")
    final = load_file(run_of("bf16") / "final/model.safetensors")
    assert all(torch.equal(exact[key].bfloat16(), final[key]) for key in final)
    assert not all(torch.equal(exact[key], final[key].float()) for key in final)  # the extra bits
    assert loaded(write(run_of("relora"), "export.dtype=bf16")).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "step"), [("relora", 8), ("relora", 20), ("gpt2", 8), ("plain", 20)])
def test_the_adapter_on_its_base_computes_what_was_trained(run_of, write, name, step):
    out = write(run_of(name), "export.to=adapter", f"export.checkpoint=step_{step:08d}")
    expected = logits(live(run_of(name), step))
    same(logits(peft.PeftModel.from_pretrained(loaded(out / "base"), out)), expected)
    same(logits(peft.AutoPeftModelForCausalLM.from_pretrained(out)), expected)  # it finds its base
    assert (logits(loaded(out / "base")) - expected).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(out / "base").eos_token == "<eos>"


@pytest.mark.parametrize("name", ["relora", "gpt2"])
def test_an_exported_adapter_can_be_trained_on_from_its_base(run_of, write, name):
    out = write(run_of(name), "export.to=adapter")
    model = loaded(out / "base")
    to_low_rank(model, to_typed(OmegaConf.load(run_of(name) / "config.yaml")).lora, seed=1)
    assert not load_adapter_(model, out).missing
    same(logits(model), logits(live(run_of(name), 20)))


def test_an_adapter_that_does_not_fit_stops_a_run_before_it_has_a_folder(run_of, write, tiny, tmp_path, capsys):
    out = write(run_of("plain"), "export.to=adapter")
    words = [word for word in tiny if not word.startswith(("model.", "relora."))]
    words += ["model=pretrained", f"model.name_or_path={out / 'base'}", f"lora.init_from={out}", "relora=none"]
    assert train.main([*words, "lora.rank=5"]) == exits.REFUSED
    assert "is 4 there and 5 here: set lora.rank=4" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["relora", "gpt2", "bf16"])
def test_an_svd_of_enough_rank_on_start_computes_what_final_does(run_of, write, name):
    out = write(run_of(name), "export.to=svd", "export.rank=16")
    model = peft.PeftModel.from_pretrained(loaded(run_of(name) / "start"), out)
    exact = loaded(write(run_of(name), "export.dtype=fp32"))
    torch.testing.assert_close(logits(model), logits(exact), rtol=0, atol=1e-4)


def test_an_svd_is_the_best_of_its_rank_and_tells_what_it_leaves_out(run_of, write, capsys):
    folder = run_of("relora")
    start, final = (load_file(folder / part / "model.safetensors") for part in ("start", "final"))
    key = "model.layers.1.mlp.up_proj"
    values = torch.linalg.svdvals(final[f"{key}.weight"] - start[f"{key}.weight"])
    for rank in (2, 6):
        out = write(folder, "export.to=svd", f"export.rank={rank}")
        row = next(line.split() for line in capsys.readouterr().out.splitlines() if key in line)
        assert float(row[1]) == pytest.approx(float(values.norm()), rel=1e-4)
        assert float(row[3]) == pytest.approx(float(values[rank:].norm() / values.norm()), rel=1e-4)
        tensors = load_file(out / "adapter_model.safetensors")
        up, down = (tensors[f"base_model.model.{key}.lora_{factor}.weight"] for factor in "BA")
        torch.testing.assert_close(torch.linalg.svdvals(up @ down)[:rank], values[:rank])


def test_an_svd_can_start_a_run_from_start(run_of, write):
    out = write(run_of("relora"), "export.to=svd", "export.rank=16")
    model = loaded(run_of("relora") / "start")
    config = to_typed(OmegaConf.load(run_of("relora") / "config.yaml")).lora
    config.rank, config.alpha = 16, 16.0
    to_low_rank(model, config, seed=1)
    assert "lm_head.weight" in load_adapter_(model, out).dense
    torch.testing.assert_close(logits(model), logits(loaded(run_of("relora") / "final")), rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["adapter", "svd"])
def test_forms_that_a_checkpoint_does_not_have_are_refused(run_of, refusal, tmp_path, form):
    words = [f"export.to={form}", f"export.out={tmp_path / 'none'}"]
    assert "trained at full rank (lora=none)" in refusal(f"run.dir={run_of('full')}", *words)
    warm = refusal(f"run.dir={run_of('relora')}", "export.checkpoint=step_00000004", *words)
    assert "full-rank warm start" in warm
    assert "after step 5" in warm
    assert not (tmp_path / "none").exists()


def test_an_svd_needs_start_and_a_rank_that_fits(run_of, refusal, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run_of("relora"), bare)
    too_high = refusal(f"run.dir={bare}", "export.to=svd", "export.rank=33")
    assert "export.rank must be at most min(in, out) = 32 of model.layers.0.self_attn.q_proj, got 33" in too_high
    (bare / "start/model.safetensors").write_bytes(b"\0" * 100)
    assert "start is damaged" in refusal(f"run.dir={bare}", "export.to=svd")
    shutil.rmtree(bare / "start")
    assert "run.save_start=false" in refusal(f"run.dir={bare}", "export.to=svd")
    assert not list(tmp_path.glob("bare/export/*"))


def test_a_checkpoint_is_named_by_latest_best_its_name_or_its_path(run_of):
    folder = run_of("relora")
    best = read_checkpoint(folder / "checkpoints/step_00000020").state["run"]["best_checkpoint"]
    assert export.find_checkpoint(folder, "latest").folder.name == "step_00000020"
    assert export.find_checkpoint(folder, "best").folder.name == best
    assert export.find_checkpoint(folder, "step_00000008").folder.name == "step_00000008"
    assert export.find_checkpoint(folder, str(folder / "checkpoints/step_00000012")).folder.name == "step_00000012"


def test_damaged_missing_and_foreign_checkpoints_are_named(run_of, refusal, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_of("relora"), copy)
    victim = copy / "checkpoints/step_00000020/model-0.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    assert f"damaged checkpoint: {victim}" in refusal(f"run.dir={copy}")
    assert "step_00000007 does not exist" in refusal(f"run.dir={copy}", "export.checkpoint=step_00000007")
    assert "holds no checkpoint" in refusal(f"run.dir={tmp_path / 'nowhere'}")
    other = run_of("gpt2") / "checkpoints/step_00000020"
    assert "of another model than run.dir" in refusal(f"run.dir={copy}", f"export.checkpoint={other}")


def test_only_a_new_or_empty_folder_is_written(run_of, refusal, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    words = [f"run.dir={run_of('plain')}", f"export.out={out}"]
    assert export.main(words) == exits.DONE
    before = sorted(out.iterdir())
    assert "is there already" in refusal(*words)
    assert sorted(out.iterdir()) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O (os error 28)")])
def test_a_full_disk_is_one_message_and_leaves_nothing(run_of, refusal, tmp_path, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(snapshot, "save_file", full)
    message = refusal(f"run.dir={run_of('plain')}", f"export.out={tmp_path / 'out'}")
    assert "cannot be written" in message
    assert not list(tmp_path.glob("*out*"))


def test_a_full_disk_leaves_the_folder_that_was_there(run_of, tmp_path, monkeypatch):
    checkpoint = read_checkpoint(run_of("full") / "checkpoints/step_00000020")
    description = description_of(run_of("full"), to_typed(OmegaConf.create(checkpoint.state["config"])))
    out = tmp_path / "final"
    write_folder(Snapshot(checkpoint, description.hf_config, None), description, out, torch.float32)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot, "save_file", full)
    with pytest.raises(ConfigError, match=r"final cannot be written: .*No space left on device"):
        write_folder(Snapshot(checkpoint, description.hf_config, None), description, out, torch.float32)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(("words", "message"), [
    (["export.too=svd"], "unknown key export.too: did you mean export.to?"),
    (["export.to=svg"], "export.to must be one of model, adapter, svd, got 'svg'"),
    (["export.to=adapter", "export.rank=4"], "export.rank=4 has no effect with export.to=adapter"),
    (["export.to=svd", "export.rank=0"], "export.rank must be at least 1, got 0"),
    (["export.to=svd", "export.rank=many"], "export.rank must be a whole number, got 'many'"),
    (["export.dtype=fp16"], "export.dtype must be one of fp32, bf16"),
    (["export.out="], "export.out needs a value"),
    (["export.checkpoint"], "export.checkpoint needs a value"),
])  # fmt: skip
def test_wrong_words_are_refused_before_anything_is_read(refusal, words, message):
    assert message in refusal("run.dir=nowhere", *words)
    assert "export needs run.dir=RUN" in refusal("export.to=model")


def test_help_names_every_key(capsys):
    assert export.main(["--help"]) == exits.DONE
    help_text = capsys.readouterr().out
    assert all(f"export.{key} " in help_text for key in ("checkpoint", "to", "rank", "out", "dtype"))
