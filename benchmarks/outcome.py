"""What a benchmark hands over: a JSON document, and tables in Markdown that read well in a terminal, too."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.machine import machine, versions
from parallel.files import write_atomically

Document = dict[str, Any]


def document(benchmark: str, device: torch.device, *, settings: dict[str, Any], **content: Any) -> Document:
    """The results of a benchmark, with what they were measured on."""
    return {
        "benchmark": benchmark,
        "machine": machine(device),
        "versions": versions(),
        "settings": settings,
        **content,
    }


def write_document(path: Path, results: Document) -> None:
    """Write the results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(results, indent=1) + "\n")


def read_document(path: Path) -> Document:
    """Read what `write_document` wrote."""
    found = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def markdown(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns, the first one to the left."""
    widths = [max(len(cell) for cell in column) for column in zip(headers, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"

    first, *rest = widths
    rule = "|" + "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in rest)]) + "|"
    return "\n".join([line(headers), rule, *(line(cells) for cells in lines)])


def paired_ratio(times: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Times over others of the same turns: median and quartiles."""
    ratios = [one / other for one, other in zip(times, others, strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"median": median(ratios), "low": low, "high": high}
