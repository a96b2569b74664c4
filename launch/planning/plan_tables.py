"""A plan in tables, and as plain values. Memory is in GiB of one process, as GPUs are sold."""

from collections.abc import Sequence
from dataclasses import astuple, replace
from typing import Any

from launch.config import TrainConfig
from launch.planning.comparison import STAGES, Outlook, fitting
from launch.planning.estimate import Cost, Layout
from launch.planning.plan_links import Speed, Study
from launch.planning.sync_estimate import SyncCost
from launch.training.recomputation import Checkpointing
from launch.watching.console import Console
from launch.watching.readings import amount
from parallel.footprint import Kind, Role
from parallel.link_model import Crossover
from relora.lte import LteConfig

GIB = 1 << 30
_SYNCED = ("factors", "changes", "dense parameters", "words")


def show(console: Console, config: TrainConfig, phases: Sequence[Outlook], gpu_memory: float | None) -> None:
    """Print a plan."""
    layout, steps = phases[0].cost.layout, config.total_steps
    heads = f"heads {layout.heads} x " if config.lte is not None else ""
    console.info(
        f"{_processes(layout)}, {heads}data {layout.data} x tensor {layout.tensor}, ZeRO stage {layout.zero_stage}, "
        f"offload {config.parallel.offload.value}; {steps:,} steps of {config.training.global_batch_size} sequences of "
        f"{config.data.sequence_length} tokens, {config.training.dtype.value}"
    )
    _show_parameters(console, phases)
    _show_memory(console, config, phases)
    _show_work(console, phases)
    for phase in phases:
        if phase.grid:
            _show_grid(console, phase, gpu_memory)
    if gpu_memory is not None:
        console.info(_verdict(phases, gpu_memory))


def figures(phases: Sequence[Outlook]) -> dict[str, Any]:
    """A plan as plain values; memory and traffic in bytes."""
    return {
        phase.name: {
            "runs": phase.runs,
            **_cost_figures(phase.cost),
            "recomputed_flops": phase.recomputed_flops,
            "layouts": [
                {**_layout_figures(layout), "peak": None if cost is None else cost.peak}
                for layout, cost in phase.grid.items()
            ],
        }
        for phase in phases
    }


def _cost_figures(cost: Cost) -> dict[str, Any]:
    return {
        **_layout_figures(cost.layout),
        "parameters": _parameters(cost),
        "sequences": cost.sequences,
        "microbatches": cost.microbatches,
        "device": {kind.value: size for kind, size in cost.footprint.device.items()},
        "host": {kind.value: size for kind, size in cost.footprint.host.items()},
        "activations": {
            "saved": cost.microbatch.saved,
            "at_loss": cost.microbatch.at_loss,
            "in_backward": cost.microbatch.in_backward,
        },
        "in_microbatch": cost.in_microbatch,
        "in_step": cost.footprint.in_step,
        "in_merge": cost.in_merge,
        "peak": cost.peak,
        "building": cost.building,
        "step_flops": cost.step_flops,
        "forward_flops": cost.microbatch.forward_flops,
        "backward_flops": cost.microbatch.backward_flops,
        "restart_flops": cost.restart_flops,
        "sent_in_step": cost.sent_in_step,
        "sent_in_restart": cost.sent_in_restart,
        "sync": None if cost.sync is None else _sync_figures(cost.sync),
    }


def _sync_figures(sync: SyncCost) -> dict[str, Any]:
    return {
        "layers": sync.layers,
        "by_factors": sync.by_factors,
        "flops": sync.flops,
        "in_sync": sync.in_sync,
        "bytes": sync.bytes,
        "sent": sync.sent,
    }


def _layout_figures(layout: Layout) -> dict[str, int]:
    return {
        "processes": layout.processes,
        "data": layout.data,
        "tensor": layout.tensor,
        "zero_stage": layout.zero_stage,
        "heads": layout.heads,
    }


def _parameters(cost: Cost) -> dict[str, int]:
    entries = {role: sum(one.entries for one in cost.whole if one.role is role) for role in Role}
    return {
        "model": sum(entries.values()) - entries[Role.factor],
        "trainable": entries[Role.dense] + entries[Role.factor],
        "frozen": entries[Role.base] + entries[Role.frozen],
        "added": entries[Role.factor],
    }


def _show_parameters(console: Console, phases: Sequence[Outlook]) -> None:
    cost = phases[0].cost
    if cost.rows:
        lines = [astuple(row) for row in cost.rows]
        console.table("parameters", ("kind", "modules", "parameters", "trainable", "state"), lines)
    count = _parameters(cost)
    console.info(
        f"{amount(count['model'])} parameters, of which {amount(count['frozen'])} are frozen; "
        f"{amount(count['trainable'])} train, {amount(count['added'])} of them factors that are added"
    )


def _show_memory(console: Console, config: TrainConfig, phases: Sequence[Outlook]) -> None:
    names = [phase.name + ("" if phase.runs else ", for comparison") for phase in phases]
    costs = [phase.cost for phase in phases]
    rows: list[tuple[str, list[int]]] = []
    for kind in Kind:
        rows.append((kind.value, [cost.footprint.device.get(kind, 0) for cost in costs]))
    rows.append(("resident", [cost.footprint.resident for cost in costs]))
    rows += [
        ("+ activations for the backward pass", [cost.microbatch.saved for cost in costs]),
        ("  + logits, loss and their gradients", [cost.microbatch.at_loss - cost.microbatch.saved for cost in costs]),
        ("  or + a block's backward pass", [cost.microbatch.in_backward - cost.microbatch.saved for cost in costs]),
        ("       and gradient buckets", [cost.footprint.in_backward for cost in costs]),
        ("+ weights gathered for a while", [cost.footprint.in_forward for cost in costs]),
        ("or + the optimizer step", [cost.footprint.in_step for cost in costs]),
        ("or + a merge", [cost.in_merge for cost in costs]),
        ("or + a sync", [0 if cost.sync is None else cost.sync.in_sync for cost in costs]),
        ("at most", [cost.peak for cost in costs]),
    ]
    for kind in Kind:
        rows.append((f"host: {kind.value}", [cost.footprint.host.get(kind, 0) for cost in costs]))
    rows.append(("host: while building the model", [cost.building for cost in costs]))
    lines = [
        (name, *(_gib(size).rjust(8) if size else "-".rjust(8) for size in sizes)) for name, sizes in rows if any(sizes)
    ]
    console.table("memory of a process, GiB", ("", *names), lines)
    state = "with" if config.training.activation_checkpointing is Checkpointing.none else "without"
    for phase in phases:
        other = phase.otherwise
        console.info(
            f"{phase.name}: {state} activation checkpointing {_gib(other.saved)} GiB of activations would be kept "
            f"(here {_gib(phase.cost.microbatch.saved)}), for microbatches of {phase.cost.sequences} sequences"
        )


def _show_work(console: Console, phases: Sequence[Outlook]) -> None:
    columns = [_work(phase) for phase in phases]
    lines = [(name, *(column[name] or "-" for column in columns)) for name in columns[0]]
    shown = [line for line in lines if any(value != "-" for value in line[1:])]
    console.table("a step and a restart, of each process", ("", *(phase.name for phase in phases)), shown)


def _work(phase: Outlook) -> dict[str, str]:
    """What there is to do, by name; empty for nothing."""
    cost, count = phase.cost, phase.cost.microbatches
    flops = {
        "forward": count * cost.microbatch.forward_flops,
        "backward": count * (cost.microbatch.backward_flops - phase.recomputed_flops),
        "recomputed": count * phase.recomputed_flops,
    }
    return {
        "microbatches": f"{count} of {cost.sequences}",
        **{f"FLOPs, {name}": amount(size) if size else "" for name, size in flops.items()},
        **{f"sent, {name}": amount(size, "B") if size else "" for name, size in cost.sent_in_step.items()},
        "restart: FLOPs": amount(cost.restart_flops) if cost.restart_flops else "",
        **{f"restart: sent, {name}": amount(size, "B") if size else "" for name, size in cost.sent_in_restart.items()},
        **_sync_work(cost),
    }


def _sync_work(cost: Cost) -> dict[str, str]:
    sync = cost.sync
    sent = dict.fromkeys(_SYNCED, 0) if sync is None else sync.sent
    return {
        "sync: FLOPs, in float64": amount(sync.flops) if sync is not None and sync.flops else "",
        "sync: layers by factors": f"{sync.by_factors} of {sync.layers}" if sync is not None and sync.layers else "",
        **{f"sync: sent by a head, {name}": amount(size, "B") if size else "" for name, size in sent.items()},
    }


def _show_grid(console: Console, phase: Outlook, gpu_memory: float | None) -> None:
    rows = []
    for first in dict.fromkeys(replace(layout, zero_stage=0) for layout in phase.grid):
        costs = [phase.grid[replace(first, zero_stage=stage)] for stage in STAGES]
        rows.append((first.processes, first.tensor, first.data, *(_marked(cost, gpu_memory) for cost in costs)))
    fits = "" if gpu_memory is None else f"; * fits into {gpu_memory:g} GiB"
    console.table(
        f"{phase.name}: GiB of a process at most, by ZeRO stage{fits}",
        ("processes", "tensor", "data", *(f"stage {stage}" for stage in STAGES)),
        rows,
    )


def _marked(cost: Cost | None, gpu_memory: float | None) -> str:
    if cost is None:
        return "-".rjust(8)
    return _gib(cost.peak).rjust(8) + ("" if gpu_memory is None else " *" if cost.peak <= gpu_memory * GIB else "  ")


def _verdict(phases: Sequence[Outlook], gpu_memory: float) -> str:
    most = max((phase for phase in phases if phase.runs), key=lambda phase: phase.cost.peak)
    need = f"{_gib(most.cost.peak)} GiB at most, in the {most.name} phase"
    if most.cost.peak <= gpu_memory * GIB:
        return f"fits into {gpu_memory:g} GiB: {need}"
    others = fitting(phases, gpu_memory * GIB)
    if not others:
        return f"does not fit into {gpu_memory:g} GiB: {need}; none of the layouts above does"
    return f"does not fit into {gpu_memory:g} GiB: {need}; {_words(others[0])} would"


def _words(layout: Layout) -> str:
    return f"{_processes(layout)} with parallel.zero_stage={layout.zero_stage} parallel.tensor={layout.tensor}"


def _processes(layout: Layout) -> str:
    return "1 process" if layout.processes == 1 else f"{layout.processes} processes"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def show_links(console: Console, lte: LteConfig, links: Study) -> None:
    """Print what becomes of heads on links."""
    names = list(next(iter(links.methods.values())))
    sent = [
        (heads, *(amount(method.bytes_per_step, "B") for method in methods.values()))
        for heads, methods in links.methods.items()
    ]
    console.table("sent by a head to the others, in a step on average", ("heads", *names), sent)
    if links.asked:
        rows = [(one.method, *_speed_cells(one)) for one in links.asked]
        console.table(
            f"on that link, {lte.heads} heads, times predicted",
            ("", "step", "idle", "tokens/s", "idle below 10 % from T ="),
            rows,
        )
        for other, turn in links.turns.items():
            console.info(f"{names[0]} takes less time for a step than {other} {_where(turn)}")
    cells: dict[tuple[str, int], list[str]] = {}
    for one in links.scenarios:
        cells.setdefault((one.link, one.heads), []).append(f"{_seconds(one.step_seconds)} {one.idle_share:>4.0%}")
    console.table(
        f"step and idle share, predicted, T = {lte.sync_every}; every head has the work that one has here",
        ("link", "heads", *names),
        [(link, heads, *values) for (link, heads), values in cells.items()],
    )


def _speed_cells(one: Speed) -> tuple[str, ...]:
    steps = "-" if one.steps is None else f"{one.steps:,}"
    return _seconds(one.step_seconds), f"{one.idle_share:.1%}", amount(one.tokens_per_second), steps


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def _where(turn: Crossover) -> str:
    if turn.bandwidth is None:
        return "on a link of any bandwidth" if turn.on_slow else "on no link, whatever its bandwidth"
    return f"{'below' if turn.on_slow else 'above'} {amount(8 * turn.bandwidth, 'bit/s')}"
