"""`train`: from a checked configuration to a finished, stopped or refused run."""

import gc
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from continual.data import Data, open_data
from launch import exits
from launch.config import TrainConfig, load, resolved
from launch.console import Console, make_console
from launch.environment import environment
from launch.flops import peak_flops
from launch.guard import Guard, TrainingDiverged
from launch.loop import evaluate, train, validation_loss
from launch.model import model_config, name_special_tokens, save_model
from launch.prepare import following, show_data
from launch.report import report
from launch.run import (
    Run,
    adopt_start,
    build,
    load_checkpoint,
    low_rank_at,
    make_engine,
    masters,
    save_start,
    show_model,
    step_flops,
)
from launch.run_folder import RunFolder, default_folder, find, locked
from launch.signals import StopRequest, listening
from launch.spectra import Spectra
from launch.state import RunState
from launch.tracker import open_tracker
from launch.usage import asks_for_help, train_help
from launch.watch import Watch
from parallel.runtime import start
from relora.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """The command `train`; returns its exit code."""
    overrides = list(sys.argv[1:] if argv is None else argv)
    if asks_for_help(overrides):
        print(train_help())
        return exits.DONE
    return exits.run(lambda: run_command(load(overrides)))


def run_command(config: TrainConfig) -> int:
    """Train as configured; returns the exit code.

    Raises:
        ConfigError: something that the user can mend; nothing on disk is harmed.
    """
    path = default_folder(config)
    with locked(path):
        folder = find(config, path)
        console = make_console(enabled=True)
        for notice in folder.notices:
            console.info(notice)
        if folder.finished:
            console.info(f"{path} is done already: its results are in summary.json and final/")
            console.info("status: done")
            return exits.DONE
        with start() as runtime, listening() as stop:
            run = prepare(config, folder, runtime.device, console, stop)
            return execute(run)


def prepare(config: TrainConfig, folder: RunFolder, device: torch.device, console: Console, stop: StopRequest) -> Run:
    """Open the data, build the model and the engine, and put a checkpoint into them if there is one.

    Nothing is written to the run folder before data and model have passed their checks.
    """
    _set_numerics(config)
    with following(console) as progress:
        data = open_data(config.data, seed=config.run.seed, progress=progress)
    if data.validation is None:
        raise ConfigError(
            "data.validation_fraction=0 without data.validation_path leaves nothing to validate on: set one of them"
        )
    hf_config = model_config(config.model, vocab_size=data.vocab_size, sequence_length=config.data.sequence_length)
    if config.model.name_or_path is None:
        name_special_tokens(hf_config, data.tokenizer)
    resume = folder.resume
    state = RunState.from_dict(resume.state["run"]) if resume else RunState()
    if resume:
        _check_data(folder, data)
    model, conversion, adapter = build(config, hf_config, device, state, fresh=resume is None)
    flops = step_flops(model, data, config, device)
    folder.begin(config, environment(device), step=state.step)
    watch = _watch(config, folder, console, device, flops)
    run = Run(
        config=config,
        folder=folder,
        device=device,
        data=data,
        model=model,
        engine=make_engine(model, config),
        state=state,
        guard=Guard(
            sigma=config.training.skip_sigma,
            window=config.training.skip_window,
            max_skips=config.training.max_skips,
        ),
        watch=watch,
        stop=stop,
        spectra=_spectra(config, folder),
        conversion=conversion,
    )
    _introduce(run)
    if adapter is not None:
        watch.say(f"lora.init_from: {adapter}")
    if resume:
        load_checkpoint(run, resume)
        adopt_start(run, resume)
        watch.event("resume", state.step, path=str(resume.folder))
        watch.say(f"resumed from {resume.folder} at step {state.step}")
    else:
        if low_rank_at(config, 0):
            save_start(run)
        torch.manual_seed(config.run.seed)  # from here on for dropout only
    return run


def execute(run: Run) -> int:
    """Train, then finish or stop; returns the exit code.

    Raises:
        TrainingDiverged: too many updates were refused; the last checkpoint is from before.
    """
    state, watch = run.state, run.watch
    if state.step == 0:
        evaluate(run)
    try:
        with watch.console.progress(run.config.total_steps, state.step) as watch.progress:
            complete = train(run)
    except TrainingDiverged:
        run.folder.write_summary({"status": "diverged", "step": state.step, "skipped": state.skipped})
        watch.tracker.finish(exits.FAILED)
        raise
    if not complete:
        reason = run.stop.name or f"training.stop_after={run.config.training.stop_after}"
        run.folder.write_summary({"status": "stopped", "reason": reason, "step": state.step})
        watch.say(f"stopped by {reason} after step {state.step}; the same command continues the run")
        watch.say("status: stopped")
        watch.tracker.finish(exits.PREEMPTED)
        return exits.PREEMPTED
    summary = finish(run)
    run.folder.write_summary(summary)
    watch.tracker.summary(summary)
    if watch.tracker.run_id is not None:
        pictures = report([run.folder.path], run.folder.path / "report")
        watch.tracker.figures({picture.stem: picture for picture in pictures if picture.suffix == ".png"})
    watch.tracker.finish(exits.DONE)
    watch.say(
        f"validation loss {summary['val_loss']:.4f}, perplexity {summary['val_perplexity']:.3f}, "
        f"{summary['restarts']} restarts; everything is in {run.folder.path}"
    )
    watch.say("status: done")
    return exits.DONE


def finish(run: Run) -> dict[str, Any]:
    """Write final/, measure what was written, and sum the run up."""
    state, config = run.state, run.config
    live_loss = state.val_loss if state.val_step == state.step else evaluate(run)
    assert live_loss is not None
    if run.spectra is not None and state.step > 0:
        run.spectra.measure(run.model, state.step, state.restarts + 1)  # the last cycle's, which final/ folds in
    val_loss = live_loss
    if config.run.save_final:
        final = run.folder.path / "final"
        save_model(run.model, final, run.data.tokenizer, dtype=config.torch_dtype, masters=masters(run))
        val_loss = _written_loss(run)
        run.watch.event("final", state.step, val_loss=val_loss, merge_difference=val_loss - live_loss)
    seconds = state.train_seconds
    return {
        "status": "done",
        "steps": state.step,
        "tokens": state.tokens,
        "train_loss": state.train_loss,
        "val_loss": val_loss,
        "val_perplexity": math.exp(min(val_loss, 700.0)),
        "restarts": state.restarts,
        "syncs": 0,
        "bytes_sent": 0,
        "skipped": len(state.skipped),
        "tokens_per_second": round(state.tokens / seconds, 1) if seconds else None,
        "peak_memory_bytes": state.peak_memory_bytes,
        "wall_seconds": round(seconds, 3),
    }


def _written_loss(run: Run) -> float:
    """Validation loss of final/ as a user would load it. The run's own model makes room for it first."""
    run.engine.close()
    run.model.to("cpu")
    gc.collect()
    model = AutoModelForCausalLM.from_pretrained(
        run.folder.path / "final", dtype=run.config.torch_dtype, attn_implementation=run.config.model.attention
    ).to(run.device)
    return validation_loss(run, model)


def _set_numerics(config: TrainConfig) -> None:
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with fixed workspaces
    torch.use_deterministic_algorithms(config.run.deterministic)


def _check_data(folder: RunFolder, data: Data) -> None:
    assert folder.resume is not None
    if folder.resume.state["data"] != data.fingerprint and folder.resume.folder.parent == folder.checkpoints:
        raise ConfigError(
            f"the data has changed since {folder.resume.folder} was written (fingerprint "
            f"{folder.resume.state['data'][:12]} then, {data.fingerprint[:12]} now), so the run cannot go on exactly: "
            f"restore it, or branch off with a new run.dir and checkpoint.resume={folder.path}"
        )


def _spectra(config: TrainConfig, folder: RunFolder) -> Spectra | None:
    if config.lora is None or not config.run.save_start or config.evaluation.spectra.value == "none":
        return None
    return Spectra(folder.path / "start", folder.path, config.evaluation.spectra.value)


def _watch(config: TrainConfig, folder: RunFolder, console: Console, device: torch.device, flops: int) -> Watch:
    tracker = open_tracker(
        config.tracker,
        run_dir=folder.path,
        run_name=config.run.name,
        resolved=resolved(config),
        run_id=folder.tracker_id,
        say=console.info,
    )
    if tracker.run_id is not None:
        folder.write_tracker_id(tracker.run_id)
    peak = config.training.peak_flops or peak_flops(device, config.torch_dtype)[0]
    cycles = None
    if config.relora is not None:
        cycles = -(-(config.total_steps - config.warm_start_steps) // config.relora.every)
    return Watch(
        metrics=folder.metrics,
        console=console,
        tracker=tracker,
        device=device,
        log_every=config.run.log_every,
        flops_per_step=flops,
        peak_flops=peak,
        cycles=cycles,
    )


def _introduce(run: Run) -> None:
    """Print what is about to be trained on what."""
    run.watch.say(f"run folder: {run.folder.path}")
    total = run.config.total_steps * run.config.training.global_batch_size
    show_data(run.watch.console, run.data.describe(total))
    show_model(run)


if __name__ == "__main__":
    sys.exit(main())
