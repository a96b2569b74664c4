"""Checkpoints on disk: which there are, whether they are whole, and reading them in any layout of processes.

A checkpoint is a folder of safetensors files and JSON; nothing in it is a pickle. How parts of tensors lie in the
files is in parallel/parts.py, and how all processes write a checkpoint together in parallel/saving.py.
"""

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.files import sha256
from parallel.parts import DamagedCheckpoint, StoredParts
from parallel.regions import Region
from relora.errors import ConfigError

FORMAT = 3
MANIFEST = "manifest.json"
STATE = "state.json"
_WITHOUT_SEAL = (1, 2)
"""Formats whose manifest had no checksum of its own."""


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
    asynchronous: bool = False
    """Write from a copy in CPU memory while training goes on."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"checkpoint.every must be 0 or more steps, got {self.every}")
        if self.keep < 1:
            raise ConfigError(f"checkpoint.keep must be at least 1, got {self.keep}: a run needs one to resume")


class Checkpoint:
    """A complete checkpoint: its state, and its tensors by kind (`model`, `optimizer`, `generators`) and name.

    Tensors are read when they are asked for, onto the CPU, and may be views of the files: copy what must live on.
    """

    def __init__(self, folder: Path, state: dict[str, Any], files: list[str]) -> None:
        self.folder = folder
        self.state = state
        self._files = files
        self._kinds: dict[str, StoredParts] = {}

    def names(self, kind: str) -> list[str]:
        """All tensors of a kind, in alphabetical order."""
        return self._stored(kind).names

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return self._stored(kind).shape(name)

    def dtype(self, kind: str, name: str) -> torch.dtype:
        """Type of a tensor's elements."""
        return self._stored(kind).dtype(name)

    def whole(self, kind: str, name: str) -> Tensor:
        """A tensor put together from its parts.

        Raises: DamagedCheckpoint when they are not all there.
        """
        return self._stored(kind).whole(name)

    def part(self, kind: str, name: str, region: Region) -> Tensor:
        """What a process of any layout holds of a tensor; hardly more is read unless the tensor was cut otherwise.

        Shapes: as `Region.take`.

        Raises:
            DamagedCheckpoint: it is not all there.
            ConfigError: the tensor has another shape.
        """
        shape = self.shape(kind, name)
        if shape != region.shape:
            raise ConfigError(f"{self.folder} is of another model: {name} is {shape} there and {region.shape} here")
        return self._stored(kind).part(name, region)

    def close(self) -> None:
        """Let go of the files, so that removing them frees the disk; reading opens them again."""
        self._kinds.clear()

    def _stored(self, kind: str) -> StoredParts:
        if kind not in self._kinds:
            files = [name for name in self._files if name.startswith(f"{kind}-")]
            self._kinds[kind] = StoredParts(self.folder, files)
        return self._kinds[kind]


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` updates."""
    return f"step_{step:08d}"


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest, and read its state.

    Raises:
        DamagedCheckpoint: a file is missing, short or changed; the message names it.
        ConfigError: another version wrote it.
    """
    for name, (size, checksum) in _files(folder).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "nothing"
            raise DamagedCheckpoint(f"{path}: {size} bytes were written, {found} is there")
        if sha256(path) != checksum:
            raise DamagedCheckpoint(f"{path}: its checksum is not the one that was written")
    return open_checkpoint(folder)


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint that another process has checked.

    Raises:
        DamagedCheckpoint: its manifest or its state is unreadable.
        ConfigError: another version wrote it.
    """
    files = _files(folder)
    return Checkpoint(folder, _json(folder / STATE), sorted(files))


def list_checkpoints(root: Path) -> list[Path]:
    """Published checkpoints under `root`, newest first."""
    return sorted(root.glob("step_*"), reverse=True) if root.is_dir() else []


def newest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint under `root`, and what was wrong with the newer ones.

    Raises:
        ConfigError: another version wrote one of these.
    """
    problems: list[str] = []
    for folder in list_checkpoints(root):
        try:
            return read_checkpoint(folder), problems
        except DamagedCheckpoint as error:
            problems.append(str(error))
    return None, problems


def prune_checkpoints(root: Path, *, keep: int, kept: Collection[str]) -> None:
    """Remove all but the newest `keep` checkpoints and those named, and what interrupted writes left behind."""
    for folder in list_checkpoints(root)[keep:]:
        if folder.name not in kept:
            folder.rename(root / f".{folder.name}.removed")  # none is ever seen half removed
    remove_partial(root)


def remove_partial(root: Path) -> None:
    """Remove what interrupted writes and removals left behind, as far as possible; nobody may be writing."""
    for folder in root.glob(".step_*"):
        shutil.rmtree(folder, ignore_errors=True)


def manifest_text(files: Mapping[str, Mapping[str, Any]], written: int = FORMAT) -> str:
    """The manifest of these files: their sizes and checksums by name, with a checksum of its own."""
    return json.dumps({"format": written, "files": files, "sha256": _seal(written, files)}, indent=1)


def _seal(written: Any, files: Any) -> str:
    return hashlib.sha256(json.dumps([written, files], sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and checksum of each file of a checkpoint."""
    manifest = _json(folder / MANIFEST)
    damaged = DamagedCheckpoint(f"{folder / MANIFEST}: its content is not what was written")
    if not isinstance(manifest, dict):
        raise damaged
    written, files = manifest.get("format"), manifest.get("files", {})
    older = set(manifest) == {"format", "files"} and written in _WITHOUT_SEAL
    if not older and manifest.get("sha256") != _seal(written, files):
        raise damaged
    if written != FORMAT:
        raise ConfigError(
            f"{folder} has format {written!r}, and this version reads format {FORMAT}: continue with the version that "
            "wrote it, or begin anew in another run.dir"
        )
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} is missing or unreadable") from error
