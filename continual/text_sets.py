"""Labelled texts: JSON Lines or Parquet with a text and a class each, and their tokens."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from continual.encoder import Encoder
from continual.image_sets import numbered
from continual.labelled import LabelledSet, Modality, Part
from continual.order import Indices
from continual.parquet_tables import class_names, read_table, split_tables
from continual.records import read_records, split_file
from continual.set_spec import SetSpec
from relora.errors import ConfigError

TABLE = ".parquet"
Row = tuple[str, str | int]
"""A text and its label."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """Texts that are not tokenized yet."""

    texts: Sequence[str]

    def inputs(self, index: Indices) -> dict[str, torch.Tensor]:
        """None, since there are no tokens."""
        raise AssertionError("texts are tokenized before they are served")

    def digest(self, index: Indices) -> str:
        """Of the text."""
        return blake2b(repr([self.texts[number] for number in index]).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedTexts:
    """The first tokens of texts, and the end-of-sequence token up to a common length."""

    texts: Texts
    tokens: npt.NDArray[Any]
    """Shapes: (N, T)"""
    lengths: Indices
    """Tokens of each text, with its end. Shapes: (N,)"""
    recipe: str
    """Of tokenizer and length."""

    def inputs(self, index: Indices) -> dict[str, torch.Tensor]:
        """Tokens, and which of them are of the text."""
        tokens = torch.from_numpy(self.tokens[index].astype(np.int64))
        mask = np.arange(self.tokens.shape[1]) < self.lengths[index][:, None]
        return {"input_ids": tokens, "attention_mask": torch.from_numpy(mask.astype(np.int64))}

    def digest(self, index: Indices) -> str:
        """Of the text and how it becomes tokens."""
        return f"{self.texts.digest(index)} {self.recipe}"


def tokenized(texts: Texts, encoder: Encoder, length: int) -> tuple[TokenizedTexts, Indices]:
    """Texts with their tokens, of which those beyond the length are cut, and how many tokens each had."""
    tokens = np.full((len(texts.texts), length), encoder.eos, encoder.dtype)
    lengths = np.zeros(len(texts.texts), dtype=np.int64)
    for row, ids in enumerate(encoder.encode(list(texts.texts))):
        lengths[row] = len(ids)
        tokens[row, : len(ids)] = ids[:length]
    recipe = f"{encoder.fingerprint} {length}"
    shortened = np.minimum(lengths, length)
    return TokenizedTexts(texts=texts, tokens=tokens, lengths=shortened, recipe=recipe), lengths


def read_texts(spec: SetSpec, path: Path, key: str) -> LabelledSet:
    """A file of JSON Lines (or a JSON list), a folder with train.jsonl and maybe test.jsonl, or Parquet likewise.

    Raises: ConfigError
    """
    trains, tests = _files(path, key)
    text_field, label_field = spec.text_field or "text", spec.label_field or "label"

    def rows(files: Sequence[Path]) -> list[Row]:
        records = (record for file in files for record in _records(file, text_field, label_field, key))
        return [_checked(place, record, text_field, label_field, key) for place, record in records]

    train = rows(trains)
    names = spec.names or _told_names(trains[0], label_field, key) or _names(train)

    def part(found: Sequence[Row], files: Sequence[Path]) -> Part:
        labels = numbered([label for _, label in found], names, str(files[0]), key)
        return Part(content=Texts(texts=[text for text, _ in found]), labels=labels)

    test = part(rows(tests), tests) if tests else None
    return LabelledSet(name=path.stem, modality=Modality.texts, classes=names, train=part(train, trains), test=test)


def _files(path: Path, key: str) -> tuple[list[Path], list[Path]]:
    """What to train on, and what to measure on."""
    if path.suffix == TABLE or (path.is_dir() and next(path.rglob(f"*{TABLE}"), None) is not None):
        return split_tables(path, key)
    if path.is_file():
        return [path], []
    train, test = split_file(path, ("train",), key), split_file(path, ("test",), key, required=False)
    assert train is not None
    return [train], [test] if test is not None else []


def _records(file: Path, text_field: str, label_field: str, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and the fields of each record."""
    if file.suffix != TABLE:
        return read_records(file, key)
    table = read_table(file, key)
    if missing := [name for name in (text_field, label_field) if name not in table.schema.names]:
        raise ConfigError(
            f"{key}: {file} has no column {missing[0]!r}; it has {', '.join(table.schema.names)}: set {key}.text_field "
            f"and {key}.label_field"
        )
    rows = table.select([text_field, label_field]).to_pylist()
    return ((f"row {number} of {file}", row) for number, row in enumerate(rows))


def _told_names(file: Path, label_field: str, key: str) -> list[str] | None:
    """Names of classes that stand in the file itself."""
    return list(class_names(read_table(file, key), label_field) or []) or None if file.suffix == TABLE else None


def _checked(place: str, record: dict[str, Any], text_field: str, label_field: str, key: str) -> Row:
    text, label = record.get(text_field), record.get(label_field)
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{key}: {place} has no text in {text_field!r}: {_shown(record)}; set {key}.text_field")
    if not isinstance(label, str | int) or isinstance(label, bool) or label == "":
        raise ConfigError(f"{key}: {place} has no label in {label_field!r}: {_shown(record)}; set {key}.label_field")
    return text, label


def _names(rows: Sequence[Row]) -> list[str]:
    """The labels that occur: numbers in order of size, then words in that of the alphabet."""
    found = {label for _, label in rows}
    numbers = sorted(label for label in found if isinstance(label, int))
    return [str(label) for label in [*numbers, *sorted(label for label in found if isinstance(label, str))]]


def _shown(record: Any) -> str:
    text = json.dumps(record)
    return text if len(text) <= 100 else f"{text[:100]} ..."
