"""Whole training runs side by side: `python -m launch.train` in processes of their own, results from their folders.

A run whose summary says done is not repeated, so that an interrupted study goes on where it was.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from launch.config import load
from launch.reports.history import read_history
from launch.training.run_folder import find

Curve = list[tuple[int, float]]
"""Tokens seen and validation loss then."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Job:
    """One run: its settings and its folder."""

    folder: Path
    overrides: tuple[str, ...]
    processes: int = 1


@dataclass(kw_only=True, slots=True, frozen=True)
class Result:
    """What a finished run achieved."""

    val_loss: float
    """Of the merged model as written to final/, in nats per token."""
    tokens: int
    restarts: int
    seconds: float
    """Wall time of training, on a machine that does other things, too."""
    curve: Curve


class RunFailed(RuntimeError):
    """A training process ended with an error."""


def run_all(jobs: Sequence[Job], *, workers: int) -> list[Result]:
    """Make the runs that are not done yet, some at a time with one thread each; return all results in order.

    Raises:
        RunFailed: a run ended with an error; what is done stays done.
        ConfigError: a folder holds a run with other settings.
    """
    finished = [find(load(job.overrides), job.folder).finished for job in jobs]
    todo = [job for job, done in zip(jobs, finished, strict=True) if not done]
    progress = _Progress(done=len(jobs) - len(todo), total=len(jobs))
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_train, job, progress) for job in todo]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    return [read_result(job.folder) for job in jobs]


def read_result(folder: Path) -> Result:
    """The result of the finished run in a folder."""
    history = read_history(folder)
    summary = history.summary
    per_step = history.config["training.global_batch_size"] * history.config["data.sequence_length"]
    return Result(
        val_loss=summary["val_loss"],
        tokens=summary["tokens"],
        restarts=summary["restarts"],
        seconds=summary["wall_seconds"],
        curve=[(step * per_step, loss) for step, loss in zip(*history.validation(), strict=True)],
    )


class _Progress:
    """Counts finished runs and says so, one line each."""

    def __init__(self, *, done: int, total: int) -> None:
        self._lock, self._done, self._total = threading.Lock(), done, total

    def finished(self, job: Job) -> None:
        result = read_result(job.folder)
        with self._lock:
            self._done += 1
            place = "/".join(job.folder.parts[-2:])
            print(f"[{self._done}/{self._total}] {place}: {result.val_loss:.4f} in {result.seconds:.0f} s", flush=True)


def _train(job: Job, progress: _Progress) -> None:
    log = job.folder.with_name(job.folder.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={job.processes}"]
    starter = several if job.processes > 1 else []
    command = [sys.executable, *starter, "-m", "launch.train", *job.overrides, f"run.dir={job.folder}"]
    # The pool of threads is sized at start-up, before training.threads is read.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code:
        raise RunFailed(f"{job.folder} ended with exit code {code}: see {log}")
    progress.finished(job)
