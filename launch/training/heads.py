"""The syncs of a run's heads: what the heads tell each other with them, and what the audience hears.

Between syncs heads do not talk, so whatever all must agree on waits for the next one: a wish to stop, and a head
that has refused too many updates.
"""

import math
from dataclasses import asdict

from launch.training.guard import TrainingDiverged
from launch.training.requests import Wish, from_number, to_number
from launch.training.run import Run
from launch.training.state import RunState
from parallel.exchange import HeadExchange
from parallel.mpi_carrier import MpiCarrier
from relora.dense import DenseGradients
from relora.lte import DenseSync, Exchange, HeadWeight, Transport
from relora.sync import HeadSync
from relora.sync_report import SyncReport


def begin_heads(run: Run) -> None:
    """Give a run whose heads train apart from now on its syncs; a warm start has none."""
    config = run.config
    if config.lte is None or run.state.step < config.warm_start_steps:
        return
    run.state.learned = run.state.learned or [0.0] * config.lte.fragments
    heads = run.elastic or HeadExchange(
        run.runtime,
        heads=config.lte.heads,
        choice=config.lte.exchange,
        compression=config.lte.compression,
        carrier=MpiCarrier(run.runtime) if config.lte.transport == Transport.mpi else None,
    )
    if config.lte.dense == DenseSync.all_reduced:
        assert isinstance(heads, HeadExchange), "elastic heads average them"
        run.engine.share_dense(DenseGradients(heads, alike=run.engine.store.masters_alike))
    run.sync = HeadSync(
        run.model,
        config.lte,
        run.engine.store,
        heads,
        seed=config.run.seed,
        scale=config.lora.scale if config.lora is not None else float,
        anchored=run.elastic is not None,
        measured=_measured(run),
    )
    run.fellows = [run.state.fellow() for _ in run.heads[1:]]


def _measured(run: Run) -> list[str]:
    """Layers of whose merged change the rank is told; none where tensor parallelism has cut the factors."""
    return run.spectra.modules(run.model) if run.spectra is not None and run.runtime.tensor.size == 1 else []


def drawn_for(run: Run) -> list[int]:
    """Heads whose factors this process draws at a restart; one for all where they share `down`."""
    if run.sync is None:
        return [0]
    assert run.config.lte is not None
    shared = run.config.lte.exchange == Exchange.shared
    return [0 if shared else head for head in run.sync.hosted]


def sync_run(run: Run, *, everything: bool) -> None:
    """Do what of syncs is due after this step, and agree.

    Args:
        everything: sync all layers, and wait for it.

    Raises:
        TrainingDiverged: a head has refused too many updates; on all processes.
    """
    assert run.sync is not None
    state = run.state
    ended = run.sync.advance(
        state.step, state.syncs + 1, lambda fragment: words_of(run, fragment), everything=everything
    )
    for report, said in ended:
        _note(run, report, said)


def words_of(run: Run, fragment: int | None) -> list[list[float]]:
    """What each head of this process says as a sync begins: weight, loss, wishes, whether it cannot go on."""
    return [_words_of(run, head, state, fragment) for head, state in zip(run.heads, run.states, strict=True)]


def _words_of(run: Run, head: int, state: RunState, fragment: int | None) -> list[float]:
    config = run.config.lte
    assert config is not None
    last = -1 if fragment is None else fragment
    weight = state.learned[last] if config.weight == HeadWeight.tokens else 1.0
    for done in range(config.fragments) if fragment is None else [fragment]:
        state.learned[done] = 0.0
    loss = math.nan if state.train_loss is None else state.train_loss
    wishes = run.wishes.heard | ({Wish.stop} if run.stop.asked else set())
    return [weight, loss, float(to_number(wishes)), float(head in run.diverged)]


def _note(run: Run, report: SyncReport, said: list[list[float]]) -> None:
    state = run.state
    _, losses, asked, diverged = (list(column) for column in zip(*said, strict=True))
    run.wishes.agreed = frozenset().union(*map(from_number, asked))
    run.stop.agreed = run.stop.agreed or Wish.stop in run.wishes.agreed
    state.syncs += 1
    state.sync_seconds += report.seconds
    state.bytes_sent += report.bytes
    mean = sum(weight * loss for weight, loss in zip(report.weights, losses, strict=True))
    run.watch.event("sync", state.step, loss=mean, losses=losses, **asdict(report))
    run.watch.say(
        f"step {state.step}: sync {report.sync}, {report.layers} layers took up the mean of {len(report.members)} "
        f"heads (update {report.update_ratio:.2%} of the base), {report.bytes:,} bytes a head in {report.seconds:.2f} s"
        f", loss {mean:.4f}"
    )
    if any(diverged):
        head = report.members[diverged.index(1.0)]
        raise TrainingDiverged(
            run.diverged.get(head) or f"head {head} has refused too many updates; the processes of that head say more",
            step=state.step,
        )
