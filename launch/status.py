"""`status`: how far runs are, by their run folders and, for jobs, by SLURM."""

import argparse
import fcntl
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import exits
from launch.config import load_stored
from launch.jobs.attempts import Attempt, Attempts, newest_step
from launch.jobs.sweep import is_sweep, show_sweep
from launch.watching.readings import duration, perplexity
from launch.watching.records import Record, read_records
from relora.errors import ConfigError

_RECENT = 20
"""Records that the pace is taken from."""
_ANSWER_SECONDS = 15.0


def main(argv: Sequence[str] | None = None) -> int:
    """The command `status`; returns its exit code."""
    parser = argparse.ArgumentParser(prog="accrete status", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    words = parser.parse_args(argv)
    return exits.run(lambda: _command(words.runs))


def _command(runs: Sequence[Path]) -> int:
    for number, run in enumerate(runs):
        if number:
            print()
        if is_sweep(run):
            show_sweep(run)
            continue
        rows = status(run)
        width = max(len(name) for name, _ in rows)
        print("\n".join(f"{name:<{width}}  {text}" for name, text in rows))
    return exits.DONE


def status(run: Path) -> list[tuple[str, str]]:
    """What is known of a run, as names and texts.

    Raises:
        ConfigError: there is no run and no job.
    """
    attempts, job = Attempts(run).read(), _job(run)
    rows = [("run", str(run))]
    if job is not None:
        rows.append(("job", job))
    if not (run / "config.yaml").is_file():
        if job is None and not attempts:
            raise ConfigError(f"{run} holds no run and no job: name the folder that train or submit printed")
        return [*rows, ("state", "has not begun"), *_attempts(attempts)]
    summary, records = _summary(run), read_records(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    rows.append(("state", _state(run, summary)))
    rows += _progress(run, [record for record in records if "loss" in record and "event" not in record])
    rows += _events(records)
    return rows + _attempts(attempts)


def _job(run: Path) -> str | None:
    """The job that submit started, as SLURM sees it now; None for a run without one."""
    path = run / "job/job_id"
    if not path.exists():
        return None
    number = path.read_text(encoding="ascii").strip()
    command = ["squeue", "-h", "-t", "all", "-j", number, "-o", "%T, %M of %l used, %R"]
    try:
        asked = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_ANSWER_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return f"{number} (SLURM does not answer here)"
    told = asked.stdout.strip() if asked.returncode == 0 else ""
    return f"{number}: {told or 'no longer known to SLURM'}"


def _summary(run: Path) -> dict[str, Any]:
    path = run / "summary.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _state(run: Path, summary: dict[str, Any]) -> str:
    """Whether a process holds the run folder, else what the last one said at its end."""
    if _in_use(run / ".lock"):
        return "training"
    status = summary.get("status", "ended without a word, or holds its folder on another machine")
    return f"{status}: {summary['reason']}" if "reason" in summary else str(status)


def _in_use(lock: Path) -> bool:
    if not lock.exists():
        return False
    with lock.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _progress(run: Path, steps: Sequence[Record]) -> list[tuple[str, str]]:
    config = load_stored(run)
    total = None if config.continual is not None else config.total_steps  # a stream's length is known with its data
    step = steps[-1]["step"] if steps else 0
    of = f" of {total} ({step / total:.0%})" if total else ""
    rows = [("step", f"{step}{of}, newest checkpoint {newest_step(run)}")]
    if steps:
        last = steps[-1]
        task = f"task {last['task']}, " if "task" in last else ""
        loss = math.nan if last["loss"] is None else last["loss"]
        rows.append(("loss", f"{task}{loss:.4f}, perplexity {perplexity(loss)}, lr {last['lr']:.2e}"))
    recent = [one["tokens_per_second"] for one in steps[-_RECENT:] if one.get("tokens_per_second")]
    if total and recent and step < total:
        tokens = steps[-1]["tokens"] / step
        pace = sum(recent) / len(recent)
        rows.append(("left", f"{duration((total - step) * tokens / pace)} of training"))
    return rows


def _events(records: Sequence[Record]) -> list[tuple[str, str]]:
    """The last validation, and how often what the run did besides."""
    rows = []
    validations = [record for record in records if record.get("event") == "evaluate"]
    if validations:
        last = validations[-1]
        rows.append(("validation", f"{last['val_loss']:.4f} at step {last['step']}"))
    for event in ("restart", "sync", "skip"):
        count = sum(record.get("event") == event for record in records)
        if count:
            rows.append((event + "s", str(count)))
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
