"""The machines of a job are compared: one line when all are alike, else one message that names machine and rule."""

import re
import shutil
import time

import pytest

from launch import exits
from launch.config import load
from launch.jobs.attempt import VARIABLE, NodeTrouble
from launch.training import preflight as module
from launch.training.preflight import Sight, Trouble, preflight, troubles_of
from parallel.collectives import barrier
from relora.errors import ConfigError

CODE = "the code of Accrete"


def _fly(runtime, tmp_path, pretended):
    """The line of a flight or the error, on this process, as if processes were on machines n0 and n1."""
    folder, data = tmp_path / "run", tmp_path / "text.txt"
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(tmp_path))
        patch.setattr(module, "gethostname", lambda: f"n{runtime.process_rank}")
        patch.setattr(module, "_SETTLE_SECONDS", 0.2)
        patch.setattr(module, "_FILES_SECONDS", 2.0)
        if runtime.is_main:
            folder.mkdir(exist_ok=True)
            data.write_text("some text " * 99)
        barrier(runtime)
        if not runtime.is_main:
            _pretend(patch, pretended, tmp_path)
        config = load([f"data.path=[{data}]", "training.global_batch_size=4"])
        try:
            preflight(config, folder, runtime, said.append)
        except (ConfigError, NodeTrouble) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            barrier(runtime)
            if runtime.is_main:
                shutil.rmtree(folder)
    return said


def _pretend(patch, what, tmp_path):
    """Be a machine that is not as the first one."""
    if what == "torch":
        patch.setattr(module, "packages_of", lambda: {**_PACKAGES(), "torch": "1.13"})
    if what == "clock":
        real = time.time
        patch.setattr(module.time, "time", lambda: real() + 40)
    if what == "folder":
        real_look = module.look
        patch.setattr(module, "look", lambda c, m, h, w, leads: real_look(c, tmp_path / "gone", h, w, leads=leads))
    if what == "data":
        patch.setattr(module, "_extent", lambda path: "not there")
    if what == "hangs":
        patch.setattr(module, "_extent", lambda path: time.sleep(6))
    if what == "other folder":
        (tmp_path / "own").mkdir(exist_ok=True)
        real_look = module.look
        patch.setattr(module, "look", lambda c, m, h, w, leads: real_look(c, tmp_path / "own", h, w, leads=leads))


_PACKAGES = module.packages_of


def _flights(runtime, tmp_path):
    cases = ("", "torch", "clock", "folder", "other folder", "data", "hangs")
    return {case: _fly(runtime, tmp_path, case) for case in cases}


def test_two_processes_are_compared_and_a_machine_that_differs_is_named(on_processes, tmp_path):
    first, second = on_processes(_flights, 2, tmp_path, seconds=300)
    (line,) = first.pop("")
    assert len(second.pop("")) == 1
    assert re.fullmatch(
        r"preflight: 2 processes on 2 machines are alike, clocks within 0\.\d+ s, all-reduce of 1 MiB in [\d.]+ ms; "
        r"[\d.]+ s",
        line,
    )
    assert first == second
    wanted = {
        "torch": r"torch is 1\.13, but \S+ on n0: start all processes from one environment and one checkout",
        "clock": r"the clock is (39\.|40\.)\d s ahead: let chronyd or ntpd set the clock",
        "folder": r"run\.dir=\S+ cannot be written to \(No such file or directory\): name a folder by run\.dir .*",
        "other folder": r"run\.dir=\S+ is another folder than on n0: name a folder by run\.dir on a file system .*",
        "data": r"\S+text\.txt is not there, but 1 file of 990 bytes on n0: let all machines read the same files.*",
        "hangs": r"run\.dir=\S+ cannot be written to \(no answer within 2 s\): name .*",
    }
    assert first.keys() == wanted.keys()
    for case, text in wanted.items():
        assert re.fullmatch(f"ConfigError: preflight: on n1 {text}", first[case]), first[case]
    assert not (tmp_path / "run").exists()


def sight(host, **more):
    facts = {"torch": more.pop("torch", "2.13"), CODE: "abc"}
    return Sight(host=host, facts=facts, data={"text": more.pop("data", "1 file of 990 bytes")}, **more)


def test_troubles_are_counted_by_machine(tmp_path):
    sights = [sight("n0"), sight("n1", torch="2.12"), sight("n1", torch="2.12"), sight("n2", folder="Read-only")]
    torch, folder = troubles_of(sights, ["n0", "n1"], tmp_path)
    assert (torch.hosts, folder.hosts) == (["n1"], ["n2"])
    assert torch.what == "torch is 2.12, but 2.13 on n0"
    assert troubles_of([sight("n0"), sight("n1")], ["n0", "n1"], tmp_path) == []


def test_one_machine_of_several_is_blamed_and_the_supervisor_hears_of_it():
    one = Trouble(hosts=["n1"], what="torch is 2.12", way_out="mend it")
    with pytest.raises(NodeTrouble, match=r"preflight: on n1 torch is 2\.12: mend it; 1 other findings") as caught:
        module._judge([one, one], ["n0", "n1", "n2"])
    failure = exits.explain(caught.value)
    assert (failure.code, failure.host, failure.traceback) == (exits.FAILED, "n1", "")
    both = Trouble(hosts=["n1", "n2"], what="torch is 2.12", way_out="mend it")
    with pytest.raises(ConfigError, match=r"on n1 \(and on n2\) torch"):
        module._judge([both], ["n0", "n1", "n2"])
    module._judge([], ["n0"])


def test_a_blamed_machine_is_noted_for_the_supervisor(tmp_path, monkeypatch):
    from launch.jobs.attempt import outcome_in

    monkeypatch.setenv(VARIABLE, str(tmp_path))
    exits.tell("n0", exits.explain(NodeTrouble("n1", "preflight: on n1 ...")))
    assert outcome_in(tmp_path).host == "n1"


def test_a_slow_link_is_named():
    (slow,) = module._measured_troubles({"n0": 0.0, "n1": 0.3}, {"n1": 0.01, "n2": 7.5})
    assert (slow.hosts, slow.what) == (["n2"], "1 MiB takes 7.5 s to process 0 and back, which should take no 2 s")


def test_a_disk_without_room_for_the_next_checkpoint_is_told(tmp_path, monkeypatch):
    newest = tmp_path / "checkpoints/step_00000008"
    newest.mkdir(parents=True)
    (newest / "model.safetensors").write_bytes(b"x" * 4096)
    assert module._lack_of_room(tmp_path) == ""
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 99))
    assert module._lack_of_room(tmp_path).startswith("99 bytes are free in ")
    assert "takes 4,096, as step_00000008 does" in module._lack_of_room(tmp_path)


def test_without_a_supervisor_nothing_is_compared(runtime, tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    preflight(load([]), tmp_path, runtime, pytest.fail)
