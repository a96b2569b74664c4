"""What a run learns, opened: its stages, and what they share. Plain pre-training is a course of one stage."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from continual.data import open_data
from continual.images import ImageForm
from continual.joint import joined_tasks
from continual.method import Method, Stage, TaskData, TaskKind
from continual.methods.registry import METHODS
from continual.prepare import Progress
from continual.stream import stage_at, stages_of
from continual.tasks import Modality, open_tasks
from launch.config import TrainConfig
from launch.models.model import classifier_config, model_config, name_special_tokens
from launch.training.pace import check_pace
from relora.errors import ConfigError

Row = dict[str, str | int | float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """The stages of a run."""

    stages: list[Stage]
    tasks: list[Stage]
    """What the model is measured on: the tasks as they were given; `joint` has one stage for many."""
    modality: Modality
    tokenizer: Any
    """Of transformers; None for images."""
    vocab_size: int | None
    class_names: list[str] = field(default_factory=list)
    """What the outputs of a classifier stand for."""
    image: tuple[int, int] | None = None
    """Size and channels of images."""
    form: ImageForm | None = None
    """How images become tensors, where all tasks have one way."""
    rows: list[Row]
    """A table of the data."""
    tokens_per_sample: int
    """Of a sequence; an image counts as one."""
    facts: list[dict[str, Any]]
    """What of each stage must not change once it has begun."""
    is_stream: bool = True

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.stages[-1].end

    @property
    def fingerprints(self) -> str:
        """A digest of all data, to compare processes by."""
        return " ".join(stage.data.fingerprint[:12] for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """The stage of the update that follows the first `step` updates."""
        return stage_at(self.stages, step)

    def remaining(self, step: int) -> Iterator[Stage]:
        """The stages that have not ended after `step` updates."""
        return (stage for stage in self.stages if step < stage.end)


def open_course(config: TrainConfig, progress: Progress | None = None) -> Course:
    """Open the data of a run, prepared first where the cache does not have it.

    Raises: ConfigError
    """
    course = _pre_training(config, progress) if config.continual is None else _stream(config, progress)
    for stage in course.stages:
        check_pace(config, stage)
    first = course.stages[0]
    if course.is_stream and config.relora is not None and config.relora.warm_start_steps >= first.steps:
        raise ConfigError(
            f"relora.warm_start_steps={config.relora.warm_start_steps} must be below the {first.steps} steps of "
            f"the first task, {first.name}: lower it, or set full_rank: true for that task"
        )
    return course


def _pre_training(config: TrainConfig, progress: Progress | None) -> Course:
    data = open_data(config.data, seed=config.run.seed, progress=progress)
    if data.validation is None:
        raise ConfigError(
            "data.validation_fraction=0 without data.validation_path leaves nothing to validate on: set one of them"
        )
    steps = config.total_steps
    task = TaskData(train=data.train, held_out={"validation": data.validation}, fingerprint=data.fingerprint)
    stage = Stage(index=0, name="pre-training", kind=TaskKind.causal_lm, first=0, steps=steps, data=task)
    return Course(
        stages=[stage],
        tasks=[stage],
        modality=Modality.causal_lm,
        tokenizer=data.tokenizer,
        vocab_size=data.vocab_size,
        rows=data.describe(steps * config.training.global_batch_size),
        tokens_per_sample=config.data.sequence_length,
        facts=[{"fingerprint": data.fingerprint}],
        is_stream=False,
    )


def _stream(config: TrainConfig, progress: Progress | None) -> Course:
    continual = config.continual
    assert continual is not None
    tasks = continual.task_list()
    opened = open_tasks(tasks, config.data, scenario=continual.scenario, seed=config.run.seed, progress=progress)
    stages = stages_of(tasks, opened.tasks, config.training.global_batch_size)
    facts: list[dict[str, Any]] = [
        {
            "name": stage.name,
            "kind": stage.kind.value,
            "steps": stage.steps,
            "lr": stage.lr,
            "full_rank": stage.full_rank,
            "classes": [opened.class_names[number] for number in stage.data.classes],
            "fingerprint": stage.data.fingerprint,
        }
        for stage in stages
    ]
    tasks_as_given = stages
    if continual.method == "joint":
        stages = joined_tasks(stages, seed=config.run.seed)
        facts = [*facts[: len(stages) - 1], {"name": "joint", "tasks": facts}]
    return Course(
        stages=stages,
        tasks=tasks_as_given,
        modality=opened.modality,
        tokenizer=opened.tokenizer,
        vocab_size=opened.vocab_size,
        class_names=opened.class_names,
        image=opened.image,
        form=opened.form,
        rows=opened.rows,
        tokens_per_sample=1 if opened.modality is Modality.images else config.data.sequence_length,
        facts=facts,
    )


def make_method(config: TrainConfig) -> Method:
    """The method of a run; without tasks there is nothing to forget."""
    continual = config.continual
    return Method() if continual is None else METHODS[continual.method].make(continual)


def model_of_course(config: TrainConfig, course: Course) -> PretrainedConfig:
    """The transformers configuration of the model, checked against what it learns.

    Raises: ConfigError
    """
    if course.modality is Modality.causal_lm:
        assert course.vocab_size is not None
        length = config.data.sequence_length
        hf_config = model_config(config.model, vocab_size=course.vocab_size, sequence_length=length)
        if config.model.name_or_path is None:
            name_special_tokens(hf_config, course.tokenizer)
        return hf_config
    pad = None if course.tokenizer is None else course.tokenizer.pad_token_id
    return classifier_config(
        config.model, course.class_names, image=course.image, vocab_size=course.vocab_size, pad_token_id=pad
    )
