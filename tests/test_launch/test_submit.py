"""Starting and starting again: what is printed, what is quoted, what is refused, and what follows an attempt's end."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from launch import exits, status, submit, train
from launch.config import CONF, load
from launch.jobs.attempt import VARIABLE, Outcome, StopFile, beating, keep_own_log, note, outcome_in
from launch.jobs.attempts import Attempt, Attempts, Next, decide, newest_step
from launch.jobs.job import in_words
from launch.jobs.launcher import LAUNCHERS, load_launcher
from launch.jobs.leftovers import processes_of
from launch.jobs.network import RESTARTABLE
from launch.jobs.supervise import SlurmJob, Supervisor
from launch.training.run_folder import locked
from launch.usage import field_docs
from launch.watching.records import read_records
from parallel.pulse import Pulse, gets_on
from relora.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests/golden/submit.sh"
NAME = 'it\'s $(touch broken) `touch broken`; "x" & $HOME #'
TIMED = {"tokens_per_second", "memory_bytes", "flops_per_second", "mfu", "seconds"}


def printed(words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert submit.main([*words, "--dry-run"]) == exits.DONE
    shown = capsys.readouterr().out
    return shown.replace(str(tmp_path), "/home/me").replace(sys.executable, "/env/bin/python")


SLURM = [
    "launcher=slurm",
    "launcher.nodes=4",
    "launcher.least_nodes=2",
    "launcher.gpus_per_node=8",
    "launcher.cpus_per_node=96",
    "launcher.memory=400G",
    "launcher.partition=gpu",
    "launcher.account=lab",
    "launcher.time=12:00:00",
    "launcher.constraint='a100&ib'",
    "launcher.sbatch=['--mail-type=END']",
    "launcher.modules=[cuda/12.4]",
    "launcher.setup=['source /shared/site.sh']",
    "launcher.interface=ib0",
    "launcher.infiniband=mlx5_0",
    "launcher.container_image=/shared/accrete.sqsh",
    "launcher.container_mounts=['/shared:/shared']",
    "launcher.environment={WORDS: 'one $two'}",
    "training.global_batch_size=480",
    "run.dir=runs/mine",
]


def test_a_dry_run_prints_the_golden_job_script(capsys, monkeypatch, tmp_path):
    script = printed([*SLURM, f"run.name={in_words(NAME)}"], capsys, monkeypatch, tmp_path)
    if os.environ.get("ACCRETE_RECORD"):
        GOLDEN.write_text(script, encoding="utf-8")
    assert script == GOLDEN.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_the_shell_gives_the_processes_the_words_as_they_were(capsys, monkeypatch, tmp_path):
    words = [f"run.name={in_words(NAME)}", "run.dir=runs/one two", "launcher=slurm", "launcher.start=srun"]
    monkeypatch.chdir(tmp_path)
    assert submit.main([*words, "--dry-run"]) == exits.DONE
    script = capsys.readouterr().out.replace(f"exec {sys.executable} -m launch.jobs.supervise", "exec printf '%s\\0'")
    environment = {**os.environ, "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.split("\0")[-3:-1] == words[:2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("launcher", ["local", "torchrun", "mpi"])
def test_a_dry_run_on_this_machine_prints_a_command_that_a_shell_takes(launcher, capsys, monkeypatch, tmp_path):
    many = [] if launcher == "local" else ["launcher.processes=2"]
    words = [f"launcher={launcher}", *many, "launcher.environment={A: 'b c'}", f"run.name={in_words(NAME)}"]
    line = printed(words, capsys, monkeypatch, tmp_path)
    assert line.startswith("A='b c' ")
    after = line.removeprefix("A='b c' ")
    told = subprocess.run(["bash", "-c", f"printf '%s\\0' {after}"], capture_output=True, text=True, check=True).stdout
    *command, name, folder, _ = told.split("\0")
    assert command[-2:] == ["-m", "launch.train"]
    assert load([name, folder]).run.name == NAME
    assert NAME in load([name, folder]).run.dir


def test_any_text_can_be_the_value_of_an_override():
    dice = random.Random(0)
    texts = ["".join(dice.choices("a '\"\\$(){}[],:=~%#\n", k=dice.randrange(1, 12))) for _ in range(150)]
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    for text in [*texts, "\\", "\\'", "'\\", "${x}", "\\${x}", "a\\\\"]:
        override = OverridesParser.create().parse_override(f"k={in_words(text)}")
        assert OmegaConf.create({"k": override.value()}).k == text, text


def test_every_launcher_composes_and_every_key_has_a_meaning():
    assert {path.stem for path in (CONF / "launcher").glob("*.yaml")} == set(LAUNCHERS)
    for name, owner in LAUNCHERS.items():
        config = load_launcher([f"launcher={name}"])
        assert config == owner(), "conf/ and the dataclass have the same defaults"
        assert set(field_docs(owner)) == set(owner.__dataclass_fields__)


SWEEP = ["--multirun", "lora.rank=8,4", "optimizer.lr=choice(0.1,0.01)", "run.dir=runs/a b"]


def test_a_sweep_is_every_combination_and_a_job_array_picks_its_words(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [*SWEEP, "launcher=slurm", "launcher.start=srun", "launcher.concurrent=2", "--dry-run"]
    assert submit.main(words) == exits.DONE
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-3%2\n" in script
    assert "#SBATCH --output=slurm-%A_%a.log\n" in script
    assert [told_by(script, task)[1] for task in range(4)] == [str(tmp_path / f"runs/a b/{n:03d}") for n in range(4)]
    assert [told_by(script, task)[-3:] for task in range(4)] == [
        [f"lora.rank={rank}", f"optimizer.lr={lr}", f"run.dir='runs/a b/{task:03d}'"]
        for task, (rank, lr) in enumerate([(8, 0.1), (8, 0.01), (4, 0.1), (4, 0.01)])
    ]


def told_by(script, task):
    """What a job of an array hands to its supervisor and, at the end, to the run."""
    script = script.replace(f"exec {sys.executable} -m launch.jobs.supervise", "exec printf '%s\\0'")
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_NUM_NODES": "1"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


HEADS = ["lte=elastic", "lte.heads=3", "training.global_batch_size=6", "evaluation.every=0", "checkpoint.every=0"]


def test_elastic_heads_are_an_array_beside_a_small_job_where_they_meet(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [*HEADS, "run.dir=runs/a b", "run.name=ours", "tracker=wandb", "launcher=slurm", "launcher.start=srun"]
    own = ["launcher.gpus_per_node=2", "launcher.partition=gpu", "launcher.meeting=['--partition=cpu']"]
    assert submit.main([*words, *own, "--dry-run"]) == exits.DONE
    assert list(tmp_path.iterdir()) == []
    meeting, script = capsys.readouterr().out.split(f"# {tmp_path}/runs/a b/job/job.sh\n")
    asked = re.findall(r"#SBATCH --(?:partition|gpus|array|job-name).*", meeting)
    assert asked == ["#SBATCH --job-name=ours_meeting", "#SBATCH --partition=cpu"]
    assert f"-m launch.meet --folder '{tmp_path}/runs/a b/meeting' --port 0" in meeting
    subprocess.run(["bash", "-n", "-c", meeting], check=True)
    assert "#SBATCH --array=0-2\n" in script
    for task in range(3):
        told = told_by(script, task)
        assert told[1] == f"{tmp_path}/runs/a b/heads/00{task}"
        assert told[4:7] == ["--requeue", "--requeue-after", f"{tmp_path}/runs/a b/job/meeting_id"]
        assert told[-4:] == [
            f"lte.meeting='{tmp_path}/runs/a b/meeting'",
            "tracker.group='ours'",
            f"run.name='ours-00{task}'",
            f"run.dir='runs/a b/heads/00{task}'",
        ]


def test_a_head_that_is_told_where_to_meet_is_a_job_of_its_own(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert submit.main([*HEADS, "lte.meeting=/shared/meeting", "launcher=slurm", "--dry-run"]) == exits.DONE
    assert "--array" not in capsys.readouterr().out


def test_a_stream_can_be_a_chain_of_jobs_each_to_the_end_of_its_task(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["experiment=digits_sequential", "run.dir=chain", "launcher=slurm", "launcher.start=srun"]
    assert submit.main([*words, "launcher.chain=true", "--dry-run"]) == exits.DONE
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-3%1\n" in script
    folders = [told_by(script, task)[1] for task in range(4)]
    assert folders == [str(tmp_path / "chain")] * 4
    assert told_by(script, 0)[4:6] == ["--requeue", "--stop-is-done"]
    names = ["digits_0_to_3", "digits_4_5", "digits_6_7"]
    assert [told_by(script, task)[-2] for task in range(3)] == [f"continual.stop_after='{name}'" for name in names]
    assert told_by(script, 3)[-2:] == [words[0], "run.dir='chain'"]


def test_a_sweep_here_trains_one_run_after_the_other_and_ends_with_a_table(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Supervisor, "work", lambda supervisor: train.main(supervisor._command[3:]))
    words = [*tiny, "--multirun", "optimizer.lr=0.01,0.0001", "run.save_start=false"]
    assert submit.main(words) == exits.DONE
    capsys.readouterr()
    assert status.main([str(tmp_path / "run")]) == exits.DONE
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("00")]
    assert [row[:3] for row in rows] == [["000", "optimizer.lr=0.01", "done"], ["001", "optimizer.lr=0.0001", "done"]]
    loss = json.loads((tmp_path / "run/000/summary.json").read_text())["val_loss"]
    assert f"{loss:.6g}" in rows[0], "the best is first"
    assert submit.main([*words[:-1], "run.save_start=true"]) == exits.REFUSED
    assert "holds another sweep" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (["--multirun", "launcher=slurm"], "--multirun needs a list of values"),
    (["--multirun", "run.dir=a,b"], "run.dir must have one value in a sweep"),
    (["--multirun", "lora.rank=4,0"], "lora.rank must be at least 1, got 0"),
    (["launcher=slurm", "launcher.concurrent=2"], "launcher.concurrent has no effect on a single run"),
    (["launcher=slurm", "launcher.nods=2"], "unknown key launcher.nods: did you mean launcher.nodes"),
    (["launcher=pbs"], "launcher=pbs is not an option: choose one of local, mpi, slurm, torchrun"),
    (["launcher=slurm", "launcher.partition='a b'"], "launcher.partition must have no spaces"),
    (["launcher=slurm", "launcher.partition='a\\\\\\nb'"], "control characters"),
    (["launcher=slurm", "launcher.time=tomorrow"], "launcher.time must look like"),
    (["launcher=slurm", "launcher.sbatch=[-x]"], "launcher.sbatch: '-x' must be --name"),
    (["launcher=slurm", "launcher.sbatch=['--output=x']"], "--output is set by `accrete submit` itself"),
    (["launcher=slurm", "launcher.nodes=3"], "training.global_batch_size must be a multiple of the 3 processes"),
    (["launcher=slurm", "launcher.least_nodes=1"], "launcher.least_nodes=1 must be below launcher.nodes=1"),
    (["launcher=slurm", "launcher.start=pmix"], "launcher.start=pmix does not go with a run without lte.transport=mpi"),
    (["launcher=slurm", "launcher.container_mounts=['/a:/b']"], "launcher.container_mounts has no effect without"),
    (["launcher=slurm", "run.dir='50%'"], "mean something to SLURM"),
    (["launcher.environment={A-B: c}"], "launcher.environment: 'A-B' cannot name a variable"),
    (["launcher=slurm", "launcher.chain=true"], "launcher.chain=true needs a stream of tasks"),
    (["launcher=slurm", "launcher.chain=true", "experiment=digits_sequential", "continual.stop_after=digits_4_5"],
     "continual.stop_after=digits_4_5 cannot be with launcher.chain=true"),
    (["launcher=slurm", "launcher.chain=true", "experiment=digits_sequential", "continual.method=joint",
      "continual.logits=seen"],
     "launcher.chain=true has no effect with continual.method=joint"),
    (["launcher=slurm", "launcher.chain=true", "experiment=digits_sequential", "launcher.concurrent=2"],
     "launcher.concurrent has no effect on a single run"),
    (["launcher=slurm", "launcher.meeting=['--time=9']"], "launcher.meeting=['--time=9'] has no effect without"),
    (["launcher=slurm", "launcher.meeting=['--array=1']", *HEADS], "--array is set by `accrete submit` itself"),
    (["launcher=slurm", "launcher.concurrent=1", *HEADS], "fewer heads run at once than a sync needs: at least lte.qu"),
    (["launcher=slurm", "--multirun", "optimizer.lr=1,2", *HEADS], "--multirun cannot be with elastic heads"),
    (["launcher=slurm", "training.steps=-1"], "training.steps must not be negative"),
    (["launcher=torchrun", "launcher.processes=0"], "launcher.processes must be at least 1"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_what_would_fail_in_the_job_is_refused_before(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("\\n", "\n") for word in words]
    assert submit.main(words) == exits.REFUSED
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_slurm_a_job_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert submit.main(["launcher=slurm"]) == exits.REFUSED
    assert "launcher=slurm needs sbatch" in capsys.readouterr().err


def ended(step, reached, host=None, diverged=None):
    own = {"host": host, "diverged": diverged}
    return Attempt(number=1, job="7", began=0.0, step=step, ended=1.0, reached=reached, code=1, **own)


@pytest.mark.parametrize(("history", "outcome", "asked", "follows"), [
    ([ended(0, 9)], Outcome(code=exits.DONE), False, (Next.end, exits.DONE, ())),
    ([ended(0, 9)], Outcome(code=exits.DONE), True, (Next.end, exits.DONE, ())),
    ([ended(0, 0)], Outcome(code=exits.REFUSED), False, (Next.end, exits.REFUSED, ())),
    ([ended(0, 9)], Outcome(code=exits.PREEMPTED, again=False), False, (Next.end, exits.PREEMPTED, ())),
    ([ended(0, 9)], Outcome(code=exits.PREEMPTED), False, (Next.elsewhere, exits.PREEMPTED, ())),
    ([ended(0, 9)], Outcome(code=1), True, (Next.elsewhere, exits.PREEMPTED, ())),
    ([ended(0, 9)], Outcome(code=1), False, (Next.again, 1, ())),
    ([ended(0, 0)] * 2, Outcome(code=1), False, (Next.again, 1, ())),
    ([ended(0, 0)] * 3, Outcome(code=1), False, (Next.end, 1, ())),
    ([ended(0, 0)] * 3, Outcome(code=exits.PREEMPTED), True, (Next.end, 1, ())),
    ([ended(0, 0), ended(0, 0), ended(0, 5), ended(5, 5)], Outcome(code=1), False, (Next.again, 1, ())),
    ([ended(0, 9, "dead")], Outcome(code=1, host="dead"), False, (Next.elsewhere, exits.PREEMPTED, ("dead",))),
    ([ended(0, 9, "n1")], Outcome(code=1, host="n1"), False, (Next.again, 1, ())),
    ([ended(0, 9, "n1"), ended(9, 12, "n1")], Outcome(code=1, host="n1"), False,
     (Next.elsewhere, exits.PREEMPTED, ("n1",))),
    ([ended(0, 9, "n1", 12)], Outcome(code=1, host="n1", diverged=12), False,
     (Next.elsewhere, exits.PREEMPTED, ("n1",))),
    ([ended(0, 9, None, 12)], Outcome(code=1, diverged=12), False, (Next.again, 1, ())),
    ([ended(0, 9, "n1", 12), ended(9, 9, "n2", 13)], Outcome(code=1, host="n2", diverged=13), False,
     (Next.end, 1, ())),
    ([ended(0, 9, "n1", 12), ended(9, 15)], Outcome(code=1), False, (Next.again, 1, ())),
    ([ended(0, 9, "n1", 12), ended(9, 30, "n2", 33)], Outcome(code=1, host="n2", diverged=33), False,
     (Next.elsewhere, exits.PREEMPTED, ("n2",))),
])  # fmt: skip
def test_what_follows_an_attempt(history, outcome, asked, follows):
    decision = decide(history, outcome, limit=3, asked=asked, alive=lambda host: host != "dead")
    assert (decision.next, decision.code, decision.exclude) == follows


def test_without_a_scheduler_no_machine_is_left_out():
    history = [ended(0, 9, "n1"), ended(9, 12, "n1")]
    assert decide(history, Outcome(code=1, host="n1"), limit=3, asked=False, alive=None).next is Next.again


def attempt_that(tmp_path, script, limit=3):
    return Supervisor(tmp_path, ["bash", "-c", script], limit=limit, job=None)


def test_a_run_that_makes_no_progress_is_given_up(tmp_path, capfd):
    assert attempt_that(tmp_path, "exit 9").work() == exits.FAILED
    assert len(Attempts(tmp_path).read()) == 3
    assert "3 attempts in a row brought the run no further than step 0" in capfd.readouterr().out
    assert attempt_that(tmp_path, "exit 0").work() == exits.DONE, "started by the user again, it counts anew"


def test_attempts_go_on_while_there_is_progress(tmp_path):
    script = 'n=$(ls checkpoints 2>/dev/null | wc -l); mkdir -p checkpoints/step_0000000$((n + 1)); [ "$n" -ge 6 ]'
    assert attempt_that(tmp_path, f"cd {tmp_path}; {script}").work() == exits.DONE
    assert [(one.step, one.reached) for one in Attempts(tmp_path).read()] == [(n, n + 1) for n in range(7)]


def test_an_attempt_that_ended_without_a_word_counts_until_there_is_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for _ in range(3):
        Attempts(tmp_path).begin(nodes="", job="7")
    with (tmp_path / "job/attempts.jsonl").open("a") as file:
        file.write('{"number": 4, "beg')
    assert attempt_that(tmp_path, "exit 0").work() == exits.FAILED, "not even tried"
    (tmp_path / "checkpoints/step_00000005").mkdir(parents=True)
    assert attempt_that(tmp_path, "exit 0").work() == exits.DONE


def test_a_signal_becomes_a_file_that_the_run_sees(tmp_path):
    script = 'while [ ! -e "$ACCRETE_ATTEMPT/stop" ]; do sleep 0.05; done\n'
    script += 'echo \'{"code": 75}\' > "$ACCRETE_ATTEMPT/outcome.json"; exit 1'
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    assert attempt_that(tmp_path, script).work() == exits.PREEMPTED
    assert Attempts(tmp_path).read()[0].reason == "stopped by SIGUSR1"


def test_a_launcher_that_lingers_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.jobs.supervise._LINGER_SECONDS", 0.3)
    began = time.monotonic()
    assert attempt_that(tmp_path, 'echo \'{"code": 0}\' > "$ACCRETE_ATTEMPT/outcome.json"; sleep 60').work() == 0
    assert time.monotonic() - began < 20


def test_a_launcher_that_restarts_processes_is_let_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.jobs.supervise._LINGER_SECONDS", 0.3)
    script = 'echo \'{"code": 1}\' > "$ACCRETE_ATTEMPT/outcome.json"; sleep 1.5; rm "$ACCRETE_ATTEMPT/outcome.json"'
    supervisor = Supervisor(tmp_path, ["bash", "-c", script], limit=1, job=None, restarts=True)
    assert supervisor.work() == exits.DONE


def test_a_divergence_that_comes_again_is_given_up_with_its_reason(tmp_path, capfd):
    script = 'echo \'{"code": 1, "reason": "loss is nan", "diverged": 7}\' > "$ACCRETE_ATTEMPT/outcome.json"; exit 1'
    assert attempt_that(tmp_path, script, limit=9).work() == exits.FAILED
    assert len(Attempts(tmp_path).read()) == 2
    assert "diverged again near step 7, so that no machine is the reason; loss is nan" in capfd.readouterr().out


@pytest.mark.parametrize("beats", [True, False])
def test_an_attempt_whose_first_process_gives_no_sign_of_life_is_ended(tmp_path, capfd, beats):
    seconds = "0.2" if beats else "60"
    script = f'for i in $(seq 20); do touch "$ACCRETE_ATTEMPT/heartbeat"; sleep {seconds}; done'
    supervisor = Supervisor(tmp_path, ["bash", "-c", script], limit=1, job=None, hang=2.0)
    assert supervisor.work() == (exits.DONE if beats else exits.FAILED)
    assert ("no sign of life for 2 s" in capfd.readouterr().out) is not beats


def test_an_attempt_that_never_begins_is_ended_after_a_longer_time(tmp_path, capfd):
    """As when SLURM has the launcher wait for a step that is never cleaned up."""
    began = time.monotonic()
    assert Supervisor(tmp_path, ["sleep", "60"], limit=1, job=None, hang=0.3).work() == exits.FAILED
    assert 6 * 0.3 < time.monotonic() - began < 30
    assert "no sign of life for 1.8 s" in capfd.readouterr().out


def test_a_heart_beats_only_while_its_process_gets_on(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr("launch.jobs.attempt._BEAT_SECONDS", 0.01)
    pulse, heart = Pulse(), tmp_path / "heartbeat"

    def beats():
        heart.unlink(missing_ok=True)
        time.sleep(0.1)
        return heart.exists()

    with beating(os.environ, lambda: gets_on(pulse, 0.2)):
        assert beats()
        with pulse.step():
            time.sleep(0.3)
            assert not beats()
        time.sleep(0.1)
        assert beats()
    assert not (beats() and beats())
    assert capfd.readouterr().err.count("warning: a step has taken") == 1


def test_a_launcher_does_not_outlive_its_supervisor(tmp_path):
    words = ["--run-dir", str(tmp_path), "--", "bash", "-c", f"echo $$ > {tmp_path}/launcher; exec sleep 62"]
    supervisor = subprocess.Popen([sys.executable, "-m", "launch.jobs.supervise", *words], cwd=ROOT)
    limit = time.monotonic() + 20
    while not (tmp_path / "launcher").exists() or not processes_of(tmp_path / "job"):
        assert time.monotonic() < limit
        time.sleep(0.02)
    supervisor.kill()
    supervisor.wait()
    while processes_of(tmp_path / "job"):
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_what_a_launcher_leaves_behind_is_killed_even_if_it_is_stopped(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("launch.jobs.leftovers._GRACE_SECONDS", 0.2)
    script = "setsid sleep 61 & kill -STOP $!; exit 0"
    assert attempt_that(tmp_path, script).work() == exits.DONE
    assert processes_of(tmp_path / "job") == {}
    assert "killed 1 processes that the launcher has left behind" in capfd.readouterr().out


def test_a_supervised_run_waits_for_the_folder_that_an_earlier_attempt_still_holds(tmp_path):
    (tmp_path / "job").mkdir()
    with ExitStack() as held:
        held.enter_context(locked(tmp_path))
        with pytest.raises(ConfigError, match="in use by another process"), locked(tmp_path):
            pass
        threading.Timer(0.5, held.close).start()
        with locked(tmp_path, seconds=20):
            pass


def test_the_last_outcome_counts_and_other_ranks_have_their_own_logs(tmp_path, monkeypatch):
    note(Outcome(code=1))  # without a supervisor nothing happens
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    note(Outcome(code=1))
    note(Outcome(code=exits.PREEMPTED, reason="x", again=False))
    assert outcome_in(tmp_path) == Outcome(code=exits.PREEMPTED, reason="x", again=False)
    keep_own_log(os.environ, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.json"]
    told = "import os; from launch.jobs.attempt import keep_own_log; keep_own_log(os.environ, 3); os.system('echo x')"
    subprocess.run([sys.executable, "-c", told], cwd=ROOT, check=True)
    assert next(tmp_path.glob("rank_00003.*.log")).read_text() == "x\n"
    stop = StopFile(os.environ)
    assert not stop.asks()


def ranks(folder):
    """Process ids of a run's training processes by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = dict(pair.split("=", 1) for pair in path.read_text(errors="replace").split("\0") if "=" in pair)
            command = path.with_name("cmdline").read_text()
        except OSError:
            continue
        if variables.get(VARIABLE, "").startswith(str(folder)) and "\0launch.train\0" in command:
            rank = variables.get("RANK", variables.get("OMPI_COMM_WORLD_RANK"))
            if rank is not None and "torch.distributed.run" not in command:
                found[int(rank)] = int(path.parent.name)
    return found


def trained(runtime, words):
    """A run by processes that are there already."""
    return train.run_command(load(words))


def records(folder):
    kept = [r for r in read_records(folder / "metrics.jsonl") if r.get("event") not in ("resume", "checkpoint")]
    return [{k: v for k, v in record.items() if k not in TIMED} for record in kept]


def with_a_killed_process(words, folder, *, after):
    """Submit a run of two processes, one of which is killed once there is a checkpoint after so many steps."""

    def kill():
        limit = time.monotonic() + 200
        while not (newest_step(folder) >= after and 1 in ranks(folder)) and time.monotonic() < limit:
            time.sleep(0.02)
        os.kill(ranks(folder)[1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    code = submit.main([*words, "launcher.processes=2", f"run.dir={folder}"])
    killer.join()
    return code


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_process_costs_a_torchrun_restart_or_an_attempt_and_changes_nothing(
    tiny_words, tmp_path, monkeypatch, on_processes
):
    words = [*tiny_words, "training.steps=40", "run.save_start=false", "run.save_final=false"]
    on_processes(trained, 2, [*words, f"run.dir={tmp_path / 'whole'}"], seconds=200)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    monkeypatch.setenv("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
    monkeypatch.setenv(*RESTARTABLE)  # submit sets it in this process, too
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # of other tests' runs in this process

    torchrun, mpi = tmp_path / "torchrun", tmp_path / "mpi"
    restarts = ["launcher=torchrun", "launcher.max_restarts=1"]
    assert with_a_killed_process([*words, *restarts], torchrun, after=4) == exits.DONE
    assert with_a_killed_process([*words, "launcher=mpi"], mpi, after=0) == exits.DONE
    assert [len(Attempts(folder).read()) for folder in (torchrun, mpi)] == [1, 2]
    assert records(torchrun) == records(mpi) == records(tmp_path / "whole")
    assert newest_step(mpi) == 40
    assert json.loads((mpi / "summary.json").read_text())["status"] == "done"


def test_the_plain_scripts_are_shell():
    for path in ("launch/torchrun.sh", "launch/mpirun.sh", "launch/slurm/train.sbatch", "tests/golden/submit.sh"):
        subprocess.run(["bash", "-n", str(ROOT / path)], check=True)


def test_a_value_that_could_not_be_read_back_is_refused():
    with pytest.raises(ConfigError, match=r"run\.name must not hold"):
        load([f"run.name={in_words('${x}')}"])


SCRIPT = "#!/bin/bash\n#SBATCH --nodes=2-4\n"


@pytest.mark.parametrize(
    ("impossible", "dead", "left_out"),
    [
        ([], [], ["n1", "n2"]),
        (["n1,n2"], ["n2"], ["n2"]),
        (["n1,n2", "n2"], ["n2"], []),
        (["n1,n2"], [], []),
    ],
)
def test_no_more_machines_are_left_out_than_the_job_can_spare(monkeypatch, impossible, dead, left_out):
    asked = []

    def answer(command, *_, given=""):
        asked.append(command)
        told = next((word.partition("=")[2] for word in command if word.startswith("--exclude=")), None)
        host = next((word.partition("=")[2] for word in command if word.startswith("--nodelist=")), None)
        if command == ["scontrol", "write", "batch_script", "7", "-"]:
            return subprocess.CompletedProcess(command, 0, SCRIPT, "")
        assert told is None or given == SCRIPT
        bad = told in impossible or host in dead
        error = "allocation failure: Requested node configuration is not available" if told in impossible else ""
        return subprocess.CompletedProcess(command, int(bad), "", error)

    monkeypatch.setattr("launch.jobs.supervise._asked", answer)
    assert SlurmJob("7").requeue(["n1", "n2"])
    assert asked[1] == ["sbatch", "--test-only", "--exclude=n1,n2"]
    updates = [command[3] for command in asked if command[:2] == ["scontrol", "update"]]
    assert updates == ([f"ExcNodeList={','.join(left_out)}"] if left_out else [])
