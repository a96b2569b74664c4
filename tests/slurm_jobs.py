"""Runs that tests submit to the cluster of tests/slurm_cluster.py, and what became of them."""

import contextlib
import io
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import status, submit
from launch.jobs.attempts import Attempts
from launch.jobs.job import in_words
from launch.watching.records import read_records
from parallel.frames import TOKEN_VARIABLE

ROOT = Path(__file__).parent.parent
TIMED = {"tokens_per_second", "memory_bytes", "flops_per_second", "mfu", "seconds"}
SECONDS = 500
"""How long a job may take where others keep the machine busy."""
ALIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"}


def eventually(what, tell=lambda: "nothing happened in time", seconds=SECONDS):
    """Wait until something is true, and return it."""
    limit = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < limit, tell()
        time.sleep(0.2)
    return found


class Job:
    """A run that is submitted."""

    def __init__(self, cluster, folder, words, *launcher, really=False):
        """`really`: as a user does, by a process of its own, whose imports take seconds."""
        self.cluster, self.run = cluster, folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        own = ["launcher=slurm", "launcher.signal_seconds=60", *launcher]
        own += [f"launcher.environment={{PYTHONPATH: {ROOT}, OMP_NUM_THREADS: '1', DS_ACCELERATOR: cpu}}"]
        words = [*own, "evaluation.spectra=none", *words, f"run.dir={in_words(str(self.run))}"]
        if really:
            command = [sys.executable, "-m", "launch.submit", *words]
            self.submitted = cluster.run(*command, cwd=folder, PYTHONPATH=str(ROOT), seconds=SECONDS)
        else:
            self.submitted = here(cluster, submit.main, words, folder)
        found = re.search(r"^job (\d+): sbatch", self.submitted.stdout, re.MULTILINE)
        self.number = found[1] if found else None

    @property
    def attempts(self):
        return Attempts(self.run).read()

    @property
    def log(self):
        return "".join(path.read_text(errors="replace") for path in sorted(self.run.glob("job/slurm-*.log")))

    def states(self, number=None):
        """Of all jobs of an array, or of one."""
        return self.cluster.ask("squeue", "-h", "-t", "all", "-j", number or self.number, "-o", "%T").split()

    def status(self):
        """What `accrete status` prints."""
        return here(self.cluster, status.main, [str(self.run)], self.run).stdout

    def wait_for_step(self, step):
        path = self.run / "metrics.jsonl"

        def reached():
            assert set(self.states()) <= ALIVE, self.tell()
            return path.exists() and any(record["step"] >= step for record in read_records(path))

        eventually(reached, self.tell)

    def wait_for_attempt(self, number):
        """Until the run has been started so often."""
        eventually(lambda: self.cluster.hurry(self.number) or len(self.attempts) == number, self.tell)

    def wait(self, states=("COMPLETED",)):
        """Until all of its jobs have ended so."""

        def done():
            found = self.states()
            assert set(found) <= {*ALIVE, *states}, self.tell()
            if "PENDING" in found:
                self.cluster.hurry(self.number)
            return sorted(found) == sorted(states)

        eventually(done, self.tell)

    def tell(self):
        """All that is known of the job."""
        logs = [f"== {path}\n{path.read_text(errors='replace')}" for path in self.run.rglob("job/**/*.log")]
        shown = self.cluster.run("scontrol", "show", "job", str(self.number)).stdout
        attempts = "\n".join(map(str, self.attempts))
        slurm = self.cluster.words_on(self.number)
        return "\n".join([self.submitted.stdout, self.submitted.stderr, *logs, slurm, shown, attempts])

    def records(self):
        kept = [r for r in read_records(self.run / "metrics.jsonl") if r.get("event") not in ("resume", "checkpoint")]
        return [{key: value for key, value in record.items() if key not in TIMED} for record in kept]


def here(cluster, main, words, folder):
    """A command of ours in this process, whose calls of SLURM's commands go to the cluster."""

    def passed_on(command, *, cwd=None, env=None, **_):
        word = {name: value for name, value in (env or {}).items() if name == TOKEN_VARIABLE}
        return cluster.run(*command, cwd=cwd, **word)

    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        patch.chdir(folder)
        patch.setattr(subprocess, "run", passed_on)
        code = main(words)
    return subprocess.CompletedProcess(words, code, out.getvalue(), errors.getvalue())
