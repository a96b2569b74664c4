"""A whole run followed by W&B, offline: every attempt under one id, pictures included."""

import json
from pathlib import Path

from launch import exits, train
from tests.test_launch.test_tracker import history, logs


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


def test_perplexities_of_a_stream_are_read_back_as_curves_and_the_matrix_as_a_heat_map(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    corpus = next(word for word in tiny if word.startswith("data.path=")).removeprefix("data.path=")
    tasks = ", ".join(f"{{name: {name}, kind: causal_lm, data: {corpus}, steps: 3}}" for name in ("one", "two"))
    dropped = ("data.path=", "training.steps=", "relora.")
    words = [*(word for word in tiny if not word.startswith(dropped)), "continual=custom", f"continual.tasks=[{tasks}]"]
    assert train.main([*words, "relora=none", "schedule.restart_warmup_steps=0", "tracker=wandb"]) == exits.DONE
    folder = tmp_path / "run"
    (records,) = logs(folder)
    curve = {row["step"]: row["tasks/one/perplexity"] for row in history(records) if "tasks/one/perplexity" in row}
    stages = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = {one["step"]: one["scores"]["one"]["perplexity"] for one in stages if one.get("event") == "stage"}
    assert curve == told
    assert list(curve) == [0, 3, 6]
    forgetting = [row["stream/forgetting"] for row in history(records) if "stream/forgetting" in row]
    assert forgetting == [json.loads((folder / "summary.json").read_text())["forgetting"]]
    media = folder / "wandb" / "latest-run" / "files" / "media"
    tables = [json.loads(path.read_text()) for path in media.glob("table/stream/*.json")]
    assert sorted(len(table["data"]) for table in tables) == [1, 2]
    assert all(table["columns"] == ["after", "one", "two"] for table in tables)
    assert len(list(media.glob("images/figures/matrix*.png"))) >= 2
