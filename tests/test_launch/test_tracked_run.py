"""A whole run followed by W&B, offline: every attempt under one id, pictures included."""

import json
from pathlib import Path

from launch import exits, train


def test_a_resumed_run_goes_on_under_the_same_id_and_nothing_leaves_the_run_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    words = [*tiny, "tracker=wandb"]
    assert train.main([*words, "training.stop_after=3", "checkpoint.every=0"]) == exits.PREEMPTED
    first = (tmp_path / "run/tracker_id").read_text()
    assert train.main(words) == exits.DONE
    assert (tmp_path / "run/tracker_id").read_text() == first
    attempts = list((tmp_path / "run/wandb").glob(f"offline-run-*-{first.strip()}"))
    assert len(attempts) == 2
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"run"}
    pictures = {path.name for path in Path(tmp_path / "run/report").glob("*.png")}
    assert {"loss.png", "learning_rate.png", "spectra.png", "rank.png"} <= pictures
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "done"
