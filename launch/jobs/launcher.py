"""What `accrete submit` is told about machines: the group `launcher`, which is no part of a run's configuration."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.config import composed
from launch.jobs.supervise import HANG_SECONDS, LEAST_HANG_SECONDS
from relora.errors import ConfigError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
_PLAIN = re.compile(r"[^\s'\"\\#]+")
"""What needs no quotes in a #SBATCH line, which SLURM reads by rules of its own."""
_OWN = {"job-name", "output", "error", "open-mode", "signal", "requeue", "no-requeue", "array", "wrap", "chdir"}


class Start(str, Enum):
    """How processes come to be in a SLURM job."""

    torchrun = "torchrun"
    """One task on each node, torchrun, which starts the node's processes; they meet by its c10d rendezvous."""
    srun = "srun"
    """One task for each process."""
    pmix = "pmix"
    """One task for each process, with MPI started through PMIx, for lte.transport=mpi."""


@dataclass(kw_only=True, slots=True)
class LocalConfig:
    """One process on this machine."""

    attempts: int = 3
    """Attempts in a row that bring the run no further, after which it is given up."""
    hang_seconds: float = HANG_SECONDS
    """Longest that the first process may be silent, or a step go on after parallel.timeout_seconds; 0: no limit.
    Six times as long at the start."""
    environment: dict[str, str] | None = None
    """Variables of the training processes, as {NAME: value}."""
    preflight: bool = True
    """Compare machines and processes at the beginning of each attempt: versions, clocks, links, files."""
    python: str | None = None
    """The interpreter; null: the one that runs this command, or `python` in a container."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ConfigError(f"launcher.attempts must be at least 1, got {self.attempts}")
        if 0 != self.hang_seconds < LEAST_HANG_SECONDS:
            raise ConfigError(
                f"launcher.hang_seconds must be at least {LEAST_HANG_SECONDS:g}, or 0 for never, got "
                f"{self.hang_seconds:g}: a sign of life comes every few seconds"
            )
        for name in self.environment or {}:
            if not _NAME.fullmatch(name):
                raise ConfigError(f"launcher.environment: {name!r} cannot name a variable: use letters, digits and _")


@dataclass(kw_only=True, slots=True)
class TorchrunConfig(LocalConfig):
    """Several processes on this machine, by torchrun."""

    processes: int | None = None
    """Processes; null: one for each GPU."""
    max_restarts: int = 0
    """Starts of all processes anew by torchrun itself, within an attempt."""

    def __post_init__(self) -> None:
        LocalConfig.__post_init__(self)
        _at_least("processes", self.processes, 1)
        _at_least("max_restarts", self.max_restarts, 0)


@dataclass(kw_only=True, slots=True)
class MpiConfig(LocalConfig):
    """Several processes on this machine, by mpirun."""

    processes: int | None = None
    """Processes; null: one for each GPU."""
    options: list[str] = field(default_factory=list)
    """Further words for mpirun."""

    def __post_init__(self) -> None:
        LocalConfig.__post_init__(self)
        _at_least("processes", self.processes, 1)


@dataclass(kw_only=True, slots=True)
class SlurmConfig(LocalConfig):
    """A job of SLURM's on one or many nodes."""

    start: Start = Start.torchrun
    """torchrun, srun or pmix."""
    nodes: int = 1
    """Nodes."""
    least_nodes: int | None = None
    """Begin with as few nodes when no more are free; the global batch stays as it is. null: all of them."""
    processes_per_node: int | None = None
    """Processes on each node; null: launcher.gpus_per_node, or 1."""
    gpus_per_node: int | None = None
    """GPUs of each node; null: none."""
    cpus_per_node: int | None = None
    """CPU cores of each node, shared by its processes; null: the site's default."""
    memory: str | None = None
    """Memory of each node, such as 200G; null: the site's default."""
    partition: str | None = None
    """Partition; null: the site's default."""
    account: str | None = None
    """Account that is charged; null: yours by default."""
    qos: str | None = None
    """Quality of service; null: the site's default."""
    time: str | None = None
    """Limit of one allocation, as days-hours:minutes:seconds; a longer run goes on in the next. null: the site's."""
    constraint: str | None = None
    """Features that nodes must have."""
    exclude: str | None = None
    """Nodes to leave out."""
    concurrent: int | None = None
    """Runs of a sweep, or elastic heads, that may run at once; null: all."""
    chain: bool = False
    """Of a stream: a job for each task, one after the other, in place of one job for all."""
    meeting: list[str] = field(default_factory=list)
    """Options of sbatch for the small job where elastic heads meet, each as --name=value, such as --partition=cpu."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch, each as --name=value."""
    container_image: str | None = None
    """Image that processes run in, through pyxis."""
    container_mounts: list[str] = field(default_factory=list)
    """Folders to mount into it, each as /outside:/inside."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load, in this order."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that the job script runs before training."""
    interface: str | None = None
    """Network device between nodes, such as ib0; null: the libraries choose."""
    infiniband: str | None = None
    """InfiniBand adapters for NCCL, such as mlx5_0,mlx5_1; null: NCCL chooses."""
    signal_seconds: int = 120
    """SLURM asks for a checkpoint so long before the time limit or a pre-emption."""
    requeue: bool = True
    """Go on in another allocation after a pre-emption, at the time limit, and when a node is lost."""

    def __post_init__(self) -> None:
        LocalConfig.__post_init__(self)
        for key in (
            "nodes",
            "least_nodes",
            "processes_per_node",
            "gpus_per_node",
            "cpus_per_node",
            "signal_seconds",
            "concurrent",
        ):
            _at_least(key, getattr(self, key), 1)
        if self.least_nodes is not None and self.least_nodes >= self.nodes:
            raise ConfigError(
                f"launcher.least_nodes={self.least_nodes} must be below launcher.nodes={self.nodes}: leave it out"
            )
        for key in ("memory", "partition", "account", "qos", "constraint", "exclude", "interface", "infiniband"):
            value = getattr(self, key)
            if value is not None and not _PLAIN.fullmatch(value):
                raise ConfigError(f"launcher.{key} must have no spaces, quotes, # or backslashes, got {value!r}")
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise ConfigError(f"launcher.time must look like 30, 12:00:00 or 1-12:00:00, got {self.time!r}")
        self._check_sbatch()
        if self.container_mounts and self.container_image is None:
            raise ConfigError("launcher.container_mounts has no effect without launcher.container_image: set that, too")

    def _check_sbatch(self) -> None:
        for key in ("sbatch", "meeting"):
            for option in getattr(self, key):
                if not option.startswith("--") or not _PLAIN.fullmatch(option):
                    raise ConfigError(
                        f"launcher.{key}: {option!r} must be --name or --name=value, without spaces or quotes"
                    )
        for option in self.meeting:
            if (name := _name_of(option)) in _OWN:
                raise ConfigError(f"launcher.meeting: --{name} is set by `accrete submit` itself")
        for option in self.sbatch:
            name = _name_of(option)
            if name in _OWN or name.replace("-", "_") in {"nodes", "time", "partition", "account", "qos", "constraint"}:
                raise ConfigError(
                    f"launcher.sbatch: --{name} is set by `accrete submit` itself: see the launcher's keys"
                )

    @property
    def node_processes(self) -> int:
        """Processes on each node."""
        return self.processes_per_node or self.gpus_per_node or 1


Launcher = LocalConfig | TorchrunConfig | MpiConfig | SlurmConfig
LAUNCHERS: dict[str, type[LocalConfig]] = {
    "local": LocalConfig,
    "torchrun": TorchrunConfig,
    "mpi": MpiConfig,
    "slurm": SlurmConfig,
}


def of_launcher(word: str) -> bool:
    """Whether an override is about the launcher."""
    return word.lstrip("+~").split("=")[0].split(".")[0] == "launcher"


def load_launcher(words: Sequence[str]) -> Launcher:
    """The launcher that overrides such as launcher=slurm launcher.nodes=2 describe.

    Raises:
        ConfigError: unknown key, wrong type or impossible value.
    """
    chosen = [word.partition("=")[2] for word in words if word.startswith("launcher=")]
    tree = composed(words, root="submit").launcher
    owner = LAUNCHERS[chosen[-1] if chosen else "local"]
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(owner), tree))
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(f"launcher.{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, LocalConfig)
    return config


def _name_of(option: str) -> str:
    return option.removeprefix("--").partition("=")[0]


def _at_least(key: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"launcher.{key} must be at least {least}, got {value}")
