"""What a run records of a stream: one event for each finished stage, and the score matrix that they make together.

The event with index -1 holds the scores before any training. launch/watching/stage_notes.py writes them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from continual.metrics import Entry, ScoreMatrix, summary
from launch.watching.records import Record

BEFORE = -1
"""The index of the record that is made before any training."""


@dataclass(kw_only=True, slots=True)
class Score:
    """What a model reaches on one task."""

    loss: float | None = None
    """Nats per target."""
    accuracy: float | None = None
    """From 0 to 1: of a classifier the share right, of answers that are written what `metric` makes of them."""
    metric: str | None = None
    """exact, choice or rouge_l where answers are written."""
    accuracy_in_task: float | None = None
    """The same when the task is known, so that only its own classes compete."""
    perplexity: float | None = None
    """The exponential of the loss; language models only."""
    samples: int = 0
    """How many it was measured on."""


@dataclass(kw_only=True, slots=True)
class StageRecord:
    """A finished stage."""

    step: int
    """Updates of the run at its end."""
    task: str
    """Its name."""
    index: int
    """Its place in the stream, from 0; BEFORE: before any training."""
    scores: dict[str, Score]
    """On each task that was measured, in the order of the stream."""
    learns: list[str] | None = None
    """Tasks that it learned: with joint training many. None: its own, or none if it was audited for forgetting."""
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    method_bytes: int = 0
    """Size of the method's state."""
    report: dict[str, Any] = field(default_factory=dict)
    """What the method tells of it."""
    audit: dict[str, Any] | None = None
    """What was forgotten on purpose, what was kept, and under `unlearned` the tasks of which nothing is left."""

    def values(self) -> Record:
        """Plain values, for records and checkpoints; what is not known is left out."""
        scores = {task: _known(asdict(score)) for task, score in self.scores.items()}
        return {**_known(asdict(self)), "scores": scores}

    @classmethod
    def from_values(cls, values: Record) -> "StageRecord":
        """The stage that `values` gave, or that an event in metrics.jsonl holds."""
        told = {entry.name: values[entry.name] for entry in fields(cls) if entry.name in values}
        told["scores"] = {task: Score(**score) for task, score in values["scores"].items()}
        return cls(**told)

    @property
    def learned(self) -> list[str]:
        """The tasks that it learned."""
        if self.learns is not None:
            return self.learns
        return [] if self.audit is not None or self.index == BEFORE else [self.task]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """The stages of a run so far."""

    stages: list[StageRecord]
    """Finished ones in their order."""
    baseline: StageRecord | None
    """Before any training."""
    tasks: list[str]
    """All that was measured."""
    score: str
    """What the matrix holds: accuracy, or the loss of language models, the logarithm of their perplexity."""

    def row(self, record: StageRecord | None) -> list[Entry]:
        """The scores of a record, in the order of `tasks`."""
        scores = record.scores if record is not None else {}
        return [getattr(scores.get(task, Score()), self.score) for task in self.tasks]

    @property
    def matrix(self) -> ScoreMatrix:
        """A row for each stage; of those that were never recorded here, an empty one."""
        recorded = {record.index: record for record in self.stages}
        learned = {task: record.index for record in reversed(self.stages) for task in record.learned}
        for record in self.stages:
            for task in (record.audit or {}).get("unlearned", ()):
                learned.pop(task, None)
        samples = {task: score.samples for record in self.stages for task, score in record.scores.items()}
        return ScoreMatrix(
            rows=[self.row(recorded.get(index)) for index in range(max(recorded, default=-1) + 1)],
            baseline=self.row(self.baseline) if self.baseline is not None else (),
            samples=[samples.get(task, 0) for task in self.tasks],
            learned=[learned.get(task) for task in self.tasks],
            higher_is_better=self.score == "accuracy",
        )

    def summary(self) -> dict[str, Any]:
        """What summary.json tells of the stream."""
        told = {"tasks": self.tasks, "score": self.score, **summary(self.matrix, score=self.score)}
        audits = {stage.task: stage.audit for stage in self.stages if stage.audit is not None}
        return {**told, "audits": audits} if audits else told


def stream_of(records: Sequence[StageRecord]) -> Stream:
    """The stream that stages make; of two records of one stage the later one counts."""
    by_index = {record.index: record for record in records}
    stages = [by_index[index] for index in sorted(by_index) if index != BEFORE]
    scores = [score for record in records for score in record.scores.values()]
    accurate = all(score.accuracy is not None and (score.perplexity is None or score.metric) for score in scores)
    return Stream(
        stages=stages,
        baseline=by_index.get(BEFORE),
        tasks=list(dict.fromkeys(task for record in reversed(records) for task in record.scores)),
        score="accuracy" if accurate and scores else "loss",
    )


def read_stream(events: Iterable[Record]) -> Stream | None:
    """The stream that a run's events tell of; None before the end of its first stage, and without one."""
    records = [StageRecord.from_values(event) for event in events if event["event"] == "stage"]
    stream = stream_of(records)
    return stream if stream.stages else None


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
