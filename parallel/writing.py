"""One checkpoint being written, by a thread in each process; no collectives, so that training may go on.

Each process writes its files into a folder that readers do not look at, and then a report with their sizes and
checksums, or with what went wrong. The main process waits for the others' reports, adds the state and the manifest,
and publishes the whole by one rename.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from torch import Tensor

from parallel.checkpoint import MANIFEST, STATE, manifest_text, prune_checkpoints, step_name
from parallel.files import is_disk_error, sha256, sync, write_atomically
from parallel.parts import write_parts
from parallel.regions import Region
from relora.errors import ConfigError

Parts = Mapping[str, Mapping[str, tuple[Region, Tensor]]]
"""By kind and name: a part of a whole tensor, of the shape that `Region.take` gives it."""

Files = dict[str, dict[str, Any]]
"""By name: `bytes` and `sha256`."""

PATIENCE_SECONDS = 1800.0
"""How long the main process waits for the others' reports after it has written its own files."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one process's writing ended."""

    error: str | None = None
    """What went wrong."""
    refusal: bool = False
    """Whether the user can mend it."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Draft:
    """What one process contributes to a checkpoint."""

    root: Path
    """Folder of all checkpoints."""
    step: int
    token: str
    """Equal on all processes, and on no other attempt, so that nothing that one left behind can be mistaken."""
    rank: int
    world_size: int
    mode: int
    """Permissions of the files."""
    parts: Parts
    state: str
    """The run's state as JSON; the main process's is written."""
    keep: int
    """How many of the newest checkpoints stay."""
    kept: frozenset[str] = frozenset()
    """Names of others that stay."""

    @property
    def partial(self) -> Path:
        """Where the checkpoint is written."""
        return self.root / f".{step_name(self.step)}.{self.token}.partial"

    @property
    def final(self) -> Path:
        """Where readers look for it."""
        return self.root / step_name(self.step)

    def report(self, rank: int) -> Path:
        """The report of a process."""
        return self.partial / f"part-{rank}.json"


class Writing(threading.Thread):
    """The thread that writes a draft. Its process ends without waiting for it, unless somebody joins it."""

    def __init__(self, draft: Draft, published: Callable[[str], None]) -> None:
        """Prepare it.

        Args:
            published: told the checkpoint's name once readers can see it; on the main process.
        """
        super().__init__(name=f"checkpoint of step {draft.step}", daemon=True)
        self.draft = draft
        self.published = published
        self.error: BaseException | None = None
        self.abandoned = threading.Event()
        """Set from outside when no more reports will come."""

    def run(self) -> None:
        """Write, report, and publish if this is the main process."""
        try:
            self._write()
        except BaseException as error:  # noqa: BLE001  (carried to the thread that waits for this one)
            self.error = error

    def _write(self) -> None:
        draft, files = self.draft, None
        try:
            files = _write_files(draft)
            if draft.rank > 0:
                write_atomically(draft.report(draft.rank), json.dumps({"files": files}))
        except Exception as error:
            _give_up(draft, error)
            raise
        finally:
            if draft.rank == 0 and _collect(draft, files, self.abandoned):
                self.published(draft.final.name)
                prune_checkpoints(draft.root, keep=draft.keep, kept=draft.kept)

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None while it has not."""
        if self.is_alive():
            return None
        if self.error is None:
            return Outcome()
        if is_disk_error(self.error):
            return Outcome(
                f"the checkpoint of step {self.draft.step} could not be written to {self.draft.root}: {self.error}. "
                "Earlier checkpoints are untouched: free some space (or set checkpoint.keep lower, or run.dir "
                "elsewhere) and start the same command again",
                refusal=True,
            )
        return Outcome(str(self.error) or repr(self.error), refusal=isinstance(self.error, ConfigError))


def publish(partial: Path, final: Path) -> None:
    """Rename into place; a checkpoint of the same step (it was damaged, or the run went back) makes room."""
    replaced = final.with_name(f".{final.name}.replaced")
    if replaced.exists():
        rmtree(replaced)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    if replaced.exists():
        rmtree(replaced)


def _write_files(draft: Draft) -> Files:
    draft.partial.mkdir(parents=True, exist_ok=True)
    files = {}
    for kind, parts in draft.parts.items():
        path = draft.partial / f"{kind}-{draft.rank}.safetensors"
        write_parts(path, parts)
        path.chmod(draft.mode)  # safetensors writes private files
        sync(path)
        files[path.name] = _entry(path)
    return files


def _give_up(draft: Draft, error: BaseException) -> None:
    """Tell the main process, which must not wait for nothing; on a full disk that needs some room."""
    with suppress(OSError):
        for path in draft.partial.glob(f"*-{draft.rank}.*"):
            path.unlink()
        write_atomically(draft.report(draft.rank), json.dumps({"error": str(error)}))


def _collect(draft: Draft, own: Files | None, abandoned: threading.Event) -> bool:
    """Wait for the other processes, then publish; or remove everything, if one of all has failed."""
    try:
        reports = _reports(draft, abandoned)
        if own is None or reports is None or any("error" in report for report in reports):
            return False
        files = {name: entry for report in [{"files": own}, *reports] for name, entry in report["files"].items()}
        state = draft.partial / STATE
        write_atomically(state, draft.state)
        write_atomically(draft.partial / MANIFEST, manifest_text({**files, STATE: _entry(state)}))
        for rank in range(1, draft.world_size):
            draft.report(rank).unlink()
        sync(draft.partial)
        publish(draft.partial, draft.final)
        write_atomically(draft.root / "latest", draft.final.name + "\n")
    finally:
        rmtree(draft.partial, ignore_errors=True)
    return True


def _reports(draft: Draft, abandoned: threading.Event) -> list[dict[str, Any]] | None:
    """The other processes' reports, or None when some will never come."""
    reports: list[dict[str, Any]] = []
    waiting = list(range(1, draft.world_size))
    pause, limit = 0.002, time.monotonic() + PATIENCE_SECONDS
    while True:
        there = [rank for rank in waiting if draft.report(rank).exists()]
        reports += [json.loads(draft.report(rank).read_text(encoding="utf-8")) for rank in there]
        waiting = [rank for rank in waiting if rank not in there]
        if not waiting:
            return reports
        if abandoned.wait(pause):
            return None
        if time.monotonic() > limit:
            raise ConfigError(
                f"process {waiting[0]} of {draft.world_size} has written no part of the checkpoint of step "
                f"{draft.step} to {draft.partial} in {PATIENCE_SECONDS:g} s: run.dir must be a folder that all "
                "machines share, on a disk that is fast enough. Earlier checkpoints are untouched"
            )
        pause = min(2 * pause, 0.5)


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
