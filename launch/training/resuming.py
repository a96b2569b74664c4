"""What of the data must be as it was when a checkpoint was written: all of a plain run, the tasks that have begun."""

from typing import Any

from launch.training.course import Course
from launch.training.run_folder import RunFolder
from relora.errors import ConfigError

_MEANINGS = {"fingerprint": "its data", "classes": "its classes", "lr": "its learning rate"}


def check_course(folder: RunFolder, course: Course, begun: int) -> None:
    """Refuse to go on when what has been trained on is not what it was.

    Args:
        begun: stages that have begun.

    Raises:
        ConfigError: the data, or a task that has begun, has changed.
    """
    assert folder.resume is not None
    stored: list[dict[str, Any]] = folder.resume.state["data"]
    if not course.is_stream:
        _check_data(folder, course, stored)
        return
    for number, before in enumerate(stored[:begun]):
        name = before["name"]
        if number >= len(course.facts):
            raise ConfigError(
                f"continual.tasks: {name} has been trained already, and is not in the list any more: put it back "
                f"as task {number + 1}, or begin anew in another run.dir"
            )
        now = course.facts[number]
        for key, value in before.items():
            if now.get(key) != value:
                what = _MEANINGS.get(key, f"its {key}")
                shown = ("then", "now") if key == "fingerprint" else (f"{value} then", f"{now.get(key)} now")
                told = "" if key == "fingerprint" else f" ({shown[0]}, {shown[1]})"
                raise ConfigError(
                    f"continual.tasks.{name}: {what} changed{told}, but the run has begun or finished it: restore "
                    f"it, go back with continual.restart_from={name}, or begin anew in another run.dir"
                )
    names = folder.resume.state["class_names"]
    if course.class_names[: len(names)] != names and begun:
        trained = names[: _classes_of(stored[:begun])]
        if course.class_names[: len(trained)] != trained:
            raise ConfigError(
                f"continual.tasks: the classes {', '.join(trained)} have outputs already, in this order, and the "
                f"list now gives {', '.join(course.class_names[: len(trained)])}: put changed tasks after those "
                "that have begun"
            )


def _classes_of(facts: list[dict[str, Any]]) -> int:
    return len(dict.fromkeys(name for fact in facts for name in fact.get("classes", [])))


def _check_data(folder: RunFolder, course: Course, stored: list[dict[str, Any]]) -> None:
    assert folder.resume is not None
    before, now = stored[0].get("fingerprint", ""), course.facts[0]["fingerprint"]
    if before != now and folder.resume.folder.parent == folder.checkpoints:
        raise ConfigError(
            f"the data has changed since {folder.resume.folder} was written (fingerprint {before[:12]} then, "
            f"{now[:12]} now), so the run cannot go on exactly: restore it, or branch off with a new run.dir and "
            f"checkpoint.resume={folder.path}"
        )
