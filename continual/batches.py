"""Batches: the sequences of training at a position of the run, and those of validation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from continual.mixture import Mixture
from continual.order import Indices, groups, key_of, permute, sample_at
from continual.pack import Counts
from continual.tokens import TokenStream

_SOURCE = 1 << 40
"""More than any source has sequences: an identity is the source times this plus the index in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Samples in the form that a model of transformers takes, B of them."""

    inputs: dict[str, torch.Tensor]
    """The model's arguments by name, such as input_ids, position_ids or pixel_values. Shapes: (B, ...)"""
    labels: torch.Tensor
    """Shapes: (B, T), next tokens, which the loss shifts, and -100 where there is no target; or (B,), classes."""
    classes: torch.Tensor | None = None
    """Which classes compete for each sample; None: all. Shapes: (B, C), bool"""
    even: bool = True
    """Whether every sample of the run has as many targets as every other."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def targets(self) -> int:
        """Labels that the loss counts."""
        return int(self.row_targets.sum())

    @property
    def row_targets(self) -> torch.Tensor:
        """The same of each sample. Shapes: (B,)."""
        counted = self.labels[:, None] if self.labels.ndim == 1 else self.labels[:, 1:]
        return (counted != -100).sum(1)

    def rows(self, index: torch.Tensor) -> "Batch":
        """Some of the samples, in the order of the index."""
        return Batch(
            inputs={name: value[index] for name, value in self.inputs.items()},
            labels=self.labels[index],
            classes=None if self.classes is None else self.classes[index],
            even=self.even,
        )

    def among(self, classes: Sequence[int], count: int) -> "Batch":
        """The batch of a classifier with `count` outputs, of which only some compete."""
        mask = torch.zeros(count, dtype=torch.bool, device=self.labels.device)
        mask[list(classes)] = True
        return Batch(inputs=self.inputs, labels=self.labels, classes=mask.expand(len(self), count), even=self.even)

    def without(self, classes: Sequence[int]) -> "Batch":
        """The batch of a classifier in which samples of some classes are no targets."""
        gone = torch.isin(self.labels, torch.tensor(list(classes), dtype=self.labels.dtype, device=self.labels.device))
        return replace(self, labels=self.labels.masked_fill(gone, -100))

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; a GPU fetches it while this process goes on."""
        return Batch(
            inputs={name: _sent(value, device) for name, value in self.inputs.items()},
            labels=_sent(self.labels, device),
            classes=None if self.classes is None else _sent(self.classes, device),
            even=self.even,
        )


def _sent(value: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    if value.is_cpu and torch.device(device).type == "cuda":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def joined(batches: Sequence[Batch]) -> Batch:
    """The samples of several batches as one; all have the same inputs."""
    if len(batches) == 1:
        return batches[0]
    classes = [batch.classes for batch in batches if batch.classes is not None]
    return Batch(
        inputs={name: torch.cat([batch.inputs[name] for batch in batches]) for name in batches[0].inputs},
        labels=torch.cat([batch.labels for batch in batches]),
        classes=torch.cat(classes) if classes else None,
        even=all(batch.even for batch in batches),
    )


class Samples(Protocol):
    """What a task trains on: distinct samples, served without end in an order that a position tells."""

    def __len__(self) -> int:
        """Distinct samples: those of an epoch."""

    def identities(self, position: int, count: int) -> Indices:
        """Which samples are served at `position` and after it."""

    def at(self, identities: Indices) -> Batch:
        """These samples."""

    def batch(self, position: int, count: int) -> Batch:
        """The samples at `position` and after it."""


class HeldOut(Protocol):
    """What a model is measured on: samples once each, of which any first ones are a fair share."""

    def __len__(self) -> int:
        """How many there are."""

    def batch(self, position: int, count: int) -> Batch:
        """The samples at `position` and after it; fewer at the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceStream:
    """One side of a prepared source: its windows and its counts."""

    label: str
    stream: TokenStream
    counts: Counts

    def __len__(self) -> int:
        return len(self.stream)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that a token stands for, on average."""
        return self.counts.text_bytes / self.counts.tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Train:
    """The endless sequences of a run; each source goes through its epochs at its own pace."""

    sources: list[SourceStream]
    mixture: Mixture
    seed: int
    document_mask: bool

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def identities(self, position: int, count: int) -> Indices:
        """Which sequences are at `position` and after it; the position counts all sequences before them."""
        source, served = self.mixture.locate(np.arange(position, position + count))
        index = np.empty_like(served)
        for number, chosen in groups(source):
            size = len(self.sources[number])
            index[chosen] = sample_at(served[chosen], size, seed=self.seed, stream=number)
        return source * _SOURCE + index

    def at(self, identities: Indices) -> Batch:
        """These sequences."""
        return _batch(self.sources, identities // _SOURCE, identities % _SOURCE, self.document_mask)

    def batch(self, position: int, count: int) -> Batch:
        """The sequences at `position` and after it."""
        return self.at(self.identities(position, count))


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """The sequences of validation, once each, in an order that no seed changes: any first ones are a fair sample."""

    sources: list[SourceStream]
    source: Indices
    index: Indices
    document_mask: bool

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, position: int, count: int) -> Batch:
        """The sequences at `position` and after it; fewer at the end."""
        chosen = slice(position, position + count)
        return _batch(self.sources, self.source[chosen], self.index[chosen], self.document_mask)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that a token stands for, on average; a loss / ln 2 / this is in bits per byte."""
        share = np.bincount(self.source, minlength=len(self.sources)) / len(self)
        return float(sum(part * one.bytes_per_token for part, one in zip(share, self.sources, strict=True)))

    @property
    def by_source(self) -> dict[str, "Validation"]:
        """The same for each source alone."""
        return {one.label: validation_of([one], [1.0], document_mask=self.document_mask) for one in self.sources}


def validation_of(streams: list[SourceStream], weights: list[float], *, document_mask: bool) -> Validation:
    """Mix by weights until the first source is used up, each source in a fixed order of its own."""
    sizes = [len(stream) for stream in streams]
    turns = [(np.arange(size) + 0.5) / weight for size, weight in zip(sizes, weights, strict=True)]
    order = np.argsort(np.concatenate(turns), kind="stable")
    used_up = min((size + 0.5) / weight for size, weight in zip(sizes, weights, strict=True))
    order = order[np.concatenate(turns)[order] < used_up]
    source = np.repeat(np.arange(len(sizes)), sizes)[order]
    index = np.concatenate([permute(np.arange(size), size, key_of("validation")) for size in sizes])[order]
    return Validation(sources=streams, source=source, index=index, document_mask=document_mask)


def _batch(sources: list[SourceStream], source: Indices, index: Indices, document_mask: bool) -> Batch:
    length = sources[0].stream.length
    tokens = np.empty((len(source), length), dtype=np.int64)
    places = np.empty_like(tokens) if document_mask else None
    for number, chosen in groups(source):
        tokens[chosen] = sources[number].stream.windows(index[chosen])
        if places is not None:
            places[chosen] = sources[number].stream.places(index[chosen])
    # A document's first token is not to be predicted from the one before.
    labels = tokens.copy() if places is None else np.where(places == 0, -100, tokens)
    inputs = {"input_ids": torch.from_numpy(tokens)}
    if places is not None:
        inputs["position_ids"] = torch.from_numpy(places)
    return Batch(inputs=inputs, labels=torch.from_numpy(labels), even=not document_mask)
