"""Opens what a process tells a tracker: the run itself, runs of LTE's heads, or the load of a node."""

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.watching.trackers.config import HeadRuns, TrackerConfig, TrackerKind
from launch.watching.trackers.event_files import open_event_files
from launch.watching.trackers.modes import Mode, modes
from launch.watching.trackers.names import Names, seats
from launch.watching.trackers.queued import QueuedTracker
from launch.watching.trackers.tracker import Tracker
from launch.watching.trackers.wandb_run import WandbTracker, open_wandb
from parallel.collectives import gather_objects
from parallel.runtime import Runtime

_MORE_SECONDS = 5.0  # than W&B is given, for it to say itself that it has not ended


@dataclass(kw_only=True, slots=True)
class Opening:
    """What all trackers of a process have in common."""

    config: TrackerConfig
    run_dir: Path
    resolved: Mapping[str, Any]
    """The configuration as plain values."""
    step: int
    """Updates so far."""
    say: Callable[[str], None]
    commands: Sequence[str] = ()
    """Tags that are commands."""
    ask: Callable[[str], None] | None = None
    """Called with such a tag, by a thread of its own; None: nobody listens."""
    _modes: Sequence[Mode] | None = None
    """Those of W&B that are left to try: what has failed once is not tried again."""

    def open(self, names: Names, *, system_metrics: bool, folder: str = ".") -> Tracker:
        """A run by these names; one that does nothing if it cannot be had.

        Args:
            folder: where TensorBoard's files lie, below the run's.

        Raises: ConfigError when the package is not installed.
        """
        config = self.config
        if config.kind is TrackerKind.tensorboard:
            root = self.run_dir / "tensorboard" if config.dir is None else Path(config.dir) / self.run_dir.name
            tracker = open_event_files(config, root / folder, step=self.step, resolved=self.resolved, say=self.say)
        else:
            tracker = self._open_wandb(names, system_metrics)
        if tracker is None:
            tracker = Tracker()
            tracker.run_id = names.run_id
            return tracker
        return QueuedTracker(tracker, self.say, finish_seconds=config.finish_timeout_seconds + _MORE_SECONDS)

    def _open_wandb(self, names: Names, system_metrics: bool) -> Tracker | None:
        self._modes = modes(self.config.mode, self.say) if self._modes is None else self._modes
        if "disabled" in self._modes:
            return None
        tracker = open_wandb(
            self.config,
            names,
            run_dir=self.run_dir,
            resolved=self.resolved,
            modes=self._modes,
            system_metrics=system_metrics,
            say=self.say,
        )
        if tracker is None:
            self.say("this attempt goes on without W&B; metrics.jsonl has everything")
            return None
        self._modes = [tracker.mode]
        if self.config.tag_commands and self.ask is not None:
            self._listen(tracker)
        return tracker

    def _listen(self, tracker: WandbTracker) -> None:
        assert self.ask is not None
        ask, self.ask = self.ask, None  # of one run only
        if tracker.mode == "online":
            tracker.listen(self.commands, ask)
        else:
            self.say("tracker.tag_commands needs a run that is online, and this one is not: `accrete tell` works")


def open_trackers(
    opening: Opening, names: Names, runtime: Runtime, heads: Sequence[int]
) -> tuple[Tracker, dict[int, Tracker]]:
    """What this process tells of itself, and by number what it tells of further heads of LTE that it hosts.

    All processes call this.

    Args:
        heads: those that this process hosts, or has a part of.

    Raises: ConfigError when the package is not installed.
    """
    config = opening.config
    apart = config.heads is HeadRuns.apart and runtime.model.index == 0
    told = gather_objects(runtime, (socket.gethostname(), list(heads) if apart else []))
    seat = seats([host for host, _ in told], [own for _, own in told], config.system_metrics)[runtime.process_rank]
    first, rest = (None, seat.heads) if runtime.is_main else (seat.heads[0] if seat.heads else None, seat.heads[1:])
    if runtime.is_main:
        own = opening.open(names, system_metrics=seat.samples)
    elif first is not None:
        own = opening.open(names.of_head(first), system_metrics=seat.samples, folder=f"head_{first}")
    elif seat.node is not None and config.kind is TrackerKind.wandb:
        own = Load(opening.open(names.of_node(seat.node), system_metrics=True))
    else:
        own = Tracker()
    more = {head: opening.open(names.of_head(head), system_metrics=False, folder=f"head_{head}") for head in rest}
    return own, more


class Load(Tracker):
    """The load of a machine, which the tracker under it samples by itself; it is told nothing."""

    def __init__(self, sampled: Tracker) -> None:
        self._sampled = sampled

    def finish(self, exit_code: int = 0) -> None:
        """Close it."""
        self._sampled.finish(exit_code)
