"""Labelled sets: samples with a class each, in two parts, and what tasks take of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import Enum
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import torch

from continual.batches import Batch
from continual.order import Indices, key_of, permute, sample_at
from relora.errors import ConfigError

TEST_FRACTION = 0.2


class Modality(str, Enum):
    """What the one model of a stream takes and gives."""

    causal_lm = "causal_lm"
    """Text to text."""
    images = "images"
    """Images to classes."""
    texts = "texts"
    """Texts to classes."""


class Content(Protocol):
    """Samples without their classes."""

    def inputs(self, index: Indices) -> dict[str, torch.Tensor]:
        """A model's arguments for these samples."""

    def digest(self, index: Indices) -> str:
        """A digest of these samples that changes when they do; no paths."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Samples with a class each."""

    content: Content
    labels: Indices
    """Numbers of the set's classes. Shapes: (N,)"""

    def of(self, classes: Sequence[int]) -> Indices:
        """The samples of some classes."""
        return np.flatnonzero(np.isin(self.labels, np.asarray(classes, dtype=np.int64)))


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledSet:
    """A set of samples with a class each."""

    name: str
    modality: Modality
    classes: list[str]
    """Names, in the set's order."""
    train: Part
    test: Part | None
    """None: the set has no test split of its own."""
    test_fraction: float = TEST_FRACTION
    """Share of each class to hold out then."""

    def named(self, classes: Sequence[Any], key: str) -> list[str]:
        """Some of the set's classes by name.

        Raises: ConfigError when one is unknown or named twice.
        """
        names = [str(name) for name in classes]
        for name in names:
            if name not in self.classes:
                near = get_close_matches(name, self.classes, n=1)
                known = (
                    f"did you mean {near[0]}?"
                    if near
                    else f"it has {', '.join(self.classes[:20])}" + (", ..." if len(self.classes) > 20 else "")
                )
                raise ConfigError(f"{key}: {self.name} has no class {name}: {known}")
            if names.count(name) > 1:
                raise ConfigError(f"{key}: class {name} is named twice: name it once")
        return names

    def numbers(self, names: Sequence[str]) -> list[int]:
        """The set's numbers of some classes."""
        place = {name: number for number, name in enumerate(self.classes)}
        return [place[name] for name in names]


def divided(labelled: LabelledSet) -> tuple[Part, Indices, Part, Indices]:
    """The part and its samples to train on, and the part and its samples to measure on.

    Where the set has no test split, a share of each class is held out, which no seed changes.
    """
    train = labelled.train
    everything = np.arange(len(train.labels))
    if labelled.test is not None:
        return train, everything, labelled.test, np.arange(len(labelled.test.labels))
    held_out = np.zeros(len(everything), dtype=bool)
    for number, name in enumerate(labelled.classes):
        members = train.of([number])
        count = round(len(members) * labelled.test_fraction)
        if len(members) > 1:
            held_out[members[permute(np.arange(max(1, count)), len(members), key_of("test", name))]] = True
    return train, everything[~held_out], train, everything[held_out]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledSamples:
    """What a task trains on: samples of some classes in an endless order, keyed by the seed and the task's name."""

    part: Part
    index: Indices
    """Which samples of the part."""
    outputs: Indices
    """The classifier's output for each class of the set, or -1. Shapes: (classes of the set,)"""
    seed: int
    stream: int

    def __len__(self) -> int:
        return len(self.index)

    def identities(self, position: int, count: int) -> Indices:
        """Which samples are served at `position` and after it."""
        places = np.arange(position, position + count)
        return sample_at(places, len(self.index), seed=self.seed, stream=self.stream)

    def at(self, identities: Indices) -> Batch:
        """These samples."""
        rows = self.index[identities]
        return Batch(
            inputs=self.part.content.inputs(rows),
            labels=torch.from_numpy(self.outputs[self.part.labels[rows]]),
        )

    def batch(self, position: int, count: int) -> Batch:
        """The samples at `position` and after it."""
        return self.at(self.identities(position, count))


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledHeldOut:
    """What a task is measured on, once each, in an order that no seed changes."""

    part: Part
    index: Indices
    """Which samples of the part, in the order served."""
    outputs: Indices
    """The classifier's output for each class of the set, or -1. Shapes: (classes of the set,)"""
    competing: torch.Tensor | None = None
    """For each output, those that compete with it; None: all. Shapes: (outputs, outputs), bool"""

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, position: int, count: int) -> Batch:
        """The samples at `position` and after it; fewer at the end."""
        rows = self.index[position : position + count]
        labels = torch.from_numpy(self.outputs[self.part.labels[rows]])
        return Batch(
            inputs=self.part.content.inputs(rows),
            labels=labels,
            classes=None if self.competing is None else self.competing[labels],
        )


def in_fixed_order(index: Indices) -> Indices:
    """The same samples, in an order of which any first ones are a fair share."""
    return index[permute(np.arange(len(index)), len(index), key_of("held out"))]


def digest_of(part: Part, index: Indices, classes: Sequence[str]) -> str:
    """Of samples and the names of their classes."""
    labels = [classes[number] for number in part.labels[index]]
    return blake2b(repr((labels, part.content.digest(index))).encode(), digest_size=16).hexdigest()


def renamed(labelled: LabelledSet, prefix: str | None) -> LabelledSet:
    """The set with a prefix before the names of its classes."""
    return labelled if prefix is None else replace(labelled, classes=[prefix + name for name in labelled.classes])
