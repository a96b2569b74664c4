"""Losses of a small run, recorded: a change that is meant to change no number must leave them as they are.

They are compared to four digits, since another CPU may round differently. An intended change re-records them:
ACCRETE_RECORD=1 pytest tests/test_launch/test_golden.py
"""

import os
from pathlib import Path

import pytest

from launch import exits, train
from launch.watching.records import read_records

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize("name", ["relora_fp32", "relora_bf16", "full_rank"])
def test_a_run_has_the_recorded_losses(tiny, tmp_path, name):
    words = tiny
    if name == "full_rank":
        words = [*(word for word in tiny if not word.startswith(("relora.", "lora."))), "lora=none"]
    if name == "relora_bf16":
        words = [*tiny, "training.dtype=bf16"]
    assert train.main(words) == exits.DONE
    losses = [line["loss"] for line in read_records(tmp_path / "run/metrics.jsonl") if "grad_norm" in line]
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("ACCRETE_RECORD"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{loss:.6f}\n" for loss in losses))
    recorded = [float(line) for line in path.read_text().split()]
    assert losses == pytest.approx(recorded, rel=2e-2 if name == "relora_bf16" else 1e-4)
