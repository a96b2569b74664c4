"""The pictures of the study of LTE: loss against what it costs, and how the final loss depends on heads and rhythm."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lte_methods import Family
from benchmarks.outcome import Document
from launch.watching.readings import amount

_COLOURS = {
    Family.ddp.value: "#222222",
    Family.relora.value: "#0072b2",
    Family.lte_none.value: "#e69f00",
    Family.lte_factors.value: "#d55e00",
    Family.diloco.value: "#009e73",
}
_LINES = ("-", "--", ":", "-.")  # for the rhythms, in the order of the study
_STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}


def draw_curves(study: Document, path: Path) -> None:
    """Loss against tokens, bytes and time, for the number of machines at which rates were chosen."""
    machines, _ = study["settings"]["reference"]
    rows = [row for row in study["rows"] if row["machines"] == machines]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(13, 5.2), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        titles = ("tokens (thousands)", f"sent by one of {machines} machines", "seconds on a slow link, computed")
        for axes, key, title in zip(panels, ("tokens", "sent", "seconds"), titles, strict=True):
            for row in rows:
                _curve(axes, study, row, key)
            axes.set_xlabel(title)
            axes.grid(axis="y", color="0.93")
            axes.set_axisbelow(True)
        panels[0].xaxis.set_major_formatter(lambda value, _: f"{value / 1e3:g}")
        panels[1].set_xscale("log")
        panels[1].xaxis.set_major_formatter(lambda value, _: amount(value, "B"))
        panels[2].set_xscale("log")
        panels[2].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panels[0].set_ylabel("validation loss (nats per byte)")
        panels[0].set_ylim(*_limits(rows))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        _save(figure, path)


def draw_grid(study: Document, path: Path) -> None:
    """The final loss over the number of heads, a panel for each number of steps between syncs."""
    rhythms = study["settings"]["rhythms"]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.2 * len(rhythms) + 1, 4.4), layout="constrained")
        panels = figure.subplots(1, len(rhythms), sharey=True, squeeze=False)[0]
        for axes, every in zip(panels, rhythms, strict=True):
            for family, colour in _COLOURS.items():
                rows = [row for row in study["rows"] if row["method"] == family]
                if not Family(family).has_heads:
                    axes.axhline(rows[0]["val_loss"], color=colour, linestyle="--", linewidth=1.2, label=family)
                    continue
                points = sorted((row["machines"], row["val_loss"]) for row in rows if row["every"] == every)
                axes.plot(*zip(*points, strict=True), "o-", color=colour, label=family)
            places = study["settings"]["machines"]
            axes.set_xscale("log")
            axes.set_xticks(places, [str(place) for place in places])
            axes.set_xticks([], minor=True)
            axes.set_xlabel("heads")
            axes.set_title(f"a sync every {every} steps" if every > 1 else "a sync after every step")
            axes.grid(axis="y", color="0.93")
        panels[0].set_ylabel("final validation loss (nats per byte)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
        _save(figure, path)


def _curve(axes: Axes, study: Document, row: dict[str, Any], key: str) -> None:
    points = [(point[key], point["loss"]) for point in row["curve"] if key == "tokens" or point[key] > 0]
    heads = Family(row["method"]).has_heads
    line = _LINES[list(study["settings"]["rhythms"]).index(row["every"]) % len(_LINES)] if heads else "-"
    label = f"{row['method']}, T = {row['every']}" if heads else row["method"]
    style: dict[str, Any] = {"linewidth": 1.6, "marker": "o", "markersize": 2.5, "label": label}
    axes.plot(*zip(*points, strict=True), line, color=_COLOURS[row["method"]], **style)


def _limits(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """From the lowest loss to where most are after a sixth of the run; what comes earlier would flatten the rest."""
    ends = [row["curve"][-1]["loss"] for row in rows]
    early = [row["curve"][max(1, len(row["curve"]) // 6)]["loss"] for row in rows]
    margin = 0.03 * (max(early) - min(ends))
    return min(ends) - margin, max(early) + margin


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
