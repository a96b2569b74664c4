"""`status`: how far runs are, by their run folders and, for jobs, by SLURM."""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch import exits
from launch.jobs.arrays import HEADS, MEETING, MEETING_ID, has_heads
from launch.jobs.attempts import Attempt
from launch.jobs.sweep import is_sweep, show_sweep
from launch.watching.live import show_once, watch_runs
from launch.watching.readings import duration, perplexity
from launch.watching.records import read_records
from launch.watching.standing import Queue, RunReader, Standing, find_runs
from relora.errors import ConfigError

_EVERY_SECONDS = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """The command `status`; returns its exit code."""
    parser = argparse.ArgumentParser(prog="accrete status", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, or a folder with runs in it")
    parser.add_argument("--watch", action="store_true", help="show one table of all runs, again and again until Ctrl-C")
    parser.add_argument(
        "--every", type=float, metavar="SECONDS", help=f"between two looks (default {_EVERY_SECONDS:g})"
    )
    words = parser.parse_args(argv)
    return exits.run(lambda: _command(words.runs, watch=words.watch, every=words.every))


def _command(runs: Sequence[Path], *, watch: bool, every: float | None) -> int:
    if every is not None and (not watch or every <= 0):
        why = "must be above 0" if watch else "has no effect without --watch: leave it out"
        raise ConfigError(f"--every {every:g} {why}")
    for run in runs:
        if not is_sweep(run) and not has_heads(run) and not (run.is_dir() and find_runs(run)):
            raise ConfigError(f"{run} holds no run and no job: name the folder that train or submit printed")
    if watch:
        try:
            watch_runs(runs, sys.stdout, seconds=every or _EVERY_SECONDS)
        except KeyboardInterrupt:
            print()
        return exits.DONE
    for number, run in enumerate(runs):
        if number:
            print()
        if is_sweep(run):
            show_sweep(run)
            continue
        if not has_heads(run) and find_runs(run) != [run]:
            show_once([run], sys.stdout)
            continue
        rows = _heads(run) if has_heads(run) else status(run)
        width = max(len(name) for name, _ in rows)
        print("\n".join(f"{name:<{width}}  {text}" for name, text in rows))
    return exits.DONE


def status(run: Path) -> list[tuple[str, str]]:
    """What is known of a run, as names and texts.

    Raises:
        ConfigError: its configuration cannot be read.
    """
    one = RunReader(run).read()
    rows = [("run", str(run))]
    if one.number is not None:
        rows += [("job", line) for line in Queue().told([one.number])[one.number]]
    rows.append(("state", f"{one.state}: {one.reason}" if one.reason else one.state))
    if one.begun:
        rows += _progress(one)
        rows += _events(one)
    return rows + _attempts(one.attempts)


def _heads(run: Path) -> list[tuple[str, str]]:
    """The jobs of elastic heads, where they meet, and each head in one line."""
    rows = [("run", str(run))]
    queue = Queue()
    for name, path in (("job", run / "job/job_id"), ("meeting", run / "job" / MEETING_ID)):
        number = path.read_text(encoding="ascii").strip() if path.exists() else None
        rows += [(name, line) for line in (queue.told([number])[number] if number is not None else ())]
    events = run / MEETING / "meeting.jsonl"
    syncs = read_records(events) if events.exists() else []
    if syncs:
        rows.append(("syncs", f"{syncs[-1]['sync']}, the last by heads {', '.join(map(str, syncs[-1]['members']))}"))
    for folder in sorted((run / HEADS).glob("*")):
        one = RunReader(folder).read()
        told = dict(_progress(one)) if one.begun else {}
        words = [one.state, *(f"{key} {told[key]}" for key in ("step", "loss") if key in told)]
        again = [f"{len(one.attempts)} attempts"] if len(one.attempts) > 1 else []
        rows.append((f"head {folder.name}", "; ".join(words + again)))
    return rows


def _progress(one: Standing) -> list[tuple[str, str]]:
    of = f" of {one.total} ({one.step / one.total:.0%})" if one.total else ""
    rows = [("step", f"{one.step}{of}, newest checkpoint {one.checkpoint}")]
    if one.last is not None:
        task = f"task {one.last['task']}, " if "task" in one.last else ""
        loss = math.nan if one.last["loss"] is None else one.last["loss"]
        rows.append(("loss", f"{task}{loss:.4f}, perplexity {perplexity(loss)}, lr {one.last['lr']:.2e}"))
    if one.seconds_left is not None:
        rows.append(("left", f"{duration(one.seconds_left)} of training"))
    return rows


def _events(one: Standing) -> list[tuple[str, str]]:
    """The last validation, how often what the run did besides, and what it is asked for."""
    rows = []
    if one.validation is not None:
        rows.append(("validation", f"{one.validation['val_loss']:.4f} at step {one.validation['step']}"))
    rows += [(f"{name}s", str(one.counts[name])) for name in ("restart", "sync", "skip") if name in one.counts]
    if one.asked:
        rows.append(("asked for", ", ".join(one.asked)))
    return rows


def _attempts(attempts: Sequence[Attempt]) -> list[tuple[str, str]]:
    rows = []
    for one in attempts:
        where = f" on {one.nodes}" if one.nodes else ""
        if one.ended is None:
            text = f"from step {one.step}{where}, begun {duration(time.time() - one.began)} ago"
        else:
            text = f"from step {one.step} to {one.reached}{where}, {duration(one.ended - one.began)}"
            text += f": {one.reason}" if one.reason else ": done"
        rows.append((f"attempt {one.number}", text))
    return rows


if __name__ == "__main__":
    sys.exit(main())
