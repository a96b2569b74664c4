"""The tables of streams: methods side by side, the score matrix, costs of stages, what was forgotten on purpose."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from launch.reports.history import flat
from launch.reports.stream_groups import Spread, StreamGroup, spread
from launch.watching.readings import amount, cell
from launch.watching.stage_records import Stream

Table = tuple[list[str], list[list[object]]]
"""Names of columns, and rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """How a kind of value is written."""

    name: str
    scale: float
    digits: int

    def text(self, value: Spread | None) -> str | None:
        """The mean, with the deviation in brackets; None for nothing."""
        if value is None:
            return None
        mean = self.scale * value.mean
        if value.deviation is None:
            return f"{mean:.{self.digits}f}"
        return f"{mean:.{self.digits}f} ({self.scale * value.deviation:.{self.digits}f})"


_PERCENT = Unit(name="%", scale=100.0, digits=1)
_POINTS = Unit(name="points", scale=100.0, digits=1)
_NATS = Unit(name="nats", scale=1.0, digits=3)
_PERPLEXITY = Unit(name="perplexity", scale=1.0, digits=2)
_CHANGES = {"forgetting": "forgetting", "forgetting_chaudhry": "Chaudhry's", "bwt": "BWT", "fwt": "FWT"}
_LEVELS = ("last", "average", "learning")
AUDIT = {
    "forgotten_before": "Acc_f before",
    "forgotten_after": "Acc_f after",
    "retained_before": "Acc_r before",
    "retained_after": "Acc_r after",
    "earlier_after": "Acc_old",
    "drop": "drop",
    "h_mean": "H-mean",
    "forgotten_loss_before": "loss_f before",
    "forgotten_loss_after": "loss_f after",
    "retained_loss_before": "loss_r before",
    "retained_loss_after": "loss_r after",
    "earlier_loss_after": "loss_old",
    "forgotten_rise": "rise_f",
    "retained_rise": "rise_r",
}
"""What audits of forgetting tell, in the words of GS-LoRA; of language models by the loss in nats per target."""


def outcome_table(groups: Sequence[StreamGroup]) -> Table:
    """A row for each method: means, with the deviation over seeds in brackets; all have the same kind of score."""
    score = groups[0].first.score
    level, change = (_PERCENT, _POINTS) if score == "accuracy" else (_NATS, _NATS)
    told = [(f"{name}_{score}", name, level) for name in _LEVELS]
    told += [(key, name, change) for key, name in _CHANGES.items()]
    if score == "loss":
        told.insert(0, ("last_perplexity", "last", _PERPLEXITY))
    rows: list[list[object]] = []
    for group in groups:
        summaries = [stream.summary() for stream in group.streams]
        runs = len(summaries) if len(summaries) == group.runs else f"{len(summaries)} of {group.runs}"
        values = [unit.text(spread([one[key] for one in summaries])) for key, _, unit in told]
        rows.append([group.name, runs, len(group.first.stages), *values])
    return ["method", "runs", "stages", *(f"{name} ({unit.name})" for _, name, unit in told)], rows


def matrix_table(group: StreamGroup) -> Table:
    """A row for each stage, a column for each task; accuracies in percent, or perplexities."""
    unit = _PERCENT if group.first.score == "accuracy" else _PERPLEXITY
    rows = zip(group.row_names(), group.rows(), strict=True)
    columns = ["after", *(f"{task} ({unit.name})" for task in group.first.tasks)]
    return columns, [[name, *map(unit.text, row)] for name, row in rows]


def cost_table(group: StreamGroup) -> Table:
    """What each stage took: means over seeds."""
    rows: list[list[object]] = []
    for stages in zip(*(stream.stages for stream in group.streams), strict=True):
        seconds, peak, method = (
            fmean(getattr(stage, key) for stage in stages) for key in ("seconds", "peak_memory_bytes", "method_bytes")
        )
        rows.append([stages[0].task, round(seconds, 1), amount(peak, "B"), amount(method, "B")])
    return ["stage", "seconds", "peak memory", "method state"], rows


def audit_table(stream: Stream) -> Table | None:
    """What each stage forgot on purpose, and what was kept; None if no stage was audited."""
    audits = {stage.task: stage.audit for stage in stream.stages if stage.audit is not None}
    if not audits:
        return None
    keys = dict.fromkeys(
        key for audit in audits.values() for key, value in audit.items() if _is_plain(value) and key != "request"
    )
    ordered = [key for key in AUDIT if key in keys] + [key for key in keys if key not in AUDIT]
    rows: list[list[object]] = [
        [task, *(_rounded(audit.get(key)) for key in ordered)] for task, audit in audits.items()
    ]
    return ["stage", *(AUDIT.get(key, key) for key in ordered)], rows


def report_table(stream: Stream) -> Table | None:
    """The numbers that the method told of each stage; None if there are none."""
    reports = {stage.task: flat(stage.report) for stage in stream.stages}
    keys = list(dict.fromkeys(key for told in reports.values() for key, value in told.items() if _is_plain(value)))
    rows: list[list[object]] = [[task, *(_rounded(told.get(key)) for key in keys)] for task, told in reports.items()]
    return (["stage", *keys], rows) if keys else None


def markdown(table: Table) -> str:
    """A table in Markdown."""
    columns, rows = table
    lines = [columns, ["---"] * len(columns), *([cell(value) for value in row] for row in rows)]
    return "".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |\n" for line in lines)


def _is_plain(value: object) -> bool:
    return isinstance(value, (str, int, float))


def _rounded(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value
