"""Whole runs as jobs of a real SLURM: started in each way, stopped, robbed of a node, and the same in the end."""

import importlib.util
import re
import sys
import time
from pathlib import Path

import pytest

from launch import exits
from launch.jobs.attempts import Attempts
from launch.jobs.job import in_words
from launch.watching.records import read_records

ROOT = Path(__file__).parent.parent.parent
TIMED = {"tokens_per_second", "memory_bytes", "flops_per_second", "mfu", "seconds"}
LONGER = ["training.steps=64", "relora.every=20", "evaluation.every=30", "checkpoint.every=20"]
HOSTILE = 'it\'s $(touch broken) `touch broken` "quoted"; touch broken & $HOME #'
SECONDS = 150

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def cluster():
    spec = importlib.util.spec_from_file_location("slurm_cluster", ROOT / "tests/slurm_cluster.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        made = module.Cluster(3)
    except module.Unavailable as reason:
        pytest.skip(str(reason))
    yield made
    made.close()


class Job:
    """A run that was submitted."""

    def __init__(self, cluster, folder, words, *launcher):
        self.cluster, self.run = cluster, folder / "run"
        own = ["launcher=slurm", "launcher.nodes=2", "launcher.signal_seconds=60", *launcher]
        own += [f"launcher.environment={{PYTHONPATH: {ROOT}, OMP_NUM_THREADS: '1', DS_ACCELERATOR: cpu}}"]
        own += ["parallel.silence_seconds=5", "parallel.timeout_seconds=60", "evaluation.spectra=none"]
        words = [*words, f"run.dir={in_words(str(self.run))}"]
        command = [sys.executable, "-m", "launch.submit", *own, *words]
        self.submitted = cluster.run(*command, cwd=folder, PYTHONPATH=str(ROOT))
        found = re.search(r"^job (\d+):", self.submitted.stdout)
        self.number = found[1] if found else None

    @property
    def attempts(self):
        return Attempts(self.run).read()

    @property
    def log(self):
        return (self.run / f"job/slurm-{self.number}.log").read_text(errors="replace")

    def state(self):
        return self.cluster.ask("squeue", "-h", "-t", "all", "-j", self.number, "-o", "%T")

    def wait_for_step(self, step):
        limit = time.monotonic() + SECONDS
        path = self.run / "metrics.jsonl"
        while not path.exists() or path.read_bytes().count(b'"loss"') < step:
            assert time.monotonic() < limit, self.tell()
            assert self.state() in ("PENDING", "CONFIGURING", "RUNNING"), self.tell()
            time.sleep(0.2)

    def wait(self):
        """Until the job is done; what SLURM puts off for two minutes is done at once."""
        limit = time.monotonic() + SECONDS
        while (state := self.state()) != "COMPLETED":
            assert time.monotonic() < limit, self.tell()
            assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"), self.tell()
            if state == "PENDING":
                self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now")
            time.sleep(0.5)

    def tell(self):
        """All that is known of the job."""
        logs = [f"== {path}\n{path.read_text(errors='replace')}" for path in self.run.glob("job/**/*.log")]
        shown = self.cluster.run("scontrol", "show", "job", str(self.number)).stdout
        return "\n".join([self.submitted.stdout, self.submitted.stderr, shown, str(self.attempts), *logs])

    def records(self):
        kept = [r for r in read_records(self.run / "metrics.jsonl") if r.get("event") not in ("resume", "checkpoint")]
        return [{key: value for key, value in record.items() if key not in TIMED} for record in kept]


@pytest.fixture
def words(tiny):
    return [word for word in tiny if not word.startswith("run.dir=")] + LONGER


@pytest.fixture(scope="module")
def undisturbed():
    """The records of the first run, for those that are disturbed."""
    return []


def test_two_nodes_finish_a_run_whose_folder_has_a_hostile_name(cluster, words, tmp_path, undisturbed):
    folder = tmp_path / HOSTILE
    folder.mkdir()
    job = Job(cluster, folder, [*words, f"run.name={in_words(HOSTILE)}"])
    job.wait()
    undisturbed += job.records()
    assert "status: done" in job.log
    assert "2 data x 1 tensor" in job.log
    assert [(one.nodes, one.code) for one in job.attempts] == [("n[1-2]", exits.DONE)]
    assert (job.run / "job/attempt_001/rank_00001.n2.log").is_file()
    assert not list(tmp_path.rglob("broken"))
    assert not (cluster.folder / "broken").exists()


def test_a_run_that_is_told_to_stop_waits_in_the_queue_again_and_ends_as_if_undisturbed(
    cluster, words, tmp_path, undisturbed
):
    job = Job(cluster, tmp_path, [*words, "tracker=wandb", "tracker.mode=offline"], "launcher.start=srun")
    job.wait_for_step(10)
    cluster.ask("scancel", "--signal=USR1", "--batch", job.number)  # as SLURM does before the time limit
    job.wait()
    first, second = job.attempts
    assert (first.code, first.reason) == (exits.PREEMPTED, "stopped by SIGUSR1")
    assert 10 <= first.reached == second.step < 64
    assert second.code == exits.DONE
    assert job.records() == undisturbed
    names = [path.name.rpartition("-")[2] for path in job.run.glob("wandb/offline-run-*")]
    assert len(names) == 2
    assert len(set(names)) == 1, "one run in W&B"


def test_a_run_that_gives_way_to_an_urgent_job_comes_back_after_it(cluster, words, tmp_path, undisturbed):
    job = Job(cluster, tmp_path, words)
    job.wait_for_step(10)
    cluster.ask("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    job.wait()
    first, second = job.attempts
    assert first.code == exits.PREEMPTED
    assert first.reached == second.step >= 10
    assert job.records() == undisturbed


def test_a_node_that_is_lost_is_left_out_and_the_run_ends_as_if_undisturbed(cluster, words, tmp_path, undisturbed):
    job = Job(cluster, tmp_path, words)
    job.wait_for_step(25)
    cluster.power_off(2)
    job.wait()
    cluster.power_on(2)
    first, second = job.attempts
    assert first.host == "n2", job.tell()
    assert (second.nodes, second.code) == ("n[1,3]", exits.DONE)
    assert second.step >= 20
    assert job.records() == undisturbed


def test_pmix_starts_mpi_for_heads_that_sync_through_it(cluster, words, tmp_path):
    heads = ["lte=heads", "lte.sync_every=4", "lte.transport=mpi", "training.steps=8"]
    heads += ["evaluation.every=0", "checkpoint.every=0"]
    words = [word for word in words if not word.startswith(("relora", "schedule.restart"))]
    job = Job(cluster, tmp_path, [*words, *heads], "launcher.start=pmix")
    assert job.number is not None, job.tell()
    job.wait()
    assert "2 heads x 1 data x 1 tensor" in job.log
    assert sum(record.get("event") == "sync" for record in job.records()) == 2


def test_the_plain_script_trains(cluster, tiny, tmp_path):
    options = ["--gpus-per-node=0", "--cpus-per-task=1", f"--output={tmp_path}/log", f"--chdir={tmp_path}", "--wait"]
    options += [f"--export=PATH={Path(sys.executable).parent}:/usr/bin:/bin,PYTHONPATH={ROOT}"]
    script = str(ROOT / "launch/slurm/train.sbatch")
    done = cluster.run("sbatch", *options, script, *tiny, "evaluation.spectra=none", seconds=SECONDS)
    assert done.returncode == 0, (tmp_path / "log").read_text()
    assert "status: done" in (tmp_path / "log").read_text()


def test_a_sweep_is_a_job_array_with_a_table_of_results(cluster, tiny, tmp_path):
    words = [word for word in tiny if not word.startswith("run.dir=")]
    job = Job(cluster, tmp_path, ["--multirun", "optimizer.lr=0.01,0.001", *words], "launcher.nodes=1")
    limit = time.monotonic() + SECONDS
    while set(states := job.state().split()) != {"COMPLETED"} or len(states) < 2:
        assert time.monotonic() < limit, job.tell()
        time.sleep(0.5)
    told = cluster.run(sys.executable, "-m", "launch.status", str(job.run), PYTHONPATH=str(ROOT)).stdout
    assert re.search(r"000 +optimizer.lr=0.01 +done", told), told
    assert re.search(r"001 +optimizer.lr=0.001 +done", told), told


STOP_ONCE = """cd "$1"; if [ "$SLURM_ARRAY_TASK_ID" = 0 ] || [ -e again ]; then exit 0; fi; touch again
echo '{"code": 75, "reason": "stopped"}' > "$ACCRETE_ATTEMPT/outcome.json"; exit 1"""


def test_of_an_array_only_the_task_that_was_stopped_runs_again(cluster, tmp_path):
    (tmp_path / "stop.sh").write_text(STOP_ONCE)
    for task in ("0", "1"):
        (tmp_path / task).mkdir()
    run = f"{tmp_path}/$SLURM_ARRAY_TASK_ID"
    line = f"{sys.executable} -m launch.jobs.supervise --run-dir {run} --requeue -- bash {tmp_path}/stop.sh {run}"
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\nexport PYTHONPATH={ROOT}\nexec {line}\n")
    number = cluster.ask("sbatch", "--parsable", "--array=0-1", "--output=/dev/null", str(tmp_path / "job.sh"))
    limit = time.monotonic() + 100
    while [one.code for one in Attempts(tmp_path / "1").read()] != [exits.PREEMPTED, exits.DONE]:
        assert time.monotonic() < limit, cluster.ask("scontrol", "show", "job", number)
        cluster.run("scontrol", "update", f"JobId={number}_1", "StartTime=now")
        time.sleep(0.5)
    assert [one.code for one in Attempts(tmp_path / "0").read()] == [exits.DONE]


def test_what_slurm_would_never_start_is_refused_with_its_words(cluster, words, tmp_path):
    job = Job(cluster, tmp_path, words, "launcher.nodes=4")
    assert job.submitted.returncode == exits.REFUSED
    assert "SLURM refuses the job" in job.submitted.stderr


def supervised(cluster, folder, command, *options):
    """A job that supervises no training but a command; its number, once it has begun."""
    script = folder / "job.sh"
    line = f"{sys.executable} -m launch.jobs.supervise --run-dir {folder} --requeue -- {command}"
    script.write_text(f"#!/bin/bash\nexport PYTHONPATH={ROOT}\nexec {line}\n")
    number = cluster.ask("sbatch", "--parsable", *options, str(script))
    limit = time.monotonic() + 60
    while not (folder / "job/attempt_001").exists():
        assert time.monotonic() < limit
        time.sleep(0.1)
    return number


BLAME = """if [ -e again ]; then exit 0; fi; touch again; sleep 3
echo '{"code": 1, "reason": "silent", "host": "n2"}' > "$ACCRETE_ATTEMPT/outcome.json"; exit 1"""


def test_a_node_that_takes_no_work_is_left_out_before_slurm_knows_of_it(cluster, tmp_path):
    (tmp_path / "blame.sh").write_text(BLAME)
    number = supervised(cluster, tmp_path, "bash blame.sh", "--nodes=2", f"--chdir={tmp_path}", "--nodelist=n1,n2")
    cluster.power_off(2)
    limit = time.monotonic() + SECONDS
    while "ExcNodeList=n2" not in cluster.ask("scontrol", "show", "job", number):
        assert time.monotonic() < limit, cluster.ask("scontrol", "show", "job", number)
        time.sleep(0.2)
    cluster.ask("scancel", number)
    cluster.power_on(2)


def test_a_cancelled_job_stays_cancelled(cluster, tmp_path):
    number = supervised(cluster, tmp_path, "srun sleep 100", f"--output={tmp_path}/log")
    limit = time.monotonic() + 30
    cluster.ask("scancel", number)
    while Attempts(tmp_path).read()[0].ended is None:
        assert time.monotonic() < limit
        time.sleep(0.1)
    time.sleep(1)
    assert cluster.ask("squeue", "-h", "-t", "all", "-j", number, "-o", "%T") == "CANCELLED"
    assert len(Attempts(tmp_path).read()) == 1
