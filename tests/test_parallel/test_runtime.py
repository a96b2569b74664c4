import os

import pytest
import torch
import torch.distributed as dist

from parallel.launchers import Announcement
from parallel.runtime import _announce_to_libraries, _device, start
from relora.errors import ConfigError


def test_one_process_needs_no_launcher_and_exchanges_nothing(runtime):
    assert (runtime.process_rank, runtime.world_size, runtime.is_main) == (0, 1, True)
    assert {axis.group for axis in (runtime.data, runtime.tensor, runtime.model)} == {None}
    assert runtime.control is None
    assert dist.get_world_size() == 1


def test_degrees_that_do_not_divide_the_processes_are_refused(runtime):
    with pytest.raises(ConfigError, match=r"parallel\.tensor=2 must divide the number of processes, got 1"):
        start(tensor=2).__enter__()


def _limits(_):
    with start(tensor=2, timeout_seconds=7) as meshed:
        groups = (meshed.tensor.group, meshed.model.group, meshed.control)
        return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_every_group_has_the_time_limit(on_processes):
    assert on_processes(_limits, 2) == [[7.0] * 3] * 2


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


def _on(launcher, local_rank):
    return Announcement(launcher=launcher, process_rank=local_rank, world_size=8, local_rank=local_rank)


def test_a_process_uses_the_gpu_of_its_number_on_the_machine(two_gpus):
    assert _device(_on("torchrun", 1)) == torch.device("cuda", 1)


def test_a_process_that_was_given_gpus_of_its_own_uses_the_first(two_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    assert _device(_on("srun", 3)) == torch.device("cuda", 0)


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_more_processes_than_gpus_are_refused(two_gpus, monkeypatch, launcher):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ConfigError, match="it has 2; start at most 2 processes"):
        _device(_on(launcher, 2))


def test_libraries_find_what_they_read(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "left over")
    found = Announcement(launcher="srun", process_rank=3, world_size=8, local_rank=1, address="n1", port=1234)
    _announce_to_libraries(found, torch.device("cpu"))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    assert [os.environ[name] for name in names] == ["3", "8", "1", "n1", "1234", "cpu"]
