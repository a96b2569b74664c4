"""The tasks of a stream, opened and checked against each other, for the one model that learns them all.

What a task serves depends on its own data, the seed and its name, and never on later tasks: a task can be appended to
a stream at any time.
"""

from collections.abc import Sequence

from continual.classes import Scenario
from continual.classification import open_classification
from continual.data import DataConfig
from continual.generation import open_generation
from continual.labelled import Modality
from continual.method import TaskKind
from continual.opened import OpenTasks
from continual.prepare import Progress
from continual.stream import TaskConfig
from relora.errors import ConfigError

__all__ = ["Modality", "OpenTasks", "open_tasks"]


def open_tasks(
    tasks: Sequence[TaskConfig],
    config: DataConfig,
    *,
    scenario: Scenario,
    seed: int,
    progress: Progress | None = None,
) -> OpenTasks:
    """The data of all tasks; text is prepared first where the cache does not have it.

    Raises: ConfigError
    """
    if config.validation_path is not None:
        raise ConfigError(
            f"data.validation_path={config.validation_path} has no effect on a stream: give its tasks a validation each"
        )
    classifying = [task for task in tasks if task.kind is TaskKind.classification]
    generating = [task for task in tasks if task.kind in (TaskKind.causal_lm, TaskKind.instruction)]
    if classifying and generating:
        raise ConfigError(
            f"{generating[0].key}.kind={generating[0].kind.value} needs a language model, and {classifying[0].name}, a "
            "task of classification, a classifier: a stream trains one model, so make two streams of them"
        )
    if classifying:
        return open_classification(tasks, config, scenario=scenario, seed=seed, progress=progress)
    if scenario is not Scenario.class_incremental:
        raise ConfigError(
            f"continual.scenario={scenario.value} has no effect on a stream without classes: leave it out"
        )
    return open_generation(tasks, config, seed=seed, progress=progress)
