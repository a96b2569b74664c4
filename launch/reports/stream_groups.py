"""Runs of streams that differ in nothing but their seed, as one: means and deviations of what they reached."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from continual.metrics import Entry
from launch.reports.history import History
from launch.watching.stage_records import Stream, read_stream

# What neither the result nor the method depends on, beside the seed itself.
_FREE = (
    "run.",
    "tracker",
    "checkpoint.",
    "training.stop_after",
    "continual.save_models",
    "continual.restart_from",
    "continual.stop_after",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A value over seeds."""

    mean: float
    deviation: float | None
    """The sample standard deviation; None for a single run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamGroup:
    """Runs of one method, with a seed each."""

    name: str
    streams: list[Stream]
    """Of the runs that got furthest; they have the same tasks."""
    runs: int = 1
    """How many there are, also those that did not get as far."""

    @property
    def first(self) -> Stream:
        """What stands for all where they are alike, as in their tasks."""
        return self.streams[0]

    def rows(self) -> list[list[Spread | None]]:
        """Accuracies or perplexities after each stage; first before any training, if all runs measured that."""
        grids = [_grid(stream) for stream in self.streams]
        return [[spread(cells) for cells in zip(*rows, strict=True)] for rows in zip(*grids, strict=True)]

    def row_names(self) -> list[str]:
        """What stands before each row."""
        return (["before"] if self.first.baseline else []) + [stage.task for stage in self.first.stages]


def spread(values: Sequence[Entry]) -> Spread | None:
    """Mean and deviation; None if a value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return Spread(mean=fmean(known), deviation=stdev(known) if len(known) > 1 else None)


def shown(stream: Stream, score: Entry) -> Entry:
    """A score as people read it: an accuracy as it is, a loss as a perplexity."""
    return score if score is None or stream.score == "accuracy" else math.exp(min(score, 100.0))


def single(stream: Stream, name: str = "") -> StreamGroup:
    """A run by itself."""
    return StreamGroup(name=name, streams=[stream])


def group_streams(histories: Sequence[History]) -> list[StreamGroup]:
    """The runs that have streams, grouped by their settings but for the seed, in order of appearance."""
    found: dict[str, list[tuple[History, Stream]]] = {}
    for number, history in enumerate(histories):
        stream = read_stream(history.events)
        if stream is not None:
            found.setdefault(_settings(history) or str(number), []).append((history, stream))
    groups = list(found.values())
    names = _names([[history for history, _ in group] for group in groups])
    return [_group(name, [stream for _, stream in group]) for name, group in zip(names, groups, strict=True)]


def families(groups: Sequence[StreamGroup]) -> list[list[StreamGroup]]:
    """Groups that can be compared: of the same tasks and kind of score."""
    found: dict[tuple[str, ...], list[StreamGroup]] = {}
    for group in groups:
        found.setdefault((group.first.score, *group.first.tasks), []).append(group)
    return list(found.values())


def _group(name: str, streams: Sequence[Stream]) -> StreamGroup:
    furthest = max(streams, key=lambda stream: len(stream.stages))
    alike = [stream for stream in streams if _shape(stream) == _shape(furthest)]
    return StreamGroup(name=name, streams=alike, runs=len(streams))


def _shape(stream: Stream) -> tuple[Any, ...]:
    return stream.tasks, [stage.task for stage in stream.stages], stream.score, stream.baseline is None


def _grid(stream: Stream) -> list[list[Entry]]:
    records = [stream.baseline, *stream.stages] if stream.baseline else stream.stages
    return [[shown(stream, score) for score in stream.row(record)] for record in records]


def _settings(history: History) -> str:
    """All settings that make a run what it is, as a text; empty if they are not known."""
    kept = {key: value for key, value in history.config.items() if not key.startswith(_FREE)}
    return json.dumps(kept, sort_keys=True, default=str) if kept else ""


def _names(groups: Sequence[Sequence[History]]) -> list[str]:
    """The shortest kind of name that tells all groups apart."""
    firsts = [group[0] for group in groups]
    for name in (_method, _run_name):
        names = [name(history) for history in firsts]
        if all(names) and len(set(names)) == len(names):
            return names
    return [history.name for history in firsts]


def _method(history: History) -> str:
    method = str(history.config.get("continual.method", ""))
    full_rank = "lora" in history.config and history.config["lora"] is None
    return f"{method}, full rank" if method and full_rank else method


def _run_name(history: History) -> str:
    return str(history.config.get("run.name", ""))
