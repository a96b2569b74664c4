"""The figures of a report. Each function draws one and knows nothing of files; launch/report.py writes them.

Restarts are light lines behind the data, the end of a warm start is a dotted one. Between runs a colour is a run;
within one it is what the colour bar says.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from launch.reports.history import History, Series
from launch.watching.records import Record
from launch.watching.spectra import select_modules

_RUNS = mpl.color_sequences["tab10"]
_RESTARTS = mpl.colormaps["viridis"]
_LAYERS = mpl.colormaps["plasma"]
_DECADES = 4  # of singular values that are shown below the largest
_MOST_MARKS = 60  # restarts beyond this number would make a grey wall


def loss_figure(histories: Sequence[History]) -> Figure:
    """Loss and perplexity over steps, in training and in validation."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for number, history in enumerate(histories):
        colour, prefix = _RUNS[number % 10], f"{history.name}: " if len(histories) > 1 else ""
        raw, smooth, validation = history.series("loss"), smoothed(history.series("loss")), history.validation()
        for axes, of in zip(panels, _LOSS_SCALES, strict=True):
            axes.plot(raw[0], [of(value) for value in raw[1]], color=colour, alpha=0.2, linewidth=0.8)
            axes.plot(smooth[0], [of(value) for value in smooth[1]], color=colour, label=f"{prefix}training")
            if validation[0]:
                other = colour if prefix else _RUNS[1]
                values = [of(value) for value in validation[1]]
                style: dict[str, Any] = {"marker": "o", "markersize": 4, "markerfacecolor": "white"}
                axes.plot(validation[0], values, "--", color=other, label=f"{prefix}validation", **style)
    _finish(panels[0], histories, "loss (nats per token)")
    _finish(panels[1], histories, "perplexity (logarithmic)")
    panels[1].set_yscale("log")
    panels[1].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    panels[1].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panels[1].yaxis.set_minor_locator(NullLocator())
    _legend(figure, panels[0], histories)
    return figure


def learning_rate_figure(histories: Sequence[History]) -> Figure:
    """Learning rate over steps."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, history in enumerate(histories):
        width = 1.4 + (len(histories) - 1 - number)  # runs with the same schedule stay visible side by side
        axes.plot(*history.series("lr"), color=_RUNS[number % 10], linewidth=width, label=history.name)
    _finish(axes, histories, "learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    _legend(figure, axes, histories)
    return figure


def throughput_figure(histories: Sequence[History]) -> Figure:
    """Tokens per second over steps, and memory and the share of the device's peak where they are known."""
    wanted = (
        ("tokens_per_second", "tokens per second", 1.0),
        ("memory_bytes", "memory (GB)", 1e-9),
        ("mfu", "executed FLOPs (% of peak)", 100.0),
    )
    shown = [entry for entry in wanted if any(history.series(entry[0])[0] for history in histories)] or wanted[:1]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (key, title, scale) in zip(panels, shown, strict=True):
        for number, history in enumerate(histories):
            steps, values = history.series(key)
            scaled = [value * scale for value in values]
            colour = _RUNS[number % 10]
            axes.plot(steps, scaled, color=colour, alpha=0.2, linewidth=0.8)
            axes.plot(*smoothed((steps, scaled)), color=colour, label=history.name)
        _finish(axes, histories, title)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    _legend(figure, panels[0], histories)
    return figure


def spectra_figure(history: History) -> Figure:
    """Singular values of W - W_start: a row per layer, a column per kind of module, a line per merge."""
    layers = history.layers()
    rows = _grid(select_modules(layers, "sample"))
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    figure = Figure(figsize=(2.3 * len(kinds) + 1.2, 2.1 * len(rows) + 1.0), layout="constrained")
    panels = figure.subplots(len(rows), len(kinds), squeeze=False, sharey=True)
    merges = [record["restart"] for record in history.spectra]
    colour = _bar(figure, panels, merges, "syncs" if history.syncs() else "restart", _RESTARTS)
    top = max((max(record["singular_values"], default=0.0) for record in history.spectra), default=0.0) or 1.0
    for line, (row, modules) in zip(panels, rows.items(), strict=True):
        for axes, kind in zip(line, kinds, strict=True):
            for record in layers.get(modules.get(kind, ""), []):
                values = record["singular_values"]
                place = range(1, len(values) + 1)
                axes.plot(place, values, color=colour(record["restart"]), linewidth=1.2)
            if rank := drawn_rank(history):
                axes.axvline(rank, color="0.5", linestyle=":", linewidth=1)
            open_axes(axes)
        line[0].set_ylabel(f"{row}\nsingular value".strip())
    for axes, kind in zip(panels[0], kinds, strict=True):
        axes.set_title(kind, fontsize="small")
    panels[0][0].set_yscale("log")
    panels[0][0].set_ylim(top * 10**-_DECADES, top * 1.6)
    for axes in panels[-1]:
        axes.set_xlabel("index")
    return figure


def rank_figure(history: History) -> Figure:
    """Effective and numerical rank of W - W_start over steps: a column per kind of module, a line per layer."""
    rows = _grid(history.layers())
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    figure = Figure(figsize=(2.3 * len(kinds) + 1.2, 5.4), layout="constrained")
    panels = figure.subplots(2, len(kinds), squeeze=False, sharex=True, sharey="row")
    colour = _bar(figure, panels, range(len(rows)), "layer, in order of depth", _LAYERS)
    for depth, modules in enumerate(rows.values()):
        for column, kind in enumerate(kinds):
            records = history.layers().get(modules.get(kind, ""), [])
            steps = [record["step"] for record in records]
            for line, key in zip(panels, ("effective_rank", "numerical_rank"), strict=True):
                values = [record[key] for record in records]
                line[column].plot(steps, values, ".-", color=colour(depth), linewidth=1.1, markersize=4)
            if bound := rank_bound(history, records):
                panels[1][column].plot(steps, bound, color="0.5", linestyle=":", linewidth=1)
    for column, kind in enumerate(kinds):
        panels[0][column].set_title(kind, fontsize="small")
        panels[1][column].set_xlabel("step")
    panels[0][0].set_ylabel("effective rank")
    panels[1][0].set_ylabel("numerical rank")
    for axes in panels.flat:
        open_axes(axes)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    return figure


def mean_rank_figure(histories: Sequence[History]) -> Figure:
    """Effective rank of W - W_start over steps, the mean of all measured modules: a line per run."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, history in enumerate(histories):
        if history.spectra:
            axes.plot(*mean_effective_rank(history), ".-", color=_RUNS[number % 10], label=history.name)
    _finish(axes, [], "mean effective rank")
    axes.set_ylim(bottom=0)
    _legend(figure, axes, histories)
    return figure


def smoothed(series: Series) -> Series:
    """The running mean over a fiftieth of the points, at the middle of each window."""
    steps, values = series
    half, count = len(values) // 100, len(values)
    sums = [0.0, *accumulate(values)]
    windows = [(max(0, at - half), min(count, at + half + 1)) for at in range(count)]
    return steps, [(sums[end] - sums[start]) / (end - start) for start, end in windows]


def mean_effective_rank(history: History) -> Series:
    """The mean over modules of the effective rank at each measured step."""
    found: dict[int, list[float]] = {}
    for record in history.spectra:
        found.setdefault(record["step"], []).append(record["effective_rank"])
    return sorted(found), [fmean(found[step]) for step in sorted(found)]


def rank_bound(history: History, records: Sequence[Record]) -> list[int]:
    """What the rank of a module's update cannot exceed: ranks of all factors so far; empty if it is not known."""
    rank = drawn_rank(history)
    if rank is None:
        return []
    return [min(rank * _draws(history, record["restart"]), *record["shape"]) for record in records]


def drawn_rank(history: History) -> int | None:
    """The adapter rank, with LTE that of all heads together: what a single merge cannot pass; None if not known."""
    told = history.config
    if any(key.startswith("lora.rank_pattern.") for key in told):
        return None
    rank, ranks = told.get("lora.rank"), told.get("lte.ranks")
    if isinstance(ranks, list):
        return sum(ranks)
    together = (
        1 if told.get("lte.exchange") == "shared" else told.get("lte.heads", 1)
    )  # the mean of products with one down
    return rank * together if isinstance(rank, int) else None


def _draws(history: History, merges: int) -> int:
    """How many sets of factors so many merges can have taken from."""
    told = history.config
    if "relora.every" in told:
        return merges
    if told.get("lte.reset") == "none" and told.get("lte.outer") in (None, "none"):
        return 1  # the merges telescope
    return -(-merges // (told.get("lte.reset_every") or 1))


def _grid(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Module names by their layer, which ends with the first number, and by what comes after it, their kind."""
    rows: dict[str, dict[str, str]] = {}
    for name in names:
        parts = name.split(".")
        end = next((place for place, part in enumerate(parts, start=1) if part.isdigit()), 0)
        rows.setdefault(".".join(parts[:end]), {})[".".join(parts[end:])] = name
    return rows


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 100.0))


_LOSS_SCALES: tuple[Callable[[float], float], ...] = (float, _perplexity)


def _bar(figure: Figure, panels: Any, values: Sequence[int], label: str, colours: Colormap) -> Callable[[int], Any]:
    """Draw a colour bar over whole numbers; return what tells the colour of one."""
    low, high = min(values, default=0), max(values, default=1)
    scale = Normalize(low, max(high, low + 1))
    ticks = MaxNLocator(integer=True)
    figure.colorbar(ScalarMappable(scale, colours), ax=panels, label=label, aspect=30, pad=0.01, ticks=ticks)
    return lambda value: colours(float(scale(value)))


def _finish(axes: Axes, histories: Sequence[History], title: str) -> None:
    open_axes(axes)
    axes.set_xlabel("step")
    axes.set_ylabel(title)
    axes.margins(x=0.01)
    for number, history in enumerate(histories):
        colour = "0.5" if len(histories) == 1 else _RUNS[number % 10]
        marks = history.marks("restart")
        for step in marks if len(marks) <= _MOST_MARKS else []:
            axes.axvline(step, color=colour, alpha=0.25, linewidth=1, zorder=0)
        for step in history.marks("warm_start_end"):
            axes.axvline(step, color=colour, alpha=0.5, linewidth=1, linestyle=":", zorder=0)


def open_axes(axes: Axes) -> None:
    """Take away what frames the data needlessly, and let a grid help to read values."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.93", zorder=0)
    axes.set_axisbelow(True)


def _legend(figure: Figure, axes: Axes, histories: Sequence[History]) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=max(2, min(4, len(histories))), frameon=False)
