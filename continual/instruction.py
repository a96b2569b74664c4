"""Prompts with answers: what is learned is the answers' tokens, and an end after each.

A sample is the prompt's tokens, the answer's, an end-of-sequence token, and more of these up to the common length;
the loss counts the answer and the first end. A prompt that is too long loses its beginning, since what is asked tends
to stand at its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from continual.batches import Batch
from continual.encoder import Encoder
from continual.order import Indices, key_of, permute, sample_at
from continual.records import read_records, split_file
from relora.errors import ConfigError

LEAST_HELD_OUT = 1


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt and the answer to it."""

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """Items as tokens of one length."""

    items: Sequence[Item]
    tokens: npt.NDArray[Any]
    """Shapes: (N, T)"""
    starts: Indices
    """Where each answer begins. Shapes: (N,)"""
    stops: Indices
    """Where what is learned ends, exclusive. Shapes: (N,)"""
    positions: bool
    """Whether batches have position_ids, as those of text with data.document_mask do."""
    cut_prompts: int
    cut_answers: int

    def __len__(self) -> int:
        return len(self.items)

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        return int(self.tokens.shape[1])

    @property
    def longest(self) -> int:
        """Tokens of the longest answer, with its end."""
        return int((self.stops - self.starts).max())

    def at(self, index: Indices) -> Batch:
        """Some items."""
        tokens = torch.from_numpy(self.tokens[index].astype(np.int64))
        place = np.arange(self.tokens.shape[1])
        learned = (place >= self.starts[index][:, None]) & (place < self.stops[index][:, None])
        inputs = {"input_ids": tokens}
        if self.positions:
            inputs["position_ids"] = torch.from_numpy(np.broadcast_to(place, tokens.shape).copy())
        return Batch(inputs=inputs, labels=tokens.masked_fill(~torch.from_numpy(learned), -100), even=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerSamples:
    """What a task trains on, in an endless order keyed by the seed and the task's name."""

    answers: Answers
    seed: int
    stream: int

    def __len__(self) -> int:
        return len(self.answers)

    def identities(self, position: int, count: int) -> Indices:
        """Which items are served at `position` and after it."""
        places = np.arange(position, position + count)
        return sample_at(places, len(self.answers), seed=self.seed, stream=self.stream)

    def at(self, identities: Indices) -> Batch:
        """These items."""
        return self.answers.at(identities)

    def batch(self, position: int, count: int) -> Batch:
        """The items at `position` and after it."""
        return self.at(self.identities(position, count))


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerHeldOut:
    """What a task is measured on, in an order that no seed changes."""

    answers: Answers
    order: Indices

    def __len__(self) -> int:
        return len(self.order)

    def batch(self, position: int, count: int) -> Batch:
        """The items at `position` and after it; fewer at the end."""
        return self.answers.at(self.order[position : position + count])

    def items(self, position: int, count: int) -> list[Item]:
        """The text of the same items, to compare what a model writes with."""
        return [self.answers.items[number] for number in self.order[position : position + count]]

    def prompts(self, position: int, count: int) -> list[Indices]:
        """The tokens of the same items' prompts, which a model is to continue."""
        chosen = self.order[position : position + count]
        return [self.answers.tokens[row, : self.answers.starts[row]].astype(np.int64) for row in chosen]


def read_items(path: Path, key: str) -> list[Item]:
    """The items of a JSON file: a list, or an object per line.

    Raises: ConfigError
    """
    items = []
    for place, record in read_records(path, key):
        for name in ("prompt", "answer"):
            if not isinstance(record.get(name), str) or not record[name]:
                raise ConfigError(
                    f"{key}: {place} has no {name}: an item needs a prompt and an answer, both text and neither empty"
                )
        items.append(Item(record["prompt"], record["answer"]))
    return items


def find_items(value: Any, validation: Any, fraction: float, key: str) -> tuple[list[Item], list[Item]]:
    """The items to train on and to measure on.

    A folder has train.json and test.json or eval.json, as TRACE and LLMCL do, of which the first is measured on. Of a
    file, or a folder without these, a fraction is held out that no seed changes.

    Raises: ConfigError
    """
    path = _path(value, f"{key}.data")
    test = None
    if validation is not None:
        test = _path(validation, f"{key}.validation")
        if test.is_dir():
            test = split_file(test, ("test", "eval"), f"{key}.validation")
    elif path.is_dir():
        test = split_file(path, ("test", "eval"), f"{key}.data", required=False)
    train = split_file(path, ("train",), f"{key}.data") if path.is_dir() else path
    assert train is not None
    items = read_items(train, f"{key}.data")
    if test is not None:
        return items, read_items(test, f"{key}.validation" if validation is not None else f"{key}.data")
    count = max(LEAST_HELD_OUT, round(len(items) * fraction))
    if fraction == 0 or count >= len(items):
        raise ConfigError(
            f"{key}: nothing to measure on: {path} has {len(items)} items, no test.json beside them, and "
            f"data.validation_fraction is {fraction}: set {key}.validation"
        )
    held_out = set(permute(np.arange(count), len(items), key_of("test items")).tolist())
    return [one for number, one in enumerate(items) if number not in held_out], [items[n] for n in sorted(held_out)]


def answers_of(items: Sequence[Item], encoder: Encoder, length: int, *, positions: bool) -> Answers:
    """Items as tokens; what is too long is cut: prompts at their beginning, answers that leave no room at their end."""
    prompts = [ids[:-1] for ids in encoder.encode([item.prompt for item in items])]
    answers = encoder.encode([item.answer for item in items])
    tokens = np.full((len(items), length), encoder.eos, encoder.dtype)
    starts, stops = np.zeros(len(items), dtype=np.int64), np.zeros(len(items), dtype=np.int64)
    cut_prompts = cut_answers = 0
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        cut_answers += len(answer) > length - 1
        learned = answer[: length - 1]
        kept = prompt[max(0, len(prompt) - (length - len(learned))) :]
        cut_prompts += len(kept) < len(prompt)
        starts[row], stops[row] = len(kept), len(kept) + len(learned)
        tokens[row, : starts[row]], tokens[row, starts[row] : stops[row]] = kept, learned
    return Answers(
        items=items,
        tokens=tokens,
        starts=starts,
        stops=stops,
        positions=positions,
        cut_prompts=cut_prompts,
        cut_answers=cut_answers,
    )


def digest_of_items(items: Sequence[Item]) -> str:
    """Of the text."""
    return blake2b(repr([(item.prompt, item.answer) for item in items]).encode(), digest_size=16).hexdigest()


def _path(value: Any, key: str) -> Path:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key} must be a JSON file or a folder with train.json and test.json, got {value!r}")
    path = Path(value).expanduser()
    if not path.exists():
        raise ConfigError(f"{key}: there is no file or folder {path.absolute()}: give one that exists")
    return path
