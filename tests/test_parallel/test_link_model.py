"""The arithmetic of links between heads; benchmarks/lte_link.py compares it with real ones."""

import pytest

from parallel.link_model import Link, Method, Trip, crossover, gather_hops, mean_hops, sum_trip

LINK = Link(bandwidth=1e6, latency=0.01)


def syncing(*, computing=1.0, size=2e6, every=10, hidden=0.0, hops=0):
    return Method(name="a", computing=computing, every=every, trips=[Trip(bytes=size, hops=hops, hidden=hidden)])


def test_a_trip_takes_its_bytes_and_two_latencies_a_hop():
    assert Trip(bytes=5e5, hops=3).seconds(LINK) == pytest.approx(0.5 + 3 * 2 * 0.01)


def test_a_ring_has_a_hop_for_each_other_head_and_a_mean_one_more():
    assert (gather_hops(4), mean_hops(4)) == (3, 4)
    assert (gather_hops(1), mean_hops(1)) == (0, 0)


def test_a_sum_in_messages_sends_what_a_ring_does():
    trip = sum_trip(800.0, 4, messages=3, hidden=0.0)
    assert (trip.bytes, trip.hops) == (2 * 3 / 4 * 800, 3 * 2 * 3)


def test_waiting_is_what_training_does_not_hide():
    plain, hidden, covered = syncing(), syncing(hidden=1.5), syncing(hidden=2.5)
    assert plain.step_seconds(LINK) == pytest.approx(1.2)
    assert hidden.step_seconds(LINK) == pytest.approx(1.05)
    assert covered.idle_share(LINK) == 0.0
    assert plain.idle_share(LINK) == pytest.approx(0.2 / 1.2)
    assert plain.bytes_per_step == hidden.bytes_per_step == 2e5


def test_syncs_that_are_rare_enough_leave_the_share_asked_for():
    method = syncing()
    steps = method.steps_for(LINK, 0.1)
    assert steps == 18
    assert syncing(every=steps).idle_share(LINK) <= 0.1 + 1e-12 < syncing(every=steps - 1).idle_share(LINK)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        # 1 + 2e5 / B against 0.9 + 2e6 / B: equal at B = 1.8e7
        (syncing(), syncing(computing=0.9, every=1), (True, False, 1.8e7)),
        (syncing(computing=0.9, every=1), syncing(), (False, True, 1.8e7)),
        (syncing(), syncing(every=1), (True, True, None)),
        (syncing(computing=1.1, every=1), syncing(), (False, False, None)),
    ],
)
def test_methods_cross_where_their_steps_take_as_long(one, other, expected):
    found = crossover(one, other, 0.0)
    slow, fast, bandwidth = expected
    assert (found.on_slow, found.on_fast) == (slow, fast)
    assert found.bandwidth == (None if bandwidth is None else pytest.approx(bandwidth, rel=1e-6))


def test_latency_alone_decides_where_bandwidth_does_not_matter():
    chatty, rare = syncing(size=0.0, every=1, hops=100), syncing(size=0.0, computing=1.5, hops=1)
    assert not crossover(rare, chatty, 0.0).on_slow
    assert crossover(rare, chatty, 0.01).on_fast
