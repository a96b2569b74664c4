"""Going back to the beginning of a task: which checkpoint that is, and what becomes of the later ones."""

from collections.abc import Sequence
from pathlib import Path

from parallel.checkpoint import Checkpoint, list_checkpoints, read_checkpoint, step_name
from parallel.parts import DamagedCheckpoint
from relora.errors import ConfigError


def way_back(root: Path, newest: Checkpoint | None, task: str) -> tuple[Checkpoint | None, list[Path]] | None:
    """The checkpoint at the beginning of a task (None: that of the run), and the later ones.

    None when this very command has gone back already.

    Raises:
        ConfigError: the run does not know the task, has not reached it, or the checkpoint is damaged.
    """
    if newest is None:
        return None
    if newest.state["run"]["gone_back"] == task:  # the same command goes on with what it has begun
        return None
    names = [stage["name"] for stage in newest.state["data"]]
    if task not in names:
        raise ConfigError(
            f"continual.restart_from={task} is no task that this run was given: it has {', '.join(names)}"
        )
    step = sum(stage["steps"] for stage in newest.state["data"][: names.index(task)])
    folders = list_checkpoints(root)
    if step > newest.state["run"]["step"]:
        raise ConfigError(f"continual.restart_from={task}: the run has not come to it yet; leave it out")
    later = [folder for folder in folders if folder.name > step_name(step)]
    if step == 0:
        return None, folders
    try:
        return read_checkpoint(root / step_name(step)), later
    except DamagedCheckpoint as error:
        raise ConfigError(
            f"continual.restart_from={task} needs the checkpoint at its beginning, which is damaged: {error}. Go back "
            "further"
        ) from error


def set_aside(folders: Sequence[Path]) -> None:
    """Move checkpoints out of the way of a run; they stay in checkpoints/abandoned."""
    for folder in folders:
        aside = folder.parent / "abandoned"
        aside.mkdir(exist_ok=True)
        target, number = aside / folder.name, 1
        while target.exists():
            number += 1
            target = aside / f"{folder.name}-{number}"
        folder.rename(target)
