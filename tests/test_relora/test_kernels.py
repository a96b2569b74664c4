"""The kernels against their twins in Triton's interpreter, in a process of its own; on a GPU, if there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.outcome import read_document

pytest.importorskip("triton", reason="Triton is not installed: pip install 'accrete[triton]'")

CASES = Path(__file__).parent.parent / "kernel_cases.py"


def run(*words, **more):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", *words], env={**environment, **more}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def run_cases(**more):
    files = [CASES, Path(__file__).with_name("test_paths.py"), CASES.parent / "test_launch" / "test_recomputation.py"]
    chosen = [*map(str, files), "-k", f"{CASES.stem} or fused"]
    run("pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", *chosen, **more)


def test_all_kernels_equal_their_twins_in_the_interpreter():
    run_cases(TRITON_INTERPRET="1", KERNEL_DEVICE="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: compiled kernels run on nothing else")
def test_all_kernels_equal_their_twins_on_the_gpu():
    run_cases(KERNEL_DEVICE="cuda")


def test_all_kernels_build_for_hopper_and_in_bfloat16_spill_nothing(tmp_path):
    pytest.importorskip("triton.backends.nvidia", reason="this Triton builds nothing for NVIDIA")
    run("benchmarks.kernels", "--architecture", "90", "--json", str(tmp_path / "kernels.json"))
    rows = {row["kernel"]: row for row in read_document(tmp_path / "kernels.json")["rows"]}
    assert len(rows) == 14
    for name, row in rows.items():
        if name.split(", ")[1] not in ("fp32", "float32"):
            assert row["tensor_cores"], name
            assert row["spilled_bytes"] == 0, name
