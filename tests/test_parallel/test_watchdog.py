"""Processes that fail in each way: all end, soon, with one report. What they do is in tests/failing.py."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.pulse import held_up_by
from parallel.watchdog import lost_peer

TESTS = Path(__file__).parent.parent


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def play():
    """Play a scenario: play(what, who) -> exit codes by rank, all output, seconds."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, str(TESTS / "failing.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:

        def ask(what, who=1, count=3):
            server.stdin.write(f"{count},{what},{who},{free_port()}\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield ask
        server.stdin.close()


def reports(result):
    """The lines that a user would take for the reason."""
    return [line for line in result["output"].splitlines() if line.startswith("error: ")]


def test_a_run_without_failure_ends_as_if_unwatched(play):
    result = play("nothing")
    assert result["codes"] == [0, 0, 0]
    assert reports(result) == []


def test_processes_that_leave_after_the_main_one_are_not_taken_for_dead(play):
    result = play("main leaves first")
    assert result["codes"] == [0, 0, 0]
    assert reports(result) == []


@pytest.mark.parametrize("what", ["alike", "terminated"])
def test_what_is_wrong_on_all_is_said_once_by_the_main_process(play, what):
    result = play(what)
    assert result["codes"] == [2, 2, 2]
    assert reports(result) == ["error: parallel.zero_stage=9 must be 0 to 3"]


@pytest.mark.parametrize("who", [0, 2])
def test_one_refusing_process_ends_all_with_its_message(play, who):
    result = play("refused", who)
    assert result["codes"] == [2, 2, 2]
    (report,) = reports(result)
    assert report.endswith("data.path=/nowhere is not there: name another")
    assert f"process {who} of 3 on " in report or who == 0
    assert "Traceback" not in result["output"]


def test_a_defect_shows_its_traceback_once(play):
    result = play("crash")
    assert result["codes"] == [1, 1, 1]
    assert result["output"].count("Traceback") == 1
    assert "tests/failing.py" in result["output"]
    (report,) = reports(result)
    assert "process 1 of 3 on " in report
    assert "ValueError: a shape is wrong" in report


@pytest.mark.parametrize("who", [0, 2])
def test_a_killed_process_ends_the_others_at_once(play, who):
    result = play("SIGKILL", who, 4)
    assert result["codes"] == [-9 if rank == who else 1 for rank in range(4)]
    (report,) = reports(result)
    assert f"process {who} of 4 on " in report
    assert "killed" in report
    assert "same command again" in report
    assert result["seconds"] < 12  # of which most is the start


@pytest.mark.parametrize("who", [0, 1])
def test_a_stopped_process_is_missed_after_the_limit(play, who):
    result = play("SIGSTOP", who)
    assert result["codes"] == [-9 if rank == who else 1 for rank in range(3)]
    (report,) = reports(result)
    assert f"process {who} of 3 on " in report
    assert "silent for 1.5 s" in report


@pytest.mark.parametrize(("what", "who"), [("late", 1), ("busy", 0), ("busy in a step", 2)])
def test_a_process_that_stays_away_from_a_collective_is_named_with_where_it_is(play, what, who):
    result = play(what, who)
    assert result["codes"] == [1, 1, 1]
    (report,) = reports(result)
    assert f"process {who} of 3 on {socket.gethostname()} holds up the rest: it is at " in report
    assert "tests/failing.py, line" in report
    assert "in misbehave" in report
    assert "the innermost call last" in result["output"]
    assert result["seconds"] < 15


def test_who_stands_elsewhere_than_most_holds_them_up():
    assert held_up_by({0: "sum", 1: "data", 2: "sum"}, {0, 2}) == [1]
    assert held_up_by({0: "sum", 1: "data", 2: "sum"}, set()) == [1], "as all wait for GPUs, nobody is known to wait"
    assert held_up_by({0: "sum", 1: "data"}, set()) == []
    assert held_up_by({0: "sum", 1: "sum"}, {0, 1}) == []
    assert held_up_by({1: "data"}, {0, 2}) == [1]


def test_a_process_without_its_launcher_ends_the_run(play):
    result = play("orphan")
    assert result["codes"] == [1, -9, 1]  # -9: the launcher between, which was killed
    (report,) = reports(result)
    assert "process 1 of 3 on " in report
    assert "lost its launcher" in report


def test_the_others_wait_for_the_main_process_to_have_written(play):
    result = play("writes last")
    assert result["codes"] == [0, 0, 0]
    (written,) = [float(line.split()[1]) for line in result["output"].splitlines() if line.startswith("written")]
    left = [float(line.split()[1]) for line in result["output"].splitlines() if line.startswith("left")]
    assert len(left) == 3
    assert min(left) > written


def test_a_failure_of_the_main_process_at_the_very_end_is_everyones(play):
    result = play("fails last")
    assert result["codes"] == [2, 2, 2]
    assert reports(result) == ["error: the disk is full: make room"]


def test_processes_that_do_not_meet_say_where_they_waited(play):
    result = play("absent")
    assert result["codes"] == [1, 0, 1], "nothing that the user must mend: another attempt may come together"
    assert "process 0 of 3 did not meet the others at 127.0.0.1:" in reports(result)[0]


def test_a_signal_to_one_process_ends_nobody(play):
    result = play("SIGTERM")
    assert result["codes"] == [0, 0, 0]
    assert "asked to stop" in result["output"]
    assert reports(result) == []


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:49344", True),
        ("[third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv", True),
        ("NCCL error in: ProcessGroupNCCL.cpp:1970, remote process exited or there was a network error", True),
        ("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)", False),
        ("NCCL error in: init.cu:1, invalid usage", False),
    ],
)
def test_broken_collectives_are_told_from_defects(words, lost):
    assert lost_peer(RuntimeError(words)) is lost
