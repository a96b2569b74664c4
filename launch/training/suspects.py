"""Whose numbers were not finite before all processes summed theirs: a broken GPU's alone, or everybody's.

Losses are known of every step. Gradients are summed as they are made, so each process looks at its own only once a step
was refused for them, until one is accepted again. Nothing is known of LTE's heads, which refuse updates apart.
"""

import math
from socket import gethostname

import torch
from torch import Tensor

from launch.training.guard import TrainingDiverged
from launch.training.run import Run
from parallel.collectives import gather_objects
from parallel.engine import Engine, StepResult


def look_closer(run: Run, parts: Tensor, loss: float, result: StepResult) -> list[int]:
    """The processes whose own numbers were not finite in a step, as far as is known; none of an accepted one.

    Args:
        parts: this process's parts of the losses.

    Collectives: a gather, after a step that was refused for numbers that are not finite.
    """
    engine = run.engine
    if run.sync is not None or not isinstance(engine, Engine):
        return []
    if math.isfinite(loss) and math.isfinite(result.grad_norm):
        engine.look_at_gradients(wanted=False)
        return []
    own = not bool(torch.isfinite(parts).all()) or not engine.own_gradients_finite
    hosts = gather_objects(run.runtime, (own, gethostname()))
    bad = {rank: host for rank, (own, host) in enumerate(hosts) if own}
    run.suspects.append((run.state.step, bad))
    run.hosts = len({host for _, host in hosts})
    engine.look_at_gradients(wanted=True)
    return list(bad)


def with_suspect(run: Run, error: TrainingDiverged) -> TrainingDiverged:
    """The error with the machine that alone had such numbers in the window, if there are others."""
    since = run.state.step - run.guard.window
    found = {rank: host for step, bad in run.suspects if step > since for rank, host in bad.items()}
    if run.hosts < 2 or len(set(found.values())) != 1:
        return error
    host, ranks = next(iter(found.values())), ", ".join(str(rank) for rank in sorted(found))
    words = (
        f"Only {host} (process {ranks}) had numbers that were not finite before the sum: its hardware may be at fault"
    )
    return TrainingDiverged(f"{error}. {words}", step=error.step, host=host)
