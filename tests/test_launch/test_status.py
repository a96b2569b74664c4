"""`status` tells what lies in run folders, and asks SLURM for the rest."""

import io
import json
import re

import pytest

from launch import exits, status, train
from launch.jobs.attempt import Outcome
from launch.jobs.attempts import Attempts
from launch.training.run_folder import locked
from launch.watching import live
from launch.watching.live import watch_runs
from launch.watching.standing import Queue, RunReader, find_runs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")


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
        (run / "requests").mkdir()
        (run / "requests/checkpoint").touch()
        check_table(run, capsys)


def check_table(run, capsys):
    """The same run in a table of all runs below a folder: once, again and again, and on a terminal."""
    assert status.main([str(run.parent)]) == exits.DONE
    title, head, row = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d  1 run, 1 training", title)
    assert head.split("  ")[1] == "run"
    cells = re.split(r"  +", row.strip())
    assert cells[:3] == ["run", "training, asked: checkpoint", "12/20"]
    assert cells[-1] == "checkpoint at 12"
    plain, terminal = io.StringIO(), Terminal()
    watch_runs([run.parent], plain, seconds=0, rounds=2)
    assert plain.getvalue().count("training, asked: checkpoint") == 2
    watch_runs([run.parent], terminal, seconds=0, rounds=2)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert drawn.count("Ctrl-C ends") >= 2
    assert {"12/20", cells[3], cells[4]} <= set(re.split(r"[\s│]+", drawn))


def test_attempts_and_a_job_that_has_not_begun(run, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    attempts = Attempts(run)
    first, _ = attempts.begin(nodes="n[1-2]", job="7")
    attempts.finish(first, Outcome(code=75, reason="stopped by SIGUSR1"))
    attempts.begin(nodes="n[1,3]", job="7")
    (run / "job/job_id").write_text("7\n")
    text = shown(run, capsys)
    assert text["job"] == "7: SLURM does not answer here"
    assert text["state"] == "has not begun"
    assert text["attempt 1"].endswith(": stopped by SIGUSR1")
    assert "from step 0 on n[1,3], begun 0:0" in text["attempt 2"]


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert status.main([str(tmp_path)]) == exits.REFUSED
    assert "holds no run and no job" in capsys.readouterr().err


def test_a_watch_ends_by_ctrl_c_without_an_error(run, capsys, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    Attempts(run).begin(nodes="", job="local-1")
    monkeypatch.setattr(live.time, "sleep", interrupt)
    assert status.main(["--watch", str(run)]) == exits.DONE
    assert "has not begun" in capsys.readouterr().out
    assert status.main(["--every", "3", str(run)]) == exits.REFUSED
    assert "--every 3 has no effect without --watch" in capsys.readouterr().err


def test_a_reader_takes_what_is_new_and_begins_anew_when_the_run_has_gone_back(run, monkeypatch):
    run.mkdir()
    (run / "config.yaml").touch()
    monkeypatch.setattr(RunReader, "_steps", lambda self: 4)
    metrics, reader = run / "metrics.jsonl", RunReader(run)

    def lines(*steps):
        return "".join(json.dumps({"step": step, "loss": 1.0, "tokens": 8 * step}) + "\n" for step in steps)

    assert (reader.read().step, reader.read().state) == (
        0,
        "ended without a word, or holds its folder on another machine",
    )
    metrics.write_text(lines(1, 2) + '{"event": "skip", "step": 2}\n' + lines(3)[:9])
    assert (reader.read().step, reader.read().counts) == (2, {"skip": 1})
    metrics.write_text(metrics.read_text()[:-9] + lines(3))
    assert (reader.read().step, reader.read().counts) == (3, {"skip": 1})
    aside = run / "metrics.jsonl.partial"
    aside.write_text(lines(1))
    aside.replace(metrics)
    assert (reader.read().step, reader.read().counts) == (1, {})


def test_runs_are_found_below_a_folder_and_those_of_a_sweep_one_by_one(tmp_path):
    for name in ("a/b/run", "sweep/000", "sweep/001", "run"):
        (tmp_path / name / "checkpoints/step_00000001").mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "sweep/sweep.json").touch()
    (tmp_path / "sweep/job").mkdir()
    names = [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)]
    assert names == ["a/b/run", "run", "sweep/000", "sweep/001"]
    assert find_runs(tmp_path / "run") == [tmp_path / "run"]
    assert [path.name for path in find_runs(tmp_path / "sweep")] == ["000", "001"]


def test_jobs_are_asked_for_at_once_and_an_array_tells_of_each_task(tmp_path, monkeypatch):
    squeue = tmp_path / "squeue"
    squeue.write_text(
        '#!/bin/sh\necho "$*" >> $0.asked\n'
        "printf '%s\\n' '13|12|12_0: RUNNING, 1:00 of 2:00 used, n1'"
        " '12|12|12_1: PENDING, 0:00 of 2:00 used, (None)'\n"
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    queue = Queue()
    for _ in range(3):
        told = queue.told(["12", "13", "9"])
    assert told["12"] == ["12_0: RUNNING, 1:00 of 2:00 used, n1", "12_1: PENDING, 0:00 of 2:00 used, (None)"]
    assert told["13"] == ["12_0: RUNNING, 1:00 of 2:00 used, n1"]
    assert told["9"] == ["9: no longer known to SLURM"]
    (asked,) = (tmp_path / "squeue.asked").read_text().splitlines()
    assert "-j 12,13,9 " in asked
