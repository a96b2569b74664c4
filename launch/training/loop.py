"""The loop. What changes the run stands here; what only watches it is told."""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from continual.batches import Batch
from continual.method import Stage, Term
from launch.training.elastic import meet_others
from launch.training.granting import asked_to_stop, grant, restart_asked, together, told
from launch.training.guard import TrainingDiverged
from launch.training.heads import sync_run
from launch.training.objective import accumulate, apart, mean_loss, validation_batches
from launch.training.pace import cycle, learning_rate, restart_follows
from launch.training.requests import Wish, from_number, to_number
from launch.training.run import Run, measure_update
from launch.training.saves import note_published, save_checkpoint
from launch.training.stages import begin_stage, end_stage, fold, stops_before
from launch.training.state import RunState
from launch.training.suspects import look_closer, with_suspect
from launch.training.transition import begin_low_rank
from launch.watching.trackers.tracker import Level
from launch.watching.watch import Stopwatch
from parallel.collectives import sum_over
from parallel.engine import StepResult
from parallel.hosted import HostedEngine
from relora.merged import formed_weights


def train(run: Run) -> bool:
    """Train until the last step or until the run is asked to stop; either way a checkpoint is written.

    Returns whether the run is complete.

    Raises:
        TrainingDiverged: too many updates were refused.
        ConfigError: a checkpoint could not be written.
    """
    state, clock = run.state, Stopwatch()
    for stage in run.course.remaining(state.step):
        if stops_before(run, stage):
            break
        run.stage = stage
        begin_stage(run, stage)
        clock.lap()
        if not train_stage(run, stage, clock):
            break
        end_stage(run, stage)
        if state.step == run.config.warm_start_steps:
            begin_low_rank(run)
        clock.lap()
    if run.saver.last != state.step:
        save_checkpoint(run)
    run.saver.wait()
    note_published(run)
    return state.step >= run.course.total_steps


def train_stage(run: Run, stage: Stage, clock: Stopwatch) -> bool:
    """Train a stage to its end, unless the run is asked to stop; returns whether it is at its end."""
    state = run.state
    while state.step < stage.end and not _asked_to_stop(run):
        with run.pulse.step():
            update(run, clock)
        at_end = state.step == stage.end
        restarts = _merge(run, stage, at_end=at_end)
        wishes = run.wishes.agreed if together(run) else frozenset()
        if _due(run.config.evaluation.every, state.step) or at_end or Wish.evaluate in wishes:
            evaluate(run)
            grant(run, Wish.evaluate)
            if run.sync is not None and not restarts and not at_end:
                measure_update(run)  # far more work than a sync; restarts and the end have theirs
        _save(run, at_end=at_end, asked=Wish.checkpoint in wishes)
        note_published(run)
        state.train_seconds += clock.lap()
        run.wishes.cycle_ended = restarts or at_end
    return state.step == stage.end


def _merge(run: Run, stage: Stage, *, at_end: bool) -> bool:
    """What follows an update by the run's method: a sync of heads, a restart; returns whether it was a restart."""
    restarts = restart_asked(run) or restart_follows(run.config, stage, run.state.step)
    if run.elastic is not None:
        meet_others(run)
    elif run.sync is not None:
        sync_run(run, everything=restarts or at_end)
    if restarts:
        fold(run)
    return restarts


def _save(run: Run, *, at_end: bool, asked: bool) -> None:
    """Write a checkpoint if one is due, as it is at the end of a warm start; the end of a stage has its own."""
    step = run.state.step
    warm_start_ends = step == run.config.warm_start_steps and not at_end
    if warm_start_ends:
        run.watch.event("warm_start_end", step)
    run.checkpoint_due |= (_due(run.config.checkpoint.every, step) or asked) and not at_end
    if warm_start_ends or (run.checkpoint_due and not at_end and not _refused(run)):
        save_checkpoint(run)
    if asked and (at_end or not run.checkpoint_due):
        run.saver.wait()  # whoever asked wants it on disk
        grant(run, Wish.checkpoint)
    if warm_start_ends:
        begin_low_rank(run)


def update(run: Run, clock: Stopwatch) -> None:
    """One optimizer step on the next global batch."""
    config, state, stage = run.config, run.state, run.stage
    size = config.job_batch
    lr = run.trainee.lr = learning_rate(config, stage, state.step, state.asked_restarts)
    terms = [run.among(term) for term in run.method.terms(run.trainee, stage, run.next_batch())]
    with formed_weights(run.model, seed=config.run.seed, step=state.step):
        parts = torch.stack([_accumulated(run, term, number == 0) for number, term in enumerate(terms)])
    run.method.after_backward(run.trainee, stage)
    agreed = _agree(run, parts)
    results = _step(run, lr, agreed)
    by_term = agreed()
    losses = _of_heads(by_term)
    for one, loss in zip(run.states, losses, strict=True):
        one.advance(sequences=size, tokens=size * run.course.tokens_per_sample)
        if math.isfinite(loss):
            one.train_loss = loss
    if results[0].refused is None:
        run.method.after_step(run.trainee, stage)
    seconds = clock.lap()
    state.train_seconds += seconds
    run.watch.step(
        state,
        loss=losses[0],
        lr=lr,
        grad_norm=results[0].grad_norm,
        cycle=cycle(config, stage, state.step - 1, state.asked_restarts),
        tokens=size * run.course.tokens_per_sample,
        seconds=seconds,
        head=run.heads[0] if run.sync is not None else None,
        task=stage.name if run.course.is_stream else None,
        measures=_measures(run, terms, by_term),
    )
    for place, (head, one, loss, result) in enumerate(zip(run.heads, run.states, losses, results, strict=True)):
        if place:
            run.watch.head(head, one, loss=loss, lr=lr, grad_norm=result.grad_norm)
        _record(run, head, one, loss, result, parts)
    if run.stepped is not None:
        run.stepped()


def _accumulated(run: Run, term: Term, learned: bool) -> torch.Tensor:
    """Forward and backward of a term; the first one's targets are what heads have learned from."""
    targets = _targets(run, term.batch)
    for one, own in zip(run.states, targets if learned else [], strict=False):
        one.learned = [count + own for count in one.learned]
    return accumulate(run.engine, term, targets=targets, microbatch_size=run.microbatch, device=run.runtime.device)


def _measures(run: Run, terms: Sequence[Term], by_term: Sequence[Sequence[float]]) -> dict[str, float]:
    """What the method has to say of this step: its measures, and its terms where there are several."""
    measures = run.method.measures()
    if len(terms) > 1:
        measures |= {f"loss/{term.name}": losses[0] for term, losses in zip(terms, by_term, strict=True)}
    return measures


def _step(run: Run, lr: float, agreed: Callable[[], list[list[float]]]) -> list[StepResult]:
    """One update of each head of this process, unless its guard objects."""

    def admit(place: int, grad_norm: float) -> str | None:
        return run.guard.objection(run.states[place], loss=_of_heads(agreed())[place], grad_norm=grad_norm)

    admits = [partial(admit, place) for place in range(len(run.states))]
    if isinstance(run.engine, HostedEngine):
        return run.engine.step(lr, admits)
    return [run.engine.step(lr, *admits)]


def _record(run: Run, head: int, state: RunState, loss: float, result: StepResult, parts: torch.Tensor) -> None:
    """Remember a head's update, accepted or not."""
    bad = look_closer(run, parts, loss, result)
    if result.refused is not None:
        whose: dict[str, Any] = {} if run.sync is None else {"head": head}
        if 0 < len(bad) < run.runtime.world_size:
            whose["processes"] = bad
        run.watch.event("skip", state.step, reason=result.refused, loss=loss, grad_norm=result.grad_norm, **whose)
        where = f" on processes {bad}" if "processes" in whose else ""
        run.watch.say(
            f"step {state.step}: update {f'of head {head} ' if 'head' in whose else ''}skipped, {result.refused}{where}"
        )
    try:
        run.guard.record(state, loss=loss, grad_norm=result.grad_norm, refused=result.refused)
    except TrainingDiverged as error:
        if run.sync is None:
            raise with_suspect(run, error) from error
        run.diverged[head] = str(error)  # the other heads hear of it at the next sync
        return
    storm = run.guard.storm(state) if result.refused is not None else None
    if storm is not None:
        run.watch.alert(
            "updates are refused", f"step {state.step}: {storm}, the last since its {result.refused}", Level.warning
        )


def _refused(run: Run) -> bool:
    """Whether the last update was refused; heads refuse theirs apart.

    What a broken GPU has spoiled another can do again, from a checkpoint of before.
    """
    return run.sync is None and run.state.skipped[-1:] == [run.state.step]


def evaluate(run: Run) -> float:
    """Validation loss of the model as it is now."""
    clock = Stopwatch()
    with run.method.measured(run.trainee):
        loss = validation_loss(run, run.model)
    run.state.val_loss, run.state.val_step = loss, run.state.step
    perplexity = math.exp(min(loss, 700.0))
    run.watch.event("evaluate", run.state.step, val_loss=loss, val_perplexity=perplexity, seconds=round(clock.lap(), 3))
    run.watch.say(f"step {run.state.step}: validation loss {loss:.4f}, perplexity {perplexity:.3f}")
    return loss


def validation_loss(run: Run, model: nn.Module) -> float:
    """Mean loss of a model on the run's validation sequences, the same ones each time."""
    config, axis, stage = run.config, run.runtime.batch, run.stage
    size = config.validation_batch(axis.size * len(run.heads))
    batches = validation_batches(stage.own_held_out, sequences=config.evaluation.sequences, size=size)
    if run.course.class_names:
        batches = (batch.among(stage.seen, len(run.course.class_names)) for batch in batches)
    return mean_loss(model, batches, run.runtime.device, axis)


def _targets(run: Run, batch: Batch) -> list[int]:
    """Targets of each head's share of the global batch; without documents to tell apart, all shares have as many."""
    axis = run.runtime.data
    own = [one.targets for one in apart(batch, len(run.heads))]
    if batch.even:
        return [count * axis.size for count in own]
    targets: list[int] = sum_over(axis, torch.tensor(own, device=run.runtime.device)).tolist()
    return targets


def _of_heads(by_term: list[list[float]]) -> list[float]:
    return [sum(column) for column in zip(*by_term, strict=True)]


def _agree(run: Run, parts: torch.Tensor) -> Callable[[], list[list[float]]]:
    """Losses over all processes of the head, and, while they talk, what any of them was asked for.

    They are read when they are asked for: by then the gradient norm is known, and the device is not waited for twice.
    Shapes: (terms, heads)
    """
    axes = run.runtime
    sums = torch.zeros(parts.numel() + 2, dtype=torch.float64, device=axes.device)
    if axes.tensor.index == 0:
        sums[:-2] = parts.flatten()
    sums[-2] = to_number(told(run))  # of the main process alone
    sums[-1] = float(bool(run.stop))
    sums = sum_over(axes.model, sums)
    terms, heads = parts.shape

    @cache
    def read() -> list[list[float]]:
        *losses, wishes, asked = sums.tolist()
        run.stop.asked, run.wishes.heard = asked > 0, from_number(wishes)
        if run.sync is None:
            run.stop.agreed = run.stop.asked
        if run.sync is None or run.elastic is not None:
            run.wishes.agreed = run.wishes.heard
        return [losses[term * heads :][:heads] for term in range(terms)]

    return read


def _asked_to_stop(run: Run) -> bool:
    stop_after = run.config.training.stop_after
    if run.elastic is not None:
        return run.stop.agreed
    if run.sync is not None:
        assert run.config.lte is not None
        asked = run.stop.agreed and run.state.step % run.config.lte.sync_every == 0  # where a checkpoint can be
    else:
        asked = bool(run.stop) if run.runtime.world_size == 1 else run.stop.agreed
    asked = asked or asked_to_stop(run)
    return asked or (stop_after is not None and run.state.step >= stop_after)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
