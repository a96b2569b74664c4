"""Checkpoints on disk: written aside, checked, and published by one rename.

A checkpoint is a folder of safetensors files and JSON; nothing in it is a pickle. Tensors are stored by
parameter name, so that the layout of processes that wrote them does not matter to a reader.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from relora.errors import ConfigError

FORMAT = 1
_MANIFEST = "manifest.json"


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written, which are kept, and where a run starts."""

    every: int = 1000
    """Steps between checkpoints; 0 writes one only when the run stops."""
    keep: int = 2
    """How many of the newest to keep."""
    keep_best: bool = True
    """Whether to keep the one with the lowest validation loss, too."""
    resume: str = "auto"
    """auto: continue what run.dir holds; never: refuse a run.dir that holds a run; else a checkpoint folder."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"checkpoint.every must be 0 or more steps, got {self.every}")
        if self.keep < 1:
            raise ConfigError(f"checkpoint.keep must be at least 1, got {self.keep}: a run needs one to resume")


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are missing, short or changed."""


@dataclass(slots=True, frozen=True)
class Checkpoint:
    """A complete, checked checkpoint."""

    folder: Path
    state: dict[str, Any]

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """One of its tensor files: `model`, `optimizer` or `generators`, on the CPU."""
        named: dict[str, Tensor] = load_file(self.folder / f"{kind}.safetensors")
        return named


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` updates."""
    return f"step_{step:08d}"


def write_checkpoint(root: Path, step: int, *, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write one checkpoint under `root` and point `latest` at it.

    Until the final rename nothing under `root` that a reader would look at has changed.

    Raises:
        ConfigError: the disk is full or not writable; whatever was there before is untouched.
    """
    final, partial = root / step_name(step), root / f".{step_name(step)}.partial"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        partial.mkdir()
        for kind, named in tensors.items():
            save_file({name: tensor.contiguous() for name, tensor in named.items()}, partial / f"{kind}.safetensors")
        _write_text(partial / "state.json", json.dumps(state, indent=1))
        _write_text(partial / _MANIFEST, json.dumps(_manifest(partial), indent=1))
        share(partial)
        for path in partial.iterdir():
            _sync(path)
        _publish(partial, final)
        write_atomically(root / "latest", final.name + "\n")
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_error(error):
            raise ConfigError(
                f"the checkpoint of step {step} could not be written to {root}: {error}. "
                "Earlier checkpoints are untouched: free some space (or set checkpoint.keep lower, or run.dir "
                "elsewhere) and start the same command again"
            ) from error
        raise
    return final


def is_disk_error(error: BaseException) -> bool:
    """Whether an error says that the disk is full, over quota or read-only.

    safetensors wraps the operating system's error in its own, so its text is looked at, too.
    """
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
    if isinstance(error, OSError) and error.errno in numbers:
        return True
    return any(f"os error {number}" in str(error) for number in numbers)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest, and read its state.

    Raises:
        DamagedCheckpoint: a file is missing, short or changed; the message names it.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder}: its {_MANIFEST} is missing or unreadable") from error
    if manifest.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{folder}: format {manifest.get('format')!r}, this version reads {FORMAT}")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            size = f"{path.stat().st_size} bytes" if path.is_file() else "nothing"
            raise DamagedCheckpoint(f"{path}: {expected['bytes']} bytes were written, {size} is there")
        if _sha256(path) != expected["sha256"]:
            raise DamagedCheckpoint(f"{path}: its checksum is not the one that was written")
    return Checkpoint(folder, json.loads((folder / "state.json").read_text(encoding="utf-8")))


def list_checkpoints(root: Path) -> list[Path]:
    """Published checkpoints under `root`, newest first."""
    return sorted(root.glob("step_*"), reverse=True) if root.is_dir() else []


def newest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint under `root`, and what was wrong with the newer ones."""
    problems: list[str] = []
    for folder in list_checkpoints(root):
        try:
            return read_checkpoint(folder), problems
        except DamagedCheckpoint as error:
            problems.append(str(error))
    return None, problems


def prune_checkpoints(root: Path, *, keep: int, best: str | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best, and what interrupted writes left behind."""
    folders = list_checkpoints(root)
    for folder in [*folders[keep:], *root.glob(".step_*")]:
        if folder.name != best:
            _remove(folder)


def share(folder: Path) -> None:
    """Give a folder's files the permissions that the user's umask asks for; safetensors writes them private."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file so that a reader sees the old or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    _write_text(partial, text)
    _sync(partial)
    partial.replace(path)


def _publish(partial: Path, final: Path) -> None:
    """Rename into place; a checkpoint of the same step (it was damaged, or the run went back) makes room."""
    replaced = final.with_name(f".{final.name}.replaced")
    _remove(replaced)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    _sync(final.parent)
    _remove(replaced)


def _manifest(folder: Path) -> dict[str, Any]:
    files: Iterable[Path] = sorted(folder.iterdir())
    return {
        "format": FORMAT,
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files},
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
