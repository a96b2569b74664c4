"""The tables of the study of continual training, made from its document alone."""

from collections.abc import Sequence
from statistics import fmean

from benchmarks.outcome import Document, markdown
from continual.metrics import Entry
from launch.reports.stream_groups import StreamGroup, spread
from launch.reports.stream_tables import Unit, matrix_table, outcome_table
from launch.watching.readings import amount, cell
from launch.watching.stage_records import StageRecord, Stream, stream_of

OWN = "per_task"
"""The method whose scores are each task's own baseline."""
_POINTS = Unit(name="points", scale=100.0, digits=1)
_NATS = Unit(name="nats", scale=1.0, digits=3)


def groups_of(found: Document) -> list[StreamGroup]:
    """The runs of each method over its seeds."""
    streams: dict[str, list[Stream]] = {}
    for run in found["runs"]:
        records = [StageRecord.from_values(values) for values in run["stages"]]
        streams.setdefault(run["method"], []).append(stream_of(records))
    return [StreamGroup(name=method, streams=of, runs=len(of)) for method, of in streams.items()]


def tables(found: Document) -> str:
    """All of them: methods side by side, against each task's own baseline, costs, and each method's matrix."""
    groups = groups_of(found)
    parts = [_told("Methods", *outcome_table(groups))]
    own = next((group for group in groups if group.name == OWN), None)
    if own is not None and len(groups) > 1:
        parts.append(_against(groups, own))
    parts.append(_costs(groups))
    parts += [_told(f"After each task: {group.name}", *matrix_table(group)) for group in groups]
    return "\n\n".join(parts)


def _told(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return f"**{title}**\n\n{markdown(columns, [[cell(value) for value in row] for row in rows])}"


def _against(groups: Sequence[StreamGroup], own: StreamGroup) -> str:
    """How far each method's last score on each task is from that of a model of its own, seed by seed."""
    accuracy = own.first.score == "accuracy"
    unit = _POINTS if accuracy else _NATS
    rows: list[list[object]] = []
    for group in groups:
        if group is not own:
            pairs = [_difference(one, other) for one, other in zip(group.streams, own.streams, strict=True)]
            rows.append([group.name, *(unit.text(spread(column)) for column in zip(*pairs, strict=True))])
    word = "accuracy" if accuracy else "loss"
    title = f"Last {word} less that of a model per task ({unit.name}; {'higher' if accuracy else 'lower'} is better)"
    return _told(title, ["method", *own.first.tasks], rows)


def _difference(stream: Stream, own: Stream) -> list[Entry]:
    last, best = dict(zip(stream.tasks, stream.row(stream.stages[-1]), strict=True)), own.row(own.stages[-1])
    pairs = [(last.get(task), score) for task, score in zip(own.tasks, best, strict=True)]
    return [None if one is None or score is None else one - score for one, score in pairs]


def _costs(groups: Sequence[StreamGroup]) -> str:
    """What whole runs took: means over seeds, the largest peak, and the method's memory after the last stage."""
    rows: list[list[object]] = []
    for group in groups:
        runs = [stream.stages for stream in group.streams]
        rows.append(
            [
                group.name,
                f"{fmean(sum(stage.seconds for stage in stages) for stages in runs):.0f}",
                amount(max(stage.peak_memory_bytes for stages in runs for stage in stages), "B"),
                amount(fmean(stages[-1].method_bytes for stages in runs), "B"),
            ]
        )
    return _told("Costs", ["method", "seconds", "peak memory", "method state"], rows)
