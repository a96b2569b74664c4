"""`status` tells what lies in run folders, and asks SLURM for the rest."""

import pytest

from launch import exits, status, train
from launch.jobs.attempt import Outcome
from launch.jobs.attempts import Attempts
from launch.training.run_folder import locked


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def shown(run, capsys):
    assert status.main([str(run)]) == exits.DONE
    pairs = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    return {name.strip(): text.strip() for name, text in pairs}


def test_a_stopped_run_tells_how_far_it_is_and_a_running_one_that_it_runs(tiny, run, capsys):
    assert train.main([*tiny, "training.stop_after=12"]) == exits.PREEMPTED
    capsys.readouterr()
    told = shown(run, capsys)
    assert told["state"] == "stopped: training.stop_after=12"
    assert told["step"] == "12 of 20 (60%), newest checkpoint 12"
    assert told["validation"].endswith("at step 10")
    assert told["restarts"] == "1"
    assert {"loss", "left"} <= set(told)
    with locked(run):
        assert shown(run, capsys)["state"] == "training"


def test_attempts_and_a_job_that_has_not_begun(run, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    attempts = Attempts(run)
    first, _ = attempts.begin(nodes="n[1-2]", job="7")
    attempts.finish(first, Outcome(code=75, reason="stopped by SIGUSR1"))
    attempts.begin(nodes="n[1,3]", job="7")
    (run / "job/job_id").write_text("7\n")
    text = shown(run, capsys)
    assert text["job"] == "7 (SLURM does not answer here)"
    assert text["state"] == "has not begun"
    assert text["attempt 1"].endswith(": stopped by SIGUSR1")
    assert "from step 0 on n[1,3], begun 0:0" in text["attempt 2"]


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert status.main([str(tmp_path)]) == exits.REFUSED
    assert "holds no run and no job" in capsys.readouterr().err
