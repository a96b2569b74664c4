"""What a report says of runs with streams: which figures it draws, and which tables it writes."""

from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure

from launch.reports import stream_figures
from launch.reports.stream_groups import StreamGroup, families
from launch.reports.stream_heat import matrix_figure
from launch.reports.stream_tables import Table, audit_table, cost_table, matrix_table, outcome_table, report_table

Drawing = tuple[str, str, str, Figure]
"""File name, title, caption and figure."""


def draw_streams(groups: Sequence[StreamGroup]) -> Iterable[Drawing]:
    """The figures of each family of groups that can be compared."""
    kinds = families(groups)
    for number, family in enumerate(kinds, start=1):
        suffix = f"_{number}" if len(kinds) > 1 else ""
        for name, title, caption, figure in _draw(family):
            yield f"{name}{suffix}", title, caption, figure


def stream_tables(groups: Sequence[StreamGroup]) -> list[tuple[str, Table]]:
    """Titles and tables, the comparison of methods first."""
    found = [(_outcome_title(family), outcome_table(family)) for family in families(groups)]
    for group in groups:
        of = f", {group.name}" if len(groups) > 1 else ""
        unit = "accuracy" if group.first.score == "accuracy" else "perplexity"
        found.append((f"Score after each stage: {unit}{of}", matrix_table(group)))
        found.append((f"Cost of each stage{of}", cost_table(group)))
        for number, stream in enumerate(group.streams, start=1):
            run = f"{of}, run {number}" if len(group.streams) > 1 else of
            audit, told = audit_table(stream), report_table(stream)
            found += [(f"Forgotten on purpose{run}", audit)] if audit else []
            found += [(f"What the method tells{run}", told)] if told else []
    return found


def _outcome_title(family: Sequence[StreamGroup]) -> str:
    several = any(len(group.streams) > 1 for group in family)
    return "Streams" + (": mean (standard deviation over seeds)" if several else "")


def _draw(groups: Sequence[StreamGroup]) -> Iterable[Drawing]:
    accuracy = groups[0].first.score == "accuracy"
    over = " Means over seeds." if any(len(group.streams) > 1 for group in groups) else ""
    bars = " Bars: a standard deviation over seeds." if over else ""
    score = "Accuracy in percent" if accuracy else "Perplexity"
    yield (
        "matrix",
        "Score after each stage",
        f"{score} on each task. Framed: learned in that stage. Italic: not learned yet, or asked about by a request to "
        f"forget.{over}",
        matrix_figure(groups),
    )
    yield "tasks", "Score of each task", f"Dotted: before it was learned.{bars}", stream_figures.curves_figure(groups)
    if any(group.first.matrix.earlier for group in groups):
        caption = f"Of the tasks that other stages followed.{bars}"
        yield "forgetting", "Forgetting of each task", caption, stream_figures.forgetting_figure(groups)
    yield (
        "stage_costs",
        "What stages cost",
        f"As the main process counts it.{bars}",
        stream_figures.costs_figure(groups),
    )
