import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import doctor
from launch.cli import main as cli
from launch.doctor import _of_all
from launch.examination import LEAST, Examination, Finding, check_folder, check_versions
from parallel.bandwidth import SIZES, groups_to_measure

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_doctor_shows_this_machine_and_that_training_can_run(runtime, tmp_path, capsys):
    assert cli(["doctor", "--dir", str(tmp_path / "runs"), "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    for topic in ("machine", "cpu", "memory", "python", "packages", "compilers", "mpi", "slurm", "run folder"):
        assert written["facts"][topic] in shown
    assert "training can run here" in shown
    assert not (tmp_path / "runs").exists()


def test_a_broken_machine_exits_1_and_tells_the_way_out(runtime, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(LEAST, "deepspeed", "99")
    assert doctor.main(["--dir", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"BROKEN: deepspeed \S+ is too old\n    pip install 'deepspeed>=99'", shown)
    assert shown.endswith("1 broken: training cannot run here\n")


def test_least_versions_are_those_of_the_package():
    needed = re.search(r"install_requires=\[(.*?)\n    \]", (ROOT / "setup.py").read_text(), re.DOTALL)[1]
    assert dict(re.findall(r'"([\w-]+)>=([\d.]+)', needed)) == LEAST


def test_missing_packages_stop_training_but_not_optional_ones():
    versions = {**LEAST, "peft": None, "wandb": None, "transformers": "4.57.1"}
    found = Examination()
    check_versions(found, versions)
    assert [(finding.what, finding.broken) for finding in found.findings] == [
        ("transformers 4.57.1 is too old", True),
        ("peft is not installed", True),
        ("wandb is not installed", False),
    ]


def test_a_folder_without_locks_is_broken(tmp_path):
    def refuse(number, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    found = Examination()
    check_folder(found, tmp_path / "a" / "b", lock=refuse, least=0)
    (finding,) = found.findings
    assert finding.broken
    assert f"{tmp_path} cannot be written to and locked (No locks available)" in finding.what


def test_a_full_disk_is_noticed(tmp_path):
    found = Examination()
    check_folder(found, tmp_path, least=1 << 60)
    assert [finding.broken for finding in found.findings] == [False]
    assert "are free in" in found.findings[0].what


def test_machines_that_differ_are_broken_and_findings_name_their_machine_once():
    def machine(torch, *findings):
        facts = {"python": "3.11", "packages": f"torch {torch}", "code": "abc"}
        return Examination(facts=facts, findings=[Finding(what=what, way_out="mend it") for what in findings])

    everyone = [machine("2.13", "slow"), machine("2.13", "slow"), machine("2.12", "full"), machine("2.12", "full")]
    found = _of_all(everyone, ["n1", "n1", "n2", "n2"])
    assert [finding.what for finding in found[:2]] == ["slow", "on n2: full"]
    assert [finding.broken for finding in found] == [False, False, True, True]
    assert found[2].what == "process 2 on n2 has packages torch 2.12, but process 0 has torch 2.13"


@pytest.mark.parametrize(
    ("hosts", "ranks"),
    [
        (["n1", "n1"], [[0, 1]]),
        (["n1", "n1", "n2", "n2"], [[0, 1, 2, 3], [0, 1], [0, 2]]),
        (["n1", "n2", "n3"], [[0, 1, 2], [0, 1]]),
    ],
)
def test_what_is_measured_covers_links_within_and_between_machines(hosts, ranks):
    assert list(groups_to_measure(hosts).values()) == ranks


def test_under_a_launcher_doctor_measures_the_links(tmp_path):
    output = tmp_path / "out.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    command += ["--module", "launch.doctor", "--dir", str(tmp_path), "--json", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("training can run here") == 1
    written = json.loads(output.read_text())
    assert written["facts"]["processes"].startswith("3 by torchrun, over gloo: 3 on ")
    assert [reading["bytes"] for reading in written["bandwidth"]] == [*SIZES, *SIZES]
    assert all(reading["bytes_per_second"] > 0 for reading in written["bandwidth"])
