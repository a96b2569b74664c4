"""Runs a training command until the run is done: again after a failure, elsewhere when its machines are taken away.

`accrete submit` writes `python -m launch.jobs.supervise --run-dir RUN -- COMMAND ...` as the last line of a job
script, so that SLURM's signals come here. Needs the standard library only: outside of a container there may be
nothing else.
"""

import argparse
import ctypes
import math
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from launch.jobs.attempt import VARIABLE, Heartbeat, Outcome, ask_to_stop, outcome_in
from launch.jobs.attempts import DONE, FAILED, PREEMPTED, Attempts, Next, decide, in_vain, newest_step
from launch.jobs.leftovers import end_leftovers

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_LOOK_SECONDS = 0.2
_LINGER_SECONDS = 30.0
"""How long a launcher may go on after the run has said why it ends: srun waits for a machine that is gone."""
_KILL_SECONDS = 20.0
_START_TIMES = 6
"""How many times as long as between signs of life may pass before the first one: images are fetched, packages read."""
_REQUEUE_SECONDS = 60.0
_ANSWER_SECONDS = 30.0
"""How long SLURM's commands may take."""
HANG_SECONDS, LEAST_HANG_SECONDS = 300.0, 15.0
_LIBC, _PR_SET_PDEATHSIG = ctypes.CDLL(None), 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.jobs.supervise", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempts", type=int, default=3, help="attempts in a row without progress")
    parser.add_argument("--hang-seconds", type=float, default=HANG_SECONDS, help="without a sign of life, 0: for ever")
    parser.add_argument("--requeue", action="store_true", help="put the SLURM job back into the queue to go on")
    parser.add_argument("--requeue-after", type=Path, help="not to run before the job has begun whose number is there")
    parser.add_argument("--stop-is-done", action="store_true", help="a run that stops by its own settings is done")
    parser.add_argument("command", nargs="+")
    words = parser.parse_args(argv)
    job = SlurmJob(job_number(os.environ), after=words.requeue_after) if words.requeue else None
    supervisor = Supervisor(
        words.run_dir,
        words.command,
        limit=words.attempts,
        job=job,
        hang=words.hang_seconds,
        stop_is_done=words.stop_is_done,
    )
    return supervisor.work()


def job_number(environment: Mapping[str, str]) -> str:
    """How SLURM's commands call this job; a task of an array by two numbers, since one may mean the whole array."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


class SlurmJob:
    """The job that this process is the script of."""

    def __init__(self, number: str, *, after: Path | None = None) -> None:
        self.number, self._after = number, after

    def alive(self, host: str) -> bool:
        """Whether a machine of the job takes a step."""
        step = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host}", "true"]
        return _asked(step, _ANSWER_SECONDS / 2).returncode == 0

    def ends(self) -> bool:
        """Whether SLURM says that the job runs no more; one that was cancelled, too, it would run again if asked to."""
        shown = _asked(["scontrol", "--oneliner", "show", "job", self.number]).stdout
        return "JobState=" in shown and "JobState=RUNNING" not in shown

    def requeue(self, exclude: Sequence[str]) -> bool:
        """Put the job back into the queue, to run without some machines; False if SLURM refuses.

        SLURM asks this process to end soon after, and takes further wishes only once the job waits.
        """
        exclude = self._that_can_be_left_out(exclude)
        done = _asked(["scontrol", "requeue", self.number])
        if done.returncode:
            _say(f"SLURM does not requeue the job: {done.stderr.strip()}")
            return False
        if exclude:
            done = _asked(["scontrol", "update", f"JobId={self.number}", f"ExcNodeList={','.join(exclude)}"])
            _say(f"left out: {', '.join(exclude)}" if not done.returncode else done.stderr.strip())
        if self._after is not None:
            other = self._after.read_text(encoding="ascii").strip()
            done = _asked(["scontrol", "update", f"JobId={self.number}", f"Dependency=after:{other}"])
            _say(f"not before job {other} runs" if not done.returncode else done.stderr.strip())
        return True

    def _that_can_be_left_out(self, hosts: Sequence[str]) -> Sequence[str]:
        """Those of some machines without which the job can still run: all, else those that take no work, else none.

        A job that wants more machines than are left would wait in the queue for ever.
        """
        if not hosts or self._could_run_without(hosts):
            return hosts
        gone = [host for host in hosts if not self.alive(host)]
        left_out = gone if gone and self._could_run_without(gone) else []
        _say(f"too few machines would be left without {', '.join(hosts)}: left out are {', '.join(left_out) or 'none'}")
        return left_out

    def _could_run_without(self, hosts: Sequence[str]) -> bool:
        """Whether SLURM would ever start this job's own script so; whatever else it says is taken for yes."""
        script = _asked(["scontrol", "write", "batch_script", self.number, "-"]).stdout
        answer = _asked(["sbatch", "--test-only", f"--exclude={','.join(hosts)}"], given=script)
        return answer.returncode == 0 or "node configuration is not available" not in answer.stderr


class Supervisor:
    """Attempts at one run, one after the other."""

    def __init__(
        self,
        run_dir: Path,
        command: Sequence[str],
        *,
        limit: int,
        job: SlurmJob | None,
        restarts: bool = False,
        hang: float = HANG_SECONDS,
        stop_is_done: bool = False,
    ) -> None:
        self._restarts = restarts  # whether the launcher itself starts processes anew after a failure
        self._hang = hang or math.inf
        self._stop_is_done = stop_is_done
        self._attempts, self._command, self._limit, self._job = Attempts(run_dir), list(command), limit, job
        self._name = os.environ.get("SLURM_JOB_ID") or f"local-{secrets.token_hex(4)}"
        self._asked: list[str] = []

    def work(self) -> int:
        """Go on until the run is done, or nothing more can be done here; returns the exit code."""
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            return self._work()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _work(self) -> int:
        while True:
            step = newest_step(self._attempts.run_dir)
            vain = in_vain(self._attempts.of_job(self._name), step)
            if vain >= self._limit:  # they may all have ended without a word
                _say(f"given up: {vain} attempts in a row brought the run no further than step {step}")
                return FAILED
            nodes = os.environ.get("SLURM_JOB_NODELIST", "")
            attempt, folder = self._attempts.begin(nodes=nodes, job=self._name)
            _say(f"attempt {attempt.number} from step {step}{f' on {nodes}' if nodes else ''}; other ranks: {folder}")
            outcome = self._run(folder)
            self._attempts.finish(attempt, outcome)
            alive = None if self._job is None else self._job.alive
            history = self._attempts.of_job(self._name)
            decision = decide(history, outcome, limit=self._limit, asked=bool(self._asked), alive=alive)
            _say(f"attempt {attempt.number} ended: {decision.reason}")
            if decision.next is not Next.end and self._job is not None and self._job.ends():
                _say("SLURM is ending the job")
                return decision.code
            if decision.next is Next.again:
                continue
            if self._stop_is_done and outcome.code == PREEMPTED and not outcome.again:
                return DONE
            self._asked.clear()
            if decision.next is Next.elsewhere and self._job is not None and self._job.requeue(decision.exclude):
                self._await_end()
                return DONE
            return decision.code

    def _await_end(self) -> None:
        """Wait until SLURM ends this script for the requeue: an end of its own could count as the job's."""
        limit = time.monotonic() + _REQUEUE_SECONDS
        while "SIGTERM" not in self._asked and time.monotonic() < limit:
            time.sleep(_LOOK_SECONDS)

    def _run(self, folder: Path) -> Outcome:
        """One attempt to its end."""
        environment = {**os.environ, VARIABLE: str(folder)}
        # In a session of its own, so that Ctrl-C comes here alone.
        process = subprocess.Popen(
            self._command,
            env=environment,
            start_new_session=True,
            preexec_fn=_end_with_parent,  # noqa: PLW1509  (one system call, whatever other threads hold)
        )
        noted, heartbeat, hangs, patience = None, Heartbeat(folder), False, math.inf
        while process.poll() is None:
            time.sleep(_LOOK_SECONDS)
            patience = self._hang if heartbeat.begun else _START_TIMES * self._hang
            if heartbeat.silence() > patience and outcome_in(folder) is None:
                hangs = True
                _say(f"the first process has given no sign of life for {patience:g} s; all are ended")
                _end(process)
            if self._asked:
                ask_to_stop(folder)
            if self._asked.count("SIGINT") > 1:
                _end(process)
            if noted is None and not self._restarts and outcome_in(folder) is not None:
                noted = time.monotonic()
            if noted is not None and time.monotonic() - noted > _LINGER_SECONDS:
                _say("the launcher lingers, and is ended")
                _end(process)
        if left := end_leftovers(folder):  # a process that is stopped keeps the run folder's lock
            _say(f"killed {len(left)} processes that the launcher has left behind")
        code = process.returncode
        outcome = outcome_in(folder)
        if hangs:
            outcome = Outcome(code=FAILED, reason=f"the first process gave no sign of life for {patience:g} s")
        elif outcome is None:
            outcome = Outcome(code=DONE if code == 0 else FAILED, reason=f"the launcher ended with code {code}")
        if self._asked and outcome.code == PREEMPTED:
            outcome = Outcome(code=PREEMPTED, reason=f"stopped by {self._asked[0]}")
        return outcome

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._asked.append(signal.Signals(number).name)


def _end_with_parent() -> None:
    """Have this process asked to stop when the supervisor dies: nobody would start the run again, or could."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a launcher and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_KILL_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
        return


def _asked(
    command: Sequence[str], seconds: float = _ANSWER_SECONDS, *, given: str = ""
) -> "subprocess.CompletedProcess[str]":
    """What a command of SLURM answers to what it is given to read; silence is a failure.

    It is deaf from its very beginning to SIGTERM, which comes to all processes of a job that is put into the queue.
    """
    try:
        return subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=seconds,
            input=given,
            preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        return subprocess.CompletedProcess(command, FAILED, "", str(error))


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} accrete: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
