"""What opening the tasks of a stream gives."""

from dataclasses import dataclass, field
from typing import Any

from continual.images import ImageForm
from continual.labelled import Modality
from continual.method import TaskData

Row = dict[str, str | int | float]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenTasks:
    """The data of all tasks, and what the one model for them must fit."""

    tasks: list[TaskData]
    modality: Modality
    tokenizer: Any = None
    """Of transformers; None for images."""
    vocab_size: int | None = None
    """One more than the largest token; None for images."""
    class_names: list[str] = field(default_factory=list)
    """Outputs of the classifier, in the order in which tasks bring them."""
    image: tuple[int, int] | None = None
    """Pixels of a side, and channels; None for text."""
    form: ImageForm | None = None
    """How images of all tasks become tensors; None for text, or where tasks differ in mean or std."""
    rows: list[Row]
    """A row for each task; all rows have the same columns."""
