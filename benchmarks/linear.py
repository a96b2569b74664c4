"""One linear layer forward and backward: every path of ours, the full linear, and PEFT's LoRA eager and compiled.

All stand in one process and take turns, and times are compared within a turn. Beside time: FLOPs, bytes that
operations read and write, peak memory, and the share of the time that a perfect machine would need for the same
operations (roofline), by the peak and the copy bandwidth of this one.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.linear_variants import AUTO, COMPILED, FULL, PEFT, Shape, counted, variants
from benchmarks.machine import device_here
from benchmarks.outcome import Document, document, markdown, paired_ratio, write_document
from benchmarks.page import write_tables
from launch import exits
from launch.planning.flops import peak_flops
from relora.choice import timed

_CPU = {
    "layers": ["512x512", "1024x1024", "1376x512"],
    "tokens": [512, 2048],
    "ranks": [8, 32, 128],
    "dtypes": ["float32", "bfloat16"],
}
_GPU = {
    "layers": ["1024x1024", "2048x2048", "4096x4096", "5461x2048", "11008x4096"],
    "tokens": [4096, 8192, 32768],
    "ranks": [8, 32, 128],
    "dtypes": ["bfloat16"],
}
_QUICK = {"layers": ["256x128"], "tokens": [128], "ranks": [8], "dtypes": ["float32", "bfloat16"]}
_WARM_UP = 2
_OTHERS = {"to_full": FULL, "to_peft": PEFT, "to_compiled": COMPILED}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.ones(1 << (24 if device.type == "cpu" else 28), device=device)
    target = torch.empty_like(source)
    best = min(timed(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * source.nbytes / best


def compare(shape: Shape, device: torch.device, *, repetitions: int, compiled: bool) -> list[dict[str, Any]]:
    """A row for each variant of one shape."""
    compared = variants(shape, device, compiled=compiled)
    updates = compared.updates
    times: dict[str, list[float]] = {name: [] for name in updates}
    for _ in range(_WARM_UP + repetitions):
        for name, update in updates.items():
            times[name].append(timed(update, device) / shape.microbatches)
    times = {name: values[_WARM_UP:] for name, values in times.items()}
    peak, _ = peak_flops(device, getattr(torch, shape.dtype))
    bandwidth = copy_bandwidth(device)
    rows = []
    for name, update in updates.items():
        done = None if name == COMPILED else counted(update, shape, peak=peak, bandwidth=bandwidth)
        seconds = median(times[name])
        row = {**asdict(shape), "variant": name, "takes": compared.taken if name == AUTO else None, "seconds": seconds}
        for key, other in _OTHERS.items():
            row[key] = paired_ratio(times[name], times[other]) if other in times else None
        row |= dict.fromkeys(("flops", "bytes", "peak_bytes", "roofline_seconds", "roofline_share"))
        if done is not None:
            row |= {**asdict(done), "roofline_share": done.roofline_seconds / seconds}
        rows.append(row)
    return rows


def summary(study: Document) -> str:
    """What `auto` takes and gains at each shape, as a Markdown table."""
    gains = [
        [_title(row), row["takes"], *(_ratio(row[key]) for key in _OTHERS)]
        for row in study["rows"]
        if row["variant"] == AUTO
    ]
    return markdown(["shape", "auto takes", *(f"/ {other}" for other in _OTHERS.values())], gains)


def details(study: Document) -> str:
    """A Markdown table for each shape."""
    shapes = [list(group) for _, group in itertools.groupby(study["rows"], key=_shape)]
    return "\n\n".join(f"{_title(rows[0])}\n\n{_table(rows)}" for rows in shapes)


def tables(study: Document) -> str:
    """All of them, for a page."""
    return f"{summary(study)}\n\n{details(study)}"


def _ratio(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['median']:.3f} [{found['low']:.2f}, {found['high']:.2f}]"


def _shape(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in Shape.__dataclass_fields__)


def _title(row: dict[str, Any]) -> str:
    return (
        f"{row['outputs']} x {row['inputs']}, {row['tokens']} tokens x {row['microbatches']}, rank {row['rank']}, "
        f"{row['dtype']}"
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            row["variant"],
            f"{1e3 * row['seconds']:.2f}",
            *(f"{row[key]['median']:.3f}" for key in ("to_full", "to_peft")),
            _figure(row["flops"], 1e9, 3),
            _figure(row["bytes"], 1e6, 1),
            _figure(row["peak_bytes"], 1e6, 1),
            _figure(row["roofline_share"], 0.01, 0),
        ]
        for row in rows
    ]
    headers = ["variant", "ms", "/ full", "/ PEFT", "GFLOP", "MB moved", "peak MB", "% of roofline"]
    return markdown(headers, lines)


def _figure(value: float | None, unit: float, digits: int) -> str:
    return "not seen" if value is None else f"{value / unit:.{digits}f}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(argv)
    device = device_here()
    usual = _QUICK if options.quick else _GPU if device.type == "cuda" else _CPU
    vars(options).update({key: value for key, value in usual.items() if getattr(options, key) is None})
    if options.threads:
        torch.set_num_threads(options.threads)
    return exits.run(lambda: _command(options, device))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", nargs="+", metavar="OUTxIN")
    for name in ("tokens", "ranks"):
        parser.add_argument(f"--{name}", nargs="+", type=int)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"])
    parser.add_argument("--microbatches", type=int, default=1, help="passes that share a formed weight (default 1)")
    parser.add_argument("--repetitions", type=int, default=7, help="turns that are timed (default 7)")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--no-compile", action="store_true", help="leave out PEFT compiled, which takes long to start")
    parser.add_argument("--quick", action="store_true", help="two small shapes, within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the tables into that Markdown file")
    return parser


def _command(options: argparse.Namespace, device: torch.device) -> int:
    rows = []
    for dtype, layer, tokens, rank in itertools.product(options.dtypes, options.layers, options.tokens, options.ranks):
        outputs, inputs = map(int, layer.split("x"))
        shape = Shape(
            outputs=outputs, inputs=inputs, tokens=tokens, rank=rank, dtype=dtype, microbatches=options.microbatches
        )
        rows += compare(shape, device, repetitions=options.repetitions, compiled=not options.no_compile)
    settings = {"threads": torch.get_num_threads(), "repetitions": options.repetitions}
    outcome = document("linear", device, settings=settings, rows=rows)
    print(f"{details(outcome)}\n\n{summary(outcome)}")
    if options.json:
        write_document(options.json, outcome)
    if options.page:
        write_tables(options.page, title="One linear layer", tables=tables(outcome))
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
