"""What training over a slow link costs: bytes that a machine sends, and seconds on machines and links of stated speed.

All of it is computed, as `accrete plan` does, so that it makes no difference how busy this computer is, or that heads
share a process here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.lte_methods import Cell, Family, Study
from continual.data import open_data
from launch.config import load
from launch.models.model import model_config
from launch.planning.comparison import asked
from launch.planning.estimate import cost
from launch.planning.plan_links import DDP, DILOCO, LTE, RELORA, study
from launch.planning.skeleton import Skeletons
from parallel.link_model import Link, Method

FLOPS = 2e10
"""FLOP/s of a machine."""
LINK = Link(bandwidth=20e6 / 8, latency=0.02)
"""20 Mbit/s each way, 20 ms one way."""
_NAMES = {Family.ddp: DDP, Family.relora: RELORA, Family.diloco: DILOCO}


@dataclass(kw_only=True, slots=True, frozen=True)
class Spending:
    """What a cell spends on so many machines."""

    machines: int
    method: Method

    def exchanges(self, step: int) -> int:
        """How often machines have exchanged by then."""
        return step // self.method.every

    def sent(self, step: int) -> int:
        """Bytes that one machine has sent by then."""
        return self.exchanges(step) * round(sum(trip.bytes for trip in self.method.trips))

    def seconds(self, step: int) -> float:
        """How long that has taken."""
        return step * self.method.computing + self.exchanges(step) * self.method.waiting(LINK)


def spending(cell: Cell, chosen: Study, machines: int) -> Spending:
    """What a cell spends; sums of gradients as if its machines were heads that sum them."""
    heads = cell if cell.family.has_heads else Cell(family=Family.lte_none, machines=machines, every=1)
    method = _methods(heads.overrides(chosen))[_NAMES.get(cell.family, LTE)]
    assert chosen.steps % method.every == 0
    return Spending(machines=machines, method=method)


def _methods(overrides: Sequence[str]) -> dict[str, Method]:
    """All ways to train on as many machines as a configuration has heads, by name."""
    config = load(overrides)
    vocab_size = open_data(config.data, seed=config.run.seed).vocab_size
    hf_config = model_config(config.model, vocab_size=vocab_size, sequence_length=config.data.sequence_length)
    skeletons = Skeletons(config, hf_config)
    run = cost(
        config, skeletons, asked(config, config.heads, config.heads), low_rank=config.lora is not None, on_gpu=False
    )
    planned = study(config, skeletons, run, link=None, gpu_flops=FLOPS, step_seconds=None)
    return planned.methods[config.heads]
