"""How well the model does on each task of a stream: loss, perplexity, accuracy; on all processes together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from continual.answers import AnswerMetric
from continual.audit import audit
from continual.batches import Batch, HeldOut
from continual.classes import Scenario
from continual.instruction import AnswerHeldOut
from continual.method import Stage, TaskKind
from launch.training.decoding import answer_score
from launch.training.objective import called, competing, row_losses, turns, validation_batches
from launch.training.run import Run
from launch.watching.stage_records import Score
from parallel.collectives import sum_over
from parallel.runtime import Axis


@dataclass(frozen=True, kw_only=True, slots=True)
class Measuring:
    """How samples are measured."""

    axis: Axis
    """Processes that take turns."""
    device: torch.device
    size: int
    """Samples per forward of a process."""
    sequences: int | None
    """Samples of each set; None: all."""
    classes: int
    """Outputs of the classifier; 0 for a language model."""
    scenario: Scenario
    tokenizer: Any = None
    """Of transformers: reads what a language model writes."""


def scores_of(model: nn.Module, tasks: Sequence[Stage], after: Stage | None, measuring: Measuring) -> dict[str, Score]:
    """The scores of all tasks that can be measured after a stage, or before the stream, by name.

    Classes that no task has brought yet cannot be, unless all tasks have the same. Classes that were forgotten on
    purpose count in what requests to forget measure of them, and nowhere else.
    """
    scores: dict[str, Score] = {}
    for task in tasks:
        request = task.kind is TaskKind.forget
        seen = tasks[0].seen if after is None else after.seen
        known = after is not None and set(task.seen if request else task.data.classes) <= set(seen)
        if measuring.classes and not known and measuring.scenario is not Scenario.domain:
            continue
        among: Sequence[int] | None = seen
        if measuring.scenario is Scenario.task:
            among = None if request else task.data.classes
        own = among if request else task.data.classes
        gone = () if after is None else after.forgotten
        for label, held_out in task.data.held_out.items():
            without = () if request and label != "retained" else gone
            score = measured(model, held_out, among, own, measuring, without=without)
            if score.samples:
                if task.metric is not AnswerMetric.loss:
                    score.metric = task.metric.value
                    score.accuracy = _of_answers(model, held_out, task.metric, measuring)
                scores[column(task, label)] = score
    return scores


def column(task: Stage, label: str) -> str:
    """What the matrix calls one of a task's held-out sets."""
    return task.name if task.kind is not TaskKind.forget else f"{task.name}/{label}"


def audit_of(
    stage: Stage, tasks: Sequence[Stage], before: Mapping[str, Score], after: Mapping[str, Score]
) -> dict[str, Any] | None:
    """What a request to forget did, and of which tasks nothing is left to know; None for a task that teaches."""
    if stage.kind is not TaskKind.forget:
        return None
    names = {label: column(stage, label) for label in stage.data.held_out}
    accuracy = bool(stage.data.classes)

    def read(scores: Mapping[str, Score]) -> dict[str, float]:
        found = {label: scores[name].accuracy if accuracy else scores[name].loss for label, name in names.items()}
        return {label: value for label, value in found.items() if value is not None}

    gone = set(stage.forgotten)
    unlearned = [
        task.name
        for task in tasks
        if task.kind is not TaskKind.forget and task.data.classes and gone.issuperset(task.data.classes)
    ]
    return {**audit(read(before), read(after), accuracy=accuracy), "unlearned": unlearned}


def measuring_of(run: Run) -> Measuring:
    """How a run measures."""
    config, continual = run.config, run.config.continual
    assert continual is not None
    return Measuring(
        axis=run.runtime.batch,
        device=run.runtime.device,
        size=config.validation_batch(run.runtime.batch.size),
        sequences=config.evaluation.sequences,
        classes=len(run.course.class_names),
        scenario=continual.scenario,
        tokenizer=run.course.tokenizer,
    )


def _of_answers(model: nn.Module, held_out: HeldOut, metric: AnswerMetric, measuring: Measuring) -> float:
    assert isinstance(held_out, AnswerHeldOut), "only prompts with answers have such a metric"
    return answer_score(
        model,
        held_out,
        metric,
        measuring.tokenizer,
        axis=measuring.axis,
        device=measuring.device,
        size=measuring.size,
        samples=measuring.sequences,
    )


@torch.no_grad()
def measured(
    model: nn.Module,
    held_out: HeldOut,
    among: Sequence[int] | None,
    own: Sequence[int] | None,
    measuring: Measuring,
    *,
    without: Sequence[int] = (),
) -> Score:
    """Loss and perplexity per target; of a classifier the accuracy among some classes, and among a task's own.

    Without classes given, those compete that each sample names. Samples of the classes in `without` do not count.
    """
    device, classes = measuring.device, measuring.classes
    sums = torch.zeros(5, dtype=torch.float64, device=device)  # loss, targets, samples, right, right in the task
    was_training = model.training
    model.eval()
    batches = validation_batches(held_out, sequences=measuring.sequences, size=measuring.size)
    for mine, counts in turns(batches, measuring.axis, 1):
        batch = (_among(mine, among, classes).without(without) if classes else mine).to(device)
        output = called(model, batch)
        of_batch = [float(row_losses(model, output, batch).double().sum()), batch.targets]
        if classes:
            right = [_right(output.logits, one) for one in (batch, _among(batch, own, classes))]
            of_batch += [batch.targets, *right]
        else:
            of_batch.append(len(batch))
        if counts:
            sums[: len(of_batch)] += torch.tensor(of_batch, dtype=torch.float64, device=device)
    model.train(was_training)
    loss_sum, targets, samples, right_sum, right_in_task = sum_over(measuring.axis, sums).tolist()
    loss = loss_sum / max(targets, 1.0)
    if classes:
        return Score(
            loss=loss,
            samples=int(samples),
            accuracy=right_sum / max(samples, 1.0),
            accuracy_in_task=right_in_task / max(samples, 1.0),
        )
    return Score(loss=loss, samples=int(samples), perplexity=math.exp(min(loss, 700.0)))


def _among(batch: Batch, among: Sequence[int] | None, classes: int) -> Batch:
    return batch if among is None else batch.among(among, classes)


def _right(logits: Tensor, batch: Batch) -> int:
    return int((competing(logits, batch).argmax(1) == batch.labels).sum())
