"""The loop. What changes the run stands here; what only watches it is told."""

import math
from dataclasses import asdict

from torch import nn

from launch.objective import accumulate, mean_loss, validation_batches
from launch.run import Run, hand_over, low_rank_at, save_checkpoint
from launch.watch import Stopwatch
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
        if state.step == config.warm_start_steps:
            hand_over(run)
            run.watch.event("warm_start_end", state.step)
        if config.relora is not None and restart_due(config.relora, state.step, total):
            restart_run(run)
        if _due(config.evaluation.every, state.step) or state.step == total:
            evaluate(run)
        if _due(config.checkpoint.every, state.step) and state.step < total:
            save_checkpoint(run)
            saved = state.step
        state.train_seconds += clock.lap()
    if saved != state.step:
        save_checkpoint(run)
    return state.step >= total


def update(run: Run, clock: Stopwatch) -> None:
    """One optimizer step on the next global batch."""
    config, state = run.config, run.state
    size = config.training.global_batch_size
    scale = multiplier(state.step, config.schedule, total_steps=config.total_steps, restarts=config.restarts)
    lr = config.peak_lr(state.step) * scale
    batch = run.data.train.batch(state.position, size)
    loss = accumulate(run.engine, batch, microbatch_size=config.training.microbatch, device=run.device)
    result = run.engine.step(lr, lambda norm: run.guard.objection(state, loss=loss, grad_norm=norm))
    state.advance(sequences=size, tokens=size * config.data.sequence_length)
    if math.isfinite(loss):
        state.train_loss = loss
    seconds = clock.lap()
    state.train_seconds += seconds
    in_cycle = config.relora is not None and low_rank_at(config, state.step - 1)
    cycle = cycle_of(config.relora, state.step - 1) if in_cycle and config.relora else None
    run.watch.step(
        state,
        loss=loss,
        lr=lr,
        grad_norm=result.grad_norm,
        cycle=cycle,
        tokens=size * config.data.sequence_length,
        seconds=seconds,
    )
    if result.refused is not None:
        run.watch.event("skip", state.step, reason=result.refused, loss=loss, grad_norm=result.grad_norm)
        run.watch.say(f"step {state.step}: update skipped, {result.refused}")
    run.guard.record(state, loss=loss, grad_norm=result.grad_norm, refused=result.refused)


def restart_run(run: Run) -> None:
    """Merge, redraw and reset at the end of a cycle; the learning rate's part is in the schedule."""
    config, state = run.config, run.state
    assert config.relora is not None
    report = restart(run.model, config.relora, run.engine.store, seed=config.run.seed, restart_index=state.restarts + 1)
    state.restarts += 1
    run.watch.event("restart", state.step, **asdict(report))
    run.watch.say(
        f"step {state.step}: restart {report.restart}, {report.layers} layers merged (update {report.update_ratio:.2%} "
        f"of the base), {report.pruned_share:.1%} of the factors' Adam state cleared"
    )
    if run.spectra is not None:
        run.spectra.measure(run.model, state.step, state.restarts)


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
    config, validation = run.config, run.data.validation
    assert validation is not None
    batches = validation_batches(validation, sequences=config.evaluation.sequences, size=config.validation_batch)
    return mean_loss(model, batches, run.device)


def _asked_to_stop(run: Run) -> bool:
    stop_after = run.config.training.stop_after
    return bool(run.stop) or (stop_after is not None and run.state.step >= stop_after)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
