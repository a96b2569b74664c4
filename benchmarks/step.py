"""Time, FLOPs and peak memory of one training step: ReLoRA beside full rank and beside PEFT's LoRA.

All variants stand in one process and take turns, step by step, and times are compared within a turn: what else
the machine does then hits all alike. Peak memory is measured in a process per variant. A restart is timed, too.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.machine import device_here
from benchmarks.memory import memory_now, memory_peak
from benchmarks.outcome import Document, document, markdown, paired_ratio, write_document
from benchmarks.step_variants import VARIANTS, Shape
from launch import exits
from launch.config import CONF
from parallel.runtime import Runtime, start
from relora.choice import timed

FULL_RANK, RELORA, *PEFT = VARIANTS
Times = dict[str, list[float]]
"""Seconds of each turn by variant; a restart's under the name RESTART."""
RESTART = "one restart"
_WARM_UP = 2
_SPAWN = "--peak-of"


def measure_times(shape: Shape, runtime: Runtime, *, repetitions: int) -> tuple[Times, list[dict[str, Any]]]:
    """Step all variants in turn; returns the times, and what each variant trains and executes."""
    variants = {name: build(shape, runtime) for name, build in VARIANTS.items()}
    times: Times = {name: [] for name in (*variants, RESTART)}
    for turn in range(_WARM_UP + repetitions):
        for name, variant in variants.items():
            times[name].append(timed(variant.step, runtime.device))
            if variant.restart is not None:
                times[RESTART].append(timed(partial(variant.restart, turn + 1), runtime.device))
    facts = [
        {"variant": name, "trainable": variant.trainable, "flops": variant.flops} for name, variant in variants.items()
    ]
    return {name: values[_WARM_UP:] for name, values in times.items()}, facts


def measure_peak(name: str, shape: Shape, runtime: Runtime) -> int:
    """Peak memory of building one variant and of a few steps, in bytes above what the libraries take."""
    import deepspeed  # noqa: F401  (part of the libraries)

    before = memory_now(runtime.device)
    variant = VARIANTS[name](shape, runtime)
    for _ in range(3):
        variant.step()
    return memory_peak(runtime.device) - before


def peaks_in_processes(shape: Shape, *, at_a_time: int) -> dict[str, int]:
    """`measure_peak` of every variant, each in a process of its own."""

    def peak(name: str) -> int:
        command = [sys.executable, "-m", "benchmarks.step", *_arguments(shape), _SPAWN, name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])

    with ThreadPoolExecutor(at_a_time) as pool:
        return dict(zip(VARIANTS, pool.map(peak, VARIANTS), strict=True))


def results(
    shape: Shape, device: torch.device, times: Times, facts: list[dict[str, Any]], peaks: dict[str, int]
) -> Document:
    """The document: a row per variant, and the restart."""
    rows = [
        {
            **fact,
            "seconds": median(times[fact["variant"]]),
            "to_full_rank": paired_ratio(times[fact["variant"]], times[FULL_RANK]),
            "to_peft": {peft: paired_ratio(times[fact["variant"]], times[peft]) for peft in PEFT},
            "peak_bytes": peaks[fact["variant"]],
        }
        for fact in facts
    ]
    again = {"seconds": median(times[RESTART]), "to_step": paired_ratio(times[RESTART], times[RELORA])}
    settings = {**asdict(shape), "threads": torch.get_num_threads(), "repetitions": len(times[RELORA])}
    return document("step", device, settings=settings, rows=rows, restart=again, times=times)


def tables(study: Document) -> str:
    """The study as Markdown: every variant beside full rank, then ReLoRA beside PEFT, then the restart."""
    rows = {row["variant"]: row for row in study["rows"]}
    full, ours, again = rows[FULL_RANK], rows[RELORA], study["restart"]
    beside_full = [
        [
            name,
            f"{row['trainable'] / 1e6:.1f} M",
            f"{1e3 * row['seconds']:.0f}",
            _spread(row["to_full_rank"]),
            f"{row['flops'] / 1e9:.1f}",
            f"{row['flops'] / full['flops']:.3f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['peak_bytes'] / full['peak_bytes']:.3f}",
        ]
        for name, row in rows.items()
    ]
    beside_peft = [
        [
            name,
            _spread(ours["to_peft"][name]),
            f"{ours['flops'] / rows[name]['flops']:.3f}",
            f"{ours['peak_bytes'] / rows[name]['peak_bytes']:.3f}",
        ]
        for name in ours["to_peft"]
    ]
    to_full = "/ full rank"
    headers = ["variant", "trainable", "ms", f"time {to_full}", "GFLOP", to_full, "peak MB", to_full]
    return (
        f"{markdown(headers, beside_full)}\n\n"
        f"{markdown(['ReLoRA over', 'time', 'FLOPs', 'peak memory'], beside_peft)}\n\n"
        f"One restart: {1e3 * again['seconds']:.0f} ms, {_spread(again['to_step'])} of a ReLoRA step."
    )


def _spread(value: dict[str, float]) -> str:
    return f"{value['median']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(argv)
    if options.quick:
        vars(options).update({key: value for key, value in _QUICK.items() if getattr(options, key) is None})
    vars(options).update({key: value for key, value in _DEFAULT.items() if getattr(options, key) is None})
    shape = Shape(**{key: getattr(options, key) for key in Shape.__dataclass_fields__})
    if options.threads:
        torch.set_num_threads(options.threads)
    return exits.run(lambda: _command(shape, options))


_DEFAULT = {"model": "llama_60m", "rank": 128, "batch": 2, "microbatch": 0, "sequence": 256}
_DEFAULT |= {"dtype": "fp32", "repetitions": 12}
_QUICK = {"model": "llama_tiny", "rank": 16, "sequence": 64, "repetitions": 3}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").splitlines()[0])
    models = sorted(path.stem for path in (CONF / "model").glob("llama*.yaml"))
    parser.add_argument("--model", choices=models, help=f"default {_DEFAULT['model']}")
    for name in ("rank", "batch", "microbatch", "sequence", "repetitions"):
        parser.add_argument(f"--{name}", type=int, help=f"default {_DEFAULT[name]}")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help=f"default {_DEFAULT['dtype']}")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--quick", action="store_true", help="a small shape, within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument(_SPAWN, choices=list(VARIANTS), help=argparse.SUPPRESS)
    return parser


def _arguments(shape: Shape) -> list[str]:
    """The options that make the same shape."""
    return [word for key, value in asdict(shape).items() for word in (f"--{key}", str(value))]


def _command(shape: Shape, options: argparse.Namespace) -> int:
    with start() as runtime:
        if options.peak_of:
            print(json.dumps({"peak_bytes": measure_peak(options.peak_of, shape, runtime)}))
            return exits.DONE
    device = device_here()
    peaks = peaks_in_processes(shape, at_a_time=1 if device.type == "cuda" else (os.cpu_count() or 1))
    with start() as runtime:
        times, facts = measure_times(shape, runtime, repetitions=options.repetitions)
    outcome = results(shape, device, times, facts, peaks)
    print(tables(outcome))
    if options.json:
        write_document(options.json, outcome)
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
