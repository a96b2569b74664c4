"""Classes over the tasks of a stream: which may occur in which task, and one set divided into tasks by its classes."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from enum import Enum
from itertools import pairwise
from typing import Any

import numpy as np

from continual.labelled import LabelledSet
from continual.labelled_sets import open_set
from continual.method import TaskKind
from continual.order import key_of, permute
from continual.set_spec import parse_set
from continual.stream import TaskConfig
from relora.errors import ConfigError

KEY = "continual.split"


class Scenario(str, Enum):
    """What tasks of classes have in common, and what is known when a model is measured."""

    class_incremental = "class_incremental"
    """Each task brings classes of its own; which task a sample is from is not known."""
    domain = "domain"
    """All tasks have the same classes, on other data."""
    task = "task"
    """Each task brings classes of its own, and only these compete when it is measured."""


@dataclass(kw_only=True, slots=True)
class SplitConfig:
    """One labelled set divided into tasks by its classes."""

    data: Any
    """A labelled set."""
    kind: str = "classification"
    """The only kind that has classes to divide by."""
    first: int | None = None
    """Classes of the first task; null: as many as increment."""
    increment: int
    """Classes of each further task; the last takes what is left."""
    order: Any = None
    """null: the set's order of classes, a list of all of them, or a number that a random order is drawn from."""
    steps: int | None = None
    """Updates of each task."""
    epochs: float | None = None
    """Passes over a task's samples, in place of steps."""
    name: str = "classes"
    """What the tasks' names begin with."""
    full_rank_first: bool = False
    """Train all weights on the first task: a warm start."""


def check_split(value: Any) -> SplitConfig:
    """The split that a configuration names.

    Raises: ConfigError
    """
    if isinstance(value, SplitConfig):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{KEY} must be a mapping with data and increment, got {value!r}")
    known = {entry.name: entry for entry in fields(SplitConfig)}
    for name in value:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it may hold {', '.join(known)}"
            raise ConfigError(f"{KEY}.{name} is not a setting of a split: {hint}")
    for name, entry in known.items():
        if entry.default is MISSING and value.get(name) is None:
            raise ConfigError(f"{KEY}.{name} is missing: a split has data and increment")
    split = SplitConfig(**{str(name): entry for name, entry in value.items()})
    _check(split)
    return split


def _check(split: SplitConfig) -> None:
    if split.kind != TaskKind.classification.value:
        raise ConfigError(f"{KEY}.kind must be classification, got {split.kind!r}: only a labelled set has classes")
    for name in ("first", "increment"):
        count = getattr(split, name)
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ConfigError(f"{KEY}.{name} must be a number of classes of at least 1, got {count!r}")
    if (split.steps is None) == (split.epochs is None):
        raise ConfigError(f"{KEY} needs exactly one of steps and epochs")
    if split.full_rank_first and split.steps is None:
        raise ConfigError(f"{KEY}.full_rank_first=true needs steps, not epochs")
    if not isinstance(split.name, str) or not split.name or "/" in split.name or split.name.startswith("."):
        raise ConfigError(f"{KEY}.name must be a plain name without '/', got {split.name!r}")
    order = split.order
    if isinstance(order, bool) or not (order is None or isinstance(order, int | list)):
        raise ConfigError(f"{KEY}.order must be null, a list of all classes or a whole number, got {order!r}")
    parse_set(split.data, f"{KEY}.data")


def split_tasks(split: SplitConfig) -> list[TaskConfig]:
    """The tasks of a split, after a look at the set's classes.

    Raises: ConfigError
    """
    labelled = open_set(parse_set(split.data, f"{KEY}.data"), f"{KEY}.data")
    order = _order(split, labelled)
    first = split.first or split.increment
    if first >= len(order):
        raise ConfigError(
            f"{KEY}.{'first' if split.first else 'increment'}={first} leaves nothing for a second task: "
            f"{labelled.name} has {len(order)} classes"
        )
    cuts = [0, first, *range(first + split.increment, len(order), split.increment), len(order)]
    return [
        TaskConfig(
            name=f"{split.name}_{number + 1}",
            kind=TaskKind.classification,
            data=split.data,
            steps=split.steps,
            epochs=split.epochs,
            classes=list(order[start:stop]),
            full_rank=split.full_rank_first and number == 0,
        )
        for number, (start, stop) in enumerate(pairwise(cuts))
    ]


def _order(split: SplitConfig, labelled: LabelledSet) -> Sequence[str]:
    if split.order is None:
        return labelled.classes
    if isinstance(split.order, int):
        count = len(labelled.classes)
        places = permute(np.arange(count), count, key_of("class order", split.order))
        return [labelled.classes[place] for place in places]
    names = labelled.named(split.order, f"{KEY}.order")
    if missing := [name for name in labelled.classes if name not in names]:
        raise ConfigError(f"{KEY}.order must name every class of {labelled.name}; it lacks {', '.join(missing)}")
    return names
