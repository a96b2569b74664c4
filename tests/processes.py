"""Pools of real processes for tests: started once per size, reused, and made anew after a failure."""

import os
import pickle
import selectors
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


def environment_of(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun would set for one process."""
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


class Pool:
    """Processes that call a function together."""

    def __init__(self, size: int) -> None:
        self._port = free_port()
        command = [sys.executable, str(Path(__file__).with_name("worker.py"))]
        self.processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment_of(rank, size, self._port)
            )
            for rank in range(size)
        ]

    def call(self, function, arguments: tuple, seconds: float) -> list:
        """Every process's result of function(runtime, *arguments), in order of ranks.

        Raises: AssertionError with the first failing process's traceback, or when the time is up.
        """
        job = pickle.dumps((function.__code__.co_filename, function.__name__, arguments))
        for process in self.processes:
            process.stdin.write(job)
            process.stdin.flush()
        answers: dict[int, object] = {}
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as waiting:
            for rank, process in enumerate(self.processes):
                waiting.register(process.stdout, selectors.EVENT_READ, rank)
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
            process.stdin.close()
            process.stdout.close()
