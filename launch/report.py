"""Draws one run or several: figures as PNG files, and one HTML page that holds them, the outcomes and the settings.

`python -m launch.report RUN_DIR [RUN_DIR ...] [--out DIR]`. Works on runs that are still going on.
"""

import argparse
import base64
import html
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from launch import exits
from launch.reports import figures, sync_figures
from launch.reports.history import History, differences, read_histories
from launch.reports.stream_groups import families, group_streams
from launch.reports.stream_report import draw_streams, stream_tables
from launch.reports.stream_tables import markdown
from launch.watching.console import Console, SilentConsole, make_console
from launch.watching.readings import cell
from relora.errors import ConfigError

_OUTCOME = (
    "status",
    "steps",
    "tokens",
    "train_loss",
    "val_loss",
    "val_perplexity",
    "restarts",
    "syncs",
    "bytes_sent",
    "sync_seconds",
    "sync_share",
    "tokens_per_second",
    "peak_memory_bytes",
    "wall_seconds",
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1150px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em } h2 { font-size: 1.15em; margin-top: 2em }
img { max-width: 100% } figure { margin: 0 } figcaption { color: #666; font-size: .9em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .25em .9em .25em 0; border-bottom: 1px solid #e5e5e5; text-align: left; vertical-align: top }
"""


def report(run_dirs: Sequence[Path], out: Path | None = None, console: Console | None = None) -> list[Path]:
    """Write the figures and report.html of some runs into a folder; returns the files, the page last.

    The console shows what became of streams: of one method all tables, of several those that compare them.
    The folder is `report` in the run folder, or in the current one for several runs.
    Raises: ConfigError when a folder is not a run's or holds no metrics.
    """
    console = console or SilentConsole()
    histories = read_histories(run_dirs)
    folder = out or (run_dirs[0] / "report" if len(run_dirs) == 1 else Path("report"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be made: {error.strerror}; name another folder") from error
    groups = group_streams(histories)
    tables = stream_tables(groups)
    compared = len(families(groups))
    files, sections = [], []
    for name, title, caption, figure in (*_draw(histories), *draw_streams(groups)):
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=130)
        files.append(path)
        image = base64.b64encode(path.read_bytes()).decode("ascii")
        sections.append(
            f'<h2>{html.escape(title)}</h2><figure><img alt="{html.escape(title)}" '
            f'src="data:image/png;base64,{image}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        )
    if tables:
        files.append(folder / "streams.md")
        texts = (f"## {title}\n\n{markdown(table)}" for title, table in tables)
        files[-1].write_text("\n".join(texts), encoding="utf-8")
        for title, (columns, rows) in tables if len(groups) == 1 else tables[:compared]:
            console.table(title, columns, rows)
    told = [f"<h2>{html.escape(title)}</h2>{_table(*table)}" for title, table in tables]
    sections = [*told[:compared], *sections, *told[compared:]]
    page = folder / "report.html"
    page.write_text(_page(histories, sections), encoding="utf-8")
    return [*files, page]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="accrete report", description="Draw one run or several.")
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path, help="a folder that training wrote")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the files go (default: RUN_DIR/report)")
    asked = parser.parse_args(arguments)

    def draw() -> int:
        for file in report(asked.run_dirs, asked.out, make_console()):
            print(file)
        return exits.DONE

    return exits.run(draw)


def _draw(histories: Sequence[History]) -> Iterable[tuple[str, str, str, Figure]]:
    """Each figure with its file name, title and caption."""
    marks = "Light vertical lines are restarts, a dotted one the end of the warm start."
    yield "loss", "Loss and perplexity", f"Thin: each record; thick: smoothed. {marks}", figures.loss_figure(histories)
    yield "learning_rate", "Learning rate", marks, figures.learning_rate_figure(histories)
    yield "throughput", "Throughput", "Thin: each record; thick: smoothed.", figures.throughput_figure(histories)
    for history in histories:
        yield from _draw_syncs(history, *_names_of(history, histories))
    measured = [history for history in histories if history.spectra]
    if len(measured) > 1:
        caption = "Of W - W_start, the mean over the measured modules."
        yield "effective_rank", "Effective rank", caption, figures.mean_rank_figure(histories)
    for history in measured:
        suffix, of = _names_of(history, histories)
        yield (
            f"spectra{suffix}",
            f"Singular values of W - W_start{of}",
            "One line per restart, or per sync at which it was measured. Dotted: the adapter rank (of all heads "
            "together), which a single merge cannot pass.",
            figures.spectra_figure(history),
        )
        yield (
            f"rank{suffix}",
            f"Rank of W - W_start{of}",
            "Above: exponential of the entropy of the singular values. Below: how many stand above rounding; "
            "dotted: the ranks of all factors so far, the most there can be.",
            figures.rank_figure(history),
        )


def _draw_syncs(history: History, suffix: str, of: str) -> Iterable[tuple[str, str, str, Figure]]:
    """What the syncs of a run's heads tell, if it has any."""
    if not history.syncs():
        return
    yield (
        f"heads{suffix}",
        f"Heads at their syncs{of}",
        "A change is what a head's factors add since the last sync, over all layers. The mean of equal changes has a "
        "ratio of 1; heads that go different ways shrink it.",
        sync_figures.agreement_figure(history),
    )
    yield (
        f"sync_rank{suffix}",
        f"Effective rank of merged changes{of}",
        "Exponential of the entropy of the singular values, for layers whose factors travel.",
        sync_figures.sync_rank_figure(history),
    )
    yield (
        f"sync_cost{suffix}",
        f"What syncs cost{of}",
        "Wall time of the first head, waiting for others included; validation and checkpoints do not count.",
        sync_figures.sync_cost_figure(history),
    )


def _names_of(history: History, histories: Sequence[History]) -> tuple[str, str]:
    """What tells a run's figures from those of the others: in file names, and in titles."""
    if len(histories) == 1:
        return "", ""
    return "_" + re.sub(r"[^A-Za-z0-9.-]+", "_", history.name), f", {history.name}"


def _page(histories: Sequence[History], sections: Sequence[str]) -> str:
    names = [history.name for history in histories]
    rows = [[key, *(history.summary.get(key) for history in histories)] for key in _keys(histories)]
    parts = [
        f"<h1>{html.escape(', '.join(names))}</h1>",
        "<h2>Outcome</h2>",
        _table(["", *names], rows),
    ]
    unfinished = [history.name for history in histories if not history.summary]
    if unfinished:
        parts.append(f"<p>Not finished: {html.escape(', '.join(unfinished))}.</p>")
    parts += sections
    if len(histories) > 1:
        parts += ["<h2>Settings that differ</h2>", _table(["key", *names], differences(histories))]
    else:
        settings = _table(["key", "value"], [list(item) for item in histories[0].config.items()])
        parts.append(f"<h2>Settings</h2><details><summary>all</summary>{settings}</details>")
    title = html.escape(f"Report: {', '.join(names)}")
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{title}</title>\n<style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _keys(histories: Sequence[History]) -> list[str]:
    """The summary's plain values: the known ones first."""
    found = dict.fromkeys(
        key
        for history in histories
        for key, value in history.summary.items()
        if value is None or isinstance(value, (str, int, float))
    )
    return [key for key in _OUTCOME if key in found] + [key for key in found if key not in _OUTCOME]


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell(value))}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


if __name__ == "__main__":
    sys.exit(main())
