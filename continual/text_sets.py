"""Labelled texts: JSON Lines with a text and a class each, and their tokens."""

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
from continual.records import read_records, split_file
from continual.set_spec import SetSpec
from relora.errors import ConfigError


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
    """A file of JSON Lines (or a JSON list), or a folder with train.jsonl and maybe test.jsonl.

    Raises: ConfigError
    """
    train_file = split_file(path, ("train",), key) if path.is_dir() else path
    assert train_file is not None
    test_file = split_file(path, ("test",), key, required=False) if path.is_dir() else None
    text_field, label_field = spec.text_field or "text", spec.label_field or "label"
    train = _rows(train_file, text_field, label_field, key)
    names = spec.names or _names(train)

    def part(rows: Sequence[tuple[str, Any]], file: Path) -> Part:
        labels = numbered([label for _, label in rows], names, str(file), key)
        return Part(content=Texts(texts=[text for text, _ in rows]), labels=labels)

    test = part(_rows(test_file, text_field, label_field, key), test_file) if test_file is not None else None
    return LabelledSet(name=path.stem, modality=Modality.texts, classes=names, train=part(train, train_file), test=test)


def _rows(path: Path, text_field: str, label_field: str, key: str) -> list[tuple[str, Any]]:
    return list(_checked(path, text_field, label_field, key))


def _checked(path: Path, text_field: str, label_field: str, key: str) -> Iterator[tuple[str, Any]]:
    for place, record in read_records(path, key):
        text, label = record.get(text_field), record.get(label_field)
        if not isinstance(text, str) or not text:
            raise ConfigError(f"{key}: {place} has no text in {text_field!r}: {_shown(record)}; set {key}.text_field")
        if not isinstance(label, str | int) or isinstance(label, bool) or label == "":
            raise ConfigError(
                f"{key}: {place} has no label in {label_field!r}: {_shown(record)}; set {key}.label_field"
            )
        yield text, label


def _names(rows: Sequence[tuple[str, Any]]) -> list[str]:
    """The labels that occur: numbers in order of size, then words in that of the alphabet."""
    found = {label for _, label in rows}
    numbers = sorted(label for label in found if isinstance(label, int))
    return [str(label) for label in [*numbers, *sorted(label for label in found if isinstance(label, str))]]


def _shown(record: Any) -> str:
    text = json.dumps(record)
    return text if len(text) <= 100 else f"{text[:100]} ..."
