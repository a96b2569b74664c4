"""The process that tests fork others from: it has imported everything, which takes each process of its own 8 seconds.

Orders come as pickles through the socket whose number is the one argument: (program, words, environment, folder) with
the new process's standard files starts one and is answered with its number; such a number is answered with the exit
code, or None while it runs.
"""

import gc
import importlib
import os
import pickle
import socket
import sys
import traceback
from pathlib import Path

import torch

EARLY = ["deepspeed", "torch._dynamo", "transformers.models.llama.modeling_llama", "launch.train"]


def begin(orders: socket.socket, order: tuple, files: list[int]) -> int:
    """Fork a process; returns its number."""
    child = os.fork()
    if child:
        for file in files:
            os.close(file)
        return child
    code = 99
    try:
        program, words, environment, folder = order
        orders.close()
        for target, file in enumerate(files):
            os.dup2(file, target)
            os.close(file)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.argv = [program, *words]
        module, _, function = program.partition(":")
        code = int(getattr(importlib.import_module(module), function)() or 0)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:  # noqa: BLE001  (told where the process's errors go)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def code_of(process: int) -> int | None:
    """Its exit code, as subprocess gives it, or None."""
    ended, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def main() -> None:
    """Serve until the socket closes."""
    orders = socket.socket(fileno=int(sys.argv[1]))
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # as parallel/engine.py
    for name in EARLY:
        importlib.import_module(name)
    importlib.import_module("launch.config").load([])
    gc.collect()
    gc.freeze()
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a thread would not come along"
    while True:
        data, files, _, _ = socket.recv_fds(orders, 1 << 18, 3)
        if not data:
            break
        order = pickle.loads(data)
        orders.send(pickle.dumps(code_of(order) if isinstance(order, int) else begin(orders, order, files)))


if __name__ == "__main__":
    main()
