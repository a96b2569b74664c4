import pytest
import torch

from parallel.collectives import broadcast_object, gather_objects, same_on_all, sum_over
from parallel.runtime import start
from relora.errors import ConfigError


def _exchange(runtime):
    total = sum_over(runtime.model, torch.tensor([runtime.process_rank + 1.0]))
    same_on_all(runtime, "the weather", "fine", "wait")
    with pytest.raises(ConfigError, match="process 1 has 1"):
        same_on_all(runtime, "the rank", str(runtime.process_rank), "impossible")
    main = broadcast_object(runtime, runtime.process_rank if runtime.is_main else None)
    return float(total), gather_objects(runtime, runtime.process_rank), main


def test_processes_sum_gather_and_agree(on_processes):
    assert on_processes(_exchange, 2) == [(3.0, [0, 1], 0)] * 2


def _axes(runtime):
    with start(tensor=2) as meshed:
        along = [
            sum_over(axis, torch.tensor([10.0**meshed.process_rank])).item() for axis in (meshed.data, meshed.tensor)
        ]
        return along, meshed.data.ranks, meshed.tensor.ranks


def test_groups_follow_the_mesh(on_processes):
    results = on_processes(_axes, 4)
    assert results[0] == ([101.0, 11.0], (0, 2), (0, 1))
    assert results[3] == ([1010.0, 1100.0], (1, 3), (2, 3))
