"""`train`: from a checked configuration to a finished, stopped or refused run."""

import gc
import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from continual.config import ContinualConfig
from launch import exits
from launch.cli import spare_imports
from launch.config import TrainConfig, load, resolved
from launch.environment import environment
from launch.jobs.attempt import Outcome, StopFile, beating, folder_of, keep_own_log, note
from launch.models.model import model_class, save_model
from launch.prepare import following, show_data
from launch.rules import check_mesh
from launch.stream_rules import check_opened
from launch.training.audience import FailureTold, make_watch
from launch.training.course import Course, make_method, model_of_course, open_course
from launch.training.elastic import begin_state, come, enter
from launch.training.granting import settle
from launch.training.guard import Guard, TrainingDiverged
from launch.training.heads import begin_heads
from launch.training.loop import evaluate, train, validation_loss
from launch.training.paths import check_device
from launch.training.phase import hosted_heads, make_engine_of_heads, make_phase
from launch.training.preflight import preflight
from launch.training.requests import Wishes
from launch.training.resuming import check_course
from launch.training.run import Run, measure_update, show_model
from launch.training.run_folder import RunFolder, default_folder, find, locked
from launch.training.saves import adopt_start, last_checkpoint, load_checkpoint, save_folder, seed_dropout
from launch.training.signals import StopRequest, listening
from launch.training.stages import make_trainee, records_of
from launch.training.state import RunState
from launch.training.transition import note_flops
from launch.usage import asks_for_help, train_help
from launch.watching.console import Console, make_console
from launch.watching.profiling import profiled
from launch.watching.spectra import Spectra
from launch.watching.stage_notes import restore_stages, tell_stream
from launch.watching.stage_records import stream_of
from launch.watching.trackers.config import Images
from launch.watching.trackers.tracker import Level
from launch.watching.watch import has_room
from parallel.checkpoint import Checkpoint, open_checkpoint
from parallel.collectives import gather_objects, on_main, same_on_all
from parallel.elastic import ElasticHeads
from parallel.launchers import own_words, rank_in
from parallel.pulse import Pulse, gets_on
from parallel.runtime import Runtime, as_one, start
from parallel.saving import Saver
from parallel.watchdog import watched
from relora.lte import bounded_layers

_LOCK_SECONDS = 90.0
"""How long a supervised run waits for processes of an earlier attempt to end, which may be on other machines."""
_BOUNDED = (
    "warning: with lte.reset=none the update of {layers} layers, {first} among them, never reaches full rank: their "
    "smaller dimension is above lte.heads x adapter rank. Raise lora.rank or lte.heads, or choose lte.reset=factors"
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command `train`; returns its exit code."""
    overrides = own_words(sys.argv[1:] if argv is None else argv)
    if asks_for_help(overrides):
        print(train_help())
        return exits.DONE
    keep_own_log(os.environ, rank_in(os.environ))
    return exits.run(lambda: run_command(load(overrides)))


def run_command(config: TrainConfig) -> int:
    """Train as configured, on all processes that a launcher started; returns the exit code.

    Raises:
        ConfigError: something that the user can mend; nothing on disk is harmed.
    """
    limits, pulse = config.parallel, Pulse()
    with (
        start(tensor=limits.tensor, heads=config.heads, timeout_seconds=limits.timeout_seconds) as runtime,
        watched(
            runtime,
            explain=exits.explain,
            tell=exits.tell,
            silence_seconds=limits.silence_seconds,
            pulse=pulse,
            step_seconds=limits.timeout_seconds,
        ),
        beating(os.environ, lambda: gets_on(pulse, limits.timeout_seconds)) if runtime.is_main else nullcontext(),
        listening(StopFile(os.environ) if runtime.is_main else None) as stop,
    ):
        _check_processes(config, runtime)
        path = Path(on_main(runtime, lambda: str(default_folder(config))))
        patience = _LOCK_SECONDS if folder_of(os.environ) else 0.0
        with locked(path, seconds=patience) if runtime.is_main else nullcontext():
            console = make_console(enabled=runtime.is_main)
            preflight(config, path, runtime, console.info)
            folder = _find(config, path, runtime)
            for notice in folder.notices:
                console.info(notice)
            if folder.finished:
                console.info(f"{path} is done already: its results are in summary.json and final/")
                console.info("status: done")
                return _noted(exits.DONE, runtime)
            run = prepare(config, folder, runtime, console, stop)
            run.pulse = pulse
            return execute(run)


def prepare(config: TrainConfig, folder: RunFolder, runtime: Runtime, console: Console, stop: StopRequest) -> Run:
    """Open the data, build the model and the engine, and put a checkpoint into them if there is one.

    Nothing is written to the run folder before data and model have passed their checks.
    """
    _set_numerics(config)
    course = _open_course(config, runtime, console)
    hf_config = model_of_course(config, course)
    if config.continual is not None:
        check_opened(config, config.continual, course, runtime.batch.size)
    elastic = come(config, folder, runtime, course, console.info)
    resume = folder.resume
    state = _counters(folder, course, elastic, config.continual, runtime)
    apart = runtime
    if state.step < config.warm_start_steps:
        runtime = as_one(apart, config.parallel.timeout_seconds)
    tensor = runtime.tensor.size
    heads = [elastic.number] if elastic is not None else hosted_heads(config, runtime, state.step)
    phase = make_phase(config, hf_config, step=state.step, fresh=resume is None, tensor=tensor, heads=heads)
    bounded = [] if config.lte is None or config.relora is not None else bounded_layers(phase.model, config.lte)
    here = environment(runtime.device, mesh=apart.mesh)
    on_main(runtime, lambda: folder.begin(config, here, state, total=course.total_steps))
    if resume is None and config.run.save_start and phase.conversion is not None:
        on_main(runtime, lambda: save_model(phase.model, folder.path / "start", course.tokenizer, dtype=torch.float32))
    run = Run(
        config=config,
        folder=folder,
        runtime=runtime,
        apart=apart,
        course=course,
        method=make_method(config),
        stage=course.stage(max(0, state.step - 1)),
        hf_config=hf_config,
        engine=make_engine_of_heads(phase, config, runtime, state.paths),
        conversion=phase.conversion,
        outputs=phase.outputs,
        targets=phase.targets,
        state=state,
        guard=_guard(config),
        saver=Saver(folder.checkpoints, runtime, config.checkpoint),
        watch=make_watch(config, course, folder, console, runtime=apart, state=state),
        stop=stop,
        wishes=Wishes(folder.path if runtime.is_main else None),
        spectra=_spectra(config, folder),
        elastic=elastic,
    )
    note_flops(run)
    run.trainee = make_trainee(run)
    begin_heads(run)
    _introduce(run)
    if bounded:
        run.watch.say(_BOUNDED.format(layers=len(bounded), first=bounded[0]))
    if phase.adapter is not None:
        run.watch.say(f"lora.init_from: {phase.adapter}")
    if resume is None:
        seed_dropout(config.run.seed, runtime)
    else:
        _resume(run, resume)
    enter(run)
    return run


def _counters(
    folder: RunFolder,
    course: Course,
    elastic: ElasticHeads | None,
    continual: ContinualConfig | None,
    runtime: Runtime,
) -> RunState:
    """What the run knows of itself as it begins."""
    state = RunState()
    if folder.resume is not None:
        state = RunState.from_dict(folder.resume.state["run"])
        check_course(folder, course, state.begun)
        if continual is not None:
            state.gone_back = continual.restart_from
    done, asked = state.step, state.asked_restarts
    state.asked_restarts = on_main(runtime, lambda: folder.kept_restarts(asked, done))
    if elastic is not None:
        begin_state(elastic, state)
    return state


def _resume(run: Run, resume: Checkpoint) -> None:
    begins_low_rank = load_checkpoint(run, resume)
    run.saver.last = run.state.step
    if not begins_low_rank:
        adopt_start(run, resume)
    elif run.config.run.save_start:
        save_folder(run, "start", resume, torch.float32)
    resume.close()
    if run.course.is_stream:
        restore_stages(run.watch, records_of(run))
    run.watch.event("resume", run.state.step, path=str(resume.folder))
    run.watch.say(f"resumed from {resume.folder} at step {run.state.step}")


def execute(run: Run) -> int:
    """Train, then finish or stop; returns the exit code.

    Raises:
        TrainingDiverged: too many updates were refused; the last checkpoint is from before.
    """
    with FailureTold(run.watch, run.state):
        return _execute(run)


def _execute(run: Run) -> int:
    state, watch = run.state, run.watch
    if state.step == 0:
        evaluate(run)
    try:
        with watch.console.progress(run.course.total_steps, state.step) as watch.progress, profiled(run):
            complete = train(run)
        settle(run)
    except TrainingDiverged:
        run.saver.wait()
        _summarize(run, {"status": "diverged", "step": state.step, "skipped": state.skipped})
        raise
    if not complete:
        return _stop(run)
    summary = finish(run)
    _summarize(run, summary)
    watch.tracker.summary(summary)
    if run.runtime.is_main and watch.tracker.images is not Images.none:
        from launch.report import report  # matplotlib comes with it, and no step waits for that

        pictures = report([run.folder.path], run.folder.path / "report")
        watch.tracker.figures({picture.stem: picture for picture in pictures if picture.suffix == ".png"})
    watch.say(
        f"validation loss {summary['val_loss']:.4f}, perplexity {summary['val_perplexity']:.3f}, "
        f"{summary['restarts']} restarts; everything is in {run.folder.path}"
    )
    watch.say("status: done")
    code = _noted(exits.DONE, run.runtime)
    watch.finish(code)
    return code


def _stop(run: Run) -> int:
    """End an attempt at a run that has more to do; returns the exit code."""
    watch, step, again = run.watch, run.state.step, (bool(run.stop) or run.stop.agreed) and run.stop.again
    reason = _stopped_by(run)
    _summarize(run, {"status": "stopped", "reason": reason, "step": step})
    watch.say(f"stopped by {reason} after step {step}; the same command continues the run")
    watch.say("status: stopped")
    code = _noted(exits.PREEMPTED, run.runtime, reason=f"stopped by {reason}", again=again)
    if again and run.runtime.is_main:
        watch.alert("training stopped", f"by {reason} after step {step}, with a checkpoint", Level.warning)
    watch.finish(code)  # last: the time that a scheduler grants may end meanwhile
    return code


def _stopped_by(run: Run) -> str:
    """Who, or what setting, had the run stop."""
    config = run.config
    if run.stop.name is not None or run.stop.agreed:
        return run.stop.name or "a signal to another process"
    if config.training.stop_after is not None and run.state.step >= config.training.stop_after:
        return f"training.stop_after={config.training.stop_after}"
    assert config.continual is not None
    return f"continual.stop_after={config.continual.stop_after}"


def _noted(code: int, runtime: Runtime, *, reason: str = "", again: bool = True) -> int:
    """The code, of which the supervisor hears, too."""
    if runtime.is_main:
        note(Outcome(code=code, reason=reason, again=again))
    return code


def finish(run: Run) -> dict[str, Any]:
    """Write final/, measure what was written, and sum the run up."""
    state, config = run.state, run.config
    live_loss = state.val_loss if state.val_step == state.step else evaluate(run)
    assert live_loss is not None
    if not config.folds:
        measure_update(run)  # a fold has done so
    val_loss = live_loss
    if config.run.save_final:
        save_folder(run, "final", last_checkpoint(run), config.torch_dtype)
        if run.runtime.is_main:
            run.watch.tracker.model(run.folder.path / "final")
        val_loss = _written_loss(run, live_loss)
        run.watch.event("final", state.step, val_loss=val_loss, merge_difference=val_loss - live_loss)
    seconds = state.train_seconds
    stream: dict[str, Any] = {}
    if run.course.is_stream:
        stream = stream_of(records_of(run)).summary()
        tell_stream(run.watch, records_of(run))
    return {
        "status": "done",
        "steps": state.step,
        "tokens": state.tokens,
        "train_loss": state.train_loss,
        "val_loss": val_loss,
        "val_perplexity": math.exp(min(val_loss, 700.0)),
        "restarts": state.restarts,
        "syncs": state.syncs,
        "bytes_sent": state.bytes_sent,
        "sync_seconds": round(state.sync_seconds, 3),
        "sync_share": round(state.sync_seconds / seconds, 4) if seconds else None,
        "skipped": len(state.skipped),
        "tokens_per_second": round(state.tokens / seconds, 1) if seconds else None,
        "peak_memory_bytes": max(gather_objects(run.runtime, state.peak_memory_bytes)),
        "wall_seconds": round(seconds, 3),
        **stream,
    }


def _summarize(run: Run, summary: dict[str, Any]) -> None:
    if run.runtime.is_main:
        run.folder.write_summary(summary)


def _written_loss(run: Run, live_loss: float) -> float:
    """Validation loss of final/ as a user would load it, whole, on every process's device; the live one without room.

    The run's own model makes room for it first.
    """
    final = run.folder.path / "final"
    run.engine.close()
    run.model.to("cpu")
    gc.collect()
    size = sum(path.stat().st_size for path in final.glob("*.safetensors"))
    if not all(gather_objects(run.runtime, has_room(run.runtime.device, size))):
        run.watch.say(f"final/ is not loaded again: a process has no room for its {size:,} bytes")
        return live_loss
    model = (
        model_class(run.hf_config)
        .from_pretrained(final, dtype=run.config.torch_dtype, attn_implementation=run.config.model.attention)
        .to(run.runtime.device)
    )
    return validation_loss(run, model)


def _check_processes(config: TrainConfig, runtime: Runtime) -> None:
    check_mesh(config, runtime.mesh)
    check_device(config, runtime.device)
    told = json.dumps(resolved(config), sort_keys=True)
    same_on_all(
        runtime,
        "the configuration",
        hashlib.sha256(told.encode()).hexdigest()[:12],
        "start all processes with the same command and the same version",
    )


def _find(config: TrainConfig, path: Path, runtime: Runtime) -> RunFolder:
    """The run folder as the main process finds it."""

    def found() -> tuple[Path | None, bool, list[str], list[Path]]:
        folder = find(config, path)
        resume = None if folder.resume is None else folder.resume.folder
        return resume, folder.finished, folder.notices, folder.abandoned

    resume, finished, notices, abandoned = on_main(runtime, found)
    checkpoint = open_checkpoint(resume) if resume is not None else None
    return RunFolder(path=path, resume=checkpoint, finished=finished, notices=notices, abandoned=abandoned)


def _guard(config: TrainConfig) -> Guard:
    limits = config.training
    return Guard(sigma=limits.skip_sigma, window=limits.skip_window, max_skips=limits.max_skips)


def _open_course(config: TrainConfig, runtime: Runtime, console: Console) -> Course:
    """Open the data, on the main process first: it prepares what is not prepared yet."""

    def opened() -> Course:
        with following(console) as progress:
            return open_course(config, progress)

    ours: list[Course] = []
    on_main(runtime, lambda: ours.append(opened()))
    course = ours[0] if ours else opened()
    same_on_all(runtime, "the data (its fingerprint)", course.fingerprints, "let all of them read the same files")
    return course


def _set_numerics(config: TrainConfig) -> None:
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with fixed workspaces
    torch.use_deterministic_algorithms(config.run.deterministic)


def _spectra(config: TrainConfig, folder: RunFolder) -> Spectra | None:
    if config.lora is None or not config.run.save_start or config.evaluation.spectra.value == "none":
        return None
    return Spectra(folder.path / "start", folder.path, config.evaluation.spectra.value)


def _introduce(run: Run) -> None:
    """Print what is about to be trained on what."""
    run.watch.say(f"run folder: {run.folder.path}")
    show_data(run.watch.console, run.course.rows)
    show_model(run)


if __name__ == "__main__":
    spare_imports()
    sys.exit(main())
