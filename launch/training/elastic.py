"""A head that is a job of its own: how it comes to the others, syncs with them, catches up, and leaves.

It trains on what the meeting point leases to it. After each sync it takes up those that were made without it, its own
change kept apart, until it has something to train on again. docs/elastic.md tells what happens when something fails.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from launch.config import TrainConfig
from launch.models.snapshot import is_shared
from launch.training.course import Course
from launch.training.guard import TrainingDiverged
from launch.training.head_state import KIND, held_of_syncs, take_momenta, take_primes
from launch.training.heads import words_of
from launch.training.run import Run
from launch.training.run_folder import RunFolder, binding
from launch.training.saves import shared_parts
from launch.training.state import RunState
from parallel.elastic import Admission, ElasticHeads
from parallel.frames import TOKEN_VARIABLE, Bytes
from parallel.ledger import Range, shown
from parallel.meeting_line import GivenUp, MeetingLost
from parallel.meeting_terms import Decision, Lease, Terms
from parallel.regions import Region
from parallel.runtime import Runtime
from relora.initialize import key_of
from relora.sync_report import SyncReport


def come(
    config: TrainConfig, folder: RunFolder, runtime: Runtime, course: Course, say: Callable[[str], None]
) -> ElasticHeads | None:
    """Come to the meeting point, and wait until this head may begin; None without elastic heads.

    A head that joins others gets their state, so its own checkpoint is left aside.

    Raises:
        ConfigError: the meeting point refuses this head.
        MeetingLost: it is not there.
    """
    if config.lte is None or config.lte.meeting is None:
        return None
    counters = folder.resume.state["run"] if folder.resume is not None else None
    say(f"coming to the meeting point at {config.lte.meeting}")
    heads = ElasticHeads(
        runtime,
        config.lte,
        terms_of(config, runtime, course.fingerprints),
        token=os.environ.get(TOKEN_VARIABLE, ""),
        checkpoint=0 if counters is None else counters["syncs"],
        wanted=None if counters is None else counters["number"],
        era=0 if counters is None else counters["era"],
        patience_seconds=config.parallel.timeout_seconds,
    )
    try:
        admission = heads.admission()
    except GivenUp as error:
        raise MeetingLost("the run has ended while this head waited to be admitted to it") from error
    if admission.joins and folder.resume is not None:
        say(f"the others are at sync {admission.sync}, so {folder.resume.folder} is not used")
        folder.resume = None
    joins = f", and gets the state after sync {admission.sync}" if admission.joins else ""
    say(f"this is head {heads.number} of {heads.count}{joins}")
    return heads


def terms_of(config: TrainConfig, runtime: Runtime, fingerprint: str) -> Terms:
    """What all heads must agree on."""
    lte, mesh = config.lte, runtime.mesh
    assert lte is not None
    told = json.dumps([binding(config), fingerprint], sort_keys=True)
    return Terms(
        identity=hashlib.sha256(told.encode()).hexdigest()[:12],
        layout=f"{mesh.data} data x {mesh.tensor} tensor, ZeRO {config.parallel.zero_stage}",
        heads=lte.heads,
        quorum=lte.least_members,
        wait_seconds=lte.wait_seconds,
        silence_seconds=config.parallel.silence_seconds,
        sync_every=lte.sync_every,
        steps=config.total_steps,
        batch=config.job_batch,
        positions=runtime.world_size,
    )


def begin_state(heads: ElasticHeads, state: RunState) -> None:
    """Set the counters that a head begins with."""
    assert heads.admitted is not None
    state.number, state.syncs, state.era = heads.number, heads.admitted.sync, heads.admitted.era
    state.step = heads.step_of(state.syncs)


def enter(run: Run) -> None:
    """Get the state of the others, or hand it to those that join; then ask for something to train on."""
    heads = run.elastic
    if heads is None:
        return
    assert heads.admitted is not None
    _draw_dropout(run)
    try:
        if heads.admitted.joins:
            _take_state(run, heads.admitted)
        else:
            _settle(run, heads.admitted.decision)
        if not _follow(run):
            _leave(run, "is done")
    except GivenUp:
        _join_anew(run)


def meet_others(run: Run) -> None:
    """The sync that is due after this step, if one is, and those that this head has missed.

    Raises:
        TrainingDiverged: this head has refused too many updates; the others go on without it.
        MeetingLost: the meeting point is gone.
    """
    heads, state = run.elastic, run.state
    assert heads is not None
    assert heads.lease is not None
    while state.step == heads.step_of(heads.lease.sync):
        if run.diverged:
            heads.goodbye("left, since it has refused too many updates")
            raise TrainingDiverged(run.diverged[heads.number], step=run.state.step)
        try:
            took_part = _sync(run)
            if took_part and heads.leaving:
                run.stop.agreed = True
                _leave(run, "left, as it was asked to")
                return
            if not _follow(run):
                if not took_part:
                    _drop_change(run)
                _leave(run, "is done")
                return
        except GivenUp:
            _join_anew(run)


def _sync(run: Run) -> bool:
    """Bring this head's change to the open sync; returns whether it is in it."""
    heads, state, sync = run.elastic, run.state, run.sync
    assert heads is not None
    assert sync is not None
    stop_after = run.config.training.stop_after
    heads.leaving = run.stop.asked or (stop_after is not None and state.step >= stop_after)
    learned = list(state.learned)
    ((report, said),) = sync.advance(
        state.step, state.syncs + 1, lambda fragment: words_of(run, fragment), everything=True
    )
    took_part = heads.number in report.members
    if not took_part:
        state.learned = learned
    _note(run, report, said)
    return took_part


def _follow(run: Run) -> bool:
    """Take up what was made without this head, then a lease; returns whether there is anything left to train."""
    heads, state, sync = run.elastic, run.state, run.sync
    assert heads is not None
    assert sync is not None
    while True:
        found = heads.after(state.syncs)
        if found is None:
            return False
        if isinstance(found, Lease):
            state.step = heads.step_of(found.sync) - found.steps
            return True
        report, said = sync.take_up(found, heads.step_of(state.syncs + 1), state.syncs + 1)
        _note(run, report, said)


def _note(run: Run, report: SyncReport, said: list[list[float]]) -> None:
    """Count a sync, tell the audience, and do what its decision asks of this head."""
    heads, state = run.elastic, run.state
    assert heads is not None
    decision = heads.decision
    assert decision is not None
    state.syncs += 1
    assert state.syncs == decision.sync == report.sync
    state.step = heads.step_of(state.syncs)
    state.position, state.tokens = decision.merged, decision.merged * run.config.data.sequence_length
    state.sync_seconds += report.seconds
    state.bytes_sent += report.bytes
    losses = [words[1] for words in said]
    loss = sum(weight * one for weight, one in zip(report.weights, losses, strict=True))
    more = {
        "trained": decision.trained,
        "returned": decision.returned,
        "gone": decision.gone,
        "joined": decision.joined,
    }
    run.watch.event("sync", state.step, loss=loss, losses=losses, **asdict(report), **more)
    late = "" if heads.number in report.members else "; this head was late for it"
    run.watch.say(
        f"step {state.step}: sync {report.sync}, {report.layers} layers took up the mean of heads "
        f"{', '.join(map(str, report.members))} (update {report.update_ratio:.2%} of the base), {report.bytes:,} bytes "
        f"in {report.seconds:.2f} s, loss {loss:.4f}{late}"
    )
    for text in decision.gone:
        run.watch.say(text + _came_back(decision.returned))
    _settle(run, decision)


def _came_back(ranges: list[Range]) -> str:
    return f"; other heads train on the positions {shown(ranges)}" if ranges else ""


def _settle(run: Run, decision: Decision | None) -> None:
    """Forget what was known of heads whose numbers others have now, and hand the state to those if it is asked for."""
    heads, sync = run.elastic, run.sync
    assert heads is not None
    assert sync is not None
    if decision is None:
        return
    for peers in sync.peers.values():
        for number in decision.joined:
            peers.pop(number, None)
    if decision.provider == heads.number:
        run.watch.say(f"handing the state after sync {decision.sync} to the heads that join")
        heads.hand_over(decision.sync, _state_of(run))


def _state_of(run: Run) -> list[tuple[dict[str, str | list[int]], Bytes]]:
    """All parts of what heads have in common, as they travel."""
    kinds = {**shared_parts(run), KIND: held_of_syncs(run)}
    return [
        (
            {"kind": kind, "name": name, "dtype": str(part.dtype).removeprefix("torch.")},
            part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
        )
        for kind, named in kinds.items()
        for name, (_, part) in named.items()
        if kind != KIND or is_shared(name) or name.endswith("/prime")
    ]


def _take_state(run: Run, admission: Admission) -> None:
    """Put the others' state into this head, with factors of its own.

    Raises:
        GivenUp: another life is needed.
    """
    heads, sync = run.elastic, run.sync
    assert heads is not None
    assert sync is not None
    while (parts := heads.take_over()) is None:
        admission = heads.admission()
    begin_state(heads, run.state)
    values: dict[tuple[str, str], Tensor] = {}
    for header, data in parts:
        dtype = getattr(torch, header["dtype"])
        values[header["kind"], header["name"]] = torch.frombuffer(data, dtype=dtype) if len(data) else torch.empty(0)

    def shaped(kind: str, name: str, region: Region) -> Tensor:
        return values[kind, name].view(region.part_shape)

    run.engine.store.load(lambda kind, name, region: shaped(kind, name, region) if (kind, name) in values else None)
    sync.dense.settle()
    sync.make_room()
    stored = {name for kind, name in values if kind == KIND}
    take_momenta(run, stored, lambda name, region: shaped(KIND, name, region))
    take_primes(run, stored, lambda name, region: shaped(KIND, name, region))
    sync.begin_anew(admission.sync)
    run.state.learned = [0.0] * len(run.state.learned)
    if admission.decision is not None:
        merged = admission.decision.merged
        run.state.position, run.state.tokens = merged, merged * run.config.data.sequence_length
    run.watch.event("join", run.state.step, head=heads.number, sync=admission.sync)
    run.watch.say(f"joined as head {heads.number} with the state after sync {admission.sync}, step {run.state.step}")


def _join_anew(run: Run) -> None:
    """Come again as a new head, after this one was given up; what it had not brought to a sync is dropped.

    Raises:
        MeetingLost: no head has the run's state any more.
    """
    heads = run.elastic
    assert heads is not None
    run.watch.say(
        "the meeting point has given this head up: it joins anew, without what it has learned since its last sync"
    )
    try:
        heads.come_again()
        _take_state(run, heads.admission())
        if not _follow(run):
            _leave(run, "is done")
    except GivenUp as error:
        raise MeetingLost(
            "no head has the run's state in memory any more. Checkpoints are whole: start the same command again"
        ) from error


def _drop_change(run: Run) -> None:
    """The run has ended with a sync that this head was late for: what it had still to bring is lost."""
    assert run.sync is not None
    run.sync.begin_anew(run.state.syncs)
    run.watch.say("the last sync was made without this head, whose last change is lost")


def _leave(run: Run, reason: str) -> None:
    assert run.elastic is not None
    run.elastic.goodbye(reason)


def _draw_dropout(run: Run) -> None:
    """Other draws of dropout than the other heads', at the beginning."""
    assert run.elastic is not None
    if run.folder.resume is None:
        number, place = run.elastic.number, run.runtime.batch.index
        torch.manual_seed(key_of(run.config.run.seed, "dropout", run.state.step, number, place) >> 1)
