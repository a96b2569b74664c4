"""The data of a run: prepared sources, mixed, in an order that one integer remembers.

`open_data` prepares what is not prepared yet. The batch at a position is a pure function of the seed and the
prepared tokens, so a run continues exactly on any number of processes, batch split or machine.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from continual.batches import Batch, SourceStream, Train, Validation, validation_of
from continual.corpora import Corpus, documents_of
from continual.documents import UnreadableError
from continual.encoder import Encoder
from continual.mixture import BLOCK, Mixture, quotas_of
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
from continual.tokens import open_stream
from relora.errors import ConfigError

__all__ = ["Batch", "Data", "DataConfig", "Train", "Validation", "open_data"]

ORDER = 1
"""Version of the order; a change of the rules below changes the order of every run."""
DEFAULT_VALIDATION_FRACTION = 0.02


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What text a run learns from, and how it becomes sequences."""

    path: Any = "python_library"
    """A source or a list of sources; a source is a name or a mapping: path weight name split revision text_field.
    null only where the tasks of a stream name their data."""
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
        if self.path is not None:
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


def open_data(
    config: DataConfig,
    *,
    seed: int,
    progress: Progress | None = None,
    tokenizer: Any = None,
    keys: tuple[str, str] = ("data.path", "data.validation_path"),
) -> Data:
    """The data of a run, prepared first where the cache does not have it.

    A tokenizer may be given, if it is what config.tokenizer asks for; keys name the sources in messages.

    Raises: ConfigError.
    """
    cache = open_cache(config)
    sources = parse_sources(config.path, keys[0])
    corpora = [find_corpus(source, keys[0]) for source in sources]
    if tokenizer is None:
        tokenizer = open_tokenizer(config, progress, keys[0])
    encoder = encoder_of(tokenizer, config.tokenizer)

    def prepared_from(sources: list[Source], corpora: list[Corpus], key: str) -> list[Prepared]:
        return [
            prepare(corpus, _recipe(config, source, encoder), cache, key=key, workers=config.workers, progress=progress)
            for source, corpus in zip(sources, corpora, strict=True)
        ]

    prepared = prepared_from(sources, corpora, keys[0])
    streams = _streams(prepared, "train", config)
    weights = _weights(sources, streams)
    quotas = quotas_of(weights, [stream.label for stream in streams])
    validation = None
    if config.validation_path is not None:
        sources = parse_sources(config.validation_path, keys[1])
        prepared = prepared_from(sources, [find_corpus(source, keys[1]) for source in sources], keys[1])
        validation = _validation(sources, _streams(prepared, "train", config), config)
    elif config.held_out:
        validation = _validation(sources, _streams(prepared, "validation", config), config)
    return Data(
        train=Train(
            sources=streams,
            mixture=Mixture(quotas=quotas, seed=seed),
            seed=seed,
            document_mask=config.document_mask,
        ),
        validation=validation,
        tokenizer=tokenizer,
        vocab_size=encoder.vocab_size,
        fingerprint=_fingerprint(config, seed, quotas, streams),
        weights=[weight / sum(weights) for weight in weights],
    )


def open_cache(config: DataConfig) -> Path:
    """The folder of prepared tokens, made if it is not there.

    Raises: ConfigError.
    """
    cache = Path(config.cache).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"data.cache: {cache} cannot be made ({error}); set it to a folder that can") from error
    return cache


def tokenizer_for(
    config: DataConfig, texts: Callable[[], list[Iterator[str]]], digests: tuple[object, ...], progress: Progress | None
) -> Any:
    """The tokenizer that config.tokenizer asks for; a BPE is trained on the texts, which their digests tell apart.

    Raises: ConfigError.
    """
    if config.tokenizer == BYTES:
        return byte_tokenizer()
    if (vocab_size := bpe_vocabulary(config.tokenizer)) is None:
        return load_tokenizer(config.tokenizer)
    name = blake2b(repr((vocab_size, *digests)).encode(), digest_size=8).hexdigest()

    def watch(done: int) -> None:
        if progress is not None:
            progress(f"training {config.tokenizer}", done, 1)

    return trained_bpe(texts(), vocab_size, open_cache(config) / f"bpe_{vocab_size}-{name}", watch)


def open_tokenizer(config: DataConfig, progress: Progress | None = None, key: str = "data.path") -> Any:
    """The tokenizer of a run; a BPE learns from the sources of config.path.

    Raises: ConfigError.
    """
    sources = parse_sources(config.path, key)
    fields = [source.text_field or config.text_field for source in sources]
    # Only a BPE needs the text, and what the Hub has is not to be looked up for another tokenizer.
    needed = bpe_vocabulary(config.tokenizer) is not None
    corpora = [find_corpus(source, key) for source in sources] if needed else []

    def texts() -> list[Iterator[str]]:
        return [documents_of(corpus, field) for corpus, field in zip(corpora, fields, strict=True)]

    try:
        return tokenizer_for(config, texts, (fields, [corpus.fingerprint() for corpus in corpora]), progress)
    except UnreadableError as error:
        raise ConfigError(f"{key}: {error}") from error


def _recipe(config: DataConfig, source: Source, encoder: Encoder) -> Recipe:
    return Recipe(
        encoder=encoder,
        text_field=source.text_field or config.text_field,
        validation_fraction=config.held_out,
        max_tokens=config.max_tokens,
    )


def _weights(sources: list[Source], streams: list[SourceStream]) -> list[float]:
    return [source.weight or len(stream) for source, stream in zip(sources, streams, strict=True)]


def _validation(sources: list[Source], streams: list[SourceStream], config: DataConfig) -> Validation:
    return validation_of(streams, _weights(sources, streams), document_mask=config.document_mask)


def _fingerprint(config: DataConfig, seed: int, quotas: list[int], streams: list[SourceStream]) -> str:
    rules = (ORDER, seed, config.sequence_length, config.document_mask, quotas)
    digests = [stream.counts.digest for stream in streams]
    return blake2b(repr((rules, digests)).encode(), digest_size=16).hexdigest()


def _streams(prepared: list[Prepared], side: str, config: DataConfig) -> list[SourceStream]:
    labels = _unique([one.label for one in prepared])
    return [_stream(one, side, label, config) for one, label in zip(prepared, labels, strict=True)]


def _stream(one: Prepared, side: str, label: str, config: DataConfig) -> SourceStream:
    counts = one.train if side == "train" else one.validation
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


def _unique(labels: list[str]) -> list[str]:
    return [
        f"{label}#{before + 1}" if (before := labels[:number].count(label)) else label
        for number, label in enumerate(labels)
    ]


def _at_least(least: int, value: int, key: str) -> None:
    if value < least:
        raise ConfigError(f"{key} must be at least {least}, got {value}")
