"""The loop. What changes the run stands here; what only watches it is told."""

import math
from dataclasses import asdict
from functools import partial

import torch
from torch import nn

from continual.batches import Batch
from launch.elastic import meet_others
from launch.guard import TrainingDiverged
from launch.heads import drawn_for, sync_run
from launch.objective import accumulate, apart, mean_loss, validation_batches
from launch.phase import low_rank_at
from launch.run import Run, measure_update
from launch.saves import note_published, save_checkpoint
from launch.state import RunState
from launch.transition import begin_low_rank
from launch.watch import Stopwatch
from parallel.collectives import sum_over
from parallel.engine import StepResult
from parallel.hosted import HostedEngine
from relora.restart import cycle_of, restart, restart_due
from relora.schedule import multiplier


def train(run: Run) -> bool:
    """Train until the last step or until the run is asked to stop; either way a checkpoint is written.

    Returns whether the run is complete.

    Raises:
        TrainingDiverged: too many updates were refused.
        ConfigError: a checkpoint could not be written.
    """
    config, state, total = run.config, run.state, run.config.total_steps
    saved = state.step if run.folder.resume is not None else None
    clock = Stopwatch()
    while state.step < total and not _asked_to_stop(run):
        update(run, clock)
        warm_start_ends = state.step == config.warm_start_steps
        restarts = config.relora is not None and restart_due(config.relora, state.step, total)
        if run.elastic is not None:
            meet_others(run)
        elif run.sync is not None:
            sync_run(run, everything=restarts or state.step == total)
        if restarts:
            restart_run(run)
        if _due(config.evaluation.every, state.step) or state.step == total:
            evaluate(run)
            if run.sync is not None and not restarts and state.step < total:
                measure_update(run)  # far more work than a sync; restarts and the end have theirs
        if warm_start_ends:
            run.watch.event("warm_start_end", state.step)
        if warm_start_ends or (_due(config.checkpoint.every, state.step) and state.step < total):
            save_checkpoint(run)
            saved = state.step
        if warm_start_ends:
            begin_low_rank(run)
        note_published(run)
        state.train_seconds += clock.lap()
    if saved != state.step:
        save_checkpoint(run)
    run.saver.wait()
    note_published(run)
    return state.step >= total


def update(run: Run, clock: Stopwatch) -> None:
    """One optimizer step on the next global batch."""
    config, state = run.config, run.state
    size = config.job_batch
    scale = multiplier(state.step, config.schedule, total_steps=config.total_steps, restarts=config.restarts)
    lr = config.peak_lr(state.step) * scale
    batch = run.next_batch()
    targets = _targets(run, batch)
    for one, own in zip(run.states, targets, strict=True):
        one.learned = [count + own for count in one.learned]
    parts = accumulate(
        run.engine,
        batch,
        targets=targets,
        microbatch_size=run.microbatch,
        device=run.runtime.device,
    )
    losses = _agree(run, parts)
    results = _step(run, lr, losses)
    for one, loss in zip(run.states, losses, strict=True):
        one.advance(sequences=size, tokens=size * config.data.sequence_length)
        if math.isfinite(loss):
            one.train_loss = loss
    seconds = clock.lap()
    state.train_seconds += seconds
    in_cycle = config.relora is not None and low_rank_at(config, state.step - 1)
    cycle = cycle_of(config.relora, state.step - 1) if in_cycle and config.relora else None
    run.watch.step(
        state,
        loss=losses[0],
        lr=lr,
        grad_norm=results[0].grad_norm,
        cycle=cycle,
        tokens=size * config.data.sequence_length,
        seconds=seconds,
        head=run.heads[0] if run.sync is not None else None,
    )
    for head, one, loss, result in zip(run.heads, run.states, losses, results, strict=True):
        _record(run, head, one, loss, result)


def _step(run: Run, lr: float, losses: list[float]) -> list[StepResult]:
    """One update of each head of this process, unless its guard objects."""

    def admit(state: RunState, loss: float, grad_norm: float) -> str | None:
        return run.guard.objection(state, loss=loss, grad_norm=grad_norm)

    admits = [partial(admit, state, loss) for state, loss in zip(run.states, losses, strict=True)]
    if isinstance(run.engine, HostedEngine):
        return run.engine.step(lr, admits)
    return [run.engine.step(lr, *admits)]


def _record(run: Run, head: int, state: RunState, loss: float, result: StepResult) -> None:
    """Remember a head's update, accepted or not."""
    if result.refused is not None:
        whose = {} if run.sync is None else {"head": head}
        run.watch.event("skip", state.step, reason=result.refused, loss=loss, grad_norm=result.grad_norm, **whose)
        run.watch.say(f"step {state.step}: update {f'of head {head} ' if whose else ''}skipped, {result.refused}")
    try:
        run.guard.record(state, loss=loss, grad_norm=result.grad_norm, refused=result.refused)
    except TrainingDiverged as error:
        if run.sync is None:
            raise
        run.diverged[head] = str(error)  # the other heads hear of it at the next sync


def restart_run(run: Run) -> None:
    """Merge, redraw and reset at the end of a cycle; the learning rate's part is in the schedule."""
    config, state = run.config, run.state
    assert config.relora is not None
    report = restart(
        run.model,
        config.relora,
        run.engine.store,
        seed=config.run.seed,
        restart_index=state.restarts + 1,
        heads=drawn_for(run),
        merged=run.sync is not None,
    )
    if run.sync is not None:
        run.sync.forget()
    state.restarts += 1
    run.watch.event("restart", state.step, **asdict(report))
    run.watch.say(
        f"step {state.step}: restart {report.restart}, {report.layers} layers merged (update {report.update_ratio:.2%} "
        f"of the base), {report.pruned_share:.1%} of the factors' Adam state cleared"
    )
    measure_update(run)


def evaluate(run: Run) -> float:
    """Validation loss of the model as it is now."""
    clock = Stopwatch()
    loss = validation_loss(run, run.model)
    run.state.val_loss, run.state.val_step = loss, run.state.step
    perplexity = math.exp(min(loss, 700.0))
    run.watch.event("evaluate", run.state.step, val_loss=loss, val_perplexity=perplexity, seconds=round(clock.lap(), 3))
    run.watch.say(f"step {run.state.step}: validation loss {loss:.4f}, perplexity {perplexity:.3f}")
    return loss


def validation_loss(run: Run, model: nn.Module) -> float:
    """Mean loss of a model on the run's validation sequences, the same ones each time."""
    config, validation, axis = run.config, run.data.validation, run.runtime.batch
    assert validation is not None
    size = config.validation_batch(axis.size * len(run.heads))
    batches = validation_batches(validation, sequences=config.evaluation.sequences, size=size)
    return mean_loss(model, batches, run.runtime.device, axis)


def _targets(run: Run, batch: Batch) -> list[int]:
    """Targets of each head's share of the global batch; without documents to tell apart, all shares have as many."""
    axis = run.runtime.data
    own = [one.targets for one in apart(batch, len(run.heads))]
    if batch.even:
        return [count * axis.size for count in own]
    targets: list[int] = sum_over(axis, torch.tensor(own, device=run.runtime.device)).tolist()
    return targets


def _agree(run: Run, parts: torch.Tensor) -> list[float]:
    """Losses over all processes of the head, and, while they talk, whether any of them was asked to stop."""
    axes = run.runtime
    sums = torch.zeros(len(parts) + 1, dtype=torch.float64, device=axes.device)
    if axes.tensor.index == 0:
        sums[:-1] = parts
    sums[-1] = float(bool(run.stop))
    *losses, stops = sum_over(axes.model, sums).tolist()
    run.stop.asked = stops > 0
    if run.sync is None:
        run.stop.agreed = run.stop.asked
    return losses


def _asked_to_stop(run: Run) -> bool:
    stop_after = run.config.training.stop_after
    if run.elastic is not None:
        return run.stop.agreed
    if run.sync is not None:
        assert run.config.lte is not None
        asked = run.stop.agreed and run.state.step % run.config.lte.sync_every == 0  # where a checkpoint can be
    else:
        asked = bool(run.stop) if run.runtime.world_size == 1 else run.stop.agreed
    return asked or (stop_after is not None and run.state.step >= stop_after)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
