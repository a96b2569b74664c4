"""The one door for configuration: Hydra composes `conf/`, typed dataclasses check it, nothing else sees YAML."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from continual.config import ContinualConfig
from continual.data import DataConfig
from continual.methods.registry import METHODS
from launch.models.model import ModelConfig
from launch.rules import check
from launch.training.recomputation import Checkpointing
from launch.watching.trackers.config import TrackerConfig
from parallel.checkpoint import CheckpointConfig
from parallel.output_loss import OutputLoss
from parallel.zero import ParallelConfig
from relora.convert import LoraConfig
from relora.errors import ConfigError
from relora.lte import LteConfig
from relora.optimizer import OptimizerConfig
from relora.precision import MergePrecision
from relora.quantised import BaseFormat
from relora.restart import ReloraConfig
from relora.schedule import Restarts, ScheduleConfig

_HERE = Path(__file__).parent
CONF = next(path for path in (_HERE / "conf", _HERE.parent / "conf") if path.is_dir())


class Dtype(str, Enum):
    """Precision of weights and activations in the forward pass; masters and moments are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """How long, how much at once, in which precision."""

    steps: int | None = None
    """Optimizer updates of the whole run, warm start included; 0 only builds, evaluates and writes final/."""
    tokens: int | None = None
    """Tokens of the whole run, in place of steps; rounded up to whole updates."""
    global_batch_size: int = 16
    """Sequences per update."""
    microbatch_size: int | None = None
    """Sequences per forward and backward of a process, or of each head in it; only a memory knob. null: its share."""
    dtype: Dtype = Dtype.fp32
    """fp32 or bf16."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    loss: OutputLoss = OutputLoss.plain
    """plain, chunked (never all logits at once), liger (the same by Liger's kernel on a GPU), or auto of these two."""
    activation_checkpointing: Checkpointing = Checkpointing.none
    """Activations that the backward pass computes anew: none, full, or selective (all but products and attention)."""
    compile: bool = False
    """Compile the model by torch.compile."""
    threads: int | None = None
    """CPU threads; null: torch's choice. Part of what makes a CPU run repeat bit for bit."""
    skip_sigma: float = 6.0
    """Skip an update whose loss or gradient norm is this many deviations above its recent mean; 0: never."""
    skip_window: int = 128
    """Updates that the mean and deviation are taken over."""
    max_skips: int = 10
    """End the run when this many of the updates in the window were skipped."""
    stop_after: int | None = None
    """End this process after that step with a checkpoint and exit code 75; the schedule is untouched."""
    peak_flops: float | None = None
    """FLOP/s that MFU is measured against; null: a table of GPUs, or a measured matrix product."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.tokens is not None:
            raise ConfigError("training needs exactly one of training.steps and training.tokens: set the other to null")
        for key, least in (("global_batch_size", 1), ("skip_window", 2), ("max_skips", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"training.{key} must be at least {least}, got {getattr(self, key)}")
        for key in ("steps", "tokens", "max_grad_norm", "skip_sigma"):
            if (getattr(self, key) or 0) < 0:
                raise ConfigError(f"training.{key} must not be negative, got {getattr(self, key)}")
        for key in ("microbatch_size", "threads", "stop_after", "peak_flops"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ConfigError(f"training.{key} must be above 0 (or null), got {value}")
        self.microbatch()

    def microbatch(self, data: int = 1) -> int:
        """Sequences per forward and backward when `data` processes share the global batch.

        Raises:
            ConfigError: it cannot be shared so.
        """
        share, rest = divmod(self.global_batch_size, data)
        if rest:
            near = " or ".join(str(data * one) for one in (share, share + 1) if one)
            raise ConfigError(
                f"training.global_batch_size must be a multiple of the {data} processes that share it (all processes / "
                f"parallel.tensor), got {self.global_batch_size}: try {near}"
            )
        size = self.microbatch_size or share
        if share % size:
            of = f"the {share} sequences that each of {data} processes has of " if data > 1 else ""
            raise ConfigError(
                f"training.microbatch_size must divide {of}training.global_batch_size={self.global_batch_size}, "
                f"got {self.microbatch_size}"
            )
        return size


class SpectraChoice(str, Enum):
    """Which layers' `W - W_start` is decomposed at each restart."""

    all = "all"
    sample = "sample"
    none = "none"


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Validation during and after training."""

    every: int = 1000
    """Steps between validations; 0: only at the start and the end."""
    sequences: int | None = 256
    """Validation sequences, the same each time; null: all."""
    batch_size: int | None = None
    """Sequences per forward; null: training.microbatch_size."""
    spectra: SpectraChoice = SpectraChoice.sample
    """all, sample (first, middle and last block) or none."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"evaluation.every must be 0 or more steps, got {self.every}")
        for key in ("sequences", "batch_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"evaluation.{key} must be at least 1 (or null), got {value}")


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    name: str = "run"
    """Part of the default folder's name, and the run's name in W&B."""
    dir: str | None = None
    """The run folder; null: runs/<name>-<time>. Naming it lets the same command continue a run."""
    seed: int = 0
    """Of initial weights, factors, data order and dropout."""
    deterministic: bool = False
    """Ask torch for deterministic GPU kernels; a CPU run is bitwise repeatable without."""
    log_every: int = 1
    """Steps between records in metrics.jsonl."""
    profile_steps: int = 0
    """Steps that torch's profiler watches, from a process's fourth on; profile/ has a trace and a table. 0: none."""
    save_start: bool = True
    """Write start/, the model that low-rank training began from; spectra and `export` of an SVD adapter read it."""
    save_final: bool = True
    """Write final/, the merged Hugging Face model."""

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ConfigError(f"run.log_every must be at least 1, got {self.log_every}")
        if self.profile_steps < 0:
            raise ConfigError(f"run.profile_steps must not be negative, got {self.profile_steps}")
        if not self.name or "/" in self.name:
            raise ConfigError(f"run.name must be a plain name without '/', got {self.name!r}: use run.dir for a path")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    lora: LoraConfig | None = None
    relora: ReloraConfig | None = None
    lte: LteConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    continual: ContinualConfig | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracker: TrackerConfig | None = None
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def total_steps(self) -> int:
        """Updates of a run without tasks; those of a stream are known when its data is."""
        training = self.training
        if training.steps is not None:
            return training.steps
        assert training.tokens is not None
        return -(-training.tokens // (training.global_batch_size * self.data.sequence_length))

    def validation_batch(self, data: int = 1) -> int:
        """Validation sequences per forward of a process."""
        return self.evaluation.batch_size or self.microbatch(data)

    @property
    def jobs(self) -> int:
        """Jobs that share the global batch: elastic heads are one each."""
        return self.lte.heads if self.lte is not None and self.lte.meeting is not None else 1

    @property
    def job_batch(self) -> int:
        """Sequences per update of this job."""
        return self.training.global_batch_size // self.jobs

    def microbatch(self, data: int = 1) -> int:
        """Sequences per forward and backward when `data` processes of this job share its part of the global batch.

        Raises:
            ConfigError: it cannot be shared so.
        """
        return self.training.microbatch(data * self.jobs)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Precision of weights in the forward pass."""
        return torch.bfloat16 if self.training.dtype is Dtype.bf16 else torch.float32

    @property
    def warm_start_steps(self) -> int:
        """Full-rank updates before low-rank training."""
        if self.continual is not None and self.lora is not None and self.continual.full_rank_steps:
            return self.continual.full_rank_steps
        return self.relora.warm_start_steps if self.relora is not None else 0

    def peak_lr(self, step: int) -> float:
        """Learning rate that the schedule multiplies for the update that follows the first `step` updates."""
        in_warm_start = self.relora is not None and step < self.relora.warm_start_steps
        if in_warm_start and self.relora is not None and self.relora.warm_start_lr is not None:
            return self.relora.warm_start_lr
        return self.optimizer.lr

    @property
    def heads(self) -> int:
        """Groups of processes of this job that train apart."""
        return self.lte.heads // self.jobs if self.lte is not None else 1

    @property
    def merge_precision(self) -> MergePrecision:
        """How base weights take up merges; without merges they need no extra bits."""
        merging = self.lte or self.relora
        if merging is not None:
            return merging.merge_precision
        return MergePrecision.split if self.folds else MergePrecision.nearest

    @property
    def base(self) -> BaseFormat:
        """How base weights are stored."""
        return BaseFormat.full if self.lora is None else self.lora.base

    @property
    def folds(self) -> bool:
        """Whether base weights take up each task's update at its end, that of the last one too."""
        return self.continual is not None and METHODS[self.continual.method].folds

    @property
    def restarts(self) -> Restarts | None:
        """When the learning rate restarts, as the schedule wants it."""
        return (self.relora.every, self.relora.warm_start_steps) if self.relora is not None else None


def load(overrides: Sequence[str]) -> TrainConfig:
    """Compose `conf/train.yaml` with overrides into a checked configuration.

    Raises:
        ConfigError: unknown option or key, wrong type, impossible value or combination.
    """
    return to_typed(composed(overrides))


def load_stored(run_dir: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration that a run stored, with overrides on top.

    Raises:
        ConfigError: no run there, or an override that is none of its keys.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"run.dir={run_dir} holds no run: {path.name} is missing; name the folder that train printed")
    try:
        tree = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path} or an override cannot be read: {error}") from error
    assert isinstance(tree, DictConfig)
    return to_typed(tree)


def composed(overrides: Sequence[str], root: str = "train") -> DictConfig:
    """What Hydra makes of conf/<root>.yaml and the overrides, before types are checked."""
    for word in overrides if root == "train" else ():
        if re.match(r"[+~]*launcher[.=]", word):
            raise ConfigError(f"{word} belongs to `accrete submit`, which starts runs: leave it out, or use that")
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return compose(config_name=root, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explained(error, overrides, root)) from error


def to_typed(tree: DictConfig) -> TrainConfig:
    """The typed form of a composed tree.

    Raises:
        ConfigError: unknown key, wrong type, impossible value or combination.
    """
    try:
        typed = OmegaConf.merge(OmegaConf.structured(TrainConfig), tree)
        config = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, ConfigError):  # a section's own words
            raise error.__cause__ from None
        raise ConfigError(_typed_message(error, tree)) from error
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"configuration: {error}") from error
    assert isinstance(config, TrainConfig)
    for key, value in leaves_of(resolved(config)):
        if "${" in str(value):
            raise ConfigError(
                f"{key} must not hold '${{', since config.yaml could not be read back: choose another value"
            )
    check(config)
    return config


def resolved(config: TrainConfig) -> dict[str, Any]:
    """A configuration as plain values: what config.yaml, checkpoints and trackers store."""
    return {one.name: _plain(getattr(config, one.name)) for one in fields(config)}


def _plain(value: Any) -> Any:
    """A value as OmegaConf.to_container would give it, which takes a hundred times as long: each save asks."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(one) for key, one in value.items()}
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    return value


def leaves_of(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of all leaves of a nested mapping."""
    if not isinstance(tree, dict) or not tree:
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from leaves_of(value, f"{prefix}.{key}" if prefix else str(key))


def keys_of(tree: Any) -> list[str]:
    """Dotted names of all leaves of a nested mapping."""
    return [name for name, _ in leaves_of(tree)]


def _explained(error: Exception, overrides: Sequence[str], root: str) -> str:
    """Hydra's error in one line, with the nearest existing key or option."""
    text = " ".join(str(error).split())
    match = re.search(r"Could not override '([^']+)'", text) or re.search(r"merging override (\S+?)=", text)
    if match:
        key = match.group(1)
        section = key.split(".")[0]
        if f"{section}=none" in overrides:
            return f"{key} has no effect: {section}=none turns it off. Drop one of the two"
        known = keys_of(OmegaConf.to_container(composed(_options_of(overrides), root)))
        near = difflib.get_close_matches(key, known, n=1)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else f"sections are {', '.join(sorted({k.split('.')[0] for k in known}))}"
        )
        if key in known:
            return f"{key}: {text}"
        if having := _options_with(section, key, root):
            return f"{key} has no effect as it is: choose one of {', '.join(f'{section}={name}' for name in having)}"
        return f"unknown key {key}: {hint}"
    match = re.search(r"Could not find '([^/']+)/([^']+)'", text)
    if match:
        group, option = match.groups()
        options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        return f"{group}={option} is not an option: choose one of {', '.join(options)}"
    return text


def _options_of(overrides: Sequence[str]) -> list[str]:
    """The words that choose an option of a group, such as lte=heads, which brings keys of its own."""
    pairs = [word.split("=", maxsplit=1) for word in overrides if "=" in word]
    return [f"{group}={option}" for group, option in pairs if (CONF / group / f"{option}.yaml").is_file()]


def _options_with(group: str, key: str, root: str) -> list[str]:
    """The options of a group that have a key."""
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    return [name for name in names if key in keys_of(OmegaConf.to_container(composed([f"{group}={name}"], root)))]


def _typed_message(error: OmegaConfBaseException, tree: DictConfig) -> str:
    """OmegaConf's error in one line, with the value that it is about, or the nearest key."""
    key = error.full_key or "configuration"
    text = str(error).splitlines()[0]
    if "not in" in text:
        near = difflib.get_close_matches(key, keys_of(OmegaConf.to_container(composed([]))), n=1)
        return f"unknown key {key}" + (f": did you mean {near[0]}?" if near else "")
    value = OmegaConf.select(tree, error.full_key) if error.full_key else None
    return f"{key}: {text}" + (f" (got {value!r})" if value is not None and repr(value) not in text else "")
