"""Whole runs as jobs of a real SLURM: started in each way, stopped, robbed of a node, and the same in the end."""

import re
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch import exits, train
from launch.jobs.attempts import Attempts
from launch.jobs.job import in_words
from launch.watching.records import read_records
from tests import slurm_cluster, stream_runs
from tests.slurm_jobs import ROOT, Job, eventually

LONGER = ["training.steps=300", "relora.every=50", "evaluation.every=150", "checkpoint.every=50"]
PATIENT = ["parallel.silence_seconds=60", "parallel.timeout_seconds=180"]
TWELVE = "training.global_batch_size=12"  # for one to four processes
HOSTILE = 'it\'s $(touch broken) `touch broken` "quoted"; touch broken & $HOME #'

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def cluster():
    try:
        made = slurm_cluster.Cluster(3)
    except slurm_cluster.Unavailable as reason:
        pytest.skip(str(reason))
    yield made
    made.close()


@pytest.fixture(scope="module")
def jobs(cluster, tiny_words, tmp_path_factory):
    """Jobs that do not disturb each other, all in the queue at once; the test of each says what it must come to."""
    root = tmp_path_factory.mktemp("jobs")
    plain = [*tiny_words, *PATIENT]
    lte = [word for word in plain if not word.startswith(("relora", "schedule.restart"))]
    lte += ["lte=heads", "lte.transport=mpi", "lte.sync_every=4"]
    lte += ["training.steps=8", "evaluation.every=0", "checkpoint.every=4"]
    stream = [word for word in stream_runs.words(root, *PATIENT) if not word.startswith("run.dir=")]
    tasks, nodes = ["launcher.start=srun"], "launcher.nodes=2"
    return {
        "whole": Job(
            cluster, root / HOSTILE, [*plain, *LONGER, f"run.name={in_words(HOSTILE)}"], nodes, *tasks, really=True
        ),
        "chain": Job(cluster, root / "chain", stream, "launcher.chain=true", *tasks),
        "pmix": Job(cluster, root / "mpi", lte, nodes, "launcher.start=pmix"),
        "fewer": Job(cluster, root / "fewer", [*plain, TWELVE], "launcher.nodes=4", "launcher.least_nodes=1"),
        "sweep": Job(cluster, root / "sweep", ["--multirun", "optimizer.lr=0.01,0.001", *plain], *tasks),
    }


@pytest.fixture(scope="module")
def script(cluster, tiny_words, tmp_path_factory):
    """The plain script as a job; its number and its log."""
    folder = tmp_path_factory.mktemp("script")
    options = ["--gpus-per-node=0", "--cpus-per-task=1", f"--output={folder}/log", f"--chdir={folder}", "--parsable"]
    options += [f"--export=PATH={Path(sys.executable).parent}:/usr/bin:/bin,PYTHONPATH={ROOT}"]
    words = [*tiny_words, *PATIENT, "evaluation.spectra=none", f"run.dir={folder}/run"]
    return cluster.ask("sbatch", *options, str(ROOT / "launch/slurm/train.sbatch"), *words), folder / "log"


def test_a_stream_is_a_chain_of_jobs_and_one_that_was_cancelled_leaves_its_task_to_the_next(jobs, tmp_path):
    job = jobs["chain"]
    eventually(lambda: len(job.attempts) == 2, job.tell)
    job.cluster.ask("scancel", f"{job.number}_1")
    job.wait(["COMPLETED", "CANCELLED", "COMPLETED"])
    first, second, third = job.attempts
    assert (first.code, first.reason) == (exits.PREEMPTED, "stopped by continual.stop_after=one")
    assert (first.reached, second.step) == (4, 4)
    assert third.code == exits.DONE
    assert f"{job.number}_1: CANCELLED" in job.status()
    assert stream_runs.same_end(job.run, stream_runs.runs_by_method(tmp_path)("inflora"))


@pytest.fixture(scope="module")
def whole(jobs):
    """The records of a run that nothing has disturbed."""
    jobs["whole"].wait()
    return jobs["whole"].records()


def test_two_nodes_finish_a_run_whose_folder_has_a_hostile_name(cluster, jobs, whole):
    job = jobs["whole"]
    assert "status: done" in job.log
    assert "2 data x 1 tensor" in job.log
    assert [(one.nodes, one.code) for one in job.attempts] == [("n[1-2]", exits.DONE)]
    assert (job.run / "job/attempt_001/rank_00001.n2.log").is_file()
    assert not list(job.run.parent.parent.rglob("broken"))
    assert not (cluster.folder / "broken").exists()


def test_pmix_starts_mpi_for_heads_that_sync_through_it(jobs):
    jobs["pmix"].wait()
    assert "2 heads x 1 data x 1 tensor" in jobs["pmix"].log
    assert sum(record.get("event") == "sync" for record in jobs["pmix"].records()) == 2


def test_fewer_nodes_than_asked_for_train_on_the_same_global_batches(jobs, tiny, tmp_path):
    job = jobs["fewer"]
    job.wait()
    (attempt,) = job.attempts
    assert attempt.nodes in ("n[1-3]", "n[1-2]", "n[1,3]", "n[2-3]", "n1", "n2", "n3"), "there are but three"
    assert train.main([*tiny, TWELVE, "evaluation.spectra=none"]) == exits.DONE
    ours, theirs = (
        [record["loss"] for record in read_records(run / "metrics.jsonl") if "loss" in record]
        for run in (job.run, tmp_path / "run")
    )
    assert len(ours) == 20
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_plain_script_trains(cluster, jobs, script):
    number, log = script
    state = ["squeue", "-h", "-t", "all", "-j", number, "-o", "%T"]
    ended = eventually(lambda: {cluster.ask(*state)} - {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"})
    assert ended == {"COMPLETED"}, log.read_text()
    assert "status: done" in log.read_text()


def test_a_sweep_is_a_job_array_with_a_table_of_results(jobs):
    jobs["sweep"].wait(["COMPLETED"] * 2)
    told = jobs["sweep"].status()
    assert re.search(r"000 +optimizer.lr=0.01 +done", told), told
    assert re.search(r"001 +optimizer.lr=0.001 +done", told), told


def test_heads_are_an_array_that_meets_in_the_run_folder_and_those_that_are_lost_or_stopped_come_back(
    cluster, tiny_words, tmp_path
):
    words = [word for word in tiny_words if not word.startswith(("relora", "schedule.restart"))]
    words += ["lte=elastic", "lte.sync_every=4", "training.steps=400", "evaluation.every=0", "checkpoint.every=40"]
    words += ["parallel.silence_seconds=15", "parallel.timeout_seconds=180"]
    job = Job(cluster, tmp_path, words, "launcher.start=srun")
    runs = [job.run / f"heads/{number:03d}" for number in range(2)]
    number = (job.run / "job/meeting_id").read_text().strip()

    def syncs():
        path = job.run / "meeting/meeting.jsonl"
        return [one for one in read_records(path) if one["sync"]] if path.exists() else []

    def joined():
        return next((one["sync"] for one in syncs() if one["joined"]), None)

    def attempts(head):
        return Attempts(runs[head]).read()

    eventually(lambda: any(one["members"] == [0, 1] for one in syncs()), job.tell)
    job.cluster.ask("scancel", "--signal=KILL", f"{job.number}_0.0")
    eventually(joined, job.tell)
    job.cluster.ask("scancel", "--signal=USR1", "--batch", f"{job.number}_1")
    eventually(lambda: attempts(1)[0].ended, job.tell)
    job.wait(["COMPLETED"] * 2)
    eventually(lambda: job.states(number) == ["COMPLETED"], job.tell)
    assert [len(attempts(head)) for head in range(2)] == [2, 2]
    assert attempts(1)[0].reason == "stopped by SIGUSR1"
    assert any(one["members"] == [0, 1] and one["sync"] > joined() for one in syncs()), "it is one of two again"
    assert syncs()[-1]["members"] == [0, 1]
    told = job.status()
    assert re.search(r"head 000 +done; step 400 of 400", told), told
    assert re.search(r"syncs +100, the last by heads 0, 1", told), told
    first, second = (load_file(run / "final/model.safetensors") for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_is_stopped_gives_way_and_loses_a_node_ends_as_if_undisturbed(cluster, tiny_words, whole, tmp_path):
    wandb = ["tracker=wandb", "tracker.mode=offline", "parallel.silence_seconds=10", "parallel.timeout_seconds=180"]
    job = Job(cluster, tmp_path, [*tiny_words, *LONGER, *wandb], "launcher.nodes=2")

    job.wait_for_step(10)
    cluster.ask("scancel", "--signal=USR1", "--batch", job.number)  # as SLURM does before the time limit
    job.wait_for_attempt(2)
    job.wait_for_step(job.attempts[0].reached + 10)
    cluster.ask("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    job.wait_for_attempt(3)
    job.wait_for_step(job.attempts[1].reached + 10)
    cluster.power_off(2)
    shown = ["scontrol", "show", "job", job.number]
    eventually(lambda: "ExcNodeList=n2" in cluster.ask(*shown), job.tell)
    assert "DOWN" not in cluster.ask("sinfo", "--noheader", "--nodes=n2", "-o", "%T").upper(), "it was not SLURM's word"
    cluster.notice(2)
    job.wait()
    cluster.power_on(2)

    first, second, third, last = job.attempts
    assert (first.code, first.reason) == (exits.PREEMPTED, "stopped by SIGUSR1")
    assert 10 <= first.reached == second.step < second.reached == third.step
    assert second.code == exits.PREEMPTED
    assert third.host == "n2", job.tell()
    assert (last.nodes, last.code) == ("n[1,3]", exits.DONE)
    assert job.records() == whole
    names = [path.name.rpartition("-")[2] for path in job.run.glob("wandb/offline-run-*")]
    assert len(names) == 4
    assert len(set(names)) == 1, "one run in W&B"


STOP_ONCE = """cd "$1"; if [ "$SLURM_ARRAY_TASK_ID" = 0 ] || [ -e again ]; then exit 0; fi; touch again
echo '{"code": 75, "reason": "stopped"}' > "$ACCRETE_ATTEMPT/outcome.json"; exit 1"""


def test_of_an_array_only_the_task_that_was_stopped_runs_again_and_not_before_the_job_that_it_needs(cluster, tmp_path):
    (tmp_path / "stop.sh").write_text(STOP_ONCE)
    for task in ("0", "1"):
        (tmp_path / task).mkdir()
    needed = cluster.ask("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "sleep 60")
    (tmp_path / "needed").write_text(needed + "\n")
    run = f"{tmp_path}/$SLURM_ARRAY_TASK_ID"
    line = f"{sys.executable} -m launch.jobs.supervise --run-dir {run} --requeue --requeue-after {tmp_path}/needed"
    script = f"#!/bin/bash\nexport PYTHONPATH={ROOT}\nexec {line} -- bash {tmp_path}/stop.sh {run}\n"
    (tmp_path / "job.sh").write_text(script)
    number = cluster.ask("sbatch", "--parsable", "--array=0-1", f"--output={tmp_path}/log_%a", str(tmp_path / "job.sh"))

    def ended():
        return [one.code for one in Attempts(tmp_path / "1").read()]

    def waits():
        return f"after:{needed}(unfulfilled)" in cluster.ask("squeue", "-h", "-j", f"{number}_1", "-o", "%T %E")

    eventually(lambda: ended() == [exits.PREEMPTED] and waits(), (tmp_path / "log_1").read_text, 60)
    cluster.ask("scontrol", "release", needed)
    eventually(
        lambda: cluster.hurry(number) or ended() == [exits.PREEMPTED, exits.DONE], (tmp_path / "log_1").read_text, 60
    )
    cluster.ask("scancel", needed)
    assert [one.code for one in Attempts(tmp_path / "0").read()] == [exits.DONE]


def test_what_slurm_would_never_start_is_refused_with_its_words(cluster, tiny_words, tmp_path):
    job = Job(cluster, tmp_path, tiny_words, "launcher.nodes=4")
    assert job.submitted.returncode == exits.REFUSED
    assert "SLURM refuses the job" in job.submitted.stderr


def test_a_cancelled_job_stays_cancelled(cluster, tmp_path):
    script = tmp_path / "job.sh"
    line = f"{sys.executable} -m launch.jobs.supervise --run-dir {tmp_path} --requeue -- srun sleep 100"
    script.write_text(f"#!/bin/bash\nexport PYTHONPATH={ROOT}\nexec {line}\n")
    number = cluster.ask("sbatch", "--parsable", f"--output={tmp_path}/log", str(script))
    eventually((tmp_path / "job/attempt_001").exists)
    cluster.ask("scancel", number)
    eventually(lambda: Attempts(tmp_path).read()[0].ended)
    time.sleep(1)
    assert cluster.ask("squeue", "-h", "-t", "all", "-j", number, "-o", "%T") == "CANCELLED"
    assert len(Attempts(tmp_path).read()) == 1
