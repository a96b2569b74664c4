"""The sync of a run's heads: the merge, what the heads tell each other with it, and what the audience hears.

Between syncs heads do not talk, so whatever all must agree on waits for the next one: a wish to stop, and a head
that has refused too many updates.
"""

import math
from dataclasses import asdict

from launch.guard import TrainingDiverged
from launch.run import Run
from relora.lte import sync


def sync_run(run: Run) -> None:
    """Merge the heads' mean change, and agree.

    Raises:
        TrainingDiverged: a head has refused too many updates; on all processes.
    """
    config, state = run.config, run.state
    assert config.lte is not None
    assert run.heads is not None
    loss = math.nan if state.train_loss is None else state.train_loss
    report, said = sync(
        run.model,
        config.lte,
        run.engine.store,
        run.heads,
        seed=config.run.seed,
        sync_index=state.syncs + 1,
        words=(loss, run.stop.asked, run.diverged is not None),
    )
    losses, asked, diverged = (list(column) for column in zip(*said, strict=True))
    run.stop.agreed = any(asked)
    state.syncs += 1
    state.bytes_sent += report.bytes
    mean = sum(losses) / len(losses)
    run.watch.event("sync", state.step, loss=mean, losses=losses, **asdict(report))
    run.watch.say(
        f"step {state.step}: sync {report.sync}, {report.layers} layers took up the mean of {config.lte.heads} heads "
        f"(update {report.update_ratio:.2%} of the base), {report.bytes:,} bytes a head in {report.seconds:.2f} s, "
        f"loss {mean:.4f}"
    )
    if any(diverged):
        head = diverged.index(1.0)
        raise TrainingDiverged(
            run.diverged or f"head {head} has refused too many updates; the processes of that head say more"
        )
