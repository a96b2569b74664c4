"""Real processes for tests: forked from one that has imported everything (tests/forks.py), alone or in pools.

A pool is started once per size, reused, and made anew after a failure.
"""

import os
import pickle
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def plain_environment() -> dict[str, str]:
    """This process's, where modules are found from anywhere."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def environment_of(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun would set for one process."""
    return {
        **plain_environment(),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class Forker:
    """Starts processes without importing everything again; one serves a whole session."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forks", str(theirs.fileno())],
                env=plain_environment(),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def start(self, program, words=(), *, environment=None, folder=ROOT, stdin=None, stdout=None, stderr=None):
        """Call "module:function" with these words in a process of its own.

        Args:
            environment: all of it; None: `plain_environment()`.
            stdin, stdout, stderr: open files; None: nothing, this process's, this process's.
        """
        environment = environment or plain_environment()
        with open(os.devnull, "rb") as nothing:
            files = [nothing if stdin is None else stdin, stdout or 1, stderr or 2]
            numbers = [file if isinstance(file, int) else file.fileno() for file in files]
            order = (program, list(map(str, words)), environment, str(folder))
            socket.send_fds(self._orders, [pickle.dumps(order)], numbers)
        return Forked(self, self._answer())

    def code_of(self, process: int) -> int | None:
        """The exit code of one that it has started and that nobody has asked for since it ended; None: it runs."""
        self._orders.send(pickle.dumps(process))
        return self._answer()

    def _answer(self):
        data = self._orders.recv(1 << 10)
        assert data, "the process that others are forked from has ended"
        return pickle.loads(data)

    def close(self) -> None:
        """End it; processes that it has started go on."""
        self._orders.close()
        self._process.wait()


class Forked:
    """What subprocess.Popen would be for a process that another one has started."""

    def __init__(self, forker: Forker, pid: int) -> None:
        self._forker, self.pid = forker, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._forker.code_of(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when it has ended.

        Raises: subprocess.TimeoutExpired
        """
        if self.poll() is None:
            file = os.pidfd_open(self.pid)
            try:
                if not select.select([file], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            finally:
                os.close(file)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


class Pool:
    """Processes that call a function together."""

    def __init__(self, forker: Forker, size: int) -> None:
        self._port = free_port()
        self.processes, self._jobs, self._answers = [], [], []
        for rank in range(size):
            (jobs, to), (back, answers) = os.pipe(), os.pipe()
            with os.fdopen(jobs) as stdin, os.fdopen(answers, "wb") as stdout:
                environment = environment_of(rank, size, self._port)
                self.processes.append(
                    forker.start("tests.worker:main", environment=environment, stdin=stdin, stdout=stdout)
                )
            self._jobs.append(os.fdopen(to, "wb"))
            self._answers.append(os.fdopen(back, "rb"))

    def call(self, function, arguments: tuple, seconds: float) -> list:
        """Every process's result of function(runtime, *arguments), in order of ranks.

        Raises: AssertionError with the first failing process's traceback, or when the time is up.
        """
        job = pickle.dumps((function.__code__.co_filename, function.__name__, arguments))
        for jobs in self._jobs:
            jobs.write(job)
            jobs.flush()
        answers: dict[int, object] = {}
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as waiting:
            for rank, file in enumerate(self._answers):
                waiting.register(file, selectors.EVENT_READ, rank)
            while len(answers) < len(self.processes):
                ready = waiting.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    missing = sorted(set(range(len(self.processes))) - set(answers))
                    raise AssertionError(f"processes {missing} gave no answer to {function.__name__} in {seconds} s")
                for key, _ in ready:
                    try:
                        worked, answer = pickle.load(key.fileobj)
                    except EOFError as error:
                        code = self.processes[key.data].wait(10.0)
                        raise AssertionError(f"process {key.data} died in {function.__name__}: code {code}") from error
                    if not worked:
                        raise AssertionError(f"process {key.data} failed in {function.__name__}:\n{answer}")
                    answers[key.data] = answer
                    waiting.unregister(key.fileobj)
        return [answers[rank] for rank in range(len(self.processes))]

    def close(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.kill()
            process.wait()
        for file in (*self._jobs, *self._answers):
            file.close()
