"""A run in Weights & Biases: what fails there is said once, and training goes on.

W&B's own counter starts again when an offline run is resumed, so charts have the record's `step` as x axis.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from launch.watching.trackers.config import Artifacts, TrackerConfig
from launch.watching.trackers.modes import Mode
from launch.watching.trackers.names import Names
from launch.watching.trackers.tag_commands import TagCommands
from launch.watching.trackers.tracker import Guard, Level, Pixels, Tracker, event_numbers, numbers_of
from parallel.checkpoint import MANIFEST
from relora.errors import ConfigError

_API_SECONDS = 10  # for an answer to a look at tags
_LEVELS = {Level.warning: "WARN", Level.failure: "ERROR"}


def open_wandb(
    config: TrackerConfig,
    names: Names,
    *,
    run_dir: Path,
    resolved: Mapping[str, Any],
    modes: Sequence[Mode],
    system_metrics: bool,
    say: Callable[[str], None],
) -> "WandbTracker | None":
    """A run in the first of these modes that works; None if none does.

    Raises: ConfigError when W&B is not installed.
    """
    wandb = _imported()
    folder = Path(config.dir or run_dir)
    for place, mode in enumerate(modes):
        with Guard(say, f"W&B could not start {mode}", "wandb"):
            folder.mkdir(parents=True, exist_ok=True)  # W&B itself would go to a temporary folder and not say so
            run = wandb.init(
                project=config.project,
                entity=config.entity,
                group=names.group,
                job_type=names.job_type,
                name=names.name,
                notes=config.notes,
                tags=config.tags,
                dir=str(folder),
                config=dict(resolved),
                id=names.run_id,
                resume="allow",
                mode=mode,
                reinit="create_new",  # LTE's heads in one process have a run each
                settings=wandb.Settings(
                    console="off",  # the progress bar would be stored line by line
                    silent=True,
                    init_timeout=config.init_timeout_seconds,
                    finish_timeout=config.finish_timeout_seconds,
                    x_disable_stats=not system_metrics,
                ),
            )
            return WandbTracker(wandb, run, config, names.run_id, mode, say)
        if place + 1 < len(modes):
            wandb.teardown()  # else the failed attempt holds the id, and the next is refused
    return None


class WandbTracker(Tracker):
    """A run in Weights & Biases."""

    def __init__(
        self,
        wandb: ModuleType,
        run: Any,
        config: TrackerConfig,
        run_id: str,
        mode: Mode,
        say: Callable[[str], None],
    ) -> None:
        self.run_id, self.images, self.mode = run_id, config.images, mode
        self._wandb, self._run, self._config, self._step = wandb, run, config, 0
        self._say = say
        self._commands: TagCommands | None = None
        self._guard = Guard(say, "W&B failed, and later failures are not told", "wandb")
        with self._guard:
            run.define_metric("step", hidden=True)
            run.define_metric("*", step_metric="step")

    def listen(self, commands: Sequence[str], ask: Callable[[str], None]) -> None:
        """Ask for what tags say that are given to the run from now on."""
        path = f"{self._run.entity}/{self._run.project}/{self.run_id}"
        api: list[Any] = []

        def find() -> Any:
            if not api:  # which asks the server who the user is
                api.append(self._wandb.Api(timeout=_API_SECONDS))
            api[0].flush()
            return api[0].run(path)

        self._commands = TagCommands(find, commands, ask, self._say)
        self._commands.start()

    def log(self, record: Mapping[str, Any]) -> None:
        """Log a step's numbers."""
        self._step = record.get("step", self._step)
        with self._guard:
            self._run.log(numbers_of(record))

    def event(self, record: Mapping[str, Any]) -> None:
        """Log an event's numbers."""
        self._step = record.get("step", self._step)
        with self._guard:
            self._run.log({**event_numbers(record), "step": self._step})

    def figures(self, figures: Mapping[str, Path | Pixels]) -> None:
        """Log pictures at the last step."""
        with self._guard:
            images = {
                f"figures/{name}": self._wandb.Image(str(figure) if isinstance(figure, Path) else figure)
                for name, figure in figures.items()
            }
            self._run.log({**images, "step": self._step})

    def matrix(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log the matrix at the last step as the table stream/matrix."""
        with self._guard:
            table = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            self._run.log({"stream/matrix": table, "step": self._step})

    def checkpoint(self, folder: Path, step: int) -> None:
        """Keep its manifest as a version of the artifact checkpoint-ID, with where it lies as metadata."""
        if self._config.artifacts not in (Artifacts.manifests, Artifacts.all):
            return
        with self._guard:
            text = (folder / MANIFEST).read_text(encoding="utf-8")
            files = json.loads(text)["files"]
            told = {"step": step, "path": str(folder.resolve()), "files": len(files)}
            told["bytes"] = sum(entry["bytes"] for entry in files.values())
            # In the folder that `wandb sync` sends: the checkpoint will be dropped, and W&B's own place is at home.
            kept = Path(self._run.settings.sync_dir) / "manifests" / f"{folder.name}.json"
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(text, encoding="utf-8")
            artifact = self._wandb.Artifact(f"checkpoint-{self.run_id}", type="checkpoint", metadata=told)
            artifact.add_file(str(kept), name=MANIFEST, policy="immutable", skip_cache=True)
            self._run.log_artifact(artifact, aliases=["latest", folder.name])

    def model(self, folder: Path) -> None:
        """Keep the files of the final model as the artifact model-ID; they are not copied before they are sent."""
        if self._config.artifacts not in (Artifacts.final, Artifacts.all):
            return
        with self._guard:
            told = {"step": self._step, "path": str(folder.resolve())}
            artifact = self._wandb.Artifact(f"model-{self.run_id}", type="model", metadata=told)
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                name = str(file.relative_to(folder))
                artifact.add_file(str(file.resolve()), name=name, policy="immutable", skip_cache=True)
            self._run.log_artifact(artifact, aliases=["latest", "final"])

    def alert(self, title: str, text: str, level: Level) -> None:
        """Have W&B write a mail or a message, as the user has set it there."""
        if not self._config.alerts:
            return
        with self._guard:
            self._run.alert(title=title, text=text, level=_LEVELS[level])

    def summary(self, values: Mapping[str, Any]) -> None:
        """Put the final values into the run's table row."""
        with self._guard:
            self._run.summary.update(dict(values))

    def finish(self, exit_code: int = 0) -> None:
        """Close the run; waits a limited time for what is not sent yet."""
        if self._commands is not None:
            self._commands.stop()
        with self._guard:
            self._run.finish(exit_code=exit_code)

    def leave(self) -> None:
        """End W&B's service, for which Python itself would wait at its own end; what is on disk can be sent later."""
        for child in psutil.Process().children():
            with suppress(psutil.Error):  # it has ended by itself
                if child.name().startswith("wandb-core"):
                    child.kill()


def _imported() -> ModuleType:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "tracker=wandb needs the package wandb, which is not installed: "
            "install it (pip install wandb), or turn tracking off with tracker=none"
        ) from error
    module: ModuleType = wandb
    return module
