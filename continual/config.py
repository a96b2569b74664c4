"""The section `continual`: a stream of tasks, and what is done so that none of them is forgotten."""

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from continual.classes import Scenario, check_split, split_tasks
from continual.methods.ewc import EwcConfig
from continual.methods.gs_lora import GsLoraConfig
from continual.methods.i_lora import ILoraConfig
from continual.methods.inflora import InfLoraConfig
from continual.methods.o_lora import OLoraConfig
from continual.methods.registry import METHODS
from continual.methods.replay import ReplayConfig
from continual.stream import TaskConfig, parse_tasks
from relora.errors import ConfigError


class Competing(str, Enum):
    """Whose logits compete while a classifier trains."""

    seen = "seen"
    """Those of all classes that tasks have brought so far."""
    task = "task"
    """Those of the task's own classes: the local cross-entropy of InfLoRA."""


@dataclass(kw_only=True, slots=True)
class ContinualConfig:
    """A stream, and the method that trains on it."""

    method: str = "sequential"
    """What is done against forgetting."""
    tasks: Any = None
    """The tasks in order, each with name, kind, data, and steps or epochs: docs/streams.md."""
    split: Any = None
    """In place of tasks: one labelled set divided by classes: docs/streams.md."""
    scenario: Scenario = Scenario.class_incremental
    """class (each task brings classes, unknown at test which task), task (known at test) or domain (all the same)."""
    logits: Competing = Competing.seen
    """Classes that compete in training: seen, or the task's own."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """replay and i_lora: what is remembered, and how much of it each update sees."""
    ewc: EwcConfig = field(default_factory=EwcConfig)
    """ewc: how firmly weights are held that earlier tasks depend on."""
    inflora: InfLoraConfig = field(default_factory=InfLoraConfig)
    """inflora: how much of each task is protected."""
    o_lora: OLoraConfig = field(default_factory=OLoraConfig)
    """o_lora: how strongly tasks are kept apart."""
    i_lora: ILoraConfig = field(default_factory=ILoraConfig)
    """i_lora: how the long-term adapter moves and acts, and which adapter is measured."""
    gs_lora: GsLoraConfig = field(default_factory=GsLoraConfig)
    """gs_lora: how hard and how far requests to forget push, and how sparse the change is."""
    save_models: bool = True
    """Write the model after each task to tasks/NN_NAME, as a Hugging Face folder."""
    restart_from: str | None = None
    """Name of a task: go back to where it began, and train from there anew."""
    stop_after: str | None = None
    """Name of a task: end this process after it, with a checkpoint and exit code 75."""

    def __post_init__(self) -> None:
        if (self.tasks is None) == (self.split is None):
            raise ConfigError("continual needs exactly one of continual.tasks and continual.split")
        if self.tasks is not None:
            parse_tasks(self.tasks)
        else:
            check_split(self.split)
        if self.method not in METHODS:
            raise ConfigError(f"continual.method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for section in fields(self):
            if section.name in METHODS and section.name not in METHODS[self.method].sections:
                self._check_unused(section.name)

    def task_list(self) -> list[TaskConfig]:
        """The tasks in order; of a split, after a look at the set's classes.

        Raises: ConfigError
        """
        return parse_tasks(self.tasks) if self.tasks is not None else split_tasks(check_split(self.split))

    @property
    def full_rank_steps(self) -> int:
        """Updates of the first tasks, as far as they train at full rank."""
        if self.tasks is None:
            split = check_split(self.split)
            return split.steps or 0 if split.full_rank_first else 0
        return sum(task.steps or 0 for task in parse_tasks(self.tasks) if task.full_rank)

    def _check_unused(self, section: str) -> None:
        """A method's settings have no effect on another method."""
        value = getattr(self, section)
        for entry in fields(value):
            if getattr(value, entry.name) != getattr(type(value)(), entry.name):
                raise ConfigError(
                    f"continual.{section}.{entry.name} has no effect with continual.method={self.method}: leave it out"
                )
