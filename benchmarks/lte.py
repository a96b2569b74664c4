"""Training on several machines at equal tokens: gradients summed in every step, or heads that sync rarely.

Full-rank DDP and ReLoRA; LTE with and without new factors; DiLoCo (full-rank heads, Nesterov on their mean change;
arXiv 2311.08105). Loss against tokens, against bytes that a machine sends, and against the time that this would take
on a slow link. The text is what ships with Python.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.lte_costs import FLOPS, LINK, Spending, spending
from benchmarks.lte_methods import FULL, QUICK, Cell, Family, Study, cells, families, reference
from benchmarks.lte_picture import draw_curves, draw_grid
from benchmarks.outcome import Document, document, markdown, write_document
from benchmarks.quality import next_rate
from benchmarks.runs import Result, read_result, run_all
from launch import exits
from launch.reports.history import History, read_history
from launch.watching.readings import amount

Found = dict[tuple[Cell, float], tuple[Result, History]]
"""Finished runs by cell and learning rate."""


def make_runs(study: Study, runs: Path, *, workers: int, apart: bool) -> Found:
    """Make all runs: each family's rates in its reference cell, and beyond them, then all cells at the best of them."""
    found: Found = {}

    def make(wanted: list[tuple[Cell, float]]) -> None:
        new = [run for run in wanted if run not in found]
        jobs = [cell.job(study, runs, rate, apart=apart) for cell, rate in new]
        run_all(jobs, workers=workers)
        found.update(
            (run, (read_result(job.folder), read_history(job.folder))) for run, job in zip(new, jobs, strict=True)
        )

    every = cells(study)
    make([(reference(study, family), rate) for family in families(every) for rate in study.rates[family]])
    for _ in range(study.extensions):
        beyond = [(family, next_rate(losses_by_rate(study, found, family))) for family in families(every)]
        make([(reference(study, family), rate) for family, rate in beyond if rate is not None])
    make([(cell, best_rate(study, found, cell.family)) for cell in every])
    return found


def losses_by_rate(study: Study, found: Found, family: Family) -> dict[float, float]:
    """Validation loss by learning rate, in the family's reference cell."""
    at = reference(study, family)
    return {rate: result.val_loss for (cell, rate), (result, _) in found.items() if cell == at}


def best_rate(study: Study, found: Found, family: Family) -> float:
    """The learning rate that does best there."""
    losses = losses_by_rate(study, found, family)
    return min(losses, key=lambda rate: losses[rate])


def results(study: Study, found: Found) -> Document:
    """The study's document: a row for each cell and number of machines, and what other rates gave."""
    rows = []
    for cell in cells(study):
        rate = best_rate(study, found, cell.family)
        result, history = found[cell, rate]
        for machines in (cell.machines,) if cell.family.has_heads else study.machines:
            spent = spending(cell, study, machines)
            rows.append(_row(cell, rate, result, history, spent))
    rates = [
        {"method": cell.family.value, "machines": cell.machines, "every": cell.every, "rate": rate}
        | {"val_loss": result.val_loss}
        for (cell, rate), (result, _) in found.items()
        if cell == reference(study, cell.family)
    ]
    settings = asdict(study) | {"flops": FLOPS, "link": asdict(LINK)}
    return document("lte", torch.device("cpu"), settings=settings, rows=rows, rates=rates)


def _row(cell: Cell, rate: float, result: Result, history: History, spent: Spending) -> dict[str, Any]:
    last = history.summary["steps"]
    per_step = result.tokens // last
    steps = [tokens // per_step for tokens, _ in result.curve]
    curve = [
        {"tokens": tokens, "loss": loss, "sent": spent.sent(step), "seconds": spent.seconds(step)}
        for step, (tokens, loss) in zip(steps, result.curve, strict=True)
    ]
    ranks = [record for record in history.spectra if record["step"] == last]
    return {
        "method": cell.family.value,
        "machines": spent.machines,
        "every": cell.every,
        "rate": rate,
        "val_loss": result.val_loss,
        "tokens": result.tokens,
        "exchanges": spent.exchanges(last),
        "sent": spent.sent(last),
        "seconds": spent.seconds(last),
        "compute_seconds": last * spent.method.computing,
        "effective_rank": fmean(record["effective_rank"] for record in ranks) if ranks else None,
        "numerical_rank": fmean(record["numerical_rank"] for record in ranks) if ranks else None,
        "cosine": fmean(_told(history, "cosine_mean")) if _told(history, "cosine_mean") else None,
        "shrinkage": fmean(_told(history, "shrinkage")) if _told(history, "shrinkage") else None,
        "curve": curve,
    }


def _told(history: History, key: str) -> list[float]:
    return [record[key] for record in history.syncs() if record.get(key) is not None]


def tables(study: Document) -> str:
    """The study as Markdown: all cells, and the rates that were tried."""
    rows = study["rows"]
    full = {row["machines"]: row for row in rows if row["method"] == Family.ddp.value}
    lines = [
        [
            row["method"],
            str(row["machines"]),
            str(row["every"]),
            f"{row['val_loss']:.3f}",
            amount(row["sent"], "B"),
            f"{full[row['machines']]['sent'] / row['sent']:.3g}",
            f"{row['seconds']:,.0f}",
            f"{row['compute_seconds'] / row['seconds']:.0%}",
            "" if row["effective_rank"] is None else f"{row['effective_rank']:.1f}",
            "" if row["numerical_rank"] is None else f"{row['numerical_rank']:.0f}",
            "" if row["cosine"] is None else f"{row['cosine']:.2f}",
        ]
        for row in rows
    ]
    headers = ["method", "machines", "T", "loss", "sent", "DDP sends", "seconds", "computing", "effective rank"]
    cells_table = markdown([*headers, "rank", "cosine"], lines)
    rates = sorted({one["rate"] for one in study["rates"]})
    losses = {(one["method"], one["rate"]): f"{one['val_loss']:.3f}" for one in study["rates"]}
    methods = dict.fromkeys(one["method"] for one in study["rates"])
    tried = [[method, *(losses.get((method, rate), "") for rate in rates)] for method in methods]
    return f"{cells_table}\n\n{markdown(['loss at rate', *(f'{rate:g}' for rate in rates)], tried)}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lte", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute's worth that only shows that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the curves there (png)")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="draw the final losses there (png)")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="where the runs live; those done are kept")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time (default: cores)")
    parser.add_argument("--apart", action="store_true", help="a process for each head, rather than one for all")
    options = parser.parse_args(argv)
    return exits.run(lambda: _command(options))


def _command(options: argparse.Namespace) -> int:
    study = QUICK if options.quick else FULL
    runs = options.runs or Path("runs") / ("lte-quick" if options.quick else "lte")
    outcome = results(study, make_runs(study, runs, workers=options.workers, apart=options.apart))
    print(tables(outcome))
    if options.json:
        write_document(options.json, outcome)
    if options.picture:
        draw_curves(outcome, options.picture)
    if options.grid:
        draw_grid(outcome, options.grid)
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
