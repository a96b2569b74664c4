"""The run folder: made, locked, and looked through for something to resume, before anything expensive begins."""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from launch.config import TrainConfig, keys_of, resolved
from launch.training.going_back import set_aside, way_back
from launch.training.state import RunState
from launch.watching.records import truncate_records
from parallel.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint
from parallel.files import write_atomically
from parallel.parts import DamagedCheckpoint
from relora.errors import ConfigError

# What may differ between two attempts at the same run: where it runs, how it is watched, how memory is used.
_FREE = (
    "continual.tasks",
    "continual.split",
    "continual.restart_from",
    "continual.save_models",
    "continual.stop_after",
    "lte.heads",
    "lte.transport",
    "checkpoint.",
    "parallel.",
    "evaluation.batch_size",
    "evaluation.spectra",
    "tracker",
    "run.dir",
    "run.name",
    "run.log_every",
    "run.save_",
    "run.profile_steps",
    "lte.meeting",
    "lte.quorum",
    "lte.wait_seconds",
    "training.stop_after",
    "training.microbatch_size",
    "training.peak_flops",
    "training.threads",
    "training.loss",
    "training.activation_checkpointing",
    "training.compile",
    "lora.forward",
    "data.cache",
    "data.workers",
)
# What a checkpoint from elsewhere (checkpoint.resume=PATH) must share: the shapes and the meaning of its tensors.
_BOUND = (
    "lte.reset",
    "lte.exchange",
    "lte.fragments",
    "model.",
    "lora.rank",
    "lora.target_modules",
    "lora.dense",
    "data.tokenizer",
)


@dataclass(kw_only=True, slots=True)
class RunFolder:
    """One run's folder, and the checkpoint that the run goes on from."""

    path: Path
    resume: Checkpoint | None
    finished: bool
    """Whether summary.json says that the run is done."""
    notices: list[str]
    """What the user should know about what was found."""
    abandoned: list[Path] = field(default_factory=list)
    """Checkpoints of tasks that continual.restart_from takes back."""

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The run's records."""
        return self.path / "metrics.jsonl"

    @property
    def spectra(self) -> Path:
        """The singular values at each restart."""
        return self.path / "spectra.jsonl"

    def begin(self, config: TrainConfig, environment: dict[str, Any], state: RunState, *, total: int) -> None:
        """Write what describes the run, and drop the records of steps that will be done again."""
        self.path.mkdir(parents=True, exist_ok=True)
        if state.asked_restarts or self._asked_restarts.exists():
            self.keep_restarts(state.asked_restarts)
        set_aside(self.abandoned)
        write_atomically(self.path / "config.yaml", yaml.safe_dump(resolved(config), sort_keys=False))
        write_atomically(self.path / "environment.json", json.dumps(environment, indent=1) + "\n")
        step = state.step
        done = step if self.resume or step else -1  # a head that joins others has no checkpoint to go on from
        truncate_records(self.metrics, done)
        # The last cycle is measured after the last step, so a run that was killed at its very end measures it again.
        truncate_records(self.spectra, done - 1 if done == total else done)

    def keep_restarts(self, steps: Sequence[int]) -> None:
        """Write down after which steps restarts were asked for, before they are made."""
        write_atomically(self._asked_restarts, json.dumps(list(steps)) + "\n")

    def kept_restarts(self, known: Sequence[int], step: int) -> list[int]:
        """The same to go on from `step`: those behind it as the checkpoint knows them, and those that come again."""
        path = self._asked_restarts
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not self.abandoned else []
        return [one for one in known if one <= step] + [one for one in kept if one > step]

    @property
    def _asked_restarts(self) -> Path:
        return self.path / "asked_restarts.json"

    @property
    def tracker_id(self) -> str | None:
        """The tracker's id of this run, so that every attempt at it appears as one."""
        path = self.path / "tracker_id"
        return path.read_text(encoding="ascii").strip() if path.exists() else None

    def write_tracker_id(self, run_id: str) -> None:
        """Keep the tracker's id for later attempts."""
        write_atomically(self.path / "tracker_id", run_id + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")


def default_folder(config: TrainConfig) -> Path:
    """`run.dir`, or runs/<name>-<time>."""
    if config.run.dir is not None:
        return Path(config.run.dir).expanduser()
    return Path("runs") / f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def find(config: TrainConfig, path: Path) -> RunFolder:
    """Look at the run folder and decide what to resume; nothing is written.

    Raises:
        ConfigError: the folder holds another run, checkpoint.resume names nothing usable, or it forbids to go on.
    """
    choice = config.checkpoint.resume
    if choice == "never" and (path / "config.yaml").exists():
        raise ConfigError(
            f"checkpoint.resume=never, but run.dir={path} holds a run: name another folder, or let it continue "
            "with checkpoint.resume=auto"
        )
    folder = RunFolder(path=path, resume=None, finished=False, notices=[])
    if (path / "config.yaml").exists():
        _same_run(config, path)
        folder.finished = _status(path) == "done" and not _more_tasks(config, path)
        folder.resume, damaged = newest_checkpoint(folder.checkpoints)
        taken = f"resuming from {folder.resume.folder.name}" if folder.resume else "starting from the beginning"
        folder.notices = [f"damaged checkpoint: {problem}; {taken}" for problem in damaged]
    if config.continual is not None and config.continual.restart_from is not None:
        way = way_back(folder.checkpoints, folder.resume, config.continual.restart_from)
        if way is not None:
            folder.resume, folder.abandoned = way
            folder.finished = False
            folder.notices.append(f"going back to the beginning of task {config.continual.restart_from}")
    if folder.resume is None and choice not in ("auto", "never"):
        folder.resume = _named(Path(choice).expanduser())
        folder.notices += _check_branch(config, folder.resume)
    return folder


def binding(config: TrainConfig) -> dict[str, Any]:
    """All that must be the same in two attempts at one run, and in all jobs of it."""
    ours = resolved(config)
    return {key: _at(ours, key) for key in keys_of(ours) if not key.startswith(_FREE)}


@contextmanager
def locked(path: Path, *, seconds: float = 0.0) -> Iterator[None]:
    """Hold the folder against a second process of the same command.

    Args:
        seconds: how long another process may take to let go of it.

    Raises:
        ConfigError: another process trains in it.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as file:
        limit = time.monotonic() + seconds
        while not _locked(file):
            if time.monotonic() >= limit:
                raise ConfigError(
                    f"run.dir={path} is in use by another process: wait for it, stop it, or name another run.dir"
                )
            time.sleep(0.2)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            if [entry.name for entry in path.iterdir()] == [".lock"]:  # refused before anything was written
                (path / ".lock").unlink()
                path.rmdir()


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _named(folder: Path) -> Checkpoint:
    """The checkpoint at `folder`, or the newest one of the run at `folder`."""
    if (folder / "checkpoints").is_dir():
        checkpoint, damaged = newest_checkpoint(folder / "checkpoints")
        if checkpoint is None:
            raise ConfigError(f"checkpoint.resume={folder} holds no usable checkpoint {'; '.join(damaged)}".rstrip())
        return checkpoint
    if not folder.is_dir():
        raise ConfigError(
            f"checkpoint.resume must be auto, never, or a checkpoint or run folder; {str(folder)!r} does not exist"
        )
    try:
        return read_checkpoint(folder)
    except DamagedCheckpoint as error:
        raise ConfigError(f"checkpoint.resume names a damaged checkpoint: {error}. Take an earlier one") from error


def _same_run(config: TrainConfig, path: Path) -> None:
    stored = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    changed = [key for key in _differences(stored, resolved(config)) if not key.startswith(_FREE)]
    if changed:
        lines = [f"{key}: {_at(stored, key)!r} there, {_at(resolved(config), key)!r} here" for key in changed]
        raise ConfigError(
            f"run.dir={path} holds a run with another configuration ({'; '.join(lines)}). Start the same command to "
            f"continue it, name another run.dir, or branch off it with a new run.dir and checkpoint.resume={path}"
        )


def _more_tasks(config: TrainConfig, path: Path) -> bool:
    """Whether the stream has changed since the run was done; what has been trained is compared later."""
    stored = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    return any(_at(stored, key) != _at(resolved(config), key) for key in ("continual.tasks", "continual.split"))


def _check_branch(config: TrainConfig, checkpoint: Checkpoint) -> list[str]:
    """Refuse a checkpoint of another model; tell what else is different from the run that it came from."""
    theirs, ours = checkpoint.state["config"], resolved(config)
    changed = [key for key in _differences(theirs, ours) if not key.startswith(_FREE)]
    bound = [key for key in changed if key.startswith(_BOUND)]
    if bound:
        key = bound[0]
        raise ConfigError(
            f"checkpoint.resume={checkpoint.folder} was made with {key}={_at(theirs, key)!r}, this run has "
            f"{_at(ours, key)!r}: use the same, or start without it"
        )
    return [f"{key} changes from {_at(theirs, key)!r} to {_at(ours, key)!r}" for key in changed]


def _differences(one: Any, other: Any) -> list[str]:
    return [key for key in dict.fromkeys([*keys_of(one), *keys_of(other)]) if _at(one, key) != _at(other, key)]


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _status(path: Path) -> str | None:
    try:
        status = json.loads((path / "summary.json").read_text(encoding="utf-8")).get("status")
    except (OSError, ValueError):
        return None
    return str(status)
