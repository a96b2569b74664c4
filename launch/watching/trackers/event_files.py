"""A run in TensorBoard: event files in a folder of its own, one for each attempt.

What a resumed run does again hides what was written of it before.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from launch.reports.stream_tables import markdown
from launch.watching.trackers.config import TrackerConfig
from launch.watching.trackers.tracker import Guard, Level, Pixels, Tracker, event_numbers, numbers_of
from relora.errors import ConfigError

_QUEUE = 1000  # of events that the writer keeps before a write
_FLUSH_SECONDS = 10


def open_event_files(
    config: TrackerConfig, folder: Path, *, step: int, resolved: Mapping[str, Any], say: Callable[[str], None]
) -> Tracker | None:
    """A run whose next update is the one after `step`; None if the folder cannot be written.

    Raises: ConfigError when TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "tracker=tensorboard needs the package tensorboard, which is not installed: "
            "install it (pip install tensorboard), or turn tracking off with tracker=none"
        ) from error
    with Guard(say, "TensorBoard's files cannot be written", "tensorboard"):
        again = folder.is_dir()
        writer = SummaryWriter(
            str(folder), purge_step=step + 1 if again else None, max_queue=_QUEUE, flush_secs=_FLUSH_SECONDS
        )
        return TensorboardTracker(writer, config, resolved, say, step)
    return None


class TensorboardTracker(Tracker):
    """A run in TensorBoard."""

    def __init__(
        self, writer: Any, config: TrackerConfig, resolved: Mapping[str, Any], say: Callable[[str], None], step: int
    ) -> None:
        self.images = config.images
        self._writer, self._step = writer, step
        self._guard = Guard(say, "TensorBoard failed, and later failures are not told", "tensorboard")
        self._text("config", _code(yaml.safe_dump(dict(resolved), sort_keys=False)))

    def log(self, record: Mapping[str, Any]) -> None:
        """Write a step's numbers."""
        self._step = record.get("step", self._step)
        self._scalars(numbers_of(record))

    def event(self, record: Mapping[str, Any]) -> None:
        """Write an event's numbers."""
        self._step = record.get("step", self._step)
        self._scalars(event_numbers(record))

    def figures(self, figures: Mapping[str, Path | Pixels]) -> None:
        """Write pictures at the last step."""
        from PIL import Image

        with self._guard:
            for name, figure in figures.items():
                pixels = np.asarray(Image.open(figure).convert("RGBA")) if isinstance(figure, Path) else figure
                self._writer.add_image(f"figures/{name}", pixels, self._step, dataformats="HWC")

    def matrix(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write the matrix at the last step as the table stream/matrix."""
        self._text("stream/matrix", markdown((list(columns), [list(row) for row in rows])))

    def alert(self, title: str, text: str, level: Level) -> None:
        """Write it as text: nobody is told."""
        self._text("alerts", f"**{level.value}: {title}** {text}")

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write the final values, numbers as summary/NAME and all as a text."""
        self._scalars({f"summary/{key}": value for key, value in numbers_of(values).items()})
        self._text("summary", _code(json.dumps(dict(values), indent=1)))

    def finish(self, exit_code: int = 0) -> None:
        """Write what waits, and close the file."""
        with self._guard:
            self._writer.close()

    def _scalars(self, numbers: Mapping[str, float]) -> None:
        with self._guard:
            for name, value in numbers.items():
                if name != "step":
                    self._writer.add_scalar(name, value, self._step)

    def _text(self, name: str, text: str) -> None:
        with self._guard:
            self._writer.add_text(name, text, self._step)


def _code(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())
