"""The learning rate, number by number."""

import re

import pytest

from relora.errors import ConfigError
from relora.schedule import Restarts, ScheduleConfig, ScheduleKind, check_schedule, multiplier

TOTAL = 15000
PAPER = ScheduleConfig(warmup_steps=500, restart_warmup_steps=100, min_ratio=0.1)


def _curve(config: ScheduleConfig, total: int, restarts: Restarts | None) -> list[float]:
    return [multiplier(step, config, total_steps=total, restarts=restarts) for step in range(total)]


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        (0, 0.0),
        (250, 0.5),
        (500, 1.0),
        (4999, 0.8026),
        (5000, 0.0),
        (5001, 0.0079),
        (5050, 0.397),
        (5100, 0.794),
        (10000, 0.0),
    ],
)
def test_jagged_cosine_has_the_reference_codes_values(step: int, wanted: float) -> None:
    ours = multiplier(step, PAPER, total_steps=TOTAL, restarts=(5000, 0))
    assert ours == pytest.approx(wanted, abs=5e-5 if wanted < 0.1 else 5e-4)


def test_ramp_meets_the_curve_without_a_jump() -> None:
    plain = _curve(PAPER, TOTAL, None)
    jagged = _curve(PAPER, TOTAL, (5000, 0))
    assert jagged[5100] == plain[5100]
    assert jagged[5099] == pytest.approx(0.99 * plain[5100])
    assert jagged[:5000] == plain[:5000]


def test_lowest_rate_of_a_cycle_is_at_the_restart() -> None:
    config = ScheduleConfig(warmup_steps=5, restart_warmup_steps=10, anneal_steps=8, min_ratio=0.0)
    curve = _curve(config, 200, (50, 0))
    for start in (50, 100, 150):
        cycle = curve[start : start + 50]
        assert min(cycle) == cycle[0] == 0.0
        assert cycle.count(0.0) == 1


def test_restarts_count_from_the_warm_start_and_the_hand_over_ramps_too() -> None:
    config = ScheduleConfig(kind=ScheduleKind.constant, min_ratio=1.0, warmup_steps=4, restart_warmup_steps=5)
    curve = _curve(config, 100, (30, 20))
    assert [step for step, value in enumerate(curve) if value == 0.0] == [0, 20, 50, 80]
    assert curve[20:26] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_without_a_warm_start_the_first_cycle_begins_with_the_warm_up_alone() -> None:
    config = ScheduleConfig(kind=ScheduleKind.constant, min_ratio=1.0, warmup_steps=2, restart_warmup_steps=5)
    assert _curve(config, 20, (10, 0))[:4] == [0.0, 0.5, 1.0, 1.0]


def test_annealing_falls_linearly_before_each_restart_but_not_at_the_end_or_the_hand_over() -> None:
    config = ScheduleConfig(kind=ScheduleKind.constant, min_ratio=1.0, restart_warmup_steps=1, anneal_steps=4)
    curve = _curve(config, 30, (10, 10))
    assert curve[6:10] == [1.0, 1.0, 1.0, 1.0]
    assert curve[15:22] == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 1.0]
    assert curve[26:30] == [1.0, 1.0, 1.0, 1.0]


def test_annealing_needs_no_ramp() -> None:
    config = ScheduleConfig(kind=ScheduleKind.constant, min_ratio=1.0, anneal_steps=2)
    assert _curve(config, 9, (4, 0)) == [1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.5, 1.0]


def test_a_restart_that_was_asked_for_has_its_ramp_and_moves_no_other() -> None:
    config = ScheduleConfig(kind=ScheduleKind.constant, min_ratio=1.0, restart_warmup_steps=2, anneal_steps=2)

    def curve(*asked: int) -> list[float]:
        return [multiplier(step, config, total_steps=20, restarts=(8, 0), asked=asked) for step in range(20)]

    plain, more = curve(), curve(12)
    assert plain[10:20] == [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.5, 1.0, 1.0]
    assert more == [*plain[:12], 0.0, 0.5, *plain[14:]]
    assert curve(0, 8) == plain


def test_a_restart_that_would_fall_on_the_last_step_changes_nothing() -> None:
    assert multiplier(100, PAPER, total_steps=100, restarts=(50, 0)) != 0.0
    config = ScheduleConfig(kind=ScheduleKind.constant, min_ratio=1.0, restart_warmup_steps=5, anneal_steps=5)
    assert multiplier(99, config, total_steps=100, restarts=(50, 0)) == 1.0


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"kind": ScheduleKind.cosine}, [0.0, 0.5, 1.0, 0.8682, 0.55, 0.2318]),
        ({"kind": ScheduleKind.linear}, [0.0, 0.5, 1.0, 0.775, 0.55, 0.325]),
        ({"kind": ScheduleKind.wsd, "decay_share": 0.4}, [0.0, 0.5, 1.0, 1.0, 1.0, 0.55]),
        ({"kind": ScheduleKind.constant, "min_ratio": 1.0}, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
    ids=lambda value: value["kind"].value if isinstance(value, dict) else "",
)
def test_base_curves(settings: dict[str, object], wanted: list[float]) -> None:
    config = ScheduleConfig(**{"warmup_steps": 2, "min_ratio": 0.1, **settings})
    total = 10 if config.kind == ScheduleKind.wsd else 6
    curve = _curve(config, total, None)
    shown = curve if total == 6 else [curve[index] for index in (0, 1, 2, 4, 6, 8)]
    assert shown == pytest.approx(wanted, abs=5e-5)


def test_curves_end_at_the_least_ratio() -> None:
    for kind, share in [(ScheduleKind.cosine, None), (ScheduleKind.linear, None), (ScheduleKind.wsd, 0.5)]:
        config = ScheduleConfig(kind=kind, decay_share=share, min_ratio=0.2)
        assert multiplier(50, config, total_steps=50, restarts=None) == pytest.approx(0.2)
        assert multiplier(80, config, total_steps=50, restarts=None) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": -1}, "schedule.warmup_steps must not be negative, got -1"),
        ({"restart_warmup_steps": -1}, "schedule.restart_warmup_steps must not be negative, got -1"),
        ({"anneal_steps": -2}, "schedule.anneal_steps must not be negative, got -2"),
        ({"min_ratio": 1.5}, "schedule.min_ratio must be in [0, 1], got 1.5"),
        ({"kind": ScheduleKind.constant}, "schedule.min_ratio=0.1 has no effect with schedule.kind=constant"),
        ({"kind": ScheduleKind.wsd}, "schedule.kind=wsd needs schedule.decay_share"),
        ({"kind": ScheduleKind.wsd, "decay_share": 0.0}, "schedule.decay_share must be in (0, 1], got 0.0"),
        ({"decay_share": 0.2}, "schedule.decay_share=0.2 has no effect with schedule.kind=cosine"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ScheduleConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "restarts", "message"),
    [
        ({"warmup_steps": 100}, None, "schedule.warmup_steps=100 must be below the run's 100 steps"),
        ({"restart_warmup_steps": 6, "anneal_steps": 5}, (10, 0), "cycle of relora.every=10 steps"),
        ({"anneal_steps": 5}, None, "schedule.anneal_steps=5 has no effect without restarts"),
        (
            {"warmup_steps": 60, "kind": ScheduleKind.wsd, "decay_share": 0.5},
            None,
            "schedule.warmup_steps=60 reaches into the decay, the last 0.5 of 100 steps",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(
    settings: dict[str, object], restarts: Restarts | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_schedule(ScheduleConfig(**settings), total_steps=100, restarts=restarts)


def test_a_schedule_that_fits_is_accepted() -> None:
    check_schedule(PAPER, total_steps=TOTAL, restarts=(5000, 0))
    check_schedule(ScheduleConfig(restart_warmup_steps=6, anneal_steps=4), total_steps=100, restarts=(10, 0))
    check_schedule(ScheduleConfig(), total_steps=0, restarts=None)
