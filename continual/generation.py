"""Tasks for a language model: texts, prompts with answers, and documents to be forgotten."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from continual.batches import HeldOut, validation_of
from continual.data import Data, DataConfig, open_data, open_tokenizer, tokenizer_for
from continual.encoder import Encoder
from continual.instruction import AnswerHeldOut, AnswerSamples, answers_of, digest_of_items, find_items
from continual.labelled import Modality, in_fixed_order
from continual.method import TaskData, TaskKind
from continual.opened import OpenTasks, Row
from continual.order import key_of
from continual.prepare import Progress
from continual.sources import parse_sources
from continual.stream import TaskConfig
from continual.tokenizer import encoder_of
from relora.errors import ConfigError

ORDER = 1
"""Version of the order of prompts with answers; a change of it changes the order of every run."""


@dataclass(kw_only=True, slots=True)
class _Opener:
    """What tasks of a stream share while they are opened."""

    config: DataConfig
    tokenizer: Any
    encoder: Encoder
    seed: int
    progress: Progress | None

    def text(self, task: TaskConfig, data: Any, name: str, validation: Any, fraction: float | None) -> Data:
        """Text of a task, in an order keyed by the seed and the task's name."""
        config = replace(self.config, path=data, validation_path=validation, validation_fraction=fraction)
        seed = key_of("task", self.seed, task.name, name)
        keys = f"{task.key}.{name}", f"{task.key}.validation"
        return open_data(config, seed=seed, progress=self.progress, tokenizer=self.tokenizer, keys=keys)


def open_generation(
    tasks: Sequence[TaskConfig], config: DataConfig, *, seed: int, progress: Progress | None = None
) -> OpenTasks:
    """The data of tasks for a language model.

    Raises: ConfigError
    """
    for task in tasks:
        _check(task)
    tokenizer = _tokenizer(tasks[0], config, progress)
    encoder = encoder_of(tokenizer, config.tokenizer)
    opener = _Opener(config=config, tokenizer=tokenizer, encoder=encoder, seed=seed, progress=progress)
    opened: list[TaskData] = []
    rows: list[Row] = []
    forgotten: dict[str, HeldOut] = {}
    for task in tasks:
        if task.kind is TaskKind.instruction:
            data, row = _instruction(task, opener)
        elif task.kind is TaskKind.causal_lm:
            data, row = _text(task, opener)
        else:
            data, row = _forgetting(task, opener, forgotten)
        opened.append(data)
        rows.append({"task": task.name, "kind": task.kind.value, **row})
    return OpenTasks(
        tasks=opened, modality=Modality.causal_lm, tokenizer=tokenizer, vocab_size=encoder.vocab_size, rows=rows
    )


def _check(task: TaskConfig) -> None:
    if task.classes is not None:
        raise ConfigError(
            f"{task.key}.classes has no effect in a stream without a task of classification: leave it out"
        )
    if task.kind is TaskKind.forget and task.retain is None:
        raise ConfigError(f"{task.key}.retain is missing: name the text that is to be retained")
    if task.kind is not TaskKind.instruction:
        for name in ("data", "validation", "retain"):
            if (value := getattr(task, name)) is not None:
                parse_sources(value, f"{task.key}.{name}")
    if task.kind is TaskKind.forget:
        retained = parse_sources(task.retain, f"{task.key}.retain")
        for source in parse_sources(task.data, f"{task.key}.data"):
            if source in retained:
                raise ConfigError(
                    f"{task.key}.retain: {source.path} is to be forgotten too: choose one of data and retain for it"
                )


def _tokenizer(first: TaskConfig, config: DataConfig, progress: Progress | None) -> Any:
    """The tokenizer; a BPE learns from the first task alone, so that appending tasks changes nothing."""
    if first.kind is not TaskKind.instruction:
        return open_tokenizer(replace(config, path=first.data), progress, f"{first.key}.data")
    items, _ = find_items(first.data, first.validation, config.held_out, first.key)

    def texts() -> list[Iterator[str]]:
        return [(text for item in items for text in (item.prompt, item.answer))]

    return tokenizer_for(config, texts, ("items", digest_of_items(items)), progress)


def _text(task: TaskConfig, opener: _Opener) -> tuple[TaskData, Row]:
    fraction = None if task.validation is not None else opener.config.validation_fraction
    data = opener.text(task, task.data, "data", task.validation, fraction)
    if data.validation is None:
        raise ConfigError(
            f"{task.key}: data.validation_fraction=0 leaves nothing to measure on: raise it, or set "
            f"{task.key}.validation"
        )
    opened = TaskData(train=data.train, held_out={"validation": data.validation}, fingerprint=data.fingerprint)
    return opened, _row(_labels(data), len(data.train), len(data.validation))


def _forgetting(task: TaskConfig, opener: _Opener, forgotten: dict[str, HeldOut]) -> tuple[TaskData, Row]:
    """Documents to be forgotten are measured on themselves, since held-out ones were never learned."""
    forget = opener.text(task, task.data, "data", None, 0.0)
    fraction = None if task.validation is not None else opener.config.validation_fraction
    retain = opener.text(task, task.retain, "retain", task.validation, fraction)
    if retain.validation is None:
        raise ConfigError(
            f"{task.key}: data.validation_fraction=0 leaves nothing of what is retained to measure on: raise it, or "
            f"set {task.key}.validation"
        )
    sources = forget.train.sources
    own = validation_of(sources, [float(len(one)) for one in sources], document_mask=opener.config.document_mask)
    held_out: dict[str, HeldOut] = {"forgotten": own, "retained": retain.validation}
    held_out |= {f"earlier {name}": one for name, one in forgotten.items()}
    forgotten[task.name] = own
    opened = TaskData(
        train=retain.train,
        held_out=held_out,
        fingerprint=blake2b(f"{forget.fingerprint} {retain.fingerprint}".encode(), digest_size=16).hexdigest(),
        forget=forget.train,
    )
    label = f"{_labels(forget)}; retains {_labels(retain)}"
    return opened, _row(label, len(forget.train) + len(retain.train), sum(len(one) for one in held_out.values()))


def _instruction(task: TaskConfig, opener: _Opener) -> tuple[TaskData, Row]:
    config = opener.config
    train, test = find_items(task.data, task.validation, config.held_out, task.key)
    answers, held_out = (
        answers_of(items, opener.encoder, config.sequence_length, positions=config.document_mask)
        for items in (train, test)
    )
    facts = (ORDER, opener.seed, task.name, opener.encoder.fingerprint, config.sequence_length, config.document_mask)
    digest = blake2b(repr((*facts, digest_of_items(train))).encode(), digest_size=16).hexdigest()
    opened = TaskData(
        train=AnswerSamples(answers=answers, seed=opener.seed, stream=key_of("task", task.name)),
        held_out={"test": AnswerHeldOut(answers=held_out, order=in_fixed_order(np.arange(len(held_out))))},
        fingerprint=digest,
    )
    return opened, _row(str(task.data), len(answers), len(held_out), _cuts(answers.cut_prompts, answers.cut_answers))


def _cuts(prompts: int, answers: int) -> str:
    told = [f"{count} {what} cut" for count, what in ((prompts, "prompts"), (answers, "answers")) if count]
    return ", ".join(told)


def _labels(data: Data) -> str:
    return ", ".join(source.label for source in data.train.sources)


def _row(data: str, samples: int, held_out: int, remarks: str = "") -> Row:
    return {"data": data, "samples": samples, "held out": held_out, "remarks": remarks}
