"""Tasks that teach classes or let them be forgotten: which samples of which sets, and which outputs stand for them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from continual.batches import HeldOut
from continual.classes import Scenario
from continual.data import DataConfig, tokenizer_for
from continual.encoder import Encoder
from continual.images import ArrayImages, EncodedImages, ImageForm
from continual.labelled import (
    LabelledHeldOut,
    LabelledSamples,
    LabelledSet,
    Modality,
    Part,
    digest_of,
    divided,
    in_fixed_order,
)
from continual.labelled_sets import open_set
from continual.method import TaskData, TaskKind
from continual.opened import OpenTasks, Row
from continual.order import Indices, key_of
from continual.prepare import Progress
from continual.set_spec import parse_set
from continual.stream import TaskConfig
from continual.text_sets import Texts, tokenized
from continual.tokenizer import encoder_of
from relora.errors import ConfigError

ORDER = 1
"""Version of the order; a change of the rules below changes the order of every run."""


@dataclass(kw_only=True, slots=True)
class _Side:
    """Samples of a set, to train on or to be measured on."""

    part: Part
    index: Indices
    classes: list[str]
    """Of the set."""

    def of(self, names: Sequence[str]) -> "_Side":
        """Those of some classes."""
        numbers = [number for number, name in enumerate(self.classes) if name in names]
        chosen = np.isin(self.part.labels[self.index], np.asarray(numbers, dtype=np.int64))
        return replace(self, index=self.index[chosen])


@dataclass(kw_only=True, slots=True)
class _Known:
    """What a stream has taught so far."""

    outputs: dict[str, int] = field(default_factory=dict)
    """Of each class, in the order of their tasks."""
    taught_by: dict[str, list[str]] = field(default_factory=dict)
    """The classes of each task that teaches."""
    forgotten: list[str] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class _Plan:
    """A task with its samples, before the outputs of the whole stream are known."""

    task: TaskConfig
    set_name: str
    classes: list[str]
    train: _Side
    held_out: dict[str, _Side]
    forget: _Side | None = None

    @property
    def sides(self) -> list[_Side]:
        """All samples."""
        return [self.train, *self.held_out.values(), *([] if self.forget is None else [self.forget])]


def open_classification(
    tasks: Sequence[TaskConfig],
    config: DataConfig,
    *,
    scenario: Scenario,
    seed: int,
    progress: Progress | None = None,
) -> OpenTasks:
    """The data of tasks for a classifier.

    Raises: ConfigError
    """
    sets = _open_sets(tasks)
    known = _Known()
    plans = [_planned(task, sets, known, scenario) for task in tasks]
    modality = next(iter(sets.values())).modality
    tokenizer = encoder = None
    remarks = [""] * len(plans)
    if modality is Modality.texts:
        tokenizer = _tokenizer(plans[0], config, progress)
        encoder = encoder_of(tokenizer, config.tokenizer)
        remarks = _tokenize(plans, encoder, config.sequence_length)
    competing = _competing(known) if scenario is Scenario.task else None
    image = _image(plans) if modality is Modality.images else None
    return OpenTasks(
        tasks=[_data(plan, known, competing, seed) for plan in plans],
        modality=modality,
        tokenizer=tokenizer,
        vocab_size=None if encoder is None else encoder.vocab_size,
        class_names=list(known.outputs),
        image=image,
        form=None if image is None else _form(plans, *image),
        rows=[_row(plan, remark) for plan, remark in zip(plans, remarks, strict=True)],
    )


def _open_sets(tasks: Sequence[TaskConfig]) -> dict[str, LabelledSet]:
    """The sets that tasks name, each opened once."""
    sets: dict[str, LabelledSet] = {}
    for task in tasks:
        for value, key in ((task.data, "data"), (task.validation, "validation")):
            if value is None or repr(value) in sets:
                continue
            sets[repr(value)] = open_set(parse_set(value, f"{task.key}.{key}"), f"{task.key}.{key}")
            first, found = next(iter(sets.values())), sets[repr(value)]
            if found.modality is not first.modality:
                raise ConfigError(
                    f"{task.key}.{key}: {found.name} holds {found.modality.value} and {first.name} holds "
                    f"{first.modality.value}: a stream trains one model, so make two streams of them"
                )
    return sets


def _planned(task: TaskConfig, sets: dict[str, LabelledSet], known: _Known, scenario: Scenario) -> _Plan:
    train, test = _sides(task, sets)
    labelled = sets[repr(task.data)]
    if task.kind is TaskKind.forget:
        return _forgetting(task, labelled, train, test, known)
    names = labelled.classes if task.classes is None else labelled.named(task.classes, f"{task.key}.classes")
    _check_scenario(task, names, known, scenario)
    for name in names:
        known.outputs.setdefault(name, len(known.outputs))
    known.taught_by[task.name] = list(names)
    known.forgotten = [name for name in known.forgotten if name not in names]
    _check_samples(train, names, f"{task.key}.data: {labelled.name}", "to train on")
    _check_samples(test, names, f"{task.key}: {labelled.name}", "to measure on")
    return _Plan(
        task=task,
        set_name=labelled.name,
        classes=list(names),
        train=train.of(names),
        held_out={"test": test.of(names)},
    )


def _sides(task: TaskConfig, sets: dict[str, LabelledSet]) -> tuple[_Side, _Side]:
    """All that the task's set has to train on, and to measure on."""
    labelled = sets[repr(task.data)]
    if task.validation is None:
        train, index, test, held_out = divided(labelled)
        return (
            _Side(part=train, index=index, classes=labelled.classes),
            _Side(part=test, index=held_out, classes=labelled.classes),
        )
    other = sets[repr(task.validation)]
    test = other.test or other.train
    return (
        _Side(part=labelled.train, index=np.arange(len(labelled.train.labels)), classes=labelled.classes),
        _Side(part=test, index=np.arange(len(test.labels)), classes=other.classes),
    )


def _check_scenario(task: TaskConfig, names: Sequence[str], known: _Known, scenario: Scenario) -> None:
    if not known.taught_by:
        return
    if scenario is Scenario.domain:
        if missing := [name for name in known.outputs if name not in names]:
            raise ConfigError(
                f"{task.key} lacks class {', '.join(missing[:5])}: with continual.scenario=domain all tasks have the "
                "same classes; give all tasks the same, or choose class or task"
            )
        if extra := [name for name in names if name not in known.outputs]:
            raise ConfigError(
                f"{task.key} has class {', '.join(extra[:5])}, which the tasks before it lack: with "
                "continual.scenario=domain all tasks have the same classes; give all tasks the same, or choose class "
                "or task"
            )
        return
    for before, classes in known.taught_by.items():
        if shared := [name for name in names if name in classes]:
            raise ConfigError(
                f"{task.key}.classes: class {', '.join(shared[:5])} already belongs to task {before}: with "
                f"continual.scenario={scenario.value} tasks share no class; leave it out here, choose "
                "continual.scenario=domain, or set prefix in the data if it is another class of the same name"
            )


def _forgetting(task: TaskConfig, labelled: LabelledSet, train: _Side, test: _Side, known: _Known) -> _Plan:
    if task.classes is None:
        raise ConfigError(f"{task.key}.classes is missing: name the classes that are to be forgotten")
    names = labelled.named(task.classes, f"{task.key}.classes")
    if isinstance(task.retain, str) or not isinstance(task.retain, list | None):
        raise ConfigError(f"{task.key}.retain must be a list of classes (or null), got {task.retain!r}")
    if task.retain is None:
        retained = [one for one in labelled.classes if one in known.outputs and one not in [*known.forgotten, *names]]
    else:
        retained = labelled.named(task.retain, f"{task.key}.retain")
    for key, chosen in (("classes", names), ("retain", retained)):
        for name in chosen:
            if name not in known.outputs:
                raise ConfigError(f"{task.key}.{key}: no task before it has taught class {name}: leave it out")
            if name in known.forgotten:
                raise ConfigError(
                    f"{task.key}.{key}: class {name} is forgotten already by an earlier task: leave it out"
                )
    if both := [name for name in retained if name in names]:
        raise ConfigError(f"{task.key}.retain: class {both[0]} is to be forgotten too: choose one")
    if not retained:
        raise ConfigError(f"{task.key}: nothing would be retained: forget fewer classes")
    held_out = {"forgotten": test.of(names), "retained": test.of(retained)}
    if earlier := [name for name in known.forgotten if name in labelled.classes]:
        held_out["earlier"] = test.of(earlier)
    for side, what in ((train, "to train on"), (test, "to measure on")):
        _check_samples(side, [*names, *retained], f"{task.key}.data: {labelled.name}", what)
    known.forgotten.extend(names)
    return _Plan(
        task=task,
        set_name=labelled.name,
        classes=names,
        train=train.of(retained),
        held_out=held_out,
        forget=train.of(names),
    )


def _check_samples(side: _Side, names: Sequence[str], where: str, what: str) -> None:
    present = {side.classes[number] for number in np.unique(side.part.labels[side.index])}
    if missing := [name for name in names if name not in present]:
        raise ConfigError(f"{where} has no samples of class {', '.join(missing[:5])} {what}: leave it out, or add some")


def _tokenizer(first: _Plan, config: DataConfig, progress: Progress | None) -> Any:
    """The tokenizer; a BPE learns from the first task alone, so that appending tasks changes nothing."""
    content = first.train.part.content
    assert isinstance(content, Texts)
    index = first.train.index

    def texts() -> list[Iterator[str]]:
        return [(content.texts[number] for number in index)]

    return tokenizer_for(config, texts, ("labelled", content.digest(index)), progress)


def _tokenize(plans: Sequence[_Plan], encoder: Encoder, length: int) -> list[str]:
    """Put tokens in place of texts; tells of each task how many texts were cut."""
    done: dict[int, tuple[Part, Indices]] = {}
    for side in (side for plan in plans for side in plan.sides):
        if isinstance(content := side.part.content, Texts) and id(side.part) not in done:
            tokens, lengths = tokenized(content, encoder, length)
            done[id(side.part)] = replace(side.part, content=tokens), lengths
    remarks = []
    for plan in plans:
        cut = int((done[id(plan.train.part)][1][plan.train.index] > length).sum())
        remarks.append(f"{cut} texts cut to {length} tokens" if cut else "")
    originals = [(side, done[id(side.part)][0]) for plan in plans for side in plan.sides]
    for side, part in originals:
        side.part = part
    return remarks


def _competing(known: _Known) -> torch.Tensor:
    """For each output, the outputs of the task that taught it. Shapes: (outputs, outputs)."""
    table = torch.zeros(len(known.outputs), len(known.outputs), dtype=torch.bool)
    for names in known.taught_by.values():
        own = torch.tensor([known.outputs[name] for name in names])
        table[own[:, None], own] = True
    return table


def _image(plans: Sequence[_Plan]) -> tuple[int, int]:
    """The one size and the channels of all images."""
    shapes: dict[tuple[int, int, int], str] = {}
    for plan in plans:
        for side in plan.sides:
            content = side.part.content
            assert isinstance(content, ArrayImages | EncodedImages)
            shapes |= {shape: plan.task.key for shape in content.shapes(side.index) if shape not in shapes}
    channels, height, width = next(iter(shapes))
    if len(shapes) > 1 or height != width:
        found = ", ".join(f"{shape[1]} x {shape[2]} with {shape[0]} channels" for shape in list(shapes)[:4])
        raise ConfigError(
            f"{list(shapes.values())[-1]}.data: a model takes square images of one size, and there are {found}: set "
            "image_size and channels in the data of the tasks"
        )
    return height, channels


def _form(plans: Sequence[_Plan], size: int, channels: int) -> ImageForm | None:
    """How all images become tensors of this shape, if they do so alike."""
    contents = [side.part.content for plan in plans for side in plan.sides]
    scales = {(one.form.mean, one.form.std) for one in contents if isinstance(one, ArrayImages | EncodedImages)}
    if len(scales) > 1:
        return None
    ((mean, std),) = scales
    return ImageForm(size=size, channels=channels, mean=mean, std=std)


def _data(plan: _Plan, known: _Known, competing: torch.Tensor | None, seed: int) -> TaskData:
    def outputs(side: _Side) -> Indices:
        return np.array([known.outputs.get(name, -1) for name in side.classes], dtype=np.int64)

    def samples(side: _Side, purpose: str) -> LabelledSamples:
        stream = key_of(purpose, plan.task.name)
        return LabelledSamples(part=side.part, index=side.index, outputs=outputs(side), seed=seed, stream=stream)

    held_out: dict[str, HeldOut] = {
        name: LabelledHeldOut(
            part=side.part, index=in_fixed_order(side.index), outputs=outputs(side), competing=competing
        )
        for name, side in plan.held_out.items()
    }
    learned = [plan.train, *([] if plan.forget is None else [plan.forget])]
    digests = [digest_of(side.part, side.index, side.classes) for side in learned]
    facts = (ORDER, seed, plan.task.name, plan.task.kind.value, plan.classes, digests)
    return TaskData(
        train=samples(plan.train, "task"),
        held_out=held_out,
        fingerprint=blake2b(repr(facts).encode(), digest_size=16).hexdigest(),
        classes=tuple(known.outputs[name] for name in plan.classes),
        forget=None if plan.forget is None else samples(plan.forget, "forget"),
    )


def _row(plan: _Plan, remark: str) -> Row:
    return {
        "task": plan.task.name,
        "kind": plan.task.kind.value,
        "data": plan.set_name,
        "classes": ", ".join(plan.classes[:10]) + (f", ... ({len(plan.classes)})" if len(plan.classes) > 10 else ""),
        "samples": sum(len(side.index) for side in (plan.train, plan.forget) if side is not None),
        "held out": sum(len(side.index) for side in plan.held_out.values()),
        "remarks": remark,
    }
