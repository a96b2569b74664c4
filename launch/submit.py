"""`submit`: has a run, or a sweep of runs, started by torchrun, mpirun or SLURM until all is done.

What can be wrong is looked for before a job waits in a queue: by launch/jobs/job.py, and by SLURM when it is asked for
its opinion. docs/launching.md tells the rest.
"""

import os
import secrets
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch import exits
from launch.jobs.arrays import MEETING_ID
from launch.jobs.attempt import VARIABLE
from launch.jobs.job import Job, Shape, prepare
from launch.jobs.launcher import LAUNCHERS, SlurmConfig
from launch.jobs.supervise import Supervisor
from launch.jobs.sweep import keep_choices, show_sweep
from launch.usage import asks_for_help, keys_help
from parallel.files import write_atomically
from parallel.frames import TOKEN_VARIABLE
from relora.errors import ConfigError

_DRY, _SWEEP = "--dry-run", "--multirun"
_HELP = f"""\
usage: accrete submit [launcher=local|torchrun|mpi|slurm] [launcher.key=value ...] [words of train ...] [{_DRY}]
                      [{_SWEEP}]

Starts a training run and goes on with it until it is done: again after a failure, from the last checkpoint, and given
up after launcher.attempts attempts that brought it no further. With launcher=slurm that is a job, which goes on in
another allocation at its time limit, after a pre-emption, and without a node that was lost. {_DRY} only prints.
Elastic heads become a job each there, and a stream a job for each task with launcher.chain=true.
{_SWEEP} (or -m) makes a run of every combination of values that are listed with commas: one after the other here,
a job array with SLURM. `accrete status` shows a table of them.

  accrete submit launcher=torchrun launcher.processes=8 parallel=zero2 run.dir=runs/mine
  accrete submit launcher=slurm launcher.nodes=4 launcher.gpus_per_node=8 launcher.time=12:00:00 \\
      launcher.partition=gpu experiment=relora_llama_1b parallel=zero2 run.dir=runs/1b {_DRY}
  accrete submit {_SWEEP} launcher=slurm optimizer.lr=1e-3,3e-3 lora.rank=8,32 run.dir=runs/sweep
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command `submit`; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if asks_for_help(words):
        parts = [_HELP]
        for name, owner in LAUNCHERS.items():
            parts.append("\n".join(keys_help(f"launcher={name}", owner, {})).replace(f"launcher={name}.", "launcher."))
        print("\n".join(parts))
        return exits.DONE
    return exits.run(lambda: _command(words))


def _command(words: Sequence[str]) -> int:
    options = {word for word in words if word in (_DRY, _SWEEP, "-m")}
    job = prepare([word for word in words if word not in options], sweep=bool(options - {_DRY}))
    is_slurm = isinstance(job.launcher, SlurmConfig)
    if _DRY in options:
        if job.shape is Shape.heads:
            print(f"# {job.own / 'meeting.sh'}, submitted first\n{job.meeting_script()}\n# {job.own / 'job.sh'}")
        print(job.script() if is_slurm else job.shown(), end="")
        return exits.DONE
    return submit(job) if is_slurm else _run_here(job)


def _run_here(job: Job) -> int:
    """All runs, one after the other; a stop ends the sweep, a failure only its run."""
    if job.choices is not None:
        keep_choices(job.folder, job.choices)
    os.environ.update(job.variables())
    worst = exits.DONE
    for (_, run_dir), command in zip(job.runs, job.commands(), strict=True):
        own = job.launcher
        supervisor = Supervisor(
            run_dir, command, limit=own.attempts, job=None, restarts=job.restarts, hang=own.hang_seconds
        )
        code = supervisor.work()
        if code == exits.PREEMPTED:
            return code
        worst = worst or code
    if job.choices is not None:
        show_sweep(job.folder)
    return worst


def submit(job: Job) -> int:
    """Hand a job to SLURM, and tell where to look.

    Raises:
        ConfigError: SLURM refuses it, or the run folder has a job already.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(f"launcher=slurm needs sbatch, which is not here: log in where it is, or look with {_DRY}")
    job.own.mkdir(parents=True, exist_ok=True)
    for name in (MEETING_ID, "job_id"):
        _check_free(job, job.own / name)
    if job.choices is not None:
        keep_choices(job.folder, job.choices)
    write_atomically(job.own / "job.sh", job.script())
    heads = job.shape is Shape.heads
    word = {TOKEN_VARIABLE: os.environ.get(TOKEN_VARIABLE) or secrets.token_hex(16)} if heads else {}
    opinion = _sbatch(job, "job.sh", word, "--test-only").stderr.strip()
    after = [f"--dependency=after:{_start_meeting(job, word)}"] if heads else []
    try:
        number = _number(_sbatch(job, "job.sh", word, "--parsable", *after))
    except ConfigError:
        if after:
            subprocess.run(["scancel", (job.own / MEETING_ID).read_text(encoding="ascii").strip()], check=False)
        raise
    write_atomically(job.own / "job_id", number + "\n")
    print(f"job {number}: {' '.join(opinion.split())}")
    print(f"run folder: {job.folder}")
    log = f"slurm-{number}.log" if job.array is None else f"slurm-{number}_*.log"
    print(f"output: {job.own / log}; the other ranks' in job/attempt_001 of the run")
    print(f"stop it with a checkpoint: scancel {number}; look: accrete status {shlex.quote(str(job.folder))}")
    return exits.DONE


def _start_meeting(job: Job, word: Mapping[str, str]) -> str:
    """Submit the job where heads meet; returns its number."""
    (job.own / "job_id").unlink(missing_ok=True)  # it looks there for theirs, and must not find one from before
    write_atomically(job.own / "meeting.sh", job.meeting_script())
    number = _number(_sbatch(job, "meeting.sh", word, "--parsable"))
    write_atomically(job.own / MEETING_ID, number + "\n")
    print(f"job {number}: where the heads meet")
    return number


def _number(done: "subprocess.CompletedProcess[str]") -> str:
    return done.stdout.strip().split(";")[0]


def _check_free(job: Job, path: Path) -> None:
    """Refuse a second job for a run."""
    if not path.exists():
        return
    number = path.read_text(encoding="ascii").strip()
    state = subprocess.run(["squeue", "-h", "-j", number, "-o", "%T"], capture_output=True, text=True, check=False)
    states = state.stdout.split() if state.returncode == 0 else []
    if states and states[0] in _ALIVE:
        raise ConfigError(
            f"run.dir={job.folder} has job {number} already ({', '.join(states).lower()}): let it go on, end it with "
            f"scancel {number}, or name another run.dir"
        )


_ALIVE = {"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "STOPPED"}


def _sbatch(job: Job, script: str, variables: Mapping[str, str], *options: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE} | dict(variables)
    done = subprocess.run(
        ["sbatch", *options, script], cwd=job.own, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = textwrap.shorten(done.stderr, 400).removeprefix("sbatch: ").removeprefix("error: ")
        raise ConfigError(f"SLURM refuses the job: {said}. The script is {job.own / script}")
    return done


if __name__ == "__main__":
    sys.exit(main())
