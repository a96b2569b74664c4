"""How launchers announce processes: the variables that they set in each process's environment.

torchrun's variables come first, then MPI's, then SLURM's: torchrun may run under mpirun or srun, and mpirun under
srun, and the innermost launcher started this process. `announced` is pure; where only MPI knows the address of the
first process, parallel/runtime.py asks it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from parallel.hostlist import expand
from relora.errors import ConfigError

# Rank, number of processes, number on this machine.
_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MPI = {
    "mpirun (Open MPI)": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpirun (MPICH)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # Intel MPI and other users of hydra too
}
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_FIRST_SPECIAL_STEP = 4294967200
"""SLURM's numbers for batch scripts, interactive and external steps are above; srun's steps count from 0."""
_PORTS = range(15000, 30000)
"""Below Linux's ephemeral ports (32768), which other programs are given at random."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Announcement:
    """What a launcher says about this process."""

    launcher: str = "python"
    process_rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Its number on its machine: which GPU it uses."""
    address: str | None = None
    """Where the first process listens; None when it is alone, or when only MPI can tell."""
    port: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.process_rank < self.world_size or self.local_rank < 0:
            raise ConfigError(
                f"{self.launcher} announced process {self.process_rank} of {self.world_size}, number {self.local_rank} "
                "on its machine, which cannot be: unset the variables that are left over from another start "
                "(RANK, WORLD_SIZE, LOCAL_RANK), or start through one launcher"
            )
        if self.port > 65535:
            raise ConfigError(f"MASTER_PORT must be a port below 65536, got {self.port}")


def announced(environment: Mapping[str, str]) -> Announcement:
    """Find the launcher's announcement; without a launcher there is one process.

    Raises:
        ConfigError: variables are missing, no numbers, or contradict each other.
    """
    found = _of_torch(environment) or _of_mpi(environment) or _of_slurm(environment) or Announcement()
    _check_slurm(environment, found)
    return found


def has_agent(environment: Mapping[str, str]) -> bool:
    """Whether this process's parent is a launcher, without which it must not go on.

    Variables set by hand do not count: the shell that started such a process may be closed.
    """
    names = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE", *(names[0] for names in _MPI.values()))  # CROSS_SIZE is DeepSpeed's
    return any(name in environment for name in names) or _in_step(environment)


def rank_in(environment: Mapping[str, str]) -> int:
    """This process's rank as far as it can be told, without any check: who speaks before the processes have met."""
    for name in (_TORCH[0], *(names[0] for names in _MPI.values()), _SLURM[0]):
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return 0


def own_words(arguments: Sequence[str]) -> list[str]:
    """A command line without the `--local_rank=N` that the deepspeed launcher adds to it."""
    return [word for word in arguments if not word.startswith(("--local_rank=", "--local-rank="))]


def _of_torch(environment: Mapping[str, str]) -> Announcement | None:
    if "RANK" not in environment:
        return None
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "deepspeed"
    rank, size, local = _numbers(environment, launcher if has_agent(environment) else "RANK", _TORCH)
    if size > 1 and "MASTER_ADDR" not in environment:
        raise ConfigError(f"RANK={rank} and WORLD_SIZE={size} are set, but MASTER_ADDR is not: {_BY_HAND}")
    return _announcement(environment, launcher, (rank, size, local), None)


def _of_mpi(environment: Mapping[str, str]) -> Announcement | None:
    for launcher, names in _MPI.items():
        # `srun --mpi=pmi2` sets PMI_RANK too, but no local rank: there SLURM's own variables tell everything.
        if names[0] in environment and (names[2] in environment or not _in_step(environment)):
            return _announcement(environment, launcher, _numbers(environment, launcher, names), None)
    return None


def _of_slurm(environment: Mapping[str, str]) -> Announcement | None:
    if not _in_step(environment):
        return None
    hosts = expand(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""))
    # On one machine no name needs to be resolved.
    address = "127.0.0.1" if len(hosts) <= 1 else hosts[0]
    return _announcement(environment, "srun", _numbers(environment, "srun", _SLURM), address)


def _announcement(
    environment: Mapping[str, str], launcher: str, numbers: tuple[int, int, int], address: str | None
) -> Announcement:
    """Put the numbers and the meeting point together; MASTER_ADDR and MASTER_PORT overrule the launcher."""
    rank, size, local = numbers
    if "WORLD_SIZE" in environment and _number(environment, "WORLD_SIZE", launcher) not in (size, 1):
        raise ConfigError(
            f"{launcher} started {size} processes, but WORLD_SIZE={environment['WORLD_SIZE']}: unset WORLD_SIZE"
        )
    if size == 1:
        return Announcement(launcher=launcher, process_rank=rank, world_size=size, local_rank=local)
    address = environment.get("MASTER_ADDR", address)
    port = _job_port(environment)
    if "MASTER_PORT" in environment:
        port = _number(environment, "MASTER_PORT", launcher)
    elif address is not None and launcher != "srun":
        raise ConfigError(f"MASTER_ADDR={address} is set, but MASTER_PORT is not: {_BY_HAND}")
    return Announcement(
        launcher=launcher, process_rank=rank, world_size=size, local_rank=local, address=address, port=port
    )


_BY_HAND = "set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or start by torchrun"


def _job_port(environment: Mapping[str, str]) -> int:
    """A port that a job's other steps and the machine's other jobs are unlikely to have."""
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return _PORTS[(job * 31 + step) % len(_PORTS)]


def _in_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process: a batch script and an interactive allocation are no such steps."""
    step = environment.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in environment and step.isdigit() and int(step) < _FIRST_SPECIAL_STEP


def _check_slurm(environment: Mapping[str, str], found: Announcement) -> None:
    """Refuse what would be several runs in one job, or one process in the room of many.

    Raises:
        ConfigError: it would.
    """
    if _in_step(environment):
        tasks = _number(environment, "SLURM_STEP_NUM_TASKS", "srun")
        if found.world_size < tasks:
            raise ConfigError(
                f"srun started {tasks} tasks, but {found.launcher} announces {found.world_size} processes: these would "
                f"be separate runs in one folder. Start python by srun itself (srun --ntasks {tasks} python -m ...), "
                "or one torchrun per machine (srun --ntasks-per-node 1 torchrun --nnodes ... --rdzv-backend c10d)"
            )
    elif found == Announcement() and environment.get("SLURM_NTASKS", "1") != "1":
        tasks = _number(environment, "SLURM_NTASKS", "SLURM")
        raise ConfigError(
            f"this SLURM job has {tasks} tasks, but plain python would use one of them: start srun python -m ... "
            "(or, for one process on purpose, srun --ntasks 1 python -m ...)"
        )


def _numbers(environment: Mapping[str, str], launcher: str, names: tuple[str, str, str]) -> tuple[int, int, int]:
    rank, size, local = (_number(environment, name, launcher) for name in names)
    return rank, size, local


def _number(environment: Mapping[str, str], name: str, launcher: str) -> int:
    text = environment.get(name)
    if text is None:
        raise ConfigError(f"{launcher} is set, but {name} is not: {_BY_HAND}")
    if not text.isdigit():
        raise ConfigError(f"{name} must be a whole number, got {text!r}: {_BY_HAND}")
    return int(text)
