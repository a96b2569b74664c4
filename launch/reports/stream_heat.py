"""The heat map of a stream's score matrix: stages down, tasks across, dark where the model is good."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from launch.reports.stream_groups import Spread, StreamGroup

_MOST_NUMBERS = 24  # stages or tasks beyond which cells are too small for numbers
_ACROSS = 14.5  # inches that panels side by side may take
_FRAME: dict[str, Any] = {"edgecolor": "#222222", "linewidth": 1.8, "zorder": 3}
_LEAST_EXCESS = 0.1  # nats that the colours span at least


@dataclass(frozen=True, kw_only=True, slots=True)
class _Colours:
    """What a cell's colour stands for: the accuracy, or how far a perplexity is above its column's best."""

    scale: Normalize
    colours: Colormap
    best: list[float] | None
    """The lowest perplexity on each task; None for accuracies."""

    def value(self, task: int, score: float) -> float:
        return score if self.best is None else math.log(score / self.best[task])


def matrix_figure(groups: Sequence[StreamGroup]) -> Figure:
    """The score on each task after each stage, a panel for each group; a frame marks what a stage learned."""
    tasks, deepest = len(groups[0].first.tasks), max(len(group.row_names()) for group in groups)
    side = _side(tasks)
    width = side * tasks + 1.3
    across = min(len(groups), max(1, int(_ACROSS / width)))
    down = -(-len(groups) // across)
    size = max(5.5, across * width + 1.0), down * (0.72 * side * deepest + 1.3)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    colours = _colours(groups)
    for axes, group in zip(panels.flat, groups, strict=False):
        _draw(axes, group, colours, deepest)
    for axes in panels.flat[len(groups) :]:
        axes.set_visible(False)
    _bar(figure, panels, colours, min(1.0, 4.5 / size[1]))
    return figure


def _side(tasks: int) -> float:
    """Width of a cell in inches."""
    return 0.66 if tasks <= 10 else 0.5 if tasks <= _MOST_NUMBERS else 0.18


def _draw(axes: Axes, group: StreamGroup, colours: _Colours, deepest: int) -> None:
    rows, names, tasks = group.rows(), group.row_names(), group.first.tasks
    numbers = max(len(rows), len(tasks)) <= _MOST_NUMBERS
    learned = [[], *(stage.learned for stage in group.first.stages)][-len(rows) :]
    known: set[str] = set()
    for place, row in enumerate(rows):
        known |= set(learned[place])
        for number, (task, cell) in enumerate(zip(tasks, row, strict=True)):
            _cell(axes, (number, place), cell, colours, words=numbers, faint=task not in known)
            if task in learned[place]:
                axes.add_patch(Rectangle((number - 0.5, place - 0.5), 1, 1, fill=False, **_FRAME))
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    axes.set_ylim(deepest - 0.5, -0.5)
    small = "small" if numbers else "xx-small"
    slant = max(map(len, tasks)) * 0.09 > _side(len(tasks))  # inches
    axes.set_xticks(
        range(len(tasks)), tasks, fontsize=small, rotation=35 if slant else 0, ha="right" if slant else "center"
    )
    axes.set_yticks(range(len(rows)), [name if name == "before" else f"after {name}" for name in names], fontsize=small)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(group.name, fontsize="medium", loc="left")


def _cell(
    axes: Axes, place: tuple[int, int], cell: Spread | None, colours: _Colours, *, words: bool, faint: bool
) -> None:
    left, top = place[0] - 0.5, place[1] - 0.5
    if cell is None:
        axes.add_patch(Rectangle((left, top), 1, 1, facecolor="0.96", edgecolor="white", linewidth=1.5))
        return
    colour = colours.colours(float(colours.scale(colours.value(place[0], cell.mean))))
    axes.add_patch(Rectangle((left, top), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5))
    if words:
        bright = sum(share * part for share, part in zip((0.3, 0.59, 0.11), colour, strict=False)) > 0.55
        text = f"{100 * cell.mean:.1f}" if colours.best is None else _digits(cell.mean)
        told: dict[str, Any] = {"ha": "center", "va": "center", "color": "#222222" if bright else "white"}
        axes.text(*place, text, fontsize="small", style="italic" if faint else "normal", **told)


def _digits(value: float) -> str:
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}" if value < 1e5 else f"{value:.0e}"


def _colours(groups: Sequence[StreamGroup]) -> _Colours:
    """Of accuracies the whole range; of perplexities what learned tasks span, for unlearned ones would hide it."""
    shades = mpl.colormaps["YlGnBu"]
    if groups[0].first.score == "accuracy":
        return _Colours(scale=Normalize(0, 1, clip=True), colours=shades, best=None)
    columns = [
        [cell.mean for group in groups for row in group.rows() if (cell := row[task]) is not None]
        for task in range(len(groups[0].first.tasks))
    ]
    best = [min(column, default=1.0) for column in columns]
    top = max((math.log(score / best[task]) for group in groups for task, score in _learned(group)), default=0.0)
    scale = Normalize(0, max(top, _LEAST_EXCESS), clip=True)
    return _Colours(scale=scale, colours=shades.reversed(), best=best)


def _learned(group: StreamGroup) -> list[tuple[int, float]]:
    """The mean scores on tasks that were learned by then, each with the task's place."""
    found, known = [], set()
    rows = group.rows()[-len(group.first.stages) :]
    for stage, row in zip(group.first.stages, rows, strict=True):
        known |= set(stage.learned)
        told = zip(group.first.tasks, row, strict=True)
        found += [(place, cell.mean) for place, (task, cell) in enumerate(told) if task in known and cell is not None]
    return found


def _bar(figure: Figure, panels: Any, colours: _Colours, share: float) -> None:
    mapped = ScalarMappable(colours.scale, colours.colours)
    if colours.best is None:
        bar = figure.colorbar(mapped, ax=panels, label="accuracy", aspect=25, pad=0.02, shrink=share)
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        return
    label = "perplexity above the task's best (nats)"
    figure.colorbar(mapped, ax=panels, label=label, aspect=25, pad=0.02, shrink=share, extend="max")
