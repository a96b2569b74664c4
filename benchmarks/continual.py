"""Continual training over seeds: every method that has a recipe for a stream, what it keeps, and what it costs.

`python -m benchmarks.continual digits|python_three` runs `experiment=STREAM_METHOD` for each method and seed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.continual_studies import STUDIES, Study
from benchmarks.continual_tables import groups_of, tables
from benchmarks.outcome import Document, document, write_document
from benchmarks.page import write_tables
from benchmarks.runs import run_all
from launch import exits
from launch.reports.history import read_history
from launch.reports.stream_figures import curves_figure
from launch.reports.stream_heat import matrix_figure
from launch.watching.stage_records import StageRecord


def make_runs(
    study: Study, methods: Sequence[str], seeds: Sequence[int], runs: Path, *, workers: int, quick: bool
) -> Document:
    """Make the runs that are not done yet; return what all of them recorded.

    Raises: ConfigError, RunFailed
    """
    jobs = {
        (method, seed): study.job(runs, method, seed, quick=quick) for seed in seeds for method in methods
    }  # a whole table after the first seed
    run_all(list(jobs.values()), workers=workers)
    told = [
        {"method": method, "seed": seed, "stages": _stages(jobs[method, seed].folder)}
        for method in methods
        for seed in seeds
    ]
    settings = {"stream": study.name, "seeds": list(seeds), "quick": quick}
    return document("continual", torch.device("cpu"), settings=settings, runs=told)


def _stages(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's stages, without what the method tells of itself."""
    events = [event for event in read_history(folder).events if event["event"] == "stage"]
    return [StageRecord.from_values({**event, "report": {}}).values() for event in events]


def draw(found: Document, path: Path) -> None:
    """Draw the matrices into a PNG file, and the score of each task into another beside it."""
    groups = groups_of(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    matrix_figure(groups).savefig(path, dpi=130)
    curves_figure(groups).savefig(path.with_name(f"{path.stem}_tasks{path.suffix}"), dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.continual", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stream", choices=STUDIES, help="the stream")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="of the recipes (default: all there are)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    parser.add_argument("--quick", action="store_true", help="a minute's worth that only shows that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the results there (png), and beside it")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the tables into this Markdown file")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="where the runs live; those done are kept")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time (default: cores)")
    return exits.run(lambda: _command(parser.parse_args(argv)))


def _command(options: argparse.Namespace) -> int:
    study, quick = STUDIES[options.stream], options.quick
    runs = options.runs or Path("runs") / f"continual-{study.name}{'-quick' if quick else ''}"
    methods = options.methods or study.methods
    found = make_runs(study, methods, options.seeds, runs, workers=options.workers, quick=quick)
    print(tables(found))
    if options.json:
        write_document(options.json, found)
    if options.picture:
        draw(found, options.picture)
    if options.page:
        write_tables(options.page, title=study.title, tables=tables(found))
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
