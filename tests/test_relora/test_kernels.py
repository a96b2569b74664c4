"""The kernels against their twins in Triton's interpreter, in a process of its own; on a GPU, if there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'accrete[triton]'")

CASES = Path(__file__).parent.parent / "kernel_cases.py"


def run_cases(**more):
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", str(CASES)]
    done = subprocess.run(words, env={**os.environ, **more}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_all_kernels_equal_their_twins_in_the_interpreter():
    assert " passed" in run_cases(TRITON_INTERPRET="1", KERNEL_DEVICE="cpu").splitlines()[-1]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU: the compiled kernels run on nothing else"
)
def test_all_kernels_equal_their_twins_on_the_gpu():
    assert " passed" in run_cases(KERNEL_DEVICE="cuda").splitlines()[-1]
