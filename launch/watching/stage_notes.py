"""Tells everybody who watches that a stage has ended: metrics.jsonl, the console, and W&B with the matrix so far."""

from collections.abc import Sequence
from typing import Any

from launch.reports.history import flat
from launch.reports.stream_groups import shown, single
from launch.reports.stream_tables import AUDIT, audit_table, matrix_table
from launch.watching.pictures import pixels
from launch.watching.records import append_records, read_records
from launch.watching.stage_records import BEFORE, StageRecord, Stream, stream_of
from launch.watching.trackers.config import Images
from launch.watching.watch import Watch


def note_stage(watch: Watch, records: Sequence[StageRecord]) -> None:
    """Tell of the newest of a run's stage records, given all so far; the one before any training is one as well."""
    newest, stream = records[-1], stream_of(records)
    watch.event("stage", **newest.values())
    watch.tracker.log({"step": newest.step, **_numbers(newest, stream)})
    if newest.index == BEFORE:
        return
    rows = [[stage.task, *(shown(stream, score) for score in stream.row(stage))] for stage in stream.stages]
    watch.tracker.matrix(["after", *stream.tasks], rows)
    if watch.tracker.images is not Images.none:
        from launch.reports.stream_heat import matrix_figure

        watch.tracker.figures({"matrix": pixels(matrix_figure([single(stream)]))})
    watch.say(_words(newest, stream))


def tell_stream(watch: Watch, records: Sequence[StageRecord]) -> None:
    """Show the whole matrix at a run's end."""
    stream = stream_of(records)
    watch.console.table("Scores after each stage:", *matrix_table(single(stream)))
    audits = audit_table(stream)
    if audits is not None:
        watch.console.table("Forgotten on purpose:", *audits)


def restore_stages(watch: Watch, records: Sequence[StageRecord]) -> None:
    """Write the stages that a checkpoint knows and metrics.jsonl does not, as in a run that branches off another."""
    if watch.metrics is None:
        return
    events = read_records(watch.metrics) if watch.metrics.exists() else []
    written = {event["index"] for event in events if event.get("event") == "stage"}
    lost = [record.values() for record in records if record.index not in written]
    append_records(watch.metrics, *({"event": "stage", **values} for values in lost))


def _numbers(newest: StageRecord, stream: Stream) -> dict[str, int | float]:
    """What W&B draws curves from: the scores on each task, the metrics so far, the audit and the method's report."""
    found: dict[str, Any] = {}
    for task, score in newest.scores.items():
        found |= {f"tasks/{task}/{key}": getattr(score, key) for key in ("loss", "accuracy", "perplexity")}
    if newest.index != BEFORE:
        found |= {f"stream/{key}": value for key, value in stream.summary().items()}
    for name, told in (("audit", newest.audit or {}), ("report", newest.report)):
        found |= {f"{name}/{key}": value for key, value in flat(told).items()}
    return {key: value for key, value in found.items() if isinstance(value, (int, float))}


def _words(newest: StageRecord, stream: Stream) -> str:
    if newest.audit is not None:
        audit = ", ".join(f"{AUDIT[key]} {value:.4f}" for key, value in newest.audit.items() if key in AUDIT)
        return f"stage {newest.task} ended at step {newest.step}: {audit}"
    told = stream.summary()
    key, name = ("last_accuracy", "accuracy") if stream.score == "accuracy" else ("last_perplexity", "perplexity")
    parts = [f"{name} {told[key]:.4g}"] if told[key] is not None else []
    if told["forgetting"] is not None:
        parts.append(f"forgetting {told['forgetting']:.4f}{'' if stream.score == 'accuracy' else ' nats'}")
    return f"stage {newest.task} ended at step {newest.step}: {', '.join(parts)} over the tasks so far"
