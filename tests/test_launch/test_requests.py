"""Requests to a running run: granted between two steps, on all processes, and told; or refused by one message."""

import json

import pytest

from launch import exits, tell, train
from launch.config import load
from launch.jobs.attempt import VARIABLE, outcome_in
from launch.training import granting, loop, requests
from launch.training.requests import Wish, from_number, request, to_number, waiting
from launch.training.run_folder import RunFolder
from launch.training.state import RunState
from launch.watching.records import read_records
from relora.errors import ConfigError


def records(folder, event=None):
    return [record for record in read_records(folder / "metrics.jsonl") if record.get("event") == event]


def learned(folder):
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"], r.get("cycle")) for r in records(folder)]


def at_steps(monkeypatch, folder, asked):
    """Let files with these names appear while the update that ends with a step is made."""
    real = granting.told
    monkeypatch.setattr(requests, "_LOOK_SECONDS", 0.0)

    def told(run):
        for name in asked.get(run.state.step + 1, ()):
            if name is None:
                raise RuntimeError("killed")
            (folder / "requests").mkdir(exist_ok=True)
            (folder / "requests" / name).touch()
        return real(run)

    monkeypatch.setattr(loop, "told", told)


def answers(folder):
    return [(r["step"], r["wish"], r["granted"]) for r in records(folder, "request")]


def test_requests_are_granted_after_the_step_and_a_restart_comes_again_after_a_kill(tiny, tmp_path, monkeypatch):
    asked = {2: ["nonsense", "restart"], 3: ["evaluate"], 7: ["restart", "checkpoint"], 10: ["restart"], 20: ["stop"]}
    folder = tmp_path / "run"
    at_steps(monkeypatch, folder, asked)
    assert train.main([*tiny, "checkpoint.keep=9"]) == exits.DONE
    assert [record["step"] for record in records(folder, "restart")] == [7, 10, 15]
    assert [record["step"] for record in records(folder, "evaluate")] == [0, 3, 10, 20]
    assert [record["step"] for record in records(folder, "checkpoint")] == [4, 5, 7, 8, 12, 16, 20]
    assert answers(folder) == [
        (1, "nonsense", False),
        (1, "restart", False),
        (3, "evaluate", True),
        (7, "restart", True),
        (7, "checkpoint", True),
        (10, "restart", True),
        (20, "stop", False),
    ]
    assert waiting(folder) == []
    told = learned(folder)
    assert [cycle for *_, cycle in told[4:12]] == [None, 0, 0, 1, 1, 1, 2, 2]
    rates = [rate for *_, rate, _ in told]
    assert rates[7] == 0.0
    assert 0 < rates[8] < rates[6]

    other = tmp_path / "other"
    words = [*tiny, f"run.dir={other}"]
    at_steps(monkeypatch, other, {7: ["restart"], 8: [None]})
    with pytest.raises(RuntimeError, match="killed"):
        train.main(words)
    at_steps(monkeypatch, other, {9: [None]})
    with pytest.raises(RuntimeError, match="killed"):  # after it has been done again
        train.main(words)
    at_steps(monkeypatch, other, {})
    assert train.main(words) == exits.DONE
    assert learned(other) == told
    assert answers(other) == [(7, "restart", True)]


def test_a_stop_ends_the_run_for_its_supervisor_too_and_the_same_command_goes_on(tiny, tmp_path, monkeypatch):
    folder, attempt = tmp_path / "run", tmp_path / "attempt"
    attempt.mkdir()
    monkeypatch.setenv(VARIABLE, str(attempt))
    at_steps(monkeypatch, folder, {3: ["stop"]})
    assert train.main(tiny) == exits.PREEMPTED
    assert json.loads((folder / "summary.json").read_text())["reason"] == "a request"
    told = outcome_in(attempt)
    assert (told.code, told.again, told.reason) == (exits.PREEMPTED, False, "stopped by a request")
    at_steps(monkeypatch, folder, {7: ["stop-after-cycle"]})
    assert train.main(tiny) == exits.PREEMPTED
    assert learned(folder)[-1][0] == 10
    assert [record["step"] for record in records(folder, "restart")] == [10]
    assert outcome_in(attempt).again is False
    assert answers(folder) == [(3, "stop", True), (10, "stop-after-cycle", True)]
    at_steps(monkeypatch, folder, {})
    assert train.main(tiny) == exits.DONE


def _train(runtime, overrides, folder, asked):
    with pytest.MonkeyPatch.context() as patch:
        at_steps(patch, folder, asked if runtime.is_main else {})
        return train.main(overrides)


def test_all_processes_grant_alike(on_processes, tiny, tmp_path):
    folder = tmp_path / "run"
    asked = {7: ["restart"], 9: ["checkpoint", "evaluate"], 11: ["stop"]}
    assert on_processes(_train, 2, tiny, folder, asked) == [exits.PREEMPTED] * 2
    assert answers(folder) == [
        (7, "restart", True),
        *((9, name, True) for name in ("evaluate", "checkpoint")),
        (11, "stop", True),
    ]
    assert (folder / "checkpoints/step_00000009").is_dir()


def test_heads_grant_at_a_sync(on_processes, tiny, tmp_path):
    folder = tmp_path / "run"
    words = [word for word in tiny if not word.startswith(("relora.", "schedule.restart"))]
    words += ["lte=heads", "lte.sync_every=4", "evaluation.every=8"]
    asked = {1: ["restart"], 2: ["checkpoint", "evaluate"], 5: ["stop-after-cycle"]}
    assert on_processes(_train, 2, words, folder, asked) == [exits.PREEMPTED] * 2
    assert answers(folder) == [
        (0, "restart", False),
        (4, "evaluate", True),
        (4, "checkpoint", True),
        (8, "stop-after-cycle", True),
    ]


def test_wishes_travel_as_numbers():
    for wishes in (frozenset(), frozenset(Wish), frozenset({Wish.restart, Wish.stop})):
        assert from_number(float(to_number(wishes))) == wishes


@pytest.fixture
def known(tmp_path, tiny, monkeypatch):
    """A run that has been configured, and is not training."""

    def make(*more):
        folder = RunFolder(path=tmp_path / "known", resume=None, finished=False, notices=[])
        folder.begin(load([*tiny, *more]), {}, RunState(), total=20)
        return folder

    return make


def test_tell_writes_a_request_and_takes_it_back(known, capsys):
    folder = known().path
    assert tell.main([str(folder), "checkpoint"]) == exits.DONE
    assert tell.main([str(folder), "checkpoint"]) == exits.DONE
    assert waiting(folder) == ["checkpoint"]
    assert tell.main([str(folder), "checkpoint", "--wait", "0.3"]) == exits.FAILED
    assert tell.main([str(folder), "nothing"]) == exits.DONE
    assert waiting(folder) == []
    assert "taken back: checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "what", "told"),
    [
        ([], "chekpoint", "'chekpoint' is nothing that a run can be asked for: choose checkpoint, "),
        (["relora=none"], "restart", "restart has no meaning with relora=none"),
        (["relora=none"], "stop-after-cycle", "stop-after-cycle has no meaning without relora, lte and tasks"),
        (["lte=heads", "lte.heads=2", "lte.sync_every=2"], "restart", "restart is for one model"),
    ],
)
def test_what_a_run_has_not_got_is_refused_by_one_message(known, tiny, capsys, more, what, told):
    if more:
        tiny[:] = [word for word in tiny if not word.startswith(("relora.", "schedule.restart"))]
    folder = known(*more).path
    assert tell.main([str(folder), what]) == exits.REFUSED
    shown = capsys.readouterr().err
    assert shown.count("error:") == 1
    assert told in shown
    assert waiting(folder) == []


def test_a_finished_run_and_a_folder_without_one_are_refused(known, tmp_path):
    folder = known()
    folder.write_summary({"status": "done"})
    with pytest.raises(ConfigError, match="is done, and hears no requests"):
        request(folder.path, Wish.checkpoint)
    with pytest.raises(ConfigError, match="holds no run"):
        request(tmp_path, Wish.checkpoint)
