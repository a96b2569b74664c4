"""The figures of streams beside their matrix: scores over the stages, forgetting of each task, what stages cost.

Each function draws groups of runs that have the same tasks, and knows nothing of files; launch/reports/stream_report.py
says which are drawn. Between groups a colour is a group; of a single one it is a task.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter, StrMethodFormatter

from continual.metrics import forgetting_by_task, last_score
from launch.reports.figures import open_axes
from launch.reports.stream_groups import Spread, StreamGroup, shown, spread
from launch.watching.readings import amount
from launch.watching.stage_records import StageRecord, Stream

_FEW = mpl.color_sequences["tab10"]
_MANY = mpl.colormaps["viridis"]
_MEAN = "#222222"
_ACROSS = 4  # panels side by side
_BARS: dict[str, Any] = {"capsize": 2, "elinewidth": 1, "capthick": 1}
Point = tuple[float, Spread]


def curves_figure(groups: Sequence[StreamGroup]) -> Figure:
    """The score on each task over the stages: of one group in one panel, of several in a panel for each task."""
    return _curves_of_tasks(groups[0]) if len(groups) == 1 else _curves_of_groups(groups)


def forgetting_figure(groups: Sequence[StreamGroup]) -> Figure:
    """How far each task's last score is below its best: bars for each task, side by side for groups."""
    first = groups[0].first
    series = []
    for group in groups:
        by_task = [forgetting_by_task(stream.matrix) for stream in group.streams]
        series.append([spread([found.get(task) for found in by_task]) for task in range(len(first.tasks))])
    kept = [task for task in range(len(first.tasks)) if any(values[task] for values in series)]
    figure = Figure(
        figsize=(max(5.5, min(13.0, 1.8 + len(kept) * (0.35 + 0.17 * len(groups)))), 3.6), layout="constrained"
    )
    axes = figure.subplots()
    _bars(axes, groups, [[values[task] for task in kept] for values in series], [first.tasks[task] for task in kept])
    accuracy = first.score == "accuracy"
    axes.set_ylabel("forgetting: best - last accuracy" if accuracy else "forgetting: last - best loss (nats)")
    if accuracy:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(figure, axes, len(groups))
    return figure


def costs_figure(groups: Sequence[StreamGroup]) -> Figure:
    """Seconds and peak memory of each stage, and the size of the method's state after it."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    wanted: tuple[tuple[str, str, Callable[[float, Any], str] | None], ...] = (
        ("seconds", "seconds of a stage", None),
        ("peak_memory_bytes", "peak memory so far", lambda value, _: amount(value, "B")),
        ("method_bytes", "state of the method", lambda value, _: amount(value, "B")),
    )
    for axes, (key, title, form) in zip(panels, wanted, strict=True):
        for number, group in enumerate(groups):
            stages = zip(*(stream.stages for stream in group.streams), strict=True)
            points = [(_place(group.first, alike[0]), spread([getattr(one, key) for one in alike])) for alike in stages]
            _line(axes, [(at, value) for at, value in points if value], color=_FEW[number % 10], label=group.name)
        axes.set_ylabel(title)
        axes.set_ylim(0, 1.05 * axes.dataLim.ymax or 1.0)
        if form is not None:
            axes.yaxis.set_major_formatter(form)
        open_axes(axes)
        _stages(axes, groups)
    _legend(figure, panels[0], len(groups))
    return figure


def _curves_of_tasks(group: StreamGroup) -> Figure:
    tasks = group.first.tasks
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, task in enumerate(tasks):
        points, origin = _points(group, number), _origin(group.first, task)
        colour = _FEW[number] if len(tasks) <= len(_FEW) else _MANY(number / (len(tasks) - 1))
        _line_from(axes, points, origin, color=colour, label=task)
    _line(axes, _means(group), color=_MEAN, linewidth=2.2, label="mean of learned tasks", zorder=4)
    _finish(axes, [group])
    axes.legend(
        frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5), ncols=1 + len(tasks) // 14
    )
    return figure


def _curves_of_groups(groups: Sequence[StreamGroup]) -> Figure:
    titles = [*groups[0].first.tasks, "mean of learned tasks"]
    down = -(-len(titles) // _ACROSS)
    across = -(-len(titles) // down)
    figure = Figure(figsize=(3.4 * across, 2.7 * down + 0.6), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=groups[0].first.score == "accuracy")
    for place, axes in enumerate(panels.flat):
        if place >= len(titles):
            axes.set_visible(False)
            continue
        for number, group in enumerate(groups):
            mean = place == len(titles) - 1
            points = _means(group) if mean else [point for point in _points(group, place) if point[0] >= 0]
            origin = 0 if mean else _origin(group.first, titles[place])
            _line_from(axes, points, origin, color=_FEW[number % 10], label=group.name)
            if len(group.first.stages) == 1 and points:  # all tasks at once: a level to compare with
                axes.axhline(points[-1][1].mean, color=_FEW[number % 10], linestyle="--", linewidth=1, alpha=0.7)
        _finish(axes, groups)
        axes.set_title(titles[place], fontsize="medium", loc="left")
        if place % across:
            axes.set_ylabel("")
        axes.tick_params(labelbottom=place + across >= len(titles))
    _legend(figure, panels.flat[0], len(groups))
    return figure


def _points(group: StreamGroup, task: int) -> list[Point]:
    """A task's score after each stage, first before any training."""
    values = [row[task] for row in group.rows()]
    return [(place, value) for place, value in zip(_places(group), values, strict=True) if value is not None]


def _means(group: StreamGroup) -> list[Point]:
    """The mean score of the tasks learned so far after each stage; of perplexities, that of the mean loss."""
    found = []
    for number, place in enumerate(_places(group)[-len(group.first.stages) :]):
        parts = [
            Stream(stages=one.stages[: number + 1], baseline=None, tasks=one.tasks, score=one.score)
            for one in group.streams
        ]
        value = spread([shown(part, last_score(part.matrix)) for part in parts])
        if value is not None:
            found.append((place, value))
    return found


def _places(group: StreamGroup) -> list[float]:
    stages: list[float] = [_place(group.first, stage) for stage in group.first.stages]
    return [-1, *stages] if group.first.baseline else stages


def _place(stream: Stream, stage: StageRecord) -> int:
    """Where a stage stands: at the last task that it learned, so that joint training stands at the end."""
    return max((stream.tasks.index(task) for task in stage.learned if task in stream.tasks), default=stage.index)


def _origin(stream: Stream, task: str) -> float:
    return next((_place(stream, stage) for stage in stream.stages if task in stage.learned), math.inf)


def _line_from(axes: Axes, points: Sequence[Point], origin: float, **style: Any) -> None:
    """A line that is faint until a task is learned."""
    early = [point for point in points if point[0] <= origin]
    if len(early) > 1:
        _line(axes, early, **{**style, "label": None, "linestyle": ":", "alpha": 0.6, "markersize": 3})
    _line(axes, points[max(0, len(early) - 1) :], **style)


def _line(axes: Axes, points: Sequence[Point], **style: Any) -> None:
    """A line through means, with bars of a deviation up and down."""
    places = [place for place, _ in points]
    means = [value.mean for _, value in points]
    known = [value.deviation for _, value in points if value.deviation is not None]
    bars = {"yerr": known, **_BARS} if known and len(known) == len(points) else {}
    axes.errorbar(places, means, **{"marker": "o", "markersize": 4, "linewidth": 1.4, **style, **bars})


def _bars(
    axes: Axes, groups: Sequence[StreamGroup], series: Sequence[Sequence[Spread | None]], names: Sequence[str]
) -> None:
    width = 0.8 / len(groups)
    for number, (group, values) in enumerate(zip(groups, series, strict=True)):
        if not any(values):  # trained on all tasks at once
            continue
        places = [place + (number - (len(groups) - 1) / 2) * width for place in range(len(values))]
        means = [math.nan if value is None else value.mean for value in values]
        errors = [0.0 if value is None or value.deviation is None else value.deviation for value in values]
        error: dict[str, Any] = {"yerr": errors, "error_kw": _BARS} if any(errors) else {}
        axes.bar(places, means, 0.92 * width, color=_FEW[number % 10], label=group.name, **error)
    open_axes(axes)
    _names(axes, dict(enumerate(names)))


def _finish(axes: Axes, groups: Sequence[StreamGroup]) -> None:
    open_axes(axes)
    _stages(axes, groups)
    if groups[0].first.score == "accuracy":
        axes.set_ylabel("accuracy")
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        return
    axes.set_ylabel("perplexity")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8) if high < 6 * low else (1, 2, 5))
    )
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _stages(axes: Axes, groups: Sequence[StreamGroup]) -> None:
    """Name the stages on the x axis."""
    names: dict[int, str] = {}
    for group in sorted(groups, key=lambda group: -len(group.first.stages)):
        for stage in group.first.stages:
            names.setdefault(_place(group.first, stage), stage.task)
    if len(groups) == 1 and groups[0].first.baseline:
        names[-1] = "before"
    _names(axes, names)


def _names(axes: Axes, names: dict[int, str]) -> None:
    slant = max(map(len, names.values()), default=0) * len(names) > 40
    style: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if slant else {}
    axes.set_xticks(list(names), list(names.values()), fontsize="small", **style)


def _legend(figure: Figure, axes: Axes, groups: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if groups > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(8, groups), frameon=False)
