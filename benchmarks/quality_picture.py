"""The picture of the quality study: validation loss against tokens, and where each method ends."""

from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.outcome import Document

_COLOURS = {
    "full rank": "#222222",
    "control": "#8c8c8c",
    "LoRA": "#e69f00",
    "LoRA + warm start": "#b35900",
    "ReLoRA": "#56b4e9",
    "ReLoRA + warm start": "#0062a3",
}
_LINES = ("-", "--", ":", "-.")  # for the cycle lengths, in the order of the study


def draw(study: Document, path: Path) -> None:
    """Draw the study into a PNG file."""
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 5.2), layout="constrained")
        curves, ends = figure.subplots(1, 2, width_ratios=(1.6, 1))
        for row in study["rows"]:
            _curves(curves, study, row)
        _ends(ends, study)
        _finish(curves, study)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _at_best(study: Document, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of a method at its best rate, a run per seed."""
    return [run for run in study["runs"] if (run["method"], run["rate"]) == (row["method"], row["best_rate"])]


def _style(study: Document, method: str) -> tuple[str, str]:
    """Colour of the method and line of its cycle length."""
    name, _, cycle = method.partition(", every ")
    return _COLOURS[name], _LINES[list(study["settings"]["cycles"]).index(int(cycle)) if cycle else 0]


def _curves(axes: Axes, study: Document, row: dict[str, Any]) -> None:
    """A thin line per seed, and their mean with the method's name."""
    runs, (colour, line) = _at_best(study, row), _style(study, row["method"])
    for run in runs if len(runs) > 1 else []:
        axes.plot(*zip(*run["curve"], strict=True), line, color=colour, linewidth=0.6, alpha=0.5)
    tokens = [point[0] for point in runs[0]["curve"]]
    means = [fmean(losses) for losses in zip(*([point[1] for point in run["curve"]] for run in runs), strict=True)]
    axes.plot(tokens, means, line, color=colour, linewidth=1.8, marker="o", markersize=3, label=row["method"])


def _ends(axes: Axes, study: Document) -> None:
    """The last loss of each seed as a point, their mean as a bar, in the order of the table from the top."""
    rows = study["rows"]
    for place, row in enumerate(reversed(rows)):
        colour, _ = _style(study, row["method"])
        losses = [run["val_loss"] for run in _at_best(study, row)]
        axes.plot([row["val_loss"]] * 2, [place - 0.28, place + 0.28], color=colour, linewidth=2.5)
        axes.plot(losses, [place] * len(losses), "o", color=colour, markersize=5, alpha=0.7)
        note = f"{row['val_loss']:.3f}"
        axes.annotate(note, (max(losses), place), (9, 0), textcoords="offset points", va="center", color=colour)
    names = [f"{row['method']}\n{row['trainable'] / 1e6:.2f} M train, rate {row['best_rate']:g}" for row in rows]
    axes.set_yticks(range(len(rows)), reversed(names), fontsize=8.5)
    axes.margins(x=0.25, y=0.06)
    axes.grid(axis="x", color="0.93")
    axes.set_axisbelow(True)
    axes.set_xlabel("final validation loss (nats per byte)")


def _finish(axes: Axes, study: Document) -> None:
    ends = [run["curve"][-1][1] for row in study["rows"] for run in _at_best(study, row)]
    sixths = [run["curve"][max(1, len(run["curve"]) // 6)][1] for row in study["rows"] for run in _at_best(study, row)]
    margin = 0.03 * (max(sixths) - min(ends))
    axes.set_ylim(min(ends) - margin, max(sixths) + margin)  # what comes earlier would flatten the rest
    axes.set_xlim(left=0)
    tokens_per_step = study["rows"][0]["tokens"] // study["settings"]["steps"]
    warm_start_tokens = study["settings"]["warm_start_steps"] * tokens_per_step
    axes.axvline(warm_start_tokens, color="0.7", linewidth=1, linestyle=":", zorder=0)
    axes.annotate(
        "end of warm start",
        (warm_start_tokens, 0),
        (4, 6),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color="0.5",
        fontsize=8.5,
    )
    axes.grid(axis="y", color="0.93")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}")
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel("validation loss (nats per byte)")
    axes.legend(frameon=False, fontsize=9)
