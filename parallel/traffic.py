"""How many bytes one process sends over the data axis. Pure arithmetic.

Sums are taken to travel over a ring: of S bytes a process sends 2 (n - 1) / n * S for a sum that all get, and
(n - 1) / n * S for one that each gets a part of, or for a whole that is put together from parts. The tests
count the bytes that an engine really hands over. The tensor axis: parallel/pretence.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from parallel.footprint import FP32, Gathering, Held, Role, flat_size, groups_of, trainable_entries
from parallel.zero import Offload, ParallelConfig


def step_traffic(
    held: Sequence[Held], parallel: ParallelConfig, settings: Mapping[str, Any], *, data: int, microbatches: int
) -> dict[str, int]:
    """Bytes handed to collectives in a step: gradients `summed` or `scattered`, weights `gathered`.

    A ring sends each of them (n - 1) / n times, and `summed` ones twice: `sent` adds up.
    """
    if data == 1:
        return {}
    section = settings.get("zero_optimization", {})
    bf16 = "bf16" in settings
    width, trainable = 2 if bf16 else FP32, trainable_entries(held)
    summed = FP32 if settings.get("communication_data_type") == "fp32" else width
    if parallel.zero_stage == 0:
        return {"summed": trainable * FP32}
    if parallel.zero_stage == 3:
        whole = Gathering(held, section, data=data)
        gathered = whole.kept + microbatches * (2 * whole.passing - whole.turning)
        return {"scattered": microbatches * trainable * summed, "gathered": gathered * width}
    sizes = sum(flat_size(group, data) for group in groups_of(held))
    once = parallel.zero_stage == 1 and (bf16 or parallel.offload is Offload.none)
    return {"summed": (1 if once else microbatches) * trainable * summed, "gathered": sizes * width}


def factor_bytes(held: Sequence[Held]) -> int:
    """Bytes of the factors in fp32: what a restart sums over the data axis where no process has whole masters.

    A pruning sums as much again over all processes, to see first moments whole. The base weights never travel.
    """
    return sum(one.entries for one in held if one.role is Role.factor) * FP32


def sent(traffic: Mapping[str, int], size: int) -> int:
    """Bytes that one of `size` processes sends."""
    passes = {"summed": 2, "scattered": 1, "gathered": 1}
    return sum(round(passes[key] * (size - 1) / size * value) for key, value in traffic.items())
