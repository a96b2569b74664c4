"""The jobs of an array that one run becomes: LTE's elastic heads, or the tasks of a stream one after the other.

Heads meet at a small job of their own (launch/jobs/slurm_script.py), which tells its address in the run folder. Of a
stream one job runs at a time, each to the end of its task; one that failed or waits again leaves the rest to the next.
"""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf

from launch.config import CONF, TrainConfig
from launch.jobs.launcher import LocalConfig, SlurmConfig
from relora.errors import ConfigError

HEADS, MEETING, MEETING_ID = "heads", "meeting", "meeting_id"
"""The folder of the heads' run folders; that of their meeting point; the file that holds its job's number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A job of an array."""

    folder: Path
    """Its run folder."""
    settings: dict[str, str] = field(default_factory=dict)
    """What it is told besides, in place of what the user said."""


def is_of_heads(config: TrainConfig, launcher: LocalConfig) -> bool:
    """Whether a run's elastic heads are started together, as an array that has a meeting point of its own."""
    if not isinstance(launcher, SlurmConfig) or config.lte is None or config.lte.meeting is None:
        return False
    usual = OmegaConf.load(CONF / "lte/elastic.yaml").lte.meeting  # on this machine, where no job of SLURM's meets
    return bool(config.lte.meeting == usual)


def has_heads(folder: Path) -> bool:
    """Whether a folder holds heads that were started together."""
    return (folder / "job" / MEETING_ID).is_file()


def heads_of(config: TrainConfig, folder: Path, here: Path) -> list[Member]:
    """A job for each head."""
    assert config.lte is not None
    names = [f"{number:03d}" for number in range(config.lte.heads)]
    shared = {"lte.meeting": str(here / folder / MEETING)}
    if config.tracker is not None and config.tracker.group is None:
        shared["tracker.group"] = config.run.name
    return [
        Member(folder=folder / HEADS / name, settings={**shared, "run.name": f"{config.run.name}-{name}"})
        for name in names
    ]


def tasks_of(config: TrainConfig, folder: Path) -> list[Member]:
    """A job for each task, all in one run folder."""
    assert config.continual is not None
    *names, _ = [task.name for task in config.continual.task_list()]
    return [*(Member(folder=folder, settings={"continual.stop_after": name}) for name in names), Member(folder=folder)]


def check_arrays(config: TrainConfig, launcher: SlurmConfig, *, sweep: bool) -> None:
    """Refuse what an array cannot be, and settings that have no effect on this run.

    Raises: ConfigError
    """
    heads = is_of_heads(config, launcher)
    if heads and sweep:
        raise ConfigError(
            "--multirun cannot be with elastic heads, which are a job array themselves: submit each run by itself"
        )
    if launcher.meeting and not heads:
        raise ConfigError(
            f"launcher.meeting={launcher.meeting} has no effect without a meeting point to start: choose lte=elastic "
            "without lte.meeting, or leave it out"
        )
    if launcher.concurrent is not None and not sweep and not heads:
        raise ConfigError("launcher.concurrent has no effect on a single run: leave it out, or sweep with --multirun")
    if heads and launcher.concurrent is not None:
        assert config.lte is not None
        if launcher.concurrent < config.lte.least_members:
            raise ConfigError(
                f"launcher.concurrent={launcher.concurrent} lets fewer heads run at once than a sync needs: at least "
                f"lte.quorum={config.lte.least_members}, or leave it out"
            )
    if launcher.chain:
        _check_chain(config, sweep=sweep)


def _check_chain(config: TrainConfig, *, sweep: bool) -> None:
    continual = config.continual
    if continual is None:
        raise ConfigError(
            "launcher.chain=true needs a stream of tasks, a job for each, and this run has none: choose continual=... "
            "(docs/streams.md), or leave it out"
        )
    if sweep:
        raise ConfigError("--multirun cannot be with launcher.chain=true: submit each run by itself, or leave it out")
    if continual.method == "joint":
        raise ConfigError(
            "launcher.chain=true has no effect with continual.method=joint, which has one task for all: leave it out"
        )
    if len(continual.task_list()) == 1:
        raise ConfigError("launcher.chain=true has no effect on a stream of one task: leave it out")
    for key in ("stop_after", "restart_from"):
        if (value := getattr(continual, key)) is not None:
            raise ConfigError(
                f"continual.{key}={value} cannot be with launcher.chain=true, which is a job for each task: leave out "
                "one of the two"
            )
