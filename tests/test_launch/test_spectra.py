import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from launch.watching.records import read_records, truncate_records
from launch.watching.spectra import KEPT_VALUES, Spectra, StartWeights, select_modules
from parallel.runtime import Runtime
from relora.convert import LoraConfig, low_rank_modules, prepare_base_, to_low_rank
from relora.errors import ConfigError
from relora.linear import LowRankLinear
from relora.precision import MergePrecision
from relora.spectrum import effective_rank, singular_values

RANK = 3


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=32,
            max_position_embeddings=16,
        )
    )


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=32, n_positions=16))


def merge_all(model: nn.Module, merge: int, size: float = 0.02) -> None:
    """Give every layer random factors, merge them, and leave `up` at zero, as a restart does."""
    generator = torch.Generator().manual_seed(merge)
    for layer in low_rank_modules(model).values():
        for factor in (layer.down, layer.up):
            factor.data.copy_(torch.randn(factor.shape, generator=generator) * size**0.5)
        layer.merge_(MergePrecision.split)
        layer.up.data.zero_()


def measure(spectra: Spectra, model: nn.Module, *, step: int, merges: int) -> None:
    """Measure a model in one process, as the loop does on many."""

    def weight_of(layer: LowRankLinear) -> torch.Tensor:
        weight = layer.base() + layer.delta()
        return weight.t() if layer.transposed else weight

    alone = Runtime(process_rank=0, world_size=1, device=torch.device("cpu"))
    spectra.measure(model, weight_of, alone, step=step, merges=merges)


@pytest.fixture(params=[llama, gpt2], ids=["llama", "gpt2"])
def started(request, tmp_path):
    """A low-rank model and its run folder with start/ in it."""
    model = request.param()
    model.save_pretrained(tmp_path / "start")
    to_low_rank(model, LoraConfig(rank=RANK), seed=0)
    return model, tmp_path


def test_each_merge_adds_the_adapter_rank(started):
    model, folder = started
    spectra = Spectra(folder / "start", folder, "all")
    for merge in (1, 2, 3):
        merge_all(model, merge)
        measure(spectra, model, step=10 * merge, merges=merge)
    records = read_records(folder / "spectra.jsonl")
    assert len(records) == 3 * len(low_rank_modules(model))
    for record in records:
        assert record["step"] == 10 * record["restart"]
        assert record["numerical_rank"] == min(RANK * record["restart"], *record["shape"])


def test_a_line_describes_the_difference_to_the_start(started):
    model, folder = started
    before = {name: layer.base().clone() for name, layer in low_rank_modules(model).items()}
    merge_all(model, 1)
    measure(Spectra(folder / "start", folder, "all"), model, step=7, merges=1)
    for record in read_records(folder / "spectra.jsonl"):
        layer = low_rank_modules(model)[record["module"]]
        start = before[record["module"]]
        values = singular_values(layer.base() - start)
        assert record["shape"] == [layer.out_features, layer.in_features]
        assert record["singular_values"] == pytest.approx(values.tolist(), rel=1e-4, abs=1e-7)
        assert record["effective_rank"] == pytest.approx(effective_rank(values), rel=1e-4)
        assert record["update_ratio"] == pytest.approx(float((layer.base() - start).norm() / start.norm()), rel=1e-4)


def test_measuring_leaves_the_model_alone(started):
    model, folder = started
    merge_all(model, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure(Spectra(folder / "start", folder, "all"), model, step=1, merges=1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_update_that_is_not_merged_counts_too(started):
    model, folder = started
    for layer in low_rank_modules(model).values():
        layer.up.data.normal_(std=0.1)
    measure(Spectra(folder / "start", folder, "all"), model, step=5, merges=0)
    assert {record["numerical_rank"] for record in read_records(folder / "spectra.jsonl")} == {RANK}


@pytest.mark.parametrize(("precision", "exact"), [(MergePrecision.split, True), (MergePrecision.nearest, False)])
def test_a_bfloat16_base_counts_its_extra_bits_and_not_its_rounding(tmp_path, precision, exact):
    model = llama()
    to_low_rank(model, LoraConfig(rank=RANK), seed=0, merge_precision=precision)
    prepare_base_(model, torch.bfloat16, precision)
    weights = {f"{name}.weight": layer.base() for name, layer in low_rank_modules(model).items()}
    (tmp_path / "start").mkdir()
    save_file({name: weight.contiguous() for name, weight in weights.items()}, tmp_path / "start/model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for layer in low_rank_modules(model).values():
        up, down = (torch.randn(f.shape, generator=generator) * 0.01 for f in (layer.up, layer.down))
        layer.merge_(precision, down, up)
    measure(Spectra(tmp_path / "start", tmp_path, "all"), model, step=1, merges=1)
    ranks = {record["numerical_rank"] for record in read_records(tmp_path / "spectra.jsonl")}
    assert ranks == {RANK} if exact else max(ranks) <= RANK


def test_a_start_in_several_files_reads_like_one(tmp_path):
    weights = {f"layer.{number}.weight": torch.randn(4, 3) for number in range(3)}
    (tmp_path / "one").mkdir()
    save_file(weights, tmp_path / "one" / "model.safetensors")
    (tmp_path / "many").mkdir()
    index = {}
    for number, (name, weight) in enumerate(weights.items()):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: weight}, tmp_path / "many" / file)
        index[name] = file
    (tmp_path / "many" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for name, weight in weights.items():
        assert torch.equal(StartWeights(tmp_path / "one").read(name), weight)
        assert torch.equal(StartWeights(tmp_path / "many").read(name), weight)


def test_a_start_without_the_weight_is_an_error_with_a_way_out(started):
    model, folder = started
    (folder / "start" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"does not hold .*\.weight.*evaluation\.spectra=none"):
        measure(Spectra(folder / "start", folder, "all"), model, step=1, merges=1)
    assert not (folder / "spectra.jsonl").exists()


def test_lines_after_the_resumed_step_can_be_dropped(started):
    model, folder = started
    spectra = Spectra(folder / "start", folder, "sample")
    for merge in (1, 2):
        measure(spectra, model, step=10 * merge, merges=merge)
    whole = len(read_records(folder / "spectra.jsonl"))
    assert truncate_records(folder / "spectra.jsonl", 19) == whole // 2
    assert {record["step"] for record in read_records(folder / "spectra.jsonl")} == {10}


def test_a_layer_with_many_values_keeps_the_largest_only(tmp_path):
    model = nn.Sequential(nn.Linear(KEPT_VALUES + 8, KEPT_VALUES + 4, bias=False))
    (tmp_path / "start").mkdir()
    save_file(model.state_dict(), tmp_path / "start" / "model.safetensors")
    to_low_rank(model, LoraConfig(rank=2), seed=0)
    merge_all(model, 1)
    measure(Spectra(tmp_path / "start", tmp_path, "all"), model, step=1, merges=1)
    (record,) = read_records(tmp_path / "spectra.jsonl")
    assert len(record["singular_values"]) == KEPT_VALUES
    assert record["singular_values"] == sorted(record["singular_values"], reverse=True)
    assert math.isclose(record["effective_rank"], 2, rel_tol=0.05)


NAMES = [f"model.layers.{layer}.{kind}" for layer in range(10) for kind in ("attn.q", "mlp.up")] + ["score"]


@pytest.mark.parametrize(("choice", "layers"), [("all", list(range(10))), ("sample", [0, 5, 9]), ("none", [])])
def test_the_choice_selects_whole_layers(choice, layers):
    chosen = select_modules(NAMES, choice)
    assert [name for name in chosen if name != "score"] == [
        name for name in NAMES[:-1] if int(name.split(".")[2]) in layers
    ]
    assert ("score" in chosen) == (choice == "all")


def test_a_sample_takes_from_each_stack_of_layers():
    names = [f"{stack}.block.{layer}.layer.0.q" for stack in ("encoder", "decoder") for layer in range(4)]
    assert select_modules(names, "sample") == [name for name in names if ".block.1." not in name]


def test_a_sample_of_a_model_without_layers_is_everything():
    assert select_modules(["up", "down"], "sample") == ["up", "down"]
