"""Whole runs of elastic heads: jobs that are late, killed, stopped and started again, and one model in the end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch import exits
from launch.config import load
from launch.watching.records import read_records
from parallel.ledger import joined
from relora.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
HEADS = [
    "lte=elastic",
    "lte.sync_every=4",
    "lte.wait_seconds=2",
    "parallel.silence_seconds=4",
    "parallel.timeout_seconds=20",
    "checkpoint.every=8",
    "evaluation.every=0",
    "run.save_start=false",
    "optimizer.lr=0.003",
]
SECONDS = 90


@pytest.fixture
def jobs(forker, tiny, tmp_path):
    """Start a job in the folder `name`; returns its process id. What still runs at the end is killed."""
    left = [
        word for word in tiny if not word.startswith(("run.dir", "relora.", "schedule.restart", "evaluation.every"))
    ]
    started = {}

    def start(name, *words):
        line = [*left, *HEADS, f"run.dir={tmp_path / name}", *words]
        (tmp_path / name).mkdir(exist_ok=True)
        with (tmp_path / name / "log").open("ab") as log:
            started[name] = forker.start("launch.train:main", line, stdout=log, stderr=log)
        return started[name].pid

    yield start, lambda name: started[name].wait()
    for job in started.values():
        job.kill()
        job.wait()


@pytest.fixture
def meeting(tmp_path):
    """Start a meeting point with the ledger in `meeting`; returns its process and its address."""
    running = []

    def start():
        with (tmp_path / "meeting.log").open("a") as log:
            words = ["--folder", str(tmp_path / "meeting"), "--host", "127.0.0.1", "--port", str(port)]
            running.append(
                subprocess.Popen([sys.executable, "-m", "launch.meet", *words], cwd=ROOT, stdout=log, stderr=log)
            )
        return running[-1], f"lte.meeting=127.0.0.1:{port}"

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield start
    for process in running:
        process.kill()
        process.wait()


def syncs(folder):
    path = folder / "metrics.jsonl"
    records = read_records(path) if path.exists() else []
    return [record for record in records if record.get("event") == "sync"]


def wait_for(what, tmp_path, seconds=SECONDS):
    limit = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > limit:
            logs = {path: path.read_text()[-2000:] for path in [*tmp_path.glob("*/log"), tmp_path / "meeting.log"]}
            raise AssertionError("\n".join(f"{path}:\n{text}" for path, text in logs.items()))
        time.sleep(0.01)
    return found


def same_model(*folders):
    first, *others = [load_file(folder / "final/model.safetensors") for folder in folders]
    assert all(tensor.isfinite().all() for tensor in first.values())
    return all(torch.equal(first[name], other[name]) for other in others for name in first)


def decisions(tmp_path):
    return read_records(tmp_path / "meeting/meeting.jsonl")


def test_one_is_late_one_is_killed_and_joins_again_and_all_three_end_as_one_model(jobs, meeting, tmp_path):
    start, end = jobs
    point, address = meeting()
    words = [address, "lte.heads=3", "lte.quorum=2", "training.global_batch_size=6", "training.steps=360"]
    names = ("a", "b", "c")
    running = {name: start(name, *words) for name in names}
    folders = {name: tmp_path / name for name in names}

    def members():
        return [record["members"] for record in syncs(folders["a"])] or [[]]

    wait_for(lambda: len(members()[-1]) == 3, tmp_path)
    os.kill(running["c"], signal.SIGSTOP)
    wait_for(lambda: len(members()[-1]) == 2, tmp_path)
    os.kill(running["c"], signal.SIGCONT)
    wait_for(lambda: len(members()[-1]) == 3, tmp_path)

    os.kill(running["b"], signal.SIGKILL)
    assert end("b") == -signal.SIGKILL
    gone = wait_for(
        lambda: [one for one in decisions(tmp_path) if any("lost" in text for text in one["gone"])], tmp_path
    )
    start("b", *words)
    assert [end(name) for name in names] == [exits.DONE] * 3, wait_for(lambda: False, tmp_path, 0)
    assert point.wait(10.0) == 0

    assert same_model(*folders.values())
    told = decisions(tmp_path)
    assert [one["sync"] for one in told] == list(range(91)), "nobody waited for good"
    again = next(one["sync"] for one in told if one["sync"] > gone[0]["sync"] and one["joined"])
    assert any(one["sync"] > again and one["members"] == [0, 1, 2] for one in told), "it is one of three again"
    number = int(re.findall(r"this is head (\d)", (folders["c"] / "log").read_text())[-1])
    assert any(number not in one["members"] for one in syncs(folders["c"])), "it takes up what was made without it"
    assert syncs(folders["a"])[-1].items() >= {"sync": 90, "trained": told[-1]["trained"]}.items()

    ledger = json.loads((tmp_path / "meeting/ledger.json").read_text())["ledger"]
    merged = [tuple(part) for one in told for ranges in one["trained"].values() for part in ranges]
    assert not ledger["leased"]
    assert not ledger["returned"]
    assert joined([*merged, *map(tuple, ledger["lost"])]) == [(0, ledger["reached"])], "each position once, or reported"
    given_back = {position for first, last in gone[0]["returned"] for position in range(first, last)}
    assert given_back, "what the killed head had not brought to a sync"
    later = [
        part for one in told if one["sync"] > gone[0]["sync"] for parts in one["trained"].values() for part in parts
    ]
    assert given_back <= {position for first, last in later for position in range(first, last)}


def test_all_jobs_and_the_meeting_point_stop_and_go_on_as_if_they_had_not(jobs, meeting, tmp_path):
    start, end = jobs
    words = ["lte.compression=int8", "lte.exchange=factors", "lte.outer=nesterov", "lte.outer_lr=0.7"]
    words += ["lte.outer_momentum=0.5", "lte.heads=2", "training.global_batch_size=4", "training.steps=18"]
    words += ["lte.wait_seconds=30", "parallel.silence_seconds=30"]

    def run(names, *stop):
        point, address = meeting()
        for name in names:
            start(name, address, *words, *stop)
        codes = [end(name) for name in names]
        assert codes == [exits.PREEMPTED if stop else exits.DONE] * 2, wait_for(lambda: False, tmp_path, 0)
        point.kill()
        point.wait()

    run("ab", "training.stop_after=8")
    run("ab")
    (tmp_path / "meeting/ledger.json").unlink()
    run("cd")
    assert same_model(*[tmp_path / name for name in "abcd"])


def test_a_signal_is_granted_at_the_next_sync_and_a_lost_meeting_point_ends_the_head_with_one_message(
    jobs, meeting, tmp_path
):
    start, end = jobs
    point, address = meeting()
    words = [address, "lte.heads=1", "lte.reset=factors", "training.steps=4000", "parallel.silence_seconds=1"]
    log = tmp_path / "a/log"
    job = start("a", *words)
    wait_for(lambda: len(syncs(tmp_path / "a")) >= 2, tmp_path)
    os.kill(job, signal.SIGTERM)
    assert end("a") == exits.PREEMPTED
    done = syncs(tmp_path / "a")[-1]["step"]
    assert (tmp_path / f"a/checkpoints/step_{done:08d}").is_dir()
    assert "head 0 left, as it was asked to\n" in (tmp_path / "meeting.log").read_text(), "it gives nothing back"

    start("a", *words)
    wait_for(lambda: syncs(tmp_path / "a")[-1]["step"] > done + 8, tmp_path)
    assert f"resumed from {tmp_path}/a/checkpoints/step_{done:08d} at step {done}" in log.read_text()
    point.kill()
    assert end("a") == exits.PREEMPTED
    last = log.read_text().rstrip().splitlines()[-1]
    assert last.startswith(f"error: the meeting point at {address.removeprefix('lte.meeting=')} cannot be reached")
    assert last.endswith("start the same command again")


@pytest.mark.parametrize(("words", "message"), [
    (["lte=heads", "+lte.wait_seconds=5"], "lte.wait_seconds=5.0 has no effect without lte.meeting"),
    (["lte=elastic", "lte.delay=2"], "lte.delay=2 cannot be with lte.meeting"),
    (["lte=elastic", "lte.dense=all_reduced"], "lte.dense=all_reduced cannot be with lte.meeting"),
    (["lte=elastic", "lte.exchange=shared"], "lte.exchange=shared cannot be with lte.meeting"),
    (["lte=elastic", "lte.quorum=3"], "lte.quorum must be in 1 to lte.heads=2"),
    (["lte=elastic", "lte.wait_seconds=0"], "lte.wait_seconds must be above 0"),
    (["lte=elastic", "training.global_batch_size=7"], "must be a multiple of lte.heads=2"),
    (["lte=elastic", "+relora.every=10"], "relora must be none with lte.meeting"),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(words, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load([*words, *([] if "relora" in words[-1] else ["evaluation.every=0", "checkpoint.every=0"])])


def test_the_quorum_is_more_than_half_unless_it_is_told():
    still = ["lte=elastic", "training.global_batch_size=8", "evaluation.every=0", "checkpoint.every=0"]
    assert [load([*still, f"lte.heads={heads}"]).lte.least_members for heads in (1, 2, 4)] == [1, 2, 3]
    assert load([*still, "lte.heads=4", "lte.quorum=1"]).lte.least_members == 1
