"""How far a run is, by its folder: read again and again at the cost of what is new in it.

What SLURM knows of jobs is asked for all runs at once (`Queue`). The words for it are in launch/status.py and
launch/watching/live.py.
"""

import fcntl
import json
import os
import subprocess
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.config import load_stored
from launch.jobs.arrays import has_heads
from launch.jobs.attempts import Attempt, Attempts, newest_step
from launch.jobs.sweep import is_sweep
from launch.training.requests import waiting
from launch.watching.records import Record, decode

_RECENT = 20
"""Records that the pace is taken from."""
_ANSWER_SECONDS = 15.0
_DEPTH = 4
"""Levels below a folder on which runs are looked for."""
_QUEUE_SECONDS = 10.0
"""Between two questions to SLURM, which serves others, too."""


@dataclass(kw_only=True, slots=True)
class Standing:
    """How far a run is."""

    run: Path
    begun: bool
    """Whether there is a run, and not only a job that waits."""
    state: str
    """training, done, stopped, diverged, or that nobody knows."""
    reason: str | None = None
    """Why it stopped."""
    step: int = 0
    total: int | None = None
    """None for a stream, whose length is known with its data."""
    checkpoint: int = 0
    """Step of the newest one."""
    last: Record | None = None
    """The last step's record."""
    tokens_per_second: float | None = None
    """Of the recent steps."""
    seconds_left: float | None = None
    """Of training."""
    validation: Record | None = None
    """The last one's record."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """How often each event has been."""
    event: Record | None = None
    """The last record that is no step's."""
    asked: Sequence[str] = ()
    """Requests that wait."""
    attempts: Sequence[Attempt] = ()
    number: str | None = None
    """SLURM's number of its job."""


class RunReader:
    """Reads one run's folder, of metrics.jsonl only what it has not read yet."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._file = 0  # its inode: a run that goes on replaces the file by a shorter one
        self._total: tuple[float, int | None] | None = None
        self._forget()

    def read(self) -> Standing:
        """The run as it is now.

        Raises:
            ConfigError: its configuration cannot be read.
        """
        run = self.run
        standing = Standing(run=run, begun=(run / "config.yaml").is_file(), state="has not begun")
        standing.attempts = Attempts(run).read()
        standing.number = _job_number(run, standing.attempts)
        if not standing.begun:
            return standing
        self._take_new()
        summary = _summary(run)
        standing.state, standing.reason = _state(run, summary), summary.get("reason")
        if standing.state == "training":
            standing.reason = None
        standing.total, standing.checkpoint, standing.asked = self._steps(), newest_step(run), waiting(run)
        standing.last, standing.validation, standing.event = self._last, self._validation, self._event
        standing.counts = dict(self._counts)
        standing.step = 0 if self._last is None else self._last["step"]
        standing.tokens_per_second = sum(self._paces) / len(self._paces) if self._paces else None
        if self._last is not None and standing.total and standing.tokens_per_second and standing.step < standing.total:
            tokens = self._last["tokens"] / standing.step
            standing.seconds_left = (standing.total - standing.step) * tokens / standing.tokens_per_second
        return standing

    def _forget(self) -> None:
        self._place = 0
        self._last: Record | None = None
        self._validation: Record | None = None
        self._event: Record | None = None
        self._counts: Counter[str] = Counter()
        self._paces: deque[float] = deque(maxlen=_RECENT)

    def _take_new(self) -> None:
        path = self.run / "metrics.jsonl"
        try:
            with path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._file or file.seek(0, 2) < self._place:
                    self._forget()
                self._file = inode
                file.seek(self._place)
                new = file.read()
        except FileNotFoundError:
            return
        whole = new[: new.rfind(b"\n") + 1]
        self._place += len(whole)
        for line in whole.splitlines():
            record = decode(line)
            if record is not None:
                self._take(record)

    def _take(self, record: Record) -> None:
        if "event" not in record:
            self._last = record
            if record.get("tokens_per_second"):
                self._paces.append(record["tokens_per_second"])
            return
        self._event = record
        self._counts[record["event"]] += 1
        if record["event"] == "evaluate":
            self._validation = record

    def _steps(self) -> int | None:
        changed = (self.run / "config.yaml").stat().st_mtime
        if self._total is None or self._total[0] != changed:
            config = load_stored(self.run)
            self._total = changed, None if config.continual is not None else config.total_steps
        return self._total[1]


class Queue:
    """SLURM's view of jobs, asked now and then."""

    def __init__(self) -> None:
        self._next = 0.0
        self._told: dict[str, list[str]] = {}

    def told(self, numbers: Iterable[str]) -> dict[str, list[str]]:
        """What SLURM says of each job, by its number: a line, or one for each task of an array."""
        wanted = sorted(set(numbers))
        if wanted and (time.monotonic() >= self._next or not set(wanted) <= self._told.keys()):
            self._told = self._ask(wanted)
            self._next = time.monotonic() + _QUEUE_SECONDS
        return self._told

    def _ask(self, numbers: Sequence[str]) -> dict[str, list[str]]:
        own = "%A|%F|"  # the number of the job, and of its array
        command = ["squeue", "-h", "-t", "all", "-j", ",".join(numbers), "-o", own + "%i: %T, %M of %l used, %R"]
        try:
            asked = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_ANSWER_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            return {number: [f"{number}: SLURM does not answer here"] for number in numbers}
        told = sorted(
            (line.split("|", 2) for line in asked.stdout.splitlines() if line.count("|") > 1), key=lambda one: one[2]
        )
        return {
            number: [words for *names, words in told if number in names] or [f"{number}: no longer known to SLURM"]
            for number in numbers
        }


def find_runs(folder: Path) -> list[Path]:
    """The runs in a folder, or the folder itself if it is one; those of a sweep, and heads, one by one."""
    if (
        not is_sweep(folder)
        and not has_heads(folder)
        and ((folder / "config.yaml").is_file() or (folder / "job").is_dir())
    ):
        return [folder]
    return _below(folder, _DEPTH)


def _below(folder: Path, depth: int) -> list[Path]:
    found = []
    for path in sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")):
        if (path / "config.yaml").is_file() or ((path / "job/attempts.jsonl").exists() and not is_sweep(path)):
            found.append(path)
        elif depth > 1:
            found += _below(path, depth - 1)
    return found


def _job_number(run: Path, attempts: Sequence[Attempt]) -> str | None:
    """That of the job that was submitted for it, or of the sweep's job that it runs in now."""
    path = run / "job/job_id"
    if path.exists():
        return path.read_text(encoding="ascii").strip()
    running = attempts[-1] if attempts and attempts[-1].ended is None else None
    return running.job if running is not None and running.job.isdigit() else None


def _summary(run: Path) -> dict[str, Any]:
    path = run / "summary.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _state(run: Path, summary: Mapping[str, Any]) -> str:
    """Whether a process holds the run folder, else what the last one said at its end."""
    if _in_use(run / ".lock"):
        return "training"
    return str(summary.get("status", "ended without a word, or holds its folder on another machine"))


def _in_use(lock: Path) -> bool:
    if not lock.exists():
        return False
    with lock.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
