import pytest
import torch.distributed as dist

from parallel.runtime import start, world_size_of
from relora.errors import ConfigError


def test_the_world_size_comes_from_the_launcher_and_is_one_without(runtime):
    assert world_size_of({}) == 1
    assert world_size_of({"WORLD_SIZE": "4"}) == 4
    assert world_size_of({"OMPI_COMM_WORLD_SIZE": "2"}) == 2
    assert dist.get_world_size() == 1


def test_a_world_size_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="WORLD_SIZE must be a number, got 'two'"):
        world_size_of({"WORLD_SIZE": "two"})


def test_more_processes_than_this_version_can_use_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="started 2"), start():
        pass
