"""The beginning and the end of a stage of a stream: what happens to the model, and what is written.

A run of plain pre-training has one stage, of which nothing of this is told.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from continual.method import Stage, TaskKind
from launch.training.fold_check import FoldCheck
from launch.training.heads import drawn_for
from launch.training.run import Run, measure_update
from launch.training.saves import last_checkpoint, load_weights, save_checkpoint, save_folder
from launch.training.scores import audit_of, column, measuring_of, scores_of
from launch.training.trainee import EngineTrainee
from launch.watching.stage_notes import note_stage
from launch.watching.stage_records import BEFORE, StageRecord
from launch.watching.watch import Stopwatch, peak_memory_bytes
from parallel.checkpoint import open_checkpoint, step_name
from relora.convert import low_rank_modules
from relora.initialize import draw_down
from relora.optimizer import clear_moments
from relora.restart import ReloraConfig, RestartReport, restart


def make_trainee(run: Run) -> EngineTrainee:
    """The run's model as its method sees it."""
    return EngineTrainee(run, lambda: _return_to_start(run))


def begin_stage(run: Run, stage: Stage) -> None:
    """Prepare the model and the method for a stage, unless it has begun before the run was resumed."""
    state = run.state
    if not run.course.is_stream or state.begun > stage.index:
        return
    if state.begun == 0:
        _measure(run, None, {})
    if _has_model_per_task(run) and not stage.full_rank:
        _return_to_start(run)
    _clear_optimizer(run)
    if run.sync is not None:
        run.sync.forget_momenta()
    state.forget_spikes()
    _measure_request(run, stage)
    run.method.begin_stage(run.trainee, stage)
    state.begun = stage.index + 1
    run.watch.say(
        f"step {state.step}: task {stage.name} begins, {stage.steps} steps on {len(stage.data.train):,} samples"
    )


def stops_before(run: Run, stage: Stage) -> bool:
    """Whether the run was to end before this stage."""
    last = run.config.continual.stop_after if run.config.continual is not None else None
    return any(one.name == last and one.index < stage.index for one in run.course.stages)


def end_stage(run: Run, stage: Stage) -> None:
    """Let the method draw its conclusions, fold, measure all tasks, and write the checkpoint and the model."""
    state, config = run.state, run.config.continual
    if not run.course.is_stream:
        return
    assert config is not None
    clock = Stopwatch()
    run.method.end_stage(run.trainee, stage)
    report = run.method.report()
    if run.config.folds and run.conversion is not None:
        check = FoldCheck(run, stage)
        fold(run)
        report = {**report, "fold_difference": check.difference(run)}
    state.boundaries.append(step_name(state.step))
    _measure(run, stage, report)
    save_checkpoint(run)
    if config.save_models:
        folder = Path("tasks") / f"{stage.index + 1:02d}_{stage.name}"
        save_folder(run, str(folder), last_checkpoint(run), run.config.torch_dtype)
    state.train_seconds += clock.lap()


def fold(run: Run) -> None:
    """Merge, redraw and reset, as at a restart; the method may give the new factors."""
    config, state = run.config, run.state
    relora = config.relora or ReloraConfig(merge_precision=config.merge_precision)
    report = restart(
        run.model,
        relora,
        run.engine.store,
        seed=config.run.seed,
        restart_index=state.restarts + 1,
        heads=drawn_for(run),
        merged=run.sync is not None,
        draw=run.method.draw,
    )
    if run.sync is not None:
        run.sync.forget()
    state.restarts += 1
    told = {key: value for key, value in asdict(report).items() if value is not None}
    run.watch.event("restart", state.step, **told)
    run.watch.say(
        f"step {state.step}: restart {report.restart}, {report.layers} layers merged (update {report.update_ratio:.2%} "
        f"of the base), {report.pruned_share:.1%} of the factors' Adam state cleared{_quantised(report)}"
    )
    measure_update(run)


def _quantised(report: RestartReport) -> str:
    if report.base_error is None:
        return ""
    return (
        f"; quantised anew: error {report.base_error:.2%} of the base, {report.lost_share:.2%} of the update lost, "
        f"a shift of {report.base_shift:.2%} of the base besides it"
    )


def _measure(run: Run, stage: Stage | None, report: dict[str, Any]) -> None:
    """Add a row to the matrix: every task that the model can be asked for by now.

    Of a model per task the scores on earlier tasks are those of their own models, which have not changed.
    """
    state = run.state
    with run.method.measured(run.trainee):
        scores = scores_of(run.model, run.course.tasks, stage, measuring_of(run))
    if stage is not None and _has_model_per_task(run):
        scores |= {
            task: score for task, score in records_of(run)[-1].scores.items() if task in _names_before(run, stage)
        }
    before = sum(row.get("seconds", 0.0) for row in state.rows)
    audit = None if stage is None else audit_of(stage, run.course.tasks, records_of(run)[-1].scores, scores)
    record = StageRecord(
        step=state.step,
        task="start" if stage is None else stage.name,
        index=BEFORE if stage is None else stage.index,
        scores=scores,
        learns=None if stage is None or stage in run.course.tasks else [task.name for task in run.course.tasks],
        seconds=round(state.train_seconds - before, 3),
        peak_memory_bytes=peak_memory_bytes(run.runtime.device),
        method_bytes=method_bytes(run),
        report=report,
        audit=audit,
    )
    state.rows.append(record.values())
    note_stage(run.watch, records_of(run))


def _measure_request(run: Run, stage: Stage) -> None:
    """Add what a request to forget is audited against to the newest row, if it was not there to be measured then."""
    if stage.kind is not TaskKind.forget:
        return
    newest = records_of(run)[-1]
    if {column(stage, label) for label in stage.data.held_out} <= newest.scores.keys():
        return
    newest.scores |= scores_of(run.model, [stage], stage, measuring_of(run))
    run.state.rows[-1] = newest.values()
    note_stage(run.watch, records_of(run))


def records_of(run: Run) -> list[StageRecord]:
    """What was recorded of the stages so far."""
    return [StageRecord.from_values(row) for row in run.state.rows]


def method_bytes(run: Run) -> int:
    """Bytes of what the method remembers, as this process holds it."""
    state = run.method.state()
    tensors = [*state.tensors.values(), *(part for _, part in state.parts.values())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _has_model_per_task(run: Run) -> bool:
    return run.config.continual is not None and run.config.continual.method == "per_task"


def _names_before(run: Run, stage: Stage) -> list[str]:
    return [task.name for task in run.course.tasks if task.index < stage.index]


def _clear_optimizer(run: Run) -> None:
    store = run.engine.store
    for parameter in run.trainee.trainable().values():
        moments = store.moments(parameter)
        if moments is not None:
            clear_moments(moments)


def _return_to_start(run: Run) -> None:
    """The weights that the first low-rank stage began with, and the first draw of the factors."""
    first = next(stage for stage in run.course.stages if not stage.full_rank)
    if run.state.step == first.first:
        if first.first == 0 and not run.state.boundaries:
            run.state.boundaries.append(step_name(0))
            save_checkpoint(run)
        return
    load_weights(run, open_checkpoint(run.folder.checkpoints / step_name(first.first)))
    store, seed = run.engine.store, run.config.run.seed
    for name, layer in low_rank_modules(run.model).items():
        rank, inputs = store.shape(layer.down)
        store.write(layer.down, draw_down(name, (rank, inputs), seed=seed))
        store.write(layer.up, torch.zeros(()).expand(store.shape(layer.up)))
