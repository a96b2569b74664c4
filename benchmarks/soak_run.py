"""A run that is started again whenever it ends before it is done, and what can be seen of it from outside."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from launch import exits
from launch.jobs.attempts import Attempt, Attempts
from launch.jobs.leftovers import processes_of
from launch.watching.records import read_records
from relora.errors import ConfigError

ROOT = Path(__file__).parent.parent
_TIMED = {"tokens_per_second", "memory_bytes", "flops_per_second", "mfu", "seconds"}
_MEASURED = {"tokens_per_second", "peak_memory_bytes", "wall_seconds", "sync_seconds", "sync_share"}
_STEP = re.compile(rb'^\{"step": (\d+),.*"loss"', re.MULTILINE)
_TAIL = 4096
_SUBMIT_SECONDS = 300.0
_STARTERS = {"torch.distributed.run", "launch.submit", "launch.jobs.supervise"}


class Cluster(Protocol):
    """What is needed of tests/slurm_cluster.py."""

    def run(
        self, *command: str, cwd: Path, seconds: float = ..., **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command where SLURM's reach the cluster."""

    def ask(self, *command: str) -> str:
        """What a command prints; it must succeed."""

    def hurry(self, number: str) -> None:
        """Start soon what SLURM puts off after a requeue."""

    def power_off(self, node: int) -> None:
        """Kill every process of a node."""

    def notice(self, node: int) -> None:
        """Let SLURM know that a node is lost."""

    def power_on(self, node: int) -> None:
        """Start a node again."""


class SoakFailed(RuntimeError):
    """The run did not survive, or ended otherwise than the undisturbed one."""


class Run:
    """A run folder in which training is kept going, and counts of what that took."""

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        self.folder = folder
        self.words = [*words, f"run.dir={folder}"]
        self.starts = 0
        """How often the command was given."""
        self.repeated = 0
        """Steps that were lost and done again."""
        self._step = 0

    def keep_going(self) -> bool:
        """Give the command again if it has ended early; returns whether the run is done."""
        raise NotImplementedError

    def supervisor(self) -> list[int]:
        """Process id of the supervisor, if it runs."""
        raise NotImplementedError

    @property
    def done(self) -> bool:
        """Whether the run says so."""
        return bool(_json(self.folder / "summary.json").get("status") == "done")

    @property
    def attempts(self) -> list[Attempt]:
        """All attempts so far."""
        return Attempts(self.folder).read()

    def look(self) -> int:
        """The last step that was recorded; counts the steps that a resumed run will do again."""
        step = 0
        with suppress(FileNotFoundError), (self.folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            steps = _STEP.findall(file.read())
            step = int(steps[-1]) if steps else 0
        self.repeated += max(0, self._step - step)
        self._step = step
        return step

    def ranks(self) -> dict[int, int]:
        """Process ids of the processes that train, by rank."""
        found = {}
        for number, variables in processes_of(self.folder / "job").items():
            with suppress(OSError):
                words = Path(f"/proc/{number}/cmdline").read_text(errors="replace").split("\0")
                rank = variables.get("RANK") or variables.get("OMPI_COMM_WORLD_RANK") or variables.get("SLURM_PROCID")
                if "launch.train" in words and Path(words[0]).name.startswith("python") and not _STARTERS & set(words):
                    found[int(rank or 0)] = number
        return found

    def launchers(self) -> list[int]:
        """Process ids of what else belongs to the attempt."""
        return [number for number in processes_of(self.folder / "job") if number not in self.ranks().values()]

    def newest(self) -> Path | None:
        """The newest checkpoint."""
        return max((self.folder / "checkpoints").glob("step_*"), default=None)

    def wait(self, what: Callable[[], bool], *, seconds: float, pause: float = 0.02) -> bool:
        """Wait until something is so, looking at the steps; returns whether it came in time."""
        limit = time.monotonic() + seconds
        while not what():
            if time.monotonic() > limit:
                return False
            self.look()
            time.sleep(pause)
        return True

    def said(self) -> str:
        """The end of what the run has printed."""
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""

    @property
    def log(self) -> Path:
        """Where the supervisor and the first process print."""
        return self.folder.with_name(self.folder.name + ".log")


class LocalRun(Run):
    """Started by `accrete submit` on this machine."""

    def __init__(self, folder: Path, words: Sequence[str], launcher: Sequence[str]) -> None:
        super().__init__(folder, words)
        self._command = [sys.executable, "-m", "launch.submit", *launcher, *self.words]
        self._process: subprocess.Popen[bytes] | None = None

    def keep_going(self) -> bool:
        """Give the command again if it has ended early; returns whether the run is done."""
        code = None if self._process is None else self._process.poll()
        if self._process is not None and code is None:
            return False
        if code == exits.DONE:
            return True
        if code == exits.REFUSED:
            raise SoakFailed(f"the run was refused: {self.said()}")
        self.starts += 1
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        return False

    def supervisor(self) -> list[int]:
        """Process id of the supervisor, if it runs."""
        running = self._process is not None and self._process.poll() is None
        return [self._process.pid] if running and self._process is not None else []

    def close(self) -> None:
        """End everything."""
        for number in [*self.supervisor(), *processes_of(self.folder / "job")]:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()


class SlurmRun(Run):
    """A job of a SLURM cluster."""

    def __init__(self, folder: Path, words: Sequence[str], launcher: Sequence[str], cluster: Cluster) -> None:
        super().__init__(folder, words)
        self._words, self._cluster, self.number = [*launcher, *self.words], cluster, ""

    def state(self) -> str:
        """What SLURM says of the job."""
        return self._cluster.ask("squeue", "-h", "-t", "all", "-j", self.number, "-o", "%T")

    def keep_going(self) -> bool:
        """Submit again what SLURM does not requeue; what it puts off for two minutes is done soon."""
        state = self.state() if self.number else ""
        if state in ("RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED"):
            return False
        if state == "COMPLETED" and self.done:
            return True
        if state == "PENDING":
            self._cluster.hurry(self.number)
            return False
        self.starts += 1
        command = [sys.executable, "-m", "launch.submit", *self._words]
        told = self._cluster.run(*command, cwd=ROOT, seconds=_SUBMIT_SECONDS, PYTHONPATH=str(ROOT))
        found = re.search(r"^job (\d+):", told.stdout)
        if found is None:
            raise SoakFailed(f"SLURM took no job: {told.stdout} {told.stderr}")
        self.number = found[1]
        return False

    @property
    def log(self) -> Path:
        """Where the supervisor and the first process print."""
        return self.folder / f"job/slurm-{self.number}.log"

    def supervisor(self) -> list[int]:
        """Process id of the supervisor, if it runs."""
        return [
            number
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if _is_supervisor(path, self.folder) and (number := int(path.parent.name))
        ]

    def nodes(self) -> list[int]:
        """Numbers of the nodes that the job has now."""
        names = self._cluster.ask("squeue", "-h", "-t", "RUNNING", "-j", self.number, "-o", "%N")
        shown = self._cluster.ask("scontrol", "show", "hostnames", names) if names else ""
        return [int(name.removeprefix("n")) for name in shown.split()]

    def close(self) -> None:
        """End the job."""
        if self.number:
            self._cluster.run("scancel", self.number, cwd=ROOT)


def _is_supervisor(path: Path, folder: Path) -> bool:
    try:
        words = path.read_text(errors="replace").split("\0")
    except OSError:
        return False
    return "launch.jobs.supervise" in words and str(folder) in words


def numbers_of(folder: Path) -> dict[str, Any]:
    """All that the arithmetic of a run decides: the records of all steps and events, spectra, results, weights."""
    kept = [one for one in read_records(folder / "metrics.jsonl") if one.get("event") not in ("resume", "checkpoint")]
    summary = _json(folder / "summary.json")
    return {
        "records": [{key: value for key, value in one.items() if key not in _TIMED} for one in kept],
        "spectra": read_records(folder / "spectra.jsonl"),
        "summary": {key: value for key, value in summary.items() if key not in _MEASURED},
        "final": {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "final").iterdir())},
    }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What is not the same in two runs, to the last bit."""
    found = []
    for name, value in ours.items():
        if value != theirs[name]:
            pairs = list(zip(value, theirs[name], strict=False)) if isinstance(value, list) else []
            first = next(
                (pair for pair in pairs if pair[0] != pair[1]), (value, theirs[name]) if not pairs else "length"
            )
            found.append(f"{name}: {first}")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    return dict(found)
