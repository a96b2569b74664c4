"""The data of a run: prepared sources, mixed, in an order that one integer remembers.

`open_data` prepares what is not prepared yet. The batch at a position is a pure function of the seed and the
prepared tokens, so a run continues exactly on any number of processes, batch split or machine.
"""

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from continual.corpora import Corpus
from continual.documents import UnreadableError, documents_of
from continual.mixture import BLOCK, Mixture, quotas_of
from continual.order import Indices, groups, key_of, permute, sample_at
from continual.pack import Counts
from continual.parts import Recipe
from continual.prepare import Prepared, Progress, prepare
from continual.sources import Source, find_corpus, parse_sources
from continual.tokenizer import (
    BYTES,
    bpe_vocabulary,
    byte_tokenizer,
    check_tokenizer,
    encoder_of,
    load_tokenizer,
    trained_bpe,
)
from continual.tokens import TokenStream, open_stream
from relora.errors import ConfigError

ORDER = 1
"""Version of the order; a change of the rules below changes the order of every run."""
DEFAULT_VALIDATION_FRACTION = 0.02


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What text a run learns from, and how it becomes sequences."""

    path: Any = "python_library"
    """A source or a list of sources; a source is a name or a mapping: path weight name split revision text_field."""
    tokenizer: str = "bytes"
    """`bytes`, `bpe:VOCABULARY` (trained on this text), or the name or folder of a transformers tokenizer."""
    sequence_length: int = 256
    """Tokens in a sequence."""
    validation_path: Any = None
    """Sources of validation; null: documents held out from `path`."""
    validation_fraction: float | None = None
    """Share of the documents held out for validation; null: 0.02, or none where validation_path is set."""
    text_field: str = "text"
    """Field of JSON Lines, Parquet and Hugging Face data sets that holds the text."""
    document_mask: bool = False
    """Attend within documents only; false: across the documents packed in a sequence, as the papers do."""
    max_tokens: int | None = None
    """Tokens taken of each source, at most; null: all."""
    cache: str = "~/.cache/accrete"
    """Folder of prepared tokens."""
    workers: int = 0
    """Processes that tokenize; 0: one for each core where there is enough text."""

    def __post_init__(self) -> None:
        parse_sources(self.path, "data.path")
        if self.validation_path is not None:
            parse_sources(self.validation_path, "data.validation_path")
            if self.validation_fraction:
                raise ConfigError(
                    f"data.validation_fraction={self.validation_fraction} has no effect beside "
                    "data.validation_path; set one of them to null"
                )
        check_tokenizer(self.tokenizer)
        _at_least(2, self.sequence_length, "data.sequence_length")
        _at_least(0, self.workers, "data.workers")
        if self.max_tokens is not None:
            _at_least(1, self.max_tokens, "data.max_tokens")
        if self.validation_fraction is not None and not 0 <= self.validation_fraction < 1:
            raise ConfigError(
                f"data.validation_fraction must be at least 0 and below 1, got {self.validation_fraction}"
            )
        if not self.text_field or not self.cache:
            raise ConfigError("data.text_field and data.cache must not be empty")

    @property
    def held_out(self) -> float:
        """Share of the documents held out."""
        if self.validation_path is not None:
            return 0.0
        return DEFAULT_VALIDATION_FRACTION if self.validation_fraction is None else self.validation_fraction


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
        return {one.label: _validation([one], [1.0], self.document_mask) for one in self.sources}


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """All that a run reads."""

    train: Train
    validation: Validation | None
    tokenizer: Any
    """Of transformers; `save_pretrained` puts it beside a model."""
    vocab_size: int
    """One more than the largest token."""
    fingerprint: str
    """Digest of what decides the sequences and their order: the tokens, the settings and the seed; no paths."""
    weights: list[float]
    """Share that each source was to have, before it was rounded to whole sequences in a block."""

    def describe(self, sequences: int | None = None) -> list[dict[str, str | int | float]]:
        """A row for each source: its size, its share as asked and as given, its epochs in so many sequences."""
        rows = []
        for source, quota, weight in zip(self.train.sources, self.train.mixture.quotas, self.weights, strict=True):
            row: dict[str, str | int | float] = {
                "source": source.label,
                "documents": source.counts.documents,
                "tokens": source.counts.tokens,
                "sequences": len(source),
                "weight": weight,
                "share": quota / BLOCK,
            }
            if sequences is not None:
                row["epochs"] = sequences * quota / BLOCK / len(source)
            rows.append(row)
        return rows


def open_data(config: DataConfig, *, seed: int, progress: Progress | None = None) -> Data:
    """The data of a run, prepared first where the cache does not have it.

    Raises: ConfigError.
    """
    cache = Path(config.cache).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"data.cache: {cache} cannot be made ({error}); set it to a folder that can") from error
    sources = parse_sources(config.path, "data.path")
    corpora = [find_corpus(source, "data.path") for source in sources]
    tokenizer = _tokenizer(config, sources, corpora, cache)
    prepared = _prepare_all(config, "data.path", sources, corpora, tokenizer, progress)
    labels = _unique([one.label for one in prepared])
    streams = [_side(one, "train", one.train, label, config) for one, label in zip(prepared, labels, strict=True)]
    asked = [source.weight for source in sources]
    weights = [len(stream) if weight is None else weight for stream, weight in zip(streams, asked, strict=True)]
    quotas = quotas_of(weights, labels)
    rules = (ORDER, seed, config.sequence_length, config.document_mask, quotas)
    digests = [stream.counts.digest for stream in streams]
    return Data(
        train=Train(
            sources=streams,
            mixture=Mixture(quotas=quotas, seed=seed),
            seed=seed,
            document_mask=config.document_mask,
        ),
        validation=_open_validation(config, sources, prepared, labels, tokenizer, progress),
        tokenizer=tokenizer,
        vocab_size=encoder_of(tokenizer, config.tokenizer).vocab_size,
        fingerprint=blake2b(repr((rules, digests)).encode(), digest_size=16).hexdigest(),
        weights=[weight / sum(weights) for weight in weights],
    )


def _tokenizer(config: DataConfig, sources: list[Source], corpora: list[Corpus], cache: Path) -> Any:
    if config.tokenizer == BYTES:
        return byte_tokenizer()
    if (vocab_size := bpe_vocabulary(config.tokenizer)) is None:
        return load_tokenizer(config.tokenizer)
    fields = [source.text_field or config.text_field for source in sources]
    facts = (vocab_size, fields, [corpus.fingerprint() for corpus in corpora])
    name = blake2b(repr(facts).encode(), digest_size=8).hexdigest()
    texts = [documents_of(corpus.units(field)) for corpus, field in zip(corpora, fields, strict=True)]
    try:
        return trained_bpe(texts, vocab_size, cache / f"bpe_{vocab_size}-{name}")
    except UnreadableError as error:
        raise ConfigError(f"data.path: {error}") from error


def _prepare_all(
    config: DataConfig,
    key: str,
    sources: list[Source],
    corpora: list[Corpus],
    tokenizer: Any,
    progress: Progress | None,
) -> list[Prepared]:
    encoder = encoder_of(tokenizer, config.tokenizer)
    return [
        prepare(
            corpus,
            Recipe(
                encoder=encoder,
                text_field=source.text_field or config.text_field,
                validation_fraction=config.held_out,
                max_tokens=config.max_tokens,
            ),
            Path(config.cache).expanduser(),
            key=key,
            workers=config.workers,
            progress=progress,
        )
        for source, corpus in zip(sources, corpora, strict=True)
    ]


def _open_validation(
    config: DataConfig,
    sources: list[Source],
    prepared: list[Prepared],
    labels: list[str],
    tokenizer: Any,
    progress: Progress | None,
) -> Validation | None:
    if config.validation_path is not None:
        key = "data.validation_path"
        sources = parse_sources(config.validation_path, key)
        corpora = [find_corpus(source, key) for source in sources]
        prepared = _prepare_all(config, key, sources, corpora, tokenizer, progress)
        labels = _unique([one.label for one in prepared])
        sides = [(one, "train", one.train) for one in prepared]
    elif config.held_out:
        sides = [(one, "validation", one.validation) for one in prepared]
    else:
        return None
    streams = [_side(*side, label, config) for side, label in zip(sides, labels, strict=True)]
    weights = [source.weight or len(stream) for source, stream in zip(sources, streams, strict=True)]
    return _validation(streams, weights, config.document_mask)


def _validation(streams: list[SourceStream], weights: list[float], document_mask: bool) -> Validation:
    """Mix by weights until the first source is used up, each source in a fixed order of its own."""
    sizes = [len(stream) for stream in streams]
    turns = [(np.arange(size) + 0.5) / weight for size, weight in zip(sizes, weights, strict=True)]
    order = np.argsort(np.concatenate(turns), kind="stable")
    used_up = min((size + 0.5) / weight for size, weight in zip(sizes, weights, strict=True))
    order = order[np.concatenate(turns)[order] < used_up]
    source = np.repeat(np.arange(len(sizes)), sizes)[order]
    index = np.concatenate([permute(np.arange(size), size, key_of("validation")) for size in sizes])[order]
    return Validation(sources=streams, source=source, index=index, document_mask=document_mask)


def _side(one: Prepared, side: str, counts: Counts, label: str, config: DataConfig) -> SourceStream:
    if counts.tokens < config.sequence_length:
        held_out = config.held_out * config.sequence_length / max(1, counts.tokens)
        way_out = f"; raise data.validation_fraction to about {held_out:.2g}" if side == "validation" else ""
        raise ConfigError(
            f"data.sequence_length must be at most the tokens for {side} in {label}, {counts.tokens}, got "
            f"{config.sequence_length}; give more text or shorter sequences{way_out}"
        )
    folder = one.folder / side
    try:
        stream = open_stream(
            folder,
            tokens=counts.tokens,
            dtype=one.dtype,
            documents=counts.documents,
            length=config.sequence_length,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.cache: {folder} is damaged ({error}); delete {one.folder}") from error
    return SourceStream(label=label, stream=stream, counts=counts)


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


def _unique(labels: list[str]) -> list[str]:
    return [
        f"{label}#{before + 1}" if (before := labels[:number].count(label)) else label
        for number, label in enumerate(labels)
    ]


def _at_least(least: int, value: int, key: str) -> None:
    if value < least:
        raise ConfigError(f"{key} must be at least {least}, got {value}")
