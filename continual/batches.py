"""Batches: the sequences of training at a position of the run, and those of validation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from continual.mixture import Mixture
from continual.order import Indices, groups, key_of, permute, sample_at
from continual.pack import Counts
from continual.tokens import TokenStream


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Sequences in the convention of transformers: a model shifts the labels itself.

    Shapes: all (B, T), int64
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None

    @property
    def targets(self) -> int:
        """Tokens that the loss counts."""
        return int((self.labels[:, 1:] != -100).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        places = None if self.position_ids is None else self.position_ids.to(device)
        return Batch(input_ids=self.input_ids.to(device), labels=self.labels.to(device), position_ids=places)


def joined(batches: Sequence[Batch]) -> Batch:
    """The sequences of several batches as one."""
    if len(batches) == 1:
        return batches[0]
    places = [batch.position_ids for batch in batches if batch.position_ids is not None]
    return Batch(
        input_ids=torch.cat([batch.input_ids for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        position_ids=torch.cat(places) if places else None,
    )


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

    def batch(self, position: int, count: int) -> Batch:
        """The sequences at `position` and after it; the position counts all sequences of the run before them."""
        source, served = self.mixture.locate(np.arange(position, position + count))
        index = np.empty_like(served)
        for number, chosen in groups(source):
            size = len(self.sources[number])
            index[chosen] = sample_at(served[chosen], size, seed=self.seed, stream=number)
        return _batch(self.sources, source, index, self.document_mask)


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
    return Batch(
        input_ids=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        position_ids=None if places is None else torch.from_numpy(places),
    )
