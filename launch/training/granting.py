"""Grants a run's requests between two steps, on all processes alike.

A restart that was asked for is kept in a file before it is made: a run that is killed and goes on from an earlier
checkpoint restarts after the same step again, and so computes the same.
"""

from launch.training.pace import cycles, restart_follows, warm_start_end
from launch.training.requests import Wish, objection, waiting
from launch.training.run import Run


def told(run: Run) -> frozenset[Wish]:
    """What the main process has been asked for; what cannot be granted it refuses at once. Nothing on the others."""
    found = []
    for name in run.wishes.names():
        reason = _refusal(run, name)
        if reason is None:
            found.append(Wish(name))
            continue
        run.wishes.remove(name)
        run.watch.event("request", run.state.step, wish=name, granted=False, reason=reason)
        run.watch.say(f"step {run.state.step}: request {name!r} refused: {reason}")
    if Wish.stop in found or (Wish.stop_after_cycle in found and _cycle_is_sync(run)):
        run.stop.ask("a request", again=False)
    return frozenset(found)


def together(run: Run) -> bool:
    """Whether a checkpoint can be written after this step: between syncs LTE's heads have not one model."""
    lte = run.config.lte
    return run.sync is None or lte is None or run.state.step % lte.sync_every == 0


def restart_asked(run: Run) -> bool:
    """Whether a restart that was asked for follows this step; now, or before the run went back to a checkpoint."""
    state, stage = run.state, run.stage
    planned = restart_follows(run.config, stage, state.step)
    if Wish.restart in run.wishes.agreed and state.step < stage.end:  # else after the first step of the next task
        if not planned:
            state.asked_restarts = sorted({*state.asked_restarts, state.step})
            run.watch.cycles = None if run.course.is_stream else cycles(run.config, stage, state.asked_restarts)
            if run.runtime.is_main:
                run.folder.keep_restarts(state.asked_restarts)
        run.wishes.granted(Wish.restart)
        _note(run, Wish.restart)
    elif state.step in state.asked_restarts:
        _note(run, Wish.restart)
    return state.step in state.asked_restarts


def grant(run: Run, wish: Wish) -> None:
    """Say that a wish has been granted, and forget it."""
    if wish in run.wishes.agreed:
        run.wishes.granted(wish)
        _note(run, wish)


def asked_to_stop(run: Run) -> bool:
    """Whether the run stops here, since it was asked to stop after a cycle."""
    if Wish.stop_after_cycle not in run.wishes.agreed or not run.wishes.cycle_ended:
        return False
    run.stop.ask("a request to stop after a cycle", again=False)
    return True


def settle(run: Run) -> None:
    """Take away at a run's end what has been granted by it; a run that goes on some time keeps the rest."""
    complete, stopped = run.state.step >= run.course.total_steps, not run.stop.again
    for name in waiting(run.folder.path) if run.runtime.is_main else ():
        if complete or (stopped and name in (Wish.stop.value, Wish.stop_after_cycle.value)):
            run.wishes.remove(name)
            why = {"reason": "the run is complete"} if complete else {}
            run.watch.event("request", run.state.step, wish=name, granted=not complete, **why)


def _cycle_is_sync(run: Run) -> bool:
    return run.sync is not None and run.config.relora is None


def _note(run: Run, wish: Wish) -> None:
    run.watch.event("request", run.state.step, wish=wish.value, granted=True)
    run.watch.say(f"step {run.state.step}: {wish.value} was asked for")


def _refusal(run: Run, name: str) -> str | None:
    if name not in {wish.value for wish in Wish}:
        return f"there is no such request: choose one of {', '.join(wish.value for wish in Wish)}"
    wish, begins = Wish(name), warm_start_end(run.config, run.stage)
    if wish is Wish.restart and objection(run.config, wish) is None and run.state.step < begins:
        return f"low-rank training begins after step {begins}: ask again later"
    return objection(run.config, wish)
