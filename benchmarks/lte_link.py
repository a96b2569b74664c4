"""Seconds of a sync over links of known bandwidth and latency: as `plan` predicts them, and as measured.

Real processes, one for each head, in network namespaces of their own (benchmarks/namespaces.py), exchange what the
sync of a small model would, over gloo. Needs root on Linux; docs/plan.md has the results.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.machine import device_here
from benchmarks.namespaces import Link, Sites, sites
from benchmarks.outcome import Document, document, markdown, write_document
from launch import exits
from parallel import link_model
from parallel.exchange import HeadExchange
from parallel.launchers import announced
from parallel.link_model import Trip, gather_hops, mean_hops
from parallel.runtime import start
from relora.heads import Compression, Parcel, Way

_LINKS = {
    "1 Gbit/s, 1 ms": Link(bandwidth=125e6, latency=0.001),
    "100 Mbit/s, 10 ms": Link(bandwidth=12.5e6, latency=0.010),
    "20 Mbit/s, 30 ms": Link(bandwidth=2.5e6, latency=0.030),
}
_QUICK_LINK = "100 Mbit/s, 10 ms"
_DEFAULT = {"heads": [2, 4], "layers": 12, "width": 320, "rank": 16, "repetitions": 3}
_QUICK = {"heads": [2], "layers": 3, "width": 128, "rank": 8, "repetitions": 2}
_ALONE = "--alone"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(argv)
    if options.quick:
        _fill(options, _QUICK)
    _fill(options, _DEFAULT)
    return exits.run(lambda: _alone(options) if options.alone else _command(options))


def _fill(options: argparse.Namespace, values: dict[str, Any]) -> None:
    vars(options).update({key: value for key, value in values.items() if getattr(options, key) is None})


def _command(options: argparse.Namespace) -> int:
    links = {_QUICK_LINK: _LINKS[_QUICK_LINK]} if options.quick else _LINKS
    rows = []
    for (name, link), heads in itertools.product(links.items(), options.heads):
        with sites([link] * heads) as made:
            for row in _measured(made, heads, options):
                rows.append({"link": name, "heads": heads, **row, "predicted": _predicted(row, link, heads)})
    outcome = results(options, rows)
    print(table(outcome["rows"]))
    if options.json:
        write_document(options.json, outcome)
    return exits.DONE


def results(options: argparse.Namespace, rows: list[dict[str, Any]]) -> Document:
    """The document."""
    settings = {key: getattr(options, key) for key in _DEFAULT}
    return document("lte_link", device_here(), settings=settings, rows=rows)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Predicted beside measured."""
    lines = [
        [
            f"{row['link']}, {row['heads']} heads",
            row["way"],
            row["compression"],
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['predicted']:.3f}",
            f"{row['seconds']:.3f}",
            f"{row['seconds'] / row['predicted']:.2f}",
        ]
        for row in rows
    ]
    return markdown(["link", "way", "compression", "MB a head", "predicted s", "measured s", "ratio"], lines)


def _predicted(row: dict[str, Any], link: Link, heads: int) -> float:
    one = gather_hops(heads) if row["way"] == Way.gather.value else mean_hops(heads)
    load = Trip(bytes=row["bytes"], hops=row["parcels"] * one + 2 * gather_hops(heads))
    return load.seconds(link_model.Link(bandwidth=link.bandwidth, latency=link.latency))


def _measured(made: Sites, heads: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What a process for each head measures, the first one's word."""
    words = [f"--{key}={getattr(options, key)}" for key in _DEFAULT if key != "heads"]
    command = [sys.executable, "-m", "benchmarks.lte_link", _ALONE, *words]
    processes = [
        made.start(
            head,
            command,
            env={"RANK": str(head), "WORLD_SIZE": str(heads), "LOCAL_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for head in range(heads)
    ]
    told = [process.communicate() for process in processes]
    for process, (_, said) in zip(processes, told, strict=True):
        if process.returncode:
            raise RuntimeError(f"a process of the measurement ended with {process.returncode}:\n{said}")
    rows = json.loads(told[0][0])
    assert isinstance(rows, list)
    return rows


def _alone(options: argparse.Namespace) -> int:
    """What one of the processes does."""
    torch.set_num_threads(1)
    with start(heads=announced(os.environ).world_size) as runtime:
        rows = []
        for way, compression in itertools.product(Way, Compression):
            exchange = HeadExchange(runtime, heads=runtime.head.size, compression=compression)
            parcels = [_parcel(f"layer {number}", way, compression, options) for number in range(options.layers)]
            sync = _syncing(exchange, parcels)
            sync()  # connects
            sent, seconds = exchange.sent, []
            for _ in range(options.repetitions):
                dist.barrier()
                began = time.perf_counter()
                sync()
                seconds.append(time.perf_counter() - began)
            rows.append(
                {
                    "way": way.value,
                    "compression": compression.value,
                    "parcels": options.layers,
                    "bytes": (exchange.sent - sent) / options.repetitions,
                    "seconds": median(seconds),
                }
            )
        if runtime.is_main:
            print(json.dumps(rows))
    return exits.DONE


def _syncing(exchange: HeadExchange, parcels: Sequence[Parcel]) -> Callable[[], None]:
    def sync() -> None:
        delivery = exchange.exchange(parcels, [[1.0]])
        for _ in parcels:
            delivery.result()
        delivery.products()

    return sync


def _parcel(name: str, way: Way, compression: Compression, options: argparse.Namespace) -> Parcel:
    """Factors of a square layer, or its whole change."""
    entries = 2 * options.width * options.rank if way is Way.gather else options.width**2
    value = torch.randn(entries, generator=torch.Generator().manual_seed(0))

    def own() -> list[Tensor]:
        return [value]

    keeps = way is Way.mean and compression is not Compression.none
    return Parcel(
        name=name,
        way=way,
        entries=entries,
        own=own,
        alike=True,
        compression=compression,
        residuals=[torch.zeros(entries)] if keeps else None,
        replicas=1 if way is Way.mean else 0,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lte_link", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", type=int, nargs="+", help=f"default {_DEFAULT['heads']}")
    meanings = {
        "layers": "low-rank layers",
        "width": "inputs and outputs of each",
        "rank": "of its factors",
        "repetitions": "syncs of each kind",
    }
    for key, meaning in meanings.items():
        parser.add_argument(f"--{key}", type=int, help=f"{meaning}; default {_DEFAULT[key]}")
    parser.add_argument("--quick", action="store_true", help="one link, two heads, a small shape")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument(_ALONE, action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
