"""A run's attempts: what is kept of them, and what follows from the last one. Needs the standard library only."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path

from launch.jobs.attempt import Outcome

DONE, FAILED, REFUSED, PREEMPTED = 0, 1, 2, 75  # launch/exits.py has their meaning, and imports torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One start of a run."""

    number: int
    """From 1."""
    began: float
    """Seconds since 1970."""
    step: int
    """Of the newest checkpoint when it began."""
    job: str
    """SLURM's number, or a name for this start on this machine: attempts are counted anew for each."""
    nodes: str = ""
    """Where it ran, as SLURM writes it."""
    ended: float | None = None
    """None: it runs, or ended without a word."""
    reached: int = 0
    """Step of the newest checkpoint when it ended."""
    code: int | None = None
    reason: str = ""
    host: str | None = None
    """The machine that is blamed."""
    diverged: int | None = None
    """The step at which too many updates had been refused."""


class Next(str, Enum):
    """What follows an attempt."""

    end = "end"
    again = "again"
    elsewhere = "elsewhere"
    """In another allocation, if the scheduler gives one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What follows an attempt, and why."""

    next: Next
    code: int
    """The supervisor's own, if it ends."""
    reason: str
    exclude: tuple[str, ...] = ()
    """Machines to leave out."""


class Attempts:
    """The attempts at a run, in a file of its folder."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.folder = run_dir, run_dir / "job"
        self._path = self.folder / "attempts.jsonl"

    def of_job(self, job: str) -> list[Attempt]:
        """The attempts of one job."""
        return [attempt for attempt in self.read() if attempt.job == job]

    def read(self) -> list[Attempt]:
        """All attempts, in order; a line that was cut off is left out."""
        found: dict[int, Attempt] = {}
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        for line in lines:
            try:
                one = Attempt(**json.loads(line))
            except ValueError:
                continue
            found[one.number] = one
        return [found[number] for number in sorted(found)]

    def begin(self, *, nodes: str, job: str) -> tuple[Attempt, Path]:
        """The next attempt, and its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        folders = [path.name.removeprefix("attempt_") for path in self.folder.glob("attempt_*")]
        number = 1 + max([int(name) for name in folders if name.isdigit()], default=0)
        folder = self.folder / f"attempt_{number:03d}"
        folder.mkdir()  # anew, since an outcome of another attempt must not be taken for this one's
        one = Attempt(number=number, began=time.time(), step=newest_step(self.run_dir), nodes=nodes, job=job)
        self._write(one)
        return one, folder

    def finish(self, attempt: Attempt, outcome: Outcome) -> Attempt:
        """Keep how it ended."""
        reached = newest_step(self.run_dir)
        end = replace(attempt, ended=time.time(), reached=reached, code=outcome.code, reason=outcome.reason)
        end = replace(end, host=outcome.host, diverged=outcome.diverged)
        self._write(end)
        return end

    def _write(self, attempt: Attempt) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(attempt)) + "\n")


def newest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint; 0 without one."""
    names = [path.name.removeprefix("step_") for path in (run_dir / "checkpoints").glob("step_*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def in_vain(attempts: Sequence[Attempt], step: int) -> int:
    """The last attempts in a row that brought the run no further than it was; `step` is where it is now."""
    count = 0
    for later in reversed(attempts):
        if later.step < step:
            break
        count += 1
    return count


def decide(
    history: Sequence[Attempt], outcome: Outcome, *, limit: int, asked: bool, alive: Callable[[str], bool] | None
) -> Decision:
    """What follows the last of these attempts, which has ended.

    Args:
        limit: attempts in a row without progress, after which the run is given up.
        asked: whether the supervisor was asked to stop.
        alive: whether a machine takes work; None where there are no other machines.
    """
    last = history[-1]
    told = outcome.reason or f"code {outcome.code}"
    if outcome.code in (DONE, REFUSED):
        return Decision(next=Next.end, code=outcome.code, reason="done" if outcome.code == DONE else told)
    if outcome.code == PREEMPTED and not outcome.again:
        return Decision(next=Next.end, code=PREEMPTED, reason=told)
    vain = in_vain(history, last.reached)
    if vain >= limit:
        reason = f"{vain} attempts in a row brought the run no further than step {last.reached}; the last: {told}"
        return Decision(next=Next.end, code=FAILED, reason=reason)
    if (before := _same_divergence(history)) is not None:
        elsewhere = f", though {before.host} was left out" if alive is not None and before.host is not None else ""
        reason = f"diverged again near step {last.diverged}{elsewhere}, so that no machine is the reason; {told}"
        return Decision(next=Next.end, code=FAILED, reason=reason)
    lost = set() if alive is None else _lost(history, outcome, alive)
    if asked or outcome.code == PREEMPTED or lost:
        return Decision(next=Next.elsewhere, code=PREEMPTED, reason=told, exclude=tuple(sorted(lost)))
    return Decision(next=Next.again, code=FAILED, reason=told)


def _same_divergence(history: Sequence[Attempt]) -> Attempt | None:
    """The earlier attempt that diverged where the last one has, before any checkpoint beyond."""
    *before, last = history
    if last.diverged is None:
        return None
    return next((one for one in reversed(before) if one.diverged is not None and last.reached <= one.diverged), None)


def _lost(history: Sequence[Attempt], outcome: Outcome, alive: Callable[[str], bool]) -> set[str]:
    """Machines that were blamed twice, and the one blamed now if it takes no work, or computes wrongly."""
    blamed = [one.host for one in history if one.host is not None]
    lost = {name for name in blamed if blamed.count(name) > 1}
    if outcome.host is not None and (outcome.diverged is not None or not alive(outcome.host)):
        lost.add(outcome.host)
    return lost
