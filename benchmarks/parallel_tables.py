"""The study of layouts as Markdown: time and memory, what a step and a restart send, and ReLoRA over full rank."""

from collections.abc import Sequence
from typing import Any

from benchmarks.outcome import Document, markdown
from benchmarks.parallel_traffic import ALL_GATHER, ALL_REDUCE, BOTH, DATA, REDUCE_SCATTER, TENSOR

Row = dict[str, Any]
_NONE = "-"


def tables(study: Document) -> str:
    """All of it: a section for each number of processes."""
    return "\n\n".join(_section(one) for one in study["sets"])


def _section(one: dict[str, Any]) -> str:
    count, rows = one["processes"], one["rows"]
    parts = [f"### {count} process{'es' if count > 1 else ''}", _times(rows)]
    if count > 1:
        shared = [row for row in rows if not row["alone"]]
        parts += [
            "Sent by a process in a step, MB (calls), and in a restart, KB (calls):",
            _traffic(shared),
            "Planned over counted:",
            _plans(shared),
        ]
    parts += ["ReLoRA over full rank on the same layout:", _methods(rows)]
    return "\n\n".join(parts)


def _times(rows: Sequence[Row]) -> str:
    lines = [
        [
            row["name"],
            f"{row['tensor']} x {row['data']}",
            f"{1e3 * row['seconds']:.0f}",
            f"{row['tokens_per_second']:.0f}",
            _spread(row["to_one_process"]),
            _spread(row["to_ddp"]),
            f"{row['peak_bytes'] / 1e6:.1f}",
            _NONE if row["restart_seconds"] is None else f"{1e3 * row['restart_seconds']:.0f}",
        ]
        for row in rows
    ]
    headers = ["", "tensor x data", "step ms", "tokens/s", "/ one process", "/ ddp", "peak MB", "restart ms"]
    return markdown(headers, lines)


def _traffic(rows: Sequence[Row]) -> str:
    flows = sorted({(one["axis"], one["kind"]) for row in rows for one in row["step"]}, key=_order)
    lines = [
        [
            row["name"],
            *(_flow(row["step"], 1e6, axis, kind) for axis, kind in flows),
            _flow(row["restart"], 1e3),
        ]
        for row in rows
    ]
    return markdown(["", *(f"{axis} {kind}" for axis, kind in flows), "a restart"], lines)


def _order(flow: tuple[str, str]) -> tuple[int, int, str]:
    axis, kind = flow
    known = [ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER]
    return [DATA, TENSOR, BOTH].index(axis), known.index(kind) if kind in known else len(known), kind


def _flow(flows: Sequence[Row], unit: float, axis: str | None = None, kind: str | None = None) -> str:
    found = [one for one in flows if axis in (None, one["axis"]) and kind in (None, one["kind"])]
    if not found:
        return _NONE
    return f"{sent(found) / unit:.3f} ({sum(one['calls'] for one in found)})"


def _plans(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        gathers = [one for one in row["step"] if one["axis"] == DATA and one["kind"] == ALL_GATHER]
        gradients = [one for one in row["step"] if one["axis"] == DATA and one["kind"] != ALL_GATHER]
        plan, again = row["planned"]["step"], row["planned"]["restart"]
        lines.append(
            [
                row["name"],
                _quotient(_planned(plan, "data axis: gradients"), sent(gradients)),
                _quotient(_planned(plan, "data axis: weights"), sent(gathers)),
                _quotient(_planned(plan, "tensor axis"), sent([one for one in row["step"] if one["axis"] == TENSOR])),
                _quotient(_planned(again, ""), sent(row["restart"])),
                _quotient(row["planned"]["peak_bytes"], row["peak_bytes"]),
            ]
        )
    headers = ["", "data axis: gradients", "data axis: weights", "tensor axis", "a restart", "peak memory"]
    return markdown(headers, lines)


def _planned(sizes: dict[str, int], prefix: str) -> int:
    return sum(size for key, size in sizes.items() if key.startswith(prefix))


def _quotient(planned: int, counted: int) -> str:
    """Planned over counted; where single numbers are all that travels (norms, reports), both in bytes."""
    if planned == counted == 0:
        return _NONE
    if 0.1 * counted < planned < 10 * counted:
        return f"{planned / counted:.3f}"
    return f"{planned} B / {counted} B"


def _methods(rows: Sequence[Row]) -> str:
    full = {_place(row): row for row in rows if row["method"] != rows[0]["method"]}
    lines = []
    for row in rows:
        if row["to_full_rank"] is None:
            continue
        other = full[_place(row)]
        lines.append(
            [
                row["name"],
                _spread(row["to_full_rank"]),
                f"{row['peak_bytes'] / other['peak_bytes']:.3f}",
                *(_share(row, other, kinds) for kinds in ((ALL_REDUCE, REDUCE_SCATTER), (ALL_GATHER,))),
            ]
        )
    return markdown(["", "step time", "peak memory", "gradient bytes", "weight bytes"], lines)


def _share(row: Row, other: Row, kinds: Sequence[str]) -> str:
    mine, theirs = (sent([one for one in each["step"] if one["kind"] in kinds]) for each in (row, other))
    return f"{mine / theirs:.3f}" if theirs else _NONE


def _place(row: Row) -> tuple[bool, int, int]:
    return row["alone"], row["zero_stage"], row["tensor"]


def sent(flows: Sequence[Row]) -> int:
    """Bytes that a process sends, of several flows together."""
    return sum(one["sent"] for one in flows)


def _spread(value: dict[str, float] | None) -> str:
    return _NONE if value is None else f"{value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
