"""A thread that does one thing after the other while the main thread trains."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_Job = tuple[Callable[[], Any], "Future[Any]", torch.cuda.Event | None]


class Background:
    """One thread, on a CUDA stream of its own where there are GPUs.

    Once something has failed, whatever comes after fails with the same error: counterparts would wait for it in vain.
    It ends with the process, even in the middle of a wait for others.
    """

    def __init__(self, device: torch.device) -> None:
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._on_gpu = device.type == "cuda"
        threading.Thread(target=_work, args=(self._jobs, device), daemon=True, name="heads").start()

    def submit(self, task: Callable[[], T]) -> "Future[T]":
        """Do a task after those before it, and after what the caller's stream has been given so far.

        The future holds its result, or its error; on a GPU the result is complete by then.
        """
        future: Future[T] = Future()
        self._jobs.put((task, future, torch.cuda.current_stream().record_event() if self._on_gpu else None))
        return future

    def wait(self) -> None:
        """Wait until nothing is left to do; raises the error of what failed."""
        self.submit(lambda: None).result()


def _work(jobs: "SimpleQueue[_Job]", device: torch.device) -> None:
    stream = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        stream = torch.cuda.Stream(device)
    failure: Exception | None = None
    while True:
        task, future, given = jobs.get()
        if failure is None:
            try:
                future.set_result(_done(task, stream, given))
            except Exception as error:  # noqa: BLE001  (raised where the result is waited for, whatever it is)
                failure = error
        if failure is not None:
            future.set_exception(failure)
        del task, future


def _done(task: Callable[[], T], stream: torch.cuda.Stream | None, given: torch.cuda.Event | None) -> T:
    if stream is None or given is None:
        return task()
    with torch.cuda.stream(stream):
        stream.wait_event(given)
        result = task()
    stream.synchronize()
    return result
