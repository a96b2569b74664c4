"""The sync of a run's heads: the merge, what the heads tell each other with it, and what the audience hears.

Between syncs heads do not talk, so whatever all must agree on waits for the next one: a wish to stop, and a head
that has refused too many updates.
"""

import math
from dataclasses import asdict

from launch.guard import TrainingDiverged
from launch.run import Run, measure_update
from relora.lte import sync
from relora.spectrum import MergeRanks


def sync_run(run: Run) -> None:
    """Merge the heads' mean change, and agree.

    Raises:
        TrainingDiverged: a head has refused too many updates; on all processes.
    """
    config, state = run.config, run.state
    assert config.lte is not None
    assert run.heads is not None
    loss = math.nan if state.train_loss is None else state.train_loss
    whole = run.spectra is not None and run.runtime.tensor.size == 1  # else factors travel in parts
    ranks = MergeRanks(run.spectra.modules(run.model) if run.spectra is not None and whole else ())
    report, said = sync(
        run.model,
        config.lte,
        run.engine.store,
        run.heads,
        seed=config.run.seed,
        sync_index=state.syncs + 1,
        words=(loss, run.stop.asked, run.diverged is not None),
        ranks=ranks,
    )
    losses, asked, diverged = (list(column) for column in zip(*said, strict=True))
    run.stop.agreed = any(asked)
    state.syncs += 1
    state.bytes_sent += report.bytes
    state.sync_seconds += report.seconds
    mean = sum(losses) / len(losses)
    run.watch.event("sync", state.step, loss=mean, losses=losses, effective_rank=ranks.mean, **asdict(report))
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
    if state.step < config.total_steps and config.evaluation.every and state.step % config.evaluation.every == 0:
        measure_update(run)  # a decomposition costs far more than a sync; the last one is made by `finish`
