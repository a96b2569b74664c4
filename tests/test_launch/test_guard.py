import math

import pytest

from launch.training.guard import Guard, TrainingDiverged
from launch.training.state import RunState

GUARD = Guard(sigma=3.0, window=4, max_skips=3)


def warmed(losses=(2.0, 2.1, 1.9, 2.0)):
    state = RunState()
    for loss in losses:
        state.step += 1
        GUARD.record(state, loss=loss, grad_norm=1.0 + 0.1 * (state.step % 2), refused=None)
    return state


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_from_the_first_step(value):
    assert "loss is" in GUARD.objection(RunState(), loss=value, grad_norm=1.0)
    assert "gradient norm is" in GUARD.objection(RunState(), loss=1.0, grad_norm=value)


def test_a_spike_is_refused_only_once_the_window_is_full():
    assert GUARD.objection(warmed(losses=(2.0, 2.1, 1.9)), loss=50.0, grad_norm=1.0) is None
    assert "loss 50 is above" in GUARD.objection(warmed(), loss=50.0, grad_norm=1.0)
    assert "gradient norm 50 is above" in GUARD.objection(warmed(), loss=2.0, grad_norm=50.0)


def test_the_limit_is_sigma_deviations_over_the_mean():
    state = warmed()
    limit = 2.0 + 3.0 * math.sqrt((0.1**2 + 0.1**2) / 4)
    assert GUARD.objection(state, loss=limit - 1e-6, grad_norm=1.0) is None
    assert GUARD.objection(state, loss=limit + 1e-6, grad_norm=1.0) is not None


def test_low_values_and_sigma_zero_never_count_as_spikes():
    assert GUARD.objection(warmed(), loss=0.1, grad_norm=0.1) is None
    off = Guard(sigma=0.0, window=4, max_skips=3)
    assert off.objection(warmed(), loss=50.0, grad_norm=50.0) is None


def test_a_refused_value_does_not_enter_the_window():
    state = warmed()
    GUARD.record(state, loss=50.0, grad_norm=1.0, refused="spike")
    assert 50.0 not in state.losses


def test_a_storm_is_told_once_when_half_of_what_ends_the_run_has_come_together():
    guard, state, told = Guard(sigma=3.0, window=100, max_skips=5), warmed(), []
    for _ in range(4):
        state.step += 1
        guard.record(state, loss=50.0, grad_norm=1.0, refused="spike")
        told.append(guard.storm(state))
    assert told == [None, None, "3 of the last 100 updates were refused; 5 end the run", None]


def test_too_many_refusals_within_the_window_end_the_run_and_old_ones_are_forgotten():
    state = warmed()
    for _ in range(2):
        state.step += 1
        GUARD.record(state, loss=50.0, grad_norm=1.0, refused="spike")
    state.step += 10
    GUARD.record(state, loss=50.0, grad_norm=1.0, refused="spike")
    state.step += 1
    GUARD.record(state, loss=50.0, grad_norm=1.0, refused="spike")
    state.step += 1
    with pytest.raises(TrainingDiverged, match=r"3 of the last 4 updates.*optimizer\.lr"):
        GUARD.record(state, loss=50.0, grad_norm=1.0, refused="spike")


def test_the_window_survives_a_checkpoint():
    state = warmed()
    again = RunState.from_dict(state.to_dict())
    assert GUARD.objection(again, loss=50.0, grad_norm=1.0) == GUARD.objection(state, loss=50.0, grad_norm=1.0)
