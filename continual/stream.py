"""A stream: the tasks that a run trains on, one after the other, and which of them a step belongs to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from typing import Any

from continual.answers import AnswerMetric
from continual.method import Stage, TaskData, TaskKind
from relora.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """One entry of continual.tasks."""

    name: str
    """Of the task, in tables, records and file names."""
    kind: TaskKind
    """causal_lm, instruction, classification or forget."""
    data: Any
    """causal_lm: as data.path; instruction: JSON files; classification and forget: a labelled set, or documents."""
    steps: int | None = None
    """Updates of the task."""
    epochs: float | None = None
    """Passes over its samples, in place of steps; rounded up to whole updates."""
    classes: list[Any] | None = None
    """Names of the set's classes that belong to the task, or that it forgets; null: all."""
    retain: Any = None
    """forget only: what is retained; null: all of the set's other classes that the stream knows by then."""
    validation: Any = None
    """What the task is measured on; null: the set's own test split, or samples held out from `data`."""
    full_rank: bool = False
    """Train all weights: a warm start. Only the first tasks of a stream may."""
    lr: float | None = None
    """Peak learning rate of the task; null: optimizer.lr."""
    metric: AnswerMetric = AnswerMetric.loss
    """instruction only: loss, or what is made of the answers that the model writes: exact, choice or rouge_l."""

    @property
    def key(self) -> str:
        """How messages name it."""
        return f"continual.tasks.{self.name}"


def parse_tasks(values: Any) -> list[TaskConfig]:
    """The tasks that a configuration names.

    Raises: ConfigError
    """
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ConfigError(f"continual.tasks must be a list of at least one task, got {values!r}")
    tasks = [_task(value, f"continual.tasks[{number}]") for number, value in enumerate(values)]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"continual.tasks: two tasks are called {name}: give each a name of its own")
    low_rank = [task.name for task in tasks if not task.full_rank]
    for before, task in enumerate(tasks):
        if task.full_rank and task.steps is None:
            raise ConfigError(f"{task.key} needs steps, not epochs: it trains at full rank")
        if task.full_rank and any(not one.full_rank for one in tasks[:before]):
            raise ConfigError(
                f"{task.key}.full_rank=true comes after {low_rank[0]}, which trains at low rank: only the "
                "first tasks of a stream may train at full rank"
            )
    return tasks


def _task(value: Any, key: str) -> TaskConfig:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} must be a mapping with name, kind and data, got {value!r}")
    known = {entry.name: entry for entry in fields(TaskConfig)}
    for name in value:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it may hold {', '.join(known)}"
            raise ConfigError(f"{key}.{name} is not a setting of a task: {hint}")
    for name, entry in known.items():
        if entry.default is MISSING and value.get(name) is None:
            raise ConfigError(f"{key}.{name} is missing: every task has name, kind and data")
    name = value["name"]
    if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
        raise ConfigError(f"{key}.name must be a plain name without '/', got {name!r}")
    kinds = [kind.value for kind in TaskKind]
    if value["kind"] not in kinds:
        raise ConfigError(f"{key}.kind must be one of {', '.join(kinds)}, got {value['kind']!r}")
    metrics = [metric.value for metric in AnswerMetric]
    if value.get("metric", "loss") not in metrics:
        raise ConfigError(f"{key}.metric must be one of {', '.join(metrics)}, got {value['metric']!r}")
    chosen = {"kind": TaskKind(value["kind"]), "metric": AnswerMetric(value.get("metric", "loss"))}
    task = TaskConfig(**{**value, **chosen})
    _check_numbers(task)
    return task


def _check_numbers(task: TaskConfig) -> None:
    if (task.steps is None) == (task.epochs is None):
        raise ConfigError(f"{task.key} needs exactly one of steps and epochs")
    for name, kinds in (("steps", int), ("epochs", int | float), ("lr", int | float)):
        number = getattr(task, name)
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, kinds) or not 0 < number < math.inf:
            raise ConfigError(f"{task.key}.{name} must be a number above 0, got {number!r}")
    if task.classes is not None and (not isinstance(task.classes, list) or not task.classes):
        raise ConfigError(f"{task.key}.classes must be a list of at least one class (or null), got {task.classes!r}")
    if task.retain is not None and task.kind is not TaskKind.forget:
        raise ConfigError(f"{task.key}.retain has no effect on kind={task.kind.value}: leave it out")
    if task.metric is not AnswerMetric.loss and task.kind is not TaskKind.instruction:
        raise ConfigError(
            f"{task.key}.metric={task.metric.value} has no effect on kind={task.kind.value}, which has no answers: "
            "leave it out"
        )
    if not isinstance(task.full_rank, bool):
        raise ConfigError(f"{task.key}.full_rank must be true or false, got {task.full_rank!r}")


def stages_of(tasks: Sequence[TaskConfig], data: Sequence[TaskData], global_batch: int) -> list[Stage]:
    """When each task is trained."""
    stages: list[Stage] = []
    seen: dict[int, None] = {}
    forgotten: set[int] = set()
    first = 0
    for index, (task, one) in enumerate(zip(tasks, data, strict=True)):
        seen |= dict.fromkeys(one.classes)
        forgotten = forgotten | {*one.classes} if task.kind is TaskKind.forget else forgotten - {*one.classes}
        steps = task.steps or math.ceil((task.epochs or 0.0) * len(one.train) / global_batch)
        stages.append(
            Stage(
                index=index,
                name=task.name,
                kind=task.kind,
                first=first,
                steps=steps,
                data=one,
                seen=tuple(sorted(seen)),
                forgotten=tuple(sorted(forgotten)),
                full_rank=task.full_rank,
                lr=task.lr,
                metric=task.metric,
            )
        )
        first += steps
    return stages


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage of the update that follows the first `step` updates; after the end, the last one."""
    return next((stage for stage in stages if step < stage.end), stages[-1])
