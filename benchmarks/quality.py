"""Does low-rank pre-training reach full-rank quality? Several ways to spend the same tokens, each at its best rate.

Full rank; control (a smaller full-rank model with as many trainable parameters as the low-rank runs train); LoRA
and ReLoRA, with and without a full-rank warm start. The comparison is that of ReLoRA's table 2 (arXiv
2307.05695), on a small model and the text that ships with Python. Every learning rate is swept.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.outcome import Document, document, markdown, write_document
from benchmarks.quality_methods import FULL, QUICK, Method, Study, methods
from benchmarks.quality_picture import draw
from benchmarks.runs import Result, run_all
from launch import exits


def next_rate(losses: dict[float, float]) -> float | None:
    """The rate beyond the best one if that lies at an edge of the sweep, a factor of two away."""
    best = min(losses, key=lambda rate: losses[rate])
    if best == max(losses):
        return 2 * best
    return best / 2 if best == min(losses) else None


Found = dict[tuple[Method, float, int], Result]
"""Results by method, learning rate and seed."""


def sweep(study: Study, runs: Path, *, workers: int) -> Found:
    """Make all runs: the first rates, rates beyond a best one at an edge, and the best rate with further seeds."""
    chosen, first = methods(study), study.seeds[0]
    found: Found = {}

    def make(wanted: list[tuple[Method, float, int]]) -> None:
        new = [run for run in wanted if run not in found]
        jobs = [method.job(runs, rate, seed) for method, rate, seed in new]
        found.update(zip(new, run_all(jobs, workers=workers), strict=True))

    make([(method, method.first_rate * 2**k, first) for k in range(study.rates) for method in chosen])
    for _ in range(study.extensions):
        beyond = [(method, next_rate(losses_by_rate(found, method, first))) for method in chosen]
        make([(method, rate, first) for method, rate in beyond if rate is not None])
    make([(method, best_rate(found, method, first), seed) for seed in study.seeds[1:] for method in chosen])
    return found


def losses_by_rate(found: Found, method: Method, seed: int) -> dict[float, float]:
    """Validation loss by learning rate."""
    return {rate: result.val_loss for (of, rate, at), result in found.items() if (of, at) == (method, seed)}


def best_rate(found: Found, method: Method, seed: int) -> float:
    """The learning rate with the lowest validation loss."""
    losses = losses_by_rate(found, method, seed)
    return min(losses, key=lambda rate: losses[rate])


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of the range."""
    return fmean(values), (max(values) - min(values)) / 2


def results(study: Study, found: Found) -> Document:
    """The study's document: a row per method, and every run with its curve."""
    rows = []
    for method in dict.fromkeys(of for of, _, _ in found):
        rate = best_rate(found, method, study.seeds[0])
        at_best = [found[method, rate, seed] for seed in study.seeds]
        loss, loss_spread = spread([result.val_loss for result in at_best])
        perplexity, perplexity_spread = spread([math.exp(result.val_loss) for result in at_best])
        rates = [of_rate for of, of_rate, _ in found if of == method]
        rows.append(
            {
                "method": method.name,
                "trainable": method.trainable,
                "best_rate": rate,
                "best_is_at_edge": rate in (min(rates), max(rates)),
                "seeds": len(at_best),
                "val_loss": loss,
                "val_loss_half_range": loss_spread,
                "val_perplexity": perplexity,
                "val_perplexity_half_range": perplexity_spread,
                "tokens": at_best[0].tokens,
                "restarts": at_best[0].restarts,
                "seconds": fmean(result.seconds for result in at_best),
            }
        )
    records = [
        {"method": method.name, "rate": rate, "seed": seed, **asdict(result)}
        for (method, rate, seed), result in sorted(found.items(), key=lambda item: (item[0][0].key, *item[0][1:]))
    ]
    return document("quality", torch.device("cpu"), settings=asdict(study), rows=rows, runs=records)


def tables(study: Document) -> str:
    """The study as Markdown: the methods at their best rate, and all the rates tried."""
    first_seed = study["settings"]["seeds"][0]
    best = [
        [
            row["method"],
            f"{row['trainable']:,}",
            f"{row['best_rate']:g}" + (" (edge)" if row["best_is_at_edge"] else ""),
            f"{row['val_loss']:.3f} +- {row['val_loss_half_range']:.3f}",
            f"{row['val_perplexity']:.2f} +- {row['val_perplexity_half_range']:.2f}",
            str(row["restarts"]),
            f"{row['tokens']:,}",
            f"{row['seconds']:.0f}",
        ]
        for row in study["rows"]
    ]
    headers = ["method", "trainable", "best rate", "validation loss", "perplexity", "restarts", "tokens", "seconds"]
    at_first_seed = [run for run in study["runs"] if run["seed"] == first_seed]
    rates = sorted({run["rate"] for run in at_first_seed})
    losses = {(run["method"], run["rate"]): f"{run['val_loss']:.3f}" for run in at_first_seed}
    tried = [[row["method"], *(losses.get((row["method"], rate), "") for rate in rates)] for row in study["rows"]]
    return f"{markdown(headers, best)}\n\n{markdown(['loss at rate', *(f'{r:g}' for r in rates)], tried)}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute's worth that only shows that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the results there (png)")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="where the runs live; those done are kept")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time (default: cores)")
    options = parser.parse_args(argv)
    study = QUICK if options.quick else FULL
    runs = options.runs or Path("runs") / ("quality-quick" if options.quick else "quality")
    return exits.run(lambda: _command(study, runs, options))


def _command(study: Study, runs: Path, options: argparse.Namespace) -> int:
    outcome = results(study, sweep(study, runs, workers=options.workers))
    print(tables(outcome))
    if options.json:
        write_document(options.json, outcome)
    if options.picture:
        draw(outcome, options.picture)
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
