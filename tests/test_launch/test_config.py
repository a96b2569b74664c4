"""The one door: everything in conf/ composes and passes, and every mistake gets one clear message."""

import ast
import inspect
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pytest

from launch import cli, exits, train
from launch.config import CONF, TrainConfig, keys_of, load, resolved, to_typed
from launch.usage import field_docs, train_help
from relora.errors import ConfigError

NEEDED = {
    ("model", "pretrained"): ["model.name_or_path=some/folder"],
    ("model", "custom"): ["model.config=some/config.json"],
    ("data", "text"): ["data.path=[some.txt]"],
    ("continual", "custom"): ["continual.split={data: digits, increment: 2, steps: 1}"],
    ("continual", "digits_split"): ["relora.warm_start_steps=0"],  # the first task is the warm start
    ("continual", "digits_forget"): ["relora=none"],
    ("continual", "digits_split_warm"): ["relora.warm_start_steps=0"],
    ("continual", "python_three_warm"): ["relora.warm_start_steps=0"],
}
FOLDERS = [path for path in CONF.iterdir() if path.is_dir() and path.name != "launcher"]  # test_submit.py has that
OPTIONS = [(path.parent.name, path.stem) for folder in sorted(FOLDERS) for path in sorted(folder.glob("*.yaml"))]
SECTIONS = {
    section: next(entry for entry in (hint, *get_args(hint)) if is_dataclass(entry))
    for section, hint in get_type_hints(TrainConfig).items()
    if any(is_dataclass(entry) for entry in (hint, *get_args(hint)))
}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_passes(group, option):
    config = load([f"{group}={option}", *NEEDED.get((group, option), [])])
    assert isinstance(config, TrainConfig)


def test_the_presets_have_the_papers_shapes_and_batches():
    sizes = {}
    for name in ("60m", "130m", "250m", "350m", "1b"):
        config = load([f"experiment=relora_llama_{name}"])
        shape, training = config.model.config, config.training
        sizes[name] = (
            shape["hidden_size"],
            shape["num_hidden_layers"],
            shape["intermediate_size"],
            training.global_batch_size * config.data.sequence_length,
            config.lora.rank,
        )
    assert sizes == {
        "60m": (512, 8, 1376, 122_880, 128),
        "130m": (768, 12, 2048, 153_600, 128),
        "250m": (768, 24, 2560, 589_824, 128),
        "350m": (1024, 24, 2736, 589_824, 128),
        "1b": (2048, 24, 5461, 786_432, 128),
    }


def test_a_stored_configuration_is_read_back_as_it_was():
    from omegaconf import OmegaConf

    config = load(
        ["lora.target_modules=[q_proj,v_proj]", "training.dtype=bf16", "relora.reset=random", "relora.prune_ratio=0.5"]
    )
    assert to_typed(OmegaConf.create(resolved(config))) == config


@pytest.mark.parametrize("section", SECTIONS)
def test_every_attribute_of_a_section_is_a_field_with_a_type_and_a_meaning(section):
    owner = SECTIONS[section]
    tree = ast.parse(inspect.getsource(owner)).body[0]
    assigned = [t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    assert assigned == [], "a name without annotation is no field, and could not be set"
    assert hasattr(owner, "__slots__"), "without slots a mistyped key would be accepted"
    assert set(field_docs(owner)) == {entry.name for entry in fields(owner)}


def test_the_help_names_every_key():
    text = train_help()
    assert [key for key in keys_of(resolved(load([]))) if key.count(".") == 1 and f"  {key}" not in text] == []
    streams = resolved(load(["continual=python_three"]))["continual"]
    assert [key for key in keys_of(streams) if f"  continual.{key}" not in text] == []
    assert "  continual.inflora.threshold=0.95\n      Share of the first task's energy" in text


@pytest.mark.parametrize(("overrides", "message"), [
    (["relora.evry=5"], "unknown key relora.evry: did you mean relora.every"),
    (["+relora.evry=5"], "relora.evry"),
    (["lte=heads", "lte.sync_evry=5"], "unknown key lte.sync_evry: did you mean lte.sync_every"),
    (["lte.heads=4"], "lte.heads has no effect as it is: choose one of lte=elastic, lte=heads, lte=heads_relora"),
    (["optimiser.lr=1"], "unknown key optimiser.lr: did you mean optimizer.lr"),
    (["schedule=cosinus"], "schedule=cosinus is not an option: choose one of constant, cosine, linear, wsd"),
    (["launcher.nodes=2"], "launcher.nodes=2 belongs to `accrete submit`"),
    (["launcher=slurm"], "launcher=slurm belongs to `accrete submit`"),
    (["lora.rank=many"], "lora.rank"),
    (["lora.rank=0"], "lora.rank must be at least 1, got 0"),
    (["training.steps=1.5"], "training.steps"),
    (["training.dtype=fp16"], "training.dtype"),
    (["training.tokens=100"], "exactly one of training.steps and training.tokens"),
    (["training.microbatch_size=3"], "training.microbatch_size must divide training.global_batch_size=8, got 3"),
    (["training.stop_after=900"], "training.stop_after=900 has no effect"),
    (["relora.prune_ratio=0.5"], "relora.prune_ratio"),
    (["relora.reset=magnitude"], "relora.prune_ratio"),
    (["relora.merge_precision=nearest"], "relora.merge_precision=nearest has no effect with training.dtype=fp32"),
    (["lora.base=nf3"], "lora.base"),
    (["lora.base=nf4", "parallel.zero_stage=3"], "lora.base=nf4 cannot be with parallel.zero_stage=3"),
    (["lora.base=int8", "parallel.tensor=2"], "lora.base=int8 cannot be with parallel.tensor=2"),
    (["lora.base=int8", "lte=heads", "relora=none"], "lora.base=int8 cannot be with lte"),
    (["lora.base=nf4", "lora.forward=merged"], "lora.base=nf4 cannot be with lora.forward=merged"),
    (["lora.base=nf4", "relora.merge_precision=stochastic"], "relora.merge_precision=stochastic cannot be with"),
    (["lora.base=nf4", "experiment=digits_inflora"], "lora.base=nf4 cannot be with continual.method=inflora"),
    (["relora.warm_start_steps=500"], "relora.warm_start_steps=500 leaves no low-rank step"),
    (["relora=none", "relora.every=3"], "relora.every"),
    (["lora=none", "lora.rank=3"], "lora.rank"),
    (["relora=none", "schedule.anneal_steps=5"], "schedule.anneal_steps"),
    (["parallel.zero_stage=4"], "parallel.zero_stage must be 0, 1, 2 or 3, got 4"),
    (["parallel.offload=optimizer"], "parallel.offload=optimizer needs parallel.zero_stage=1"),
    (["parallel.tensor=2"], "parallel.tensor=2 must divide the number of processes, got 1"),
    (["+parallel.deepspeed.optimizer.type=Adam"], "parallel.deepspeed.optimizer"),
    (["lte=head"], "lte=head is not an option: choose one of elastic, heads, heads_relora, none"),
    (["model.name_or_path=x"], "exactly one of model.name_or_path and model.config, got both"),
    (["schedule.warmup_steps=500"], "schedule.warmup_steps=500 must be below"),
    (["evaluation.sequences=0"], "evaluation.sequences must be at least 1"),
    (["checkpoint.keep=0"], "checkpoint.keep must be at least 1"),
    (["run.name=a/b"], "run.name"),
    (["run.name='a \\${x}'"], "run.name must not hold '${'"),
    (["training.steps"], "training.steps"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_a_mistake_is_one_line_that_names_key_value_and_rule(overrides, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(overrides) == exits.REFUSED
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_full_rank_training_turns_restarts_off():
    assert load(["lora=none"]).relora is None
    assert load(["relora=none"]).lora is not None


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["report", "--help"], ["prepare", "--help"],
                                   ["evaluate", "--help"], ["export", "--help"], ["submit", "--help"],
                                   ["status", "--help"]])  # fmt: skip
def test_every_verb_explains_itself(words, capsys):
    assert cli.main(words) == exits.DONE
    assert "usage:" in capsys.readouterr().out


def test_an_unknown_verb_is_refused_with_the_known_ones(capsys):
    assert cli.main(["trian"]) == exits.REFUSED
    assert "train" in capsys.readouterr().err


def test_config_errors_are_value_errors():
    with pytest.raises(ValueError, match=r"lora\.rank"):
        load(["lora.rank=-1"])
    assert issubclass(ConfigError, ValueError)
