"""The figures of LTE's syncs, from the sync events of a run: how heads agree, what they merge, what it costs.

Each function draws one and knows nothing of files; launch/report.py writes them.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from launch.reports.figures import mean_effective_rank, open_axes, rank_bound
from launch.reports.history import History, Series
from launch.watching.readings import amount
from launch.watching.records import Record

_FEW = mpl.color_sequences["tab10"]
_MANY = mpl.colormaps["viridis"]
_MEAN = "#222222"
_LINE: dict[str, Any] = {"marker": ".", "markersize": 4, "linewidth": 1.2}


def by_head(syncs: Sequence[Record], key: str) -> dict[int, Series]:
    """What sync events list for the heads, as a series for each; a head has no point where it did not take part."""
    found: dict[int, Series] = {}
    for record in syncs:
        values = record[key]
        for head, value in zip(record.get("members") or range(len(values)), values, strict=True):
            if value is not None:
                steps, told = found.setdefault(head, ([], []))
                steps.append(record["step"])
                told.append(value)
    return dict(sorted(found.items()))


def sync_shares(history: History) -> Series:
    """Which share of the time so far syncs took, at each of them; validation and checkpoints count on neither side."""
    places, training, tokens = [0], [0.0], 0
    for record in history.steps:
        if record.get("tokens_per_second"):
            places.append(record["step"])
            training.append(training[-1] + (record["tokens"] - tokens) / record["tokens_per_second"])
            tokens = record["tokens"]
    steps = [record["step"] for record in history.syncs()]
    spent = accumulate(record["seconds"] for record in history.syncs())
    trained = [training[bisect_right(places, step) - 1] for step in steps]
    return steps, [lost / (lost + kept) for lost, kept in zip(spent, trained, strict=True)]


def agreement_figure(history: History) -> Figure:
    """Loss and norm of change of each head, cosines between heads' changes, and how much their mean shrinks."""
    syncs = history.syncs()
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    (losses, norms), (cosines, shrinkage) = figure.subplots(2, 2, sharex=True)
    for axes, key, title in (
        (losses, "losses", "loss of the last update (nats per token)"),
        (norms, "delta_norms", "norm of a head's change"),
    ):
        heads = by_head(syncs, key)
        for place, (head, series) in enumerate(heads.items()):
            axes.plot(*series, color=_colour(place, len(heads)), label=f"head {head}", **_LINE)
        _finish(axes, title)
    low, high = (_series(syncs, f"cosine_{end}") for end in ("min", "max"))
    if low[0]:
        cosines.fill_between(low[0], low[1], high[1], color=_FEW[0], alpha=0.2, linewidth=0, label="all pairs")
        cosines.plot(*_series(syncs, "cosine_mean"), color=_FEW[0], label="mean", **_LINE)
        cosines.legend(frameon=False, fontsize="small")
    cosines.axhline(0, color="0.5", linestyle=":", linewidth=1)
    _finish(cosines, "cosine between two heads' changes")
    shrinkage.plot(*_series(syncs, "shrinkage"), color=_MEAN, **_LINE)
    shrinkage.plot(*_orthogonal(syncs), color="0.5", linestyle=":", linewidth=1, label="if they were orthogonal")
    shrinkage.legend(frameon=False, fontsize="small")
    _finish(shrinkage, "norm of the mean change / mean norm")
    shrinkage.set_ylim(0, 1.05)
    norms.set_ylim(bottom=0)
    for axes in (cosines, shrinkage):
        axes.set_xlabel("step")
    handles, labels = losses.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(8, max(1, len(labels))), frameon=False)
    return figure


def sync_rank_figure(history: History) -> Figure:
    """Effective rank of what each sync merges, and of W - W_start where it was decomposed."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(*_series(history.syncs(), "effective_rank"), color=_FEW[0], label="of the merged change", **_LINE)
    if history.spectra:
        steps, ranks = mean_effective_rank(history)
        axes.plot(steps, ranks, "o-", color=_FEW[1], markersize=4, label="of W - W_start")
        module = next(iter(history.layers().values()))
        if bound := rank_bound(history, module):
            steps = [record["step"] for record in module]
            axes.plot(steps, bound, color="0.5", linestyle=":", linewidth=1, label="most that W - W_start can have")
    _finish(axes, "effective rank, mean over layers")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def sync_cost_figure(history: History) -> Figure:
    """Bytes and seconds of each sync, and the share of the time that all of them took."""
    syncs = history.syncs()
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    sizes, seconds, shares = figure.subplots(1, 3)
    sizes.plot(*_series(syncs, "bytes"), color=_FEW[0], **_LINE)
    sizes.yaxis.set_major_formatter(lambda value, _: amount(value, "B"))
    _finish(sizes, "sent by one head in a sync")
    seconds.plot(*_series(syncs, "seconds"), color=_FEW[0], **_LINE)
    _finish(seconds, "seconds of a sync")
    shares.plot(*sync_shares(history), color=_FEW[0], **_LINE)
    shares.yaxis.set_major_formatter(PercentFormatter(1.0))
    _finish(shares, "share of the time in syncs, so far")
    for axes in (sizes, seconds, shares):
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
    return figure


def _series(syncs: Sequence[Record], key: str) -> Series:
    points = [(record["step"], record[key]) for record in syncs if record.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _orthogonal(syncs: Sequence[Record]) -> Series:
    """The shrinkage of orthogonal changes of the norms and weights that there were."""
    steps, told = [], []
    for record in syncs:
        norms = record["delta_norms"]
        parts = [norm * weight for norm, weight in zip(norms, record.get("weights") or [1.0] * len(norms), strict=True)]
        if any(parts):
            steps.append(record["step"])
            told.append(math.hypot(*parts) / sum(parts))
    return steps, told


def _colour(place: int, heads: int) -> Any:
    return _FEW[place] if heads <= len(_FEW) else _MANY(place / (heads - 1))


def _finish(axes: Axes, title: str) -> None:
    open_axes(axes)
    axes.set_ylabel(title)
    axes.margins(x=0.02)
