"""Whole training steps of Llama shapes: full rank, PEFT's LoRA, and Accrete by each path of `lora.forward`.

All trainers of a model stand in one process, see the same batch and take turns, and speed is compared within a turn;
where they do not fit beside each other, each stands alone, and where one does not fit at all, its row says so. Beside
speed: executed FLOPs and the share of the device's peak that they make, peak memory, and memory of the state.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import device_here
from benchmarks.model_page import page, tables
from benchmarks.model_turns import measure
from benchmarks.outcome import Document, document, read_document, write_document
from benchmarks.page import write_tables
from benchmarks.step_variants import Shape
from launch import exits
from launch.config import CONF
from parallel.runtime import Runtime, start

Grid = list[dict[str, Any]]
GPU: Grid = [
    {"model": "llama_60m", "batch": 32, "microbatch": 32, "sequence": 1024},
    {"model": "llama_350m", "batch": 32, "microbatch": 32, "sequence": 1024},
    {"model": "llama_1b", "batch": 32, "microbatch": 8, "sequence": 1024},
    {"model": "llama_7b", "batch": 8, "microbatch": 1, "sequence": 2048},
]
CPU: Grid = [{"model": "llama_60m", "batch": 4, "microbatch": 4, "sequence": 256}]
QUICK: Grid = [{"model": "llama_tiny", "batch": 2, "microbatch": 1, "sequence": 64}]
_USUAL = {"cuda": {"dtype": "bf16", "rank": 128}, "cpu": {"dtype": "fp32", "rank": 128}}
_GRID_KEYS = ("batch", "microbatch", "sequence")


def shapes(options: argparse.Namespace, device: torch.device) -> list[Shape]:
    """The models of a run and their batches."""
    grid = QUICK if options.quick else GPU if device.type == "cuda" else CPU
    if options.models:
        usual = {row["model"]: row for row in grid}  # other models take the sizes of this device's first
        grid = [{**usual.get(name, grid[0]), "model": name} for name in options.models]
    usual_words = {**_USUAL[device.type], **({"rank": 16} if options.quick else {})}
    given = {key: getattr(options, key) for key in (*_GRID_KEYS, "dtype", "rank") if getattr(options, key) is not None}
    return [Shape(**{**usual_words, **row, **given}) for row in grid]


def results(wanted: Sequence[Shape], runtime: Runtime, *, repetitions: int) -> Document:
    """The document: a row for each model and trainer."""
    with tempfile.TemporaryDirectory() as cache:
        found = [measure(shape, runtime, Path(cache), repetitions=repetitions) for shape in wanted]
    clock = "wall" if runtime.device.type == "cuda" else "processor"
    settings = {"threads": torch.get_num_threads(), "repetitions": repetitions, "clock": clock}
    sets = [{**asdict(shape), "rows": rows} for shape, rows in zip(wanted, found, strict=True)]
    return document("model", runtime.device, settings=settings, sets=sets)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    return exits.run(lambda: _command(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=(__doc__ or "").splitlines()[0])
    models = sorted(path.stem for path in (CONF / "model").glob("llama*.yaml"))
    parser.add_argument(
        "--models", nargs="+", choices=models, help="default: by device; 60m on a CPU, 60m to 7b on a GPU"
    )
    for name in (*_GRID_KEYS, "rank"):
        parser.add_argument(f"--{name}", type=int, help="default: by device and model")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--repetitions", type=int, help="turns that are timed (default 7, --quick 2)")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--quick", action="store_true", help="a tiny model, within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the tables into a Markdown file")
    parser.add_argument("--beside", type=Path, metavar="FILE", help="JSON of another device, to stand on the page, too")
    return parser


def _command(options: argparse.Namespace) -> int:
    device = device_here()
    repetitions = options.repetitions or (2 if options.quick else 7)
    with start() as runtime:
        outcome = results(shapes(options, device), runtime, repetitions=repetitions)
    print(tables(outcome))
    if options.json:
        write_document(options.json, outcome)
    if options.page:
        others = [read_document(options.beside)] if options.beside else []
        write_tables(
            options.page, title="Whole models: speed and memory of a step", tables=page([outcome, *others], GPU)
        )
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
