"""Puts a run's audience together: what its tracker calls it, who listens, and how they hear of a failure."""

import hashlib
import json
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import TracebackType

from launch import exits
from launch.config import TrainConfig, resolved
from launch.jobs.sweep import is_sweep
from launch.planning.flops import peak_flops
from launch.training.course import Course
from launch.training.pace import cycles
from launch.training.phase import hosted_heads
from launch.training.requests import Wish, request
from launch.training.run_folder import RunFolder, binding
from launch.training.state import RunState
from launch.watching.console import Console
from launch.watching.trackers.config import HeadRuns, SystemMetrics, TrackerConfig
from launch.watching.trackers.names import Names
from launch.watching.trackers.opening import Opening, open_trackers
from launch.watching.trackers.tracker import Level, Tracker
from launch.watching.watch import Watch
from parallel.collectives import on_main
from parallel.runtime import Runtime
from relora.errors import ConfigError


def make_watch(
    config: TrainConfig,
    course: Course,
    folder: RunFolder,
    console: Console,
    *,
    runtime: Runtime,
    state: RunState,
) -> Watch:
    """The audience of a run whose folder has been begun; all processes call this.

    Args:
        runtime: of heads that train apart, whatever the phase that the run is in.
    """
    heads = hosted_heads(config, runtime, config.warm_start_steps)
    tracker, of_heads = _trackers(config, folder, console, runtime, heads, state.step)
    peak = config.training.peak_flops
    if peak is None and runtime.is_main:
        peak = peak_flops(runtime.device, config.torch_dtype)[0]
    return Watch(
        metrics=folder.metrics if runtime.is_main else None,
        console=console,
        tracker=tracker,
        device=runtime.device,
        log_every=config.run.log_every,
        peak_flops=None if peak is None else peak * runtime.world_size,
        cycles=None if course.is_stream else cycles(config, course.stages[0], state.asked_restarts),
        heads=of_heads,
    )


def _trackers(
    config: TrainConfig, folder: RunFolder, console: Console, runtime: Runtime, heads: Sequence[int], step: int
) -> tuple[Tracker, dict[int, Tracker]]:
    if config.tracker is None:
        return Tracker(), {}
    run_id = on_main(runtime, lambda: folder.tracker_id or secrets.token_hex(4))
    opening = Opening(
        config=config.tracker,
        run_dir=folder.path,
        resolved=resolved(config),
        step=step,
        say=console.info,
        commands=[wish.value for wish in Wish],
        ask=partial(_ask, folder.path, console.info) if runtime.is_main else None,
    )
    tracker, of_heads = open_trackers(opening, names_of(config, config.tracker, folder, run_id), runtime, heads)
    if runtime.is_main and tracker.run_id is not None:
        folder.write_tracker_id(tracker.run_id)
    return tracker, of_heads


def _ask(run_dir: Path, say: Callable[[str], None], tag: str) -> None:
    """Have a run do what a tag says, as `accrete tell` would."""
    try:
        request(run_dir, Wish(tag))
    except ConfigError as error:
        say(f"tag in W&B: {error}")


def names_of(config: TrainConfig, tracker: TrackerConfig, folder: RunFolder, run_id: str) -> Names:
    """What the run is called, and what it shares with others: with those of its sweep, or with other heads of LTE."""
    path = folder.path.resolve()
    elastic = config.lte is not None and config.lte.meeting is not None
    group, among = None, is_sweep(path.parent) or elastic
    if elastic:
        told = json.dumps(binding(config), sort_keys=True)  # what all heads have in common, wherever they run
        group = f"heads-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    elif is_sweep(path.parent):
        group = path.parent.name
    elif tracker.heads is HeadRuns.apart or tracker.system_metrics is SystemMetrics.nodes:
        group = path.name
    return Names(
        run_id=run_id,
        name=tracker.name or (f"{config.run.name}-{path.name}" if among else config.run.name),
        group=tracker.group or group,
        job_type=tracker.job_type or ("head" if elastic else "train"),
    )


class FailureTold(AbstractContextManager[None]):
    """Tells the trackers of an error that ends a run, and closes them; who presses Ctrl-C twice does not wait."""

    def __init__(self, watch: Watch, state: RunState) -> None:
        self._watch, self._state = watch, state

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            text = f"after step {self._state.step}: {type(error).__name__}: {' '.join(str(error).split())}"
            self._watch.alert("training failed", text, Level.failure)
            self._watch.finish(exits.FAILED)
