"""What training over a slow link costs: bytes that a machine sends, and seconds on machines and a link of stated speed.

Compute time is counted, not measured, so that a busy computer makes no difference.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.lte_methods import Cell
from benchmarks.parallel_traffic import ALL_REDUCE, ring
from benchmarks.quality_methods import trainable_parameters
from continual.data import open_data
from launch.config import load
from launch.history import History
from launch.model import model_config
from launch.skeleton import step_flops

_FP32 = 4


@dataclass(kw_only=True, slots=True, frozen=True)
class Scenario:
    """Machines and the link of each to all others."""

    flops: float
    """FLOP/s that a machine really makes."""
    bandwidth: float
    """Bits per second that a machine can send."""
    latency: float
    """Seconds that a message takes."""

    def exchange_seconds(self, sent: int, machines: int) -> float:
        """Of an exchange in which each machine sends so many bytes: a ring passes its pieces on 2 (N - 1) times."""
        return 8 * sent / self.bandwidth + 2 * (machines - 1) * self.latency


SCENARIO = Scenario(flops=2e10, bandwidth=2e7, latency=0.02)


def step_flops_of(overrides: Sequence[str]) -> int:
    """FLOPs of one update on all machines together."""
    config = load(overrides)
    vocab_size = open_data(config.data, seed=config.run.seed).vocab_size
    hf_config = model_config(config.model, vocab_size=vocab_size, sequence_length=config.data.sequence_length)
    return step_flops(config, hf_config, 0, print)


@dataclass(kw_only=True, slots=True, frozen=True)
class Spending:
    """What a cell spends."""

    machines: int
    step_seconds: float
    """Compute time of one update."""
    exchanges: dict[int, int]
    """Bytes that one machine sends, by the step after which it does."""

    def after(self, step: int, scenario: Scenario) -> tuple[int, float]:
        """Bytes that a machine has sent by then, and the seconds that have passed."""
        sent = [size for at, size in self.exchanges.items() if at <= step]
        waited = sum(scenario.exchange_seconds(size, self.machines) for size in sent)
        return sum(sent), step * self.step_seconds + waited


def spending(cell: Cell, overrides: Sequence[str], machines: int, history: History, scenario: Scenario) -> Spending:
    """What a finished run would have spent on so many machines; heads tell it themselves."""
    steps = history.summary["steps"]
    if cell.family.has_heads:
        exchanges = {record["step"]: record["bytes"] for record in history.syncs()}
    else:
        gradients = ring(ALL_REDUCE, _FP32 * trainable_parameters(overrides), machines)
        exchanges = dict.fromkeys(range(1, steps + 1), gradients)
    seconds = step_flops_of(overrides) / machines / scenario.flops
    return Spending(machines=machines, step_seconds=seconds, exchanges=exchanges)


def as_values(scenario: Scenario) -> dict[str, Any]:
    """A scenario for a document."""
    return asdict(scenario)
