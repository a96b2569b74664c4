"""Runs in which a process fails on purpose: reads `COUNT,WHAT,WHO,PORT` from stdin, writes what became of each process.

torch is imported once, and every scenario's processes are forked from here.
"""

import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import torch

from launch import exits
from parallel.collectives import gather_objects, sum_over
from parallel.lines import Line
from parallel.pulse import Pulse
from parallel.runtime import start
from parallel.watchdog import watched
from relora.errors import ConfigError

SILENCE, TIMEOUT, LIMIT = 1.5, 2.0, 20.0


def misbehave(what: str, number: int) -> None:
    """What the chosen process does while the others go on into a sum."""
    if what == "refused":
        raise ConfigError("data.path=/nowhere is not there: name another")
    if what == "crash":
        raise ValueError("a shape is wrong")
    if what in ("SIGKILL", "SIGSTOP"):
        os.kill(os.getpid(), signal.Signals[what])
    if what == "SIGTERM":
        signal.signal(signal.SIGTERM, lambda *_: print("asked to stop", flush=True))
        os.kill(os.getpid(), signal.SIGTERM)
    if what == "late":
        time.sleep(LIMIT)
    if what in ("busy", "busy in a step"):
        while True:
            sum(range(1000))
    if what == "orphan":
        os.kill(number, signal.SIGKILL)


def say_goodbye_slowly() -> None:
    """Let the others hang up long before the main process has told them all that it is done."""
    at_once = Line.send

    def send(line: Line, **message: object) -> None:
        at_once(line, **message)
        if "finished" in message:
            time.sleep(0.2)

    Line.send = send


def run(what: str, who: int, parent: int) -> int:
    """A run of a few sums."""
    pulse, limit = Pulse(), TIMEOUT if what == "busy in a step" else math.inf
    silence = 4 * SILENCE if what == "SIGKILL" else SILENCE  # a busy machine is silent, too, and that is not the claim
    limits = {"silence_seconds": silence, "pulse": pulse, "step_seconds": limit}
    # Where no collective has a limit, as with a GPU that is waited for, the steps have one.
    timeout = TIMEOUT if math.isinf(limit) else 10 * LIMIT
    with start(timeout_seconds=timeout) as runtime, watched(runtime, explain=exits.explain, **limits):
        gather_objects(runtime, 0)
        if what == "terminated":  # as torchrun does to the others when the first process has ended
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        if what in ("alike", "terminated"):
            raise ConfigError("parallel.zero_stage=9 must be 0 to 3")
        if runtime.process_rank == who:
            with pulse.step():
                misbehave(what, parent)
        for _ in range(1000 if what == "orphan" else 3):
            with pulse.step():
                sum_over(runtime.model, torch.ones(1000))
            time.sleep(0.01)
        if what == "main leaves first":
            if runtime.is_main:
                say_goodbye_slowly()
            else:
                time.sleep(0.2)
        if runtime.is_main and what in ("writes last", "fails last"):
            time.sleep(2 * SILENCE)
            print("written", time.monotonic(), flush=True)
            if what == "fails last":
                raise ConfigError("the disk is full: make room")
    print("left", time.monotonic(), flush=True)
    return 0


def begin(rank: int, count: int, port: int, what: str, who: int, folder: Path) -> int:
    """Fork one process of a scenario; returns its id. An orphan-to-be gets a launcher in between, which it kills."""
    child = os.fork()
    if child:
        return child
    with (folder / str(rank)).open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if what == "absent" and rank == who:
        os._exit(0)
    code = 99
    try:
        if what == "orphan":
            os.environ["TORCHELASTIC_RUN_ID"] = "test"
            if rank == who and (own := os.fork()):
                os.waitpid(own, 0)
        code = exits.run(lambda: run(what, who, os.getppid()))
    finally:
        if code == 99:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)


def play(count: int, what: str, who: int, port: int) -> dict[str, object]:
    """Let a scenario's processes run to their ends; who is still there after LIMIT, or stopped, is killed."""
    with tempfile.TemporaryDirectory() as name:
        running = {begin(rank, count, port, what, who, Path(name)): rank for rank in range(count)}
        codes, began = {}, time.monotonic()
        while running:
            only_stopped = what == "SIGSTOP" and list(running.values()) == [who]
            if only_stopped or time.monotonic() - began > LIMIT:
                for child in running:
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
            for child in list(running):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
        return {
            "codes": [codes[rank] for rank in range(count)],
            "output": "".join((Path(name) / str(rank)).read_text(errors="replace") for rank in range(count)),
            "seconds": time.monotonic() - began,
        }


if __name__ == "__main__":
    for row in sys.stdin:
        count, what, who, port = row.strip().split(",")
        print(json.dumps(play(int(count), what, int(who), int(port))), flush=True)
