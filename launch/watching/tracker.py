"""Weights & Biases beside a run and never in its way: what fails there is said once, and training goes on.

W&B's own counter starts again when an offline run is resumed, so charts have the record's `step` as x axis.
With `tracker=none` a run has the plain Tracker, which does nothing.
"""

import netrc
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from relora.errors import ConfigError

Pixels = NDArray[np.uint8]
"""A picture. Shapes: (height, width, 4)"""
_FINISH_SECONDS = 120.0  # of waiting for uploads at the end; `wandb sync` can send the rest later


class TrackerMode(str, Enum):
    """Whether records go to the server at once."""

    auto = "auto"
    """online where an API key is configured, else offline; WANDB_MODE decides where it is set."""
    online = "online"
    offline = "offline"


@dataclass(kw_only=True, slots=True)
class TrackerConfig:
    """Where a run appears in Weights & Biases."""

    project: str = "accrete"
    """Project name."""
    entity: str | None = None
    """User or team; null: the key's default."""
    group: str | None = None
    """Runs of one study share a group."""
    name: str | None = None
    """Display name; null: the run's name."""
    tags: list[str] = field(default_factory=list)
    """Words to find the run by."""
    mode: TrackerMode = TrackerMode.auto
    """auto, online or offline (send later by `wandb sync`)."""
    dir: str | None = None
    """Where W&B keeps its files, in a folder `wandb`; null: the run folder."""
    init_timeout_seconds: float = 20.0
    """How long to wait for the server before the run is tracked offline."""

    def __post_init__(self) -> None:
        if not self.project:
            raise ConfigError("tracker.project must not be empty: name one, or choose tracker=none")
        if not self.init_timeout_seconds > 0:
            seconds = self.init_timeout_seconds
            raise ConfigError(f"tracker.init_timeout_seconds must be above 0, got {seconds}: leave it at 20")


class Tracker:
    """What a run tells about itself while it works; this one keeps it to itself."""

    run_id: str | None = None
    """The id to continue under; None if there is nothing to continue."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take a step's record."""

    def event(self, record: Mapping[str, Any]) -> None:
        """Take an event's numbers, each named after its event."""

    def figures(self, figures: Mapping[str, Path]) -> None:
        """Take images by name."""

    def matrix(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], draw: Callable[[], Pixels]) -> None:
        """Take a stream's score matrix, as a table and as what draws it."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Take the run's final values."""

    def finish(self, exit_code: int = 0) -> None:
        """Close the run."""


def open_tracker(
    config: TrackerConfig | None,
    *,
    run_dir: Path,
    run_name: str,
    resolved: Mapping[str, Any],
    run_id: str | None,
    say: Callable[[str], None] = print,
) -> Tracker:
    """The tracker of a run, which goes on under `run_id` if one is given; one process of a run opens it.

    Raises: ConfigError when W&B is asked for and not installed.
    """
    if config is None:
        return Tracker()
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "tracker=wandb needs the package wandb, which is not installed: "
            "install it (pip install wandb), or turn tracking off with tracker=none"
        ) from error
    run_id = run_id or secrets.token_hex(4)
    folder = Path(config.dir or run_dir)
    for mode in _modes(config.mode, say):
        with _Guard(say, f"W&B could not start {mode}"):
            folder.mkdir(parents=True, exist_ok=True)  # W&B itself would go to a temporary folder and not say so
            run = wandb.init(
                project=config.project,
                entity=config.entity,
                group=config.group,
                name=config.name or run_name,
                tags=config.tags,
                dir=str(folder),
                config=dict(resolved),
                id=run_id,
                resume="allow",
                mode=mode,
                settings=wandb.Settings(
                    console="off",  # the progress bar would be stored line by line
                    silent=True,
                    init_timeout=config.init_timeout_seconds,
                    finish_timeout=_FINISH_SECONDS,
                ),
            )
            return WandbTracker(wandb, run, run_id, say)
        wandb.teardown()  # else the failed attempt holds the id, and the offline run is refused
    say("this attempt goes on without W&B; metrics.jsonl has everything")
    tracker = Tracker()
    tracker.run_id = run_id
    return tracker


class WandbTracker(Tracker):
    """A run in Weights & Biases."""

    def __init__(self, wandb: ModuleType, run: Any, run_id: str, say: Callable[[str], None]) -> None:
        self.run_id = run_id
        self._wandb, self._run, self._step = wandb, run, 0
        self._guard = _Guard(say, "W&B failed, and later failures are not told")
        with self._guard:
            run.define_metric("step", hidden=True)
            run.define_metric("*", step_metric="step")

    def log(self, record: Mapping[str, Any]) -> None:
        """Log a step's numbers."""
        self._step = record.get("step", self._step)
        with self._guard:
            self._run.log(_numbers(record))

    def event(self, record: Mapping[str, Any]) -> None:
        """Log an event's numbers as event/number, and those of LTE's heads as event/numbers/head_0 and so on."""
        self._step = record.get("step", self._step)
        numbers = {f"{record['event']}/{key}": value for key, value in _numbers(record).items() if key != "step"}
        with self._guard:
            self._run.log({**numbers, "step": self._step})

    def figures(self, figures: Mapping[str, Path]) -> None:
        """Log image files at the last step."""
        with self._guard:
            images = {f"figures/{name}": self._wandb.Image(str(path)) for name, path in figures.items()}
            self._run.log({**images, "step": self._step})

    def matrix(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], draw: Callable[[], Pixels]) -> None:
        """Log the matrix at the last step: as the table stream/matrix and the picture figures/matrix."""
        picture = draw()
        with self._guard:
            table = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            image = self._wandb.Image(picture)
            self._run.log({"stream/matrix": table, "figures/matrix": image, "step": self._step})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Put the final values into the run's table row."""
        with self._guard:
            self._run.summary.update(dict(values))

    def finish(self, exit_code: int = 0) -> None:
        """Close the run; waits a limited time for what is not sent yet."""
        with self._guard:
            self._run.finish(exit_code=exit_code)


class _Guard(AbstractContextManager[None]):
    """Keeps in what W&B or the system under it raises, and tells of the first; an error of ours passes.

    Errors are known by the package that defines them, for not all of W&B's share a base class.
    """

    def __init__(self, say: Callable[[str], None], what: str) -> None:
        self._say, self._what, self._told = say, what, False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if kind is None or not (issubclass(kind, OSError) or kind.__module__.partition(".")[0] == "wandb"):
            return False
        if not self._told:
            self._say(f"{self._what}: {kind.__name__}: {' '.join(str(error).split())}")
        self._told = True
        return True


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The record's numbers; those that it lists for LTE's heads each under its head, as losses/head_0."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, (int, float)):
            found[key] = value
        elif isinstance(value, list) and all(isinstance(entry, float) for entry in value):
            heads = record.get("members") or range(len(value))
            found |= {f"{key}/head_{head}": entry for head, entry in zip(heads, value, strict=False)}
    return found


def _modes(mode: TrackerMode, say: Callable[[str], None]) -> list[Literal["online", "offline", "disabled"]]:
    """The modes to try, in this order."""
    asked = os.environ.get("WANDB_MODE") if mode == TrackerMode.auto else TrackerMode(mode).value
    if asked == "disabled":
        return ["disabled"]
    if asked == "offline":
        return ["offline"]
    if _has_key():
        return ["online", "offline"]
    if asked == "online":
        say("W&B has no API key (WANDB_API_KEY, or `wandb login`): this run is tracked offline")
    return ["offline"]


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return False
    return known is not None
