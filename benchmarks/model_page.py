"""The tables of benchmarks/model.py, and its page of results: what was measured, and what was not."""

from collections.abc import Sequence
from typing import Any

from benchmarks.outcome import Document, markdown

_HEADERS = ["trainer", "trainable", "tokens/s", "/ full rank", "/ PEFT", "GFLOP", "MFU", "state MB", "/ full rank"]
_HEADERS += ["peak MB", "/ full rank"]
_NOT_MEASURED = "not measured"


def tables(study: Document) -> str:
    """A study as Markdown: a table for each model."""
    clock = study["settings"]["clock"]
    return "\n\n".join(f"{_title(one, clock)}\n\n{_table(one['rows'])}" for one in study["sets"])


def page(studies: Sequence[Document], gpu: Sequence[dict[str, Any]]) -> str:
    """The studies of several devices, each under its name; what no study has of a GPU's models is not measured."""
    parts, on_gpu = [], False
    for study in sorted(studies, key=lambda one: one["machine"]["device"] == "cpu"):
        machine, settings = study["machine"], study["settings"]
        gpu_here = machine["device"] != "cpu"
        on_gpu = on_gpu or gpu_here
        name = machine["device"] if gpu_here else f"{machine['processor']}, {settings['threads']} thread(s)"
        parts.append(f"## {name}\n\n{tables(study)}")
    if not on_gpu:
        lines = [[f"{one['model']}, {one['batch']} x {one['sequence']}", *[_NOT_MEASURED] * 3] for one in gpu]
        headers = ["one GPU, bf16, rank 128", "tokens/s beside full rank and PEFT", "MFU", "state and peak memory"]
        parts.insert(0, f"## GPU\n\n{markdown(headers, lines)}")
    return "\n\n".join(parts)


def _title(one: dict[str, Any], clock: str) -> str:
    size = one["microbatch"] or one["batch"]
    seconds = "of the wall clock" if clock == "wall" else "of processor time, over threads"
    return (
        f"{one['model']}, {one['dtype']}, rank {one['rank']}, {one['batch']} sequences of {one['sequence']} a step, "
        f"{size} a pass; seconds are {seconds}"
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown(_HEADERS, [_line(row) for row in rows])


def _line(row: dict[str, Any]) -> list[str]:
    if "missing" in row:
        return [f"{row['variant']}: {row['missing']}", *["-"] * (len(_HEADERS) - 1)]
    apart = "" if row["side_by_side"] else " (alone)"
    full = row["to_full"]
    return [
        row["variant"] + apart,
        f"{row['trainable'] / 1e6:.1f} M",
        f"{row['tokens_per_second']:.0f}",
        *(_speed(row[key]) for key in ("to_full", "to_peft")),
        f"{row['flops'] / 1e9:.1f}",
        f"{row['mfu']:.2f}",
        f"{row['state_bytes'] / 1e6:.0f}",
        "-" if full is None else f"{full['state_bytes']:.3f}",
        f"{row['peak_bytes'] / 1e6:.0f}",
        "-" if full is None else f"{full['peak_bytes']:.3f}",
    ]


def _speed(ratio: dict[str, Any] | None) -> str:
    return "-" if ratio is None else "{median:.3f} [{low:.3f}, {high:.3f}]".format(**ratio["speed"])
