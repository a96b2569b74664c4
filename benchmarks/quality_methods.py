"""What the quality study compares: the methods on one small model, their settings and the length of their runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.runs import Job
from continual.data import open_data
from launch.config import load
from launch.models.model import build_model, model_config
from relora.convert import to_low_rank


@dataclass(kw_only=True, slots=True, frozen=True)
class Study:
    """How long and how large the runs are."""

    steps: int
    warm_start_steps: int
    warm_start_rate: float
    """Learning rate of the warm start: about the best one of full-rank training."""
    cycles: tuple[int, ...]
    """Steps between two restarts; each makes a ReLoRA of its own."""
    rank: int
    seeds: tuple[int, ...]
    rates: int
    """Learning rates of a method's first sweep, each twice the one before."""
    extensions: int
    """How often a sweep whose best rate lies at an edge goes on beyond it."""
    overrides: tuple[str, ...]
    """Settings that all methods share."""


FULL = Study(
    steps=600,
    warm_start_steps=150,
    warm_start_rate=0.002,
    cycles=(90, 225),
    rank=8,
    seeds=(0, 1),
    rates=3,
    extensions=2,
    overrides=(
        "model.config.initializer_range=0.07",  # 1 / sqrt(hidden_size): with 0.02 no rate above 0.001 is stable
        "data.sequence_length=128",
        "training.global_batch_size=8",
        "schedule.warmup_steps=50",
        "schedule.restart_warmup_steps=10",
        "evaluation.every=50",
        "evaluation.sequences=128",
        "evaluation.batch_size=32",
    ),
)
QUICK = replace(
    FULL,
    steps=12,
    warm_start_steps=4,
    cycles=(4,),
    rank=2,
    seeds=(0,),
    rates=1,
    extensions=0,
    overrides=(
        "model.config.hidden_size=32",
        "model.config.num_attention_heads=4",
        "model.config.intermediate_size=88",
        "data.sequence_length=64",
        "training.global_batch_size=4",
        "schedule.warmup_steps=2",
        "schedule.restart_warmup_steps=2",
        "evaluation.every=6",
        "evaluation.sequences=8",
        "evaluation.batch_size=8",
    ),
)
# The same for every study: no update is left out, one thread, and nothing is written that nobody reads.
ALWAYS = (
    "training.skip_sigma=0",
    "training.threads=1",
    "evaluation.spectra=none",
    "checkpoint.every=0",
    "run.save_start=false",
    "run.log_every=10",
)


@dataclass(kw_only=True, slots=True, frozen=True)
class Method:
    """One way to spend the tokens."""

    key: str
    name: str
    overrides: tuple[str, ...]
    first_rate: float
    """Lowest learning rate of the sweep."""
    trainable: int
    """Parameters that train, after the warm start where there is one."""

    def job(self, runs: Path, rate: float, seed: int) -> Job:
        """The run at a learning rate and a seed."""
        folder = runs / self.key / f"lr_{rate:g}-seed_{seed}"
        return Job(folder=folder, overrides=(*self.overrides, f"optimizer.lr={rate:g}", f"run.seed={seed}"))


def methods(study: Study) -> list[Method]:
    """The methods of a study, in the order of its tables."""
    base = ("model=llama_tiny", f"training.steps={study.steps}", *study.overrides, *ALWAYS)
    dense = (*base, "lora=none")
    lora = (*base, f"lora.rank={study.rank}", f"lora.alpha={2 * study.rank}")
    cold = ("relora.warm_start_steps=0",)
    warm = (f"relora.warm_start_steps={study.warm_start_steps}", f"relora.warm_start_lr={study.warm_start_rate}")
    never = f"relora.every={study.steps}"
    low_rank = trainable_parameters((*lora, "relora=none"))
    control = (*dense, *control_shape(dense, low_rank))

    def method(key: str, name: str, overrides: tuple[str, ...], first_rate: float) -> Method:
        trainable = trainable_parameters(overrides)
        return Method(key=key, name=name, overrides=overrides, first_rate=first_rate, trainable=trainable)

    found = [
        method("full", "full rank", dense, 0.001),
        method("control", "control", control, 0.002),
        method("lora", "LoRA", (*lora, "relora=none"), 0.002),
        method("lora_warm", "LoRA + warm start", (*lora, *warm, never), 0.002),
    ]
    for key, name, start in (("relora", "ReLoRA", cold), ("relora_warm", "ReLoRA + warm start", warm)):
        for steps in study.cycles:
            settings = (*lora, *start, f"relora.every={steps}")
            found.append(method(f"{key}_{steps}", f"{name}, every {steps}", settings, 0.002))
    return found


def trainable_parameters(overrides: Sequence[str]) -> int:
    """How many parameters a run trains, after its warm start if it has one."""
    config = load(overrides)
    vocab_size = open_data(config.data, seed=config.run.seed).vocab_size
    hf_config = model_config(config.model, vocab_size=vocab_size, sequence_length=config.data.sequence_length)
    model = build_model(config.model, hf_config, seed=0)
    if config.lora is not None:
        return to_low_rank(model, config.lora, seed=0).trainable
    return sum(parameter.numel() for parameter in model.parameters())


def control_shape(dense: Sequence[str], target: int) -> tuple[str, ...]:
    """Overrides that shrink a full-rank Llama to `target` parameters: heads of the same size, the same depth.

    The number of heads comes nearest at the same proportions; the MLP's width makes up the difference.
    """
    shape = load(dense).model.config
    head_size = shape["hidden_size"] // shape["num_attention_heads"]

    def overrides(heads: int, intermediate: int) -> tuple[str, ...]:
        return (
            f"model.config.hidden_size={heads * head_size}",
            f"model.config.num_attention_heads={heads}",
            f"model.config.intermediate_size={intermediate}",
        )

    candidates: dict[int, tuple[int, int]] = {}
    for heads in range(1, shape["num_attention_heads"] + 1):
        intermediate = round(shape["intermediate_size"] * heads / shape["num_attention_heads"])
        candidates[heads] = intermediate, trainable_parameters((*dense, *overrides(heads, intermediate)))
    heads = min(candidates, key=lambda heads: abs(candidates[heads][1] - target))
    intermediate, parameters = candidates[heads]
    per_unit = 3 * heads * head_size * shape["num_hidden_layers"]
    return overrides(heads, max(1, intermediate + round((target - parameters) / per_unit)))
