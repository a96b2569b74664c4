"""From the full-rank warm start to low-rank training: a new phase, with the values of the one before.

Parameters that train on keep their masters and Adam state; the wrapped weights start their first cycle. The values
go through the checkpoint that ends the warm start, so that a run that is resumed there does the very same.
"""

import gc

import torch

from launch.planning.skeleton import step_flops
from launch.training.heads import begin_heads
from launch.training.phase import hosted_heads, make_engine_of_heads, make_phase
from launch.training.run import Run, show_model
from launch.training.saves import last_checkpoint, load_checkpoint, save_folder


def begin_low_rank(run: Run) -> None:
    """Make the model low-rank and give it an engine of its own; the checkpoint of this step must be written."""
    checkpoint = last_checkpoint(run)
    run.engine.close()
    del run.engine
    gc.collect()  # the old engine's and its model's memory, which refer to each other
    run.runtime = run.apart
    phase = make_phase(
        run.config,
        run.hf_config,
        step=run.state.step,
        fresh=False,
        tensor=run.runtime.tensor.size,
        heads=hosted_heads(run.config, run.runtime, run.state.step),
    )
    run.conversion = phase.conversion
    run.targets = phase.targets
    run.engine = make_engine_of_heads(phase, run.config, run.runtime, run.state.paths)
    begin_heads(run)
    load_checkpoint(run, checkpoint)
    note_flops(run)
    show_model(run)
    if run.config.run.save_start:
        save_folder(run, "start", checkpoint, torch.float32)
    checkpoint.close()


def note_flops(run: Run) -> None:
    """Count what an update of this phase executes, for the main process, which alone has an audience."""
    if run.runtime.is_main:
        run.watch.flops_per_step = step_flops(run.config, run.hf_config, run.state.step, run.watch.say)
