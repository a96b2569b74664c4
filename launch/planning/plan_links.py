"""LTE on links between heads, beside other ways to train the same model on the same processes.

Times are a model's (parallel/link_model.py), not measurements. All methods compute at one rate of FLOPs; what travels
inside a head costs no time; sums of gradients hide behind the backward pass of a step's last microbatch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from launch.config import Dtype, TrainConfig
from launch.planning.estimate import Cost, cost, sync_of
from launch.planning.skeleton import Skeletons
from parallel.footprint import trainable_entries
from parallel.link_model import Crossover, Link, Method, crossover, sum_trip
from parallel.zero import BUCKET_ENTRIES
from relora.lte import LteConfig, OuterOptimizer

LTE, DILOCO, RELORA, DDP = "LTE", "DiLoCo", "ReLoRA, DDP", "full rank, DDP"
IDLE = 0.1
"""Share of the time that `Speed.steps` lets heads wait."""
LINKS = {
    "NVLink, 2.4 Tbit/s": Link(bandwidth=300e9, latency=5e-6),
    "InfiniBand, 200 Gbit/s": Link(bandwidth=25e9, latency=10e-6),
    "Ethernet, 10 Gbit/s": Link(bandwidth=1.25e9, latency=100e-6),
    "internet, 1 Gbit/s, 30 ms": Link(bandwidth=125e6, latency=0.030),
    "internet, 100 Mbit/s, 60 ms": Link(bandwidth=12.5e6, latency=0.060),
}
"""What joins GPUs, machines and sites; latencies are one way."""
HEADS = (2, 8, 32, 100)


@dataclass(kw_only=True, slots=True, frozen=True)
class Speed:
    """One method, with so many heads on one link."""

    method: str
    heads: int
    link: str
    step_seconds: float
    idle_share: float
    tokens_per_second: float
    """Of all heads."""
    steps: int | None
    """The least lte.sync_every with which heads wait for at most `IDLE` of the time; None for sums in every step."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Study:
    """A run's heads on links."""

    methods: dict[int, dict[str, Method]]
    """By number of heads, and by name; LTE, or DiLoCo where heads train at full rank, is the run."""
    asked: list[Speed]
    """All methods on the link that was asked for, with the run's own heads."""
    turns: dict[str, Crossover]
    """Where LTE is faster than each other one, at that link's latency and with the run's own heads."""
    scenarios: list[Speed]
    """All methods on all of `LINKS`, for all numbers of heads."""

    def figures(self) -> dict[str, Any]:
        """As plain values."""
        sent = {
            heads: {name: method.bytes_per_step for name, method in methods.items()}
            for heads, methods in self.methods.items()
        }
        return {
            "bytes_per_step": sent,
            "asked": [asdict(one) for one in self.asked],
            "crossovers": {name: asdict(turn) for name, turn in self.turns.items()},
            "scenarios": [asdict(one) for one in self.scenarios],
        }


def study(
    config: TrainConfig,
    skeletons: Skeletons,
    run: Cost,
    *,
    link: Link | None,
    gpu_flops: float,
    step_seconds: float | None,
) -> Study:
    """What becomes of a run with heads.

    Args:
        run: the phase in which heads train apart.
        link: what joins them; without it there are scenarios only.
        gpu_flops: FLOP/s of a process.
        step_seconds: of a step of the run without waiting for other heads; says more than the rate.
    """
    assert config.lte is not None
    costs = _costs(config, skeletons, run)
    rate = gpu_flops if step_seconds is None else run.step_flops / step_seconds
    own = config.lte.heads
    counts = [own] if config.lte.ranks is not None else sorted({own, *HEADS})
    methods = {heads: _methods(config, costs, heads, rate) for heads in counts}
    tokens = config.training.global_batch_size // own * config.data.sequence_length
    asked, turns = [], {}
    if link is not None:
        asked = _speeds(methods, [own], {"": link}, tokens)
        first, *others = methods[own].values()
        turns = {other.name: crossover(first, other, link.latency) for other in others}
    return Study(methods=methods, asked=asked, turns=turns, scenarios=_speeds(methods, counts, LINKS, tokens))


def _costs(config: TrainConfig, skeletons: Skeletons, run: Cost) -> dict[str, Cost]:
    """The run, and what its processes would compute without heads."""
    alone = replace(config, lte=None)
    costs = {LTE if config.lora is not None else DILOCO: run}
    if config.lora is not None:
        costs[RELORA] = cost(alone, Skeletons(alone, skeletons.hf_config), run.layout, low_rank=True)
    return {**costs, DDP: cost(alone, skeletons, run.layout, low_rank=False)}


def _methods(config: TrainConfig, costs: Mapping[str, Cost], heads: int, rate: float) -> dict[str, Method]:
    assert config.lte is not None
    lte = replace(config.lte, heads=heads)
    methods = []
    if LTE in costs:
        methods.append(_syncing(LTE, config, lte, costs[LTE], rate))
    usual = LteConfig(
        heads=heads,
        sync_every=lte.sync_every,
        compression=lte.compression,
        outer=OuterOptimizer.nesterov,
        outer_lr=0.7,
        outer_momentum=0.9,
    )
    methods.append(_syncing(DILOCO, config, lte if LTE not in costs else usual, costs[DDP], rate))
    methods += [_summing(name, config, costs[name], heads, rate) for name in (RELORA, DDP) if name in costs]
    return {method.name: method for method in methods}


def _syncing(name: str, config: TrainConfig, lte: LteConfig, each: Cost, rate: float) -> Method:
    """A method whose heads exchange every few steps."""
    computing = each.step_flops / rate
    sync = sync_of(config, lte, each.held, each.layout)
    trips = [replace(trip, hidden=lte.delay * computing) for trip in sync.fragments]
    trips += [] if sync.dense is None else [sync.dense]
    if sync.gradients is not None:
        step, times = sync.gradients, lte.sync_every
        trips.append(replace(step, bytes=step.bytes * times, hops=step.hops * times))
    return Method(name=name, computing=computing, every=lte.sync_every, trips=trips)


def _summing(name: str, config: TrainConfig, each: Cost, heads: int, rate: float) -> Method:
    """A method whose heads sum their gradients in every step, inside each head first."""
    entries = trainable_entries(each.held)
    size = entries * each.layout.tensor * (2 if config.training.dtype is Dtype.bf16 else 4)
    trip = sum_trip(
        size,
        heads,
        messages=-(-entries // BUCKET_ENTRIES),
        hidden=each.microbatch.backward_flops / rate,
    )
    return Method(name=name, computing=each.step_flops / rate, every=1, trips=[trip])


def _speeds(
    methods: Mapping[int, Mapping[str, Method]], counts: Sequence[int], links: Mapping[str, Link], tokens: int
) -> list[Speed]:
    return [
        Speed(
            method=method.name,
            heads=heads,
            link=name,
            step_seconds=method.step_seconds(link),
            idle_share=method.idle_share(link),
            tokens_per_second=heads * tokens / method.step_seconds(link),
            steps=method.steps_for(link, IDLE) if method.name in (LTE, DILOCO) else None,
        )
        for name, link in links.items()
        for heads in counts
        for method in methods[heads].values()
    ]
