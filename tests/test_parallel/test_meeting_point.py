"""What the meeting point decides, with a clock of the test's own, and that no position of the data gets lost."""

import random
from dataclasses import dataclass, field

import pytest

from parallel.ledger import Ledger, joined, taken
from parallel.meeting_point import MeetingPoint
from parallel.meeting_terms import Refused, Standing, Terms, Verdict

TERMS = {"identity": "a", "layout": "b", "heads": 3, "quorum": 2, "wait_seconds": 10.0, "silence_seconds": 4.0}
TERMS |= {"sync_every": 4, "steps": 40, "batch": 2, "positions": 1}


def meeting(*names, at=0.0, **changed):
    """A meeting point whose heads, so named, have started."""
    point = MeetingPoint(Terms(**{**TERMS, **changed}), Ledger())
    for name in names:
        hello(point, name, at)
    return point


def hello(point, name, now, checkpoint=0, wanted=None, era=0):
    return point.hello(name, 0, checkpoint=checkpoint, wanted=wanted, era=era, now=now)


def answer(point, name, sync, now, leaving=False):
    reply = point.next(name, sync - 1, now)
    assert reply.verdict == Verdict.lease
    point.answer(name, 0, sync, [1.0, 0.5], leaving, now)


def places(ledger):
    """All positions of the ledger, each as often as it has a place."""
    kept = [ranges for heads in ledger.recent.values() for ranges in heads.values()]
    everything = [*kept, *ledger.leased.values(), ledger.returned, ledger.merged, ledger.lost]
    return sorted(position for ranges in everything for start, stop in ranges for position in range(start, stop))


def test_a_sync_is_made_as_soon_as_all_have_answered():
    point = meeting("a", "b", "c")
    for name in "ab":
        answer(point, name, 1, 1.0)
    assert point.sync == 0
    answer(point, "c", 1, 2.0)
    decision = point.decisions[1]
    assert decision.members == [0, 1, 2]
    assert decision.weights == pytest.approx([1 / 3] * 3)
    assert sorted(decision.trained.values()) == [[(0, 8)], [(8, 16)], [(16, 24)]], "four steps of two sequences each"


def test_the_start_waits_for_all_heads_then_for_a_quorum():
    point = meeting("a")
    point.look(1000.0)
    assert not point.running, "one head is no quorum"
    hello(point, "b", 1000.0)
    assert point.running, "a quorum has come, and the first has waited long enough"
    assert [head.number for head in point.heads.values()] == [0, 1]


def test_the_time_limit_makes_a_sync_without_the_late_who_then_bring_both_changes():
    point = meeting("a", "b", "c")
    for name in "ab":
        answer(point, name, 1, 1.0)
    assert point.next("c", 0, 1.0).verdict == Verdict.lease
    point.look(10.9)
    assert point.sync == 0
    point.look(11.0)
    assert point.decisions[1].members == [0, 1]
    assert point.next("c", 0, 12.0).verdict == Verdict.lease, "its processes are told the same until one has answered"
    point.answer("c", 0, 1, [1.0], False, 12.0)
    assert point.sync == 1, "what comes too late changes nothing"
    reply = point.next("c", 1, 12.0)
    assert 0 <= reply.lease.steps < 4, "it gets what it can make in time"
    for name in "ab":
        answer(point, name, 2, 13.0)
    point.answer("c", 0, 2, [1.0], False, 14.0)
    assert point.decisions[2].members == [0, 1, 2]
    assert joined([(16, 24), *reply.lease.ranges]) == point.decisions[2].trained[2]


def test_a_late_head_hears_of_all_syncs_that_it_missed_and_of_too_many_that_it_must_join_anew():
    point = meeting("a", "b", "c")
    for sync in (1, 2, 3):
        for name in "ab":
            answer(point, name, sync, 20.0 * sync)
        point.look(20.0 * sync + 10.0)
    assert [point.next("c", have, 80.0).verdict for have in (1, 2)] == [Verdict.outcome] * 2
    assert point.next("c", 3, 80.0).verdict == Verdict.lease
    for name in "ab":
        answer(point, name, 4, 90.0)
    point.look(100.0)
    point.drop(4)
    point.heads["c"].replies.clear()
    assert point.next("c", 3, 100.0).verdict == Verdict.gone
    assert not hello(point, "c", 101.0), "its change is lost, and its positions are trained on by others"
    assert places(point.ledger) == list(range(point.ledger.reached))
    assert point.ledger.returned


def test_who_dies_before_the_answer_is_not_in_the_sync_and_the_positions_go_to_the_next_lease():
    point = meeting("a", "b", "c")
    point.broken("c", 0, 1.0)
    for name in "ab":
        answer(point, name, 1, 2.0)
    point.look(4.9)
    assert point.sync == 0, "it may come back"
    point.look(5.0)
    decision = point.decisions[1]
    assert decision.members == [0, 1]
    assert decision.returned == [(16, 24)]
    assert "head 2 was lost" in decision.gone[0]
    assert point.next("a", 1, 5.0).lease.ranges == [(16, 24)], "first of all"


def test_who_dies_after_the_answer_is_in_the_sync():
    point = meeting("a", "b", "c")
    answer(point, "c", 1, 1.0)
    point.broken("c", 0, 1.0)
    answer(point, "a", 1, 2.0)
    point.look(6.0)
    answer(point, "b", 1, 7.0)
    decision = point.decisions[1]
    assert decision.members == [0, 1, 2]
    assert decision.trained[2] == [(16, 24)]
    assert not decision.returned
    assert len(point.heads) == 2


def test_a_connection_that_comes_back_in_time_is_no_loss():
    point = meeting("a", "b", "c")
    point.broken("c", 0, 1.0)
    assert hello(point, "c", 3.0)
    point.look(100.0)
    assert len(point.heads) == 3
    assert point.next("c", 0, 100.0).lease.ranges == [(16, 24)]


def test_a_head_of_two_processes_answers_with_both_and_each_is_told_the_same():
    point = MeetingPoint(Terms(**{**TERMS, "heads": 1, "quorum": 1, "positions": 2}), Ledger())
    hello(point, "a", 0.0)
    assert not point.running
    point.hello("a", 1, checkpoint=0, wanted=None, era=0, now=0.0)
    lease = point.next("a", 0, 0.0)
    point.answer("a", 0, 1, [1.0], False, 1.0)
    assert point.sync == 0
    assert point.next("a", 0, 1.0) is lease
    point.answer("a", 1, 1, [1.0], False, 2.0)
    assert point.sync == 1


def test_below_the_quorum_a_sync_waits_until_heads_join():
    point = meeting("a", "b", "c")
    for name in "bc":
        point.goodbye(name, "left", 1.0)
    answer(point, "a", 1, 2.0)
    point.look(1000.0)
    assert point.sync == 0
    assert "lte.quorum=2" in point.said[-1]
    hello(point, "d", 1001.0)
    assert point.decisions[1].members == [0], "one waits, and comes in by a sync only"
    assert point.decisions[1].joined == [1]


def test_a_joining_head_gets_a_free_number_the_state_of_the_lowest_member_and_a_share_of_the_data():
    point = meeting("a", "b", "c")
    point.goodbye("b", "left", 1.0)
    hello(point, "d", 2.0, checkpoint=0)
    assert point.heads["d"].standing == Standing.waiting
    for name in "ac":
        answer(point, name, 1, 3.0)
    decision = point.decisions[1]
    assert (decision.joined, decision.provider) == ([1], 0)
    assert not point.has_state("d")
    point.state_is_here(1)
    assert point.has_state("d")
    reply = point.next("d", 1, 3.0)
    assert reply.lease.steps == 4, "nothing is open, so it may have a whole period"
    for name in "acd":
        answer(point, name, 2, 5.0)
    assert point.decisions[2].members == [0, 1, 2]


def test_a_joining_head_waits_again_when_its_provider_is_lost():
    point = meeting("a", "b", "c")
    point.goodbye("c", "left", 1.0)
    hello(point, "d", 2.0)
    for name in "ab":
        answer(point, name, 1, 3.0)
    point.broken("a", 0, 3.5)
    answer(point, "b", 2, 4.0)
    assert point.heads["d"].standing == Standing.joining
    point.look(7.5)
    assert point.decisions[2].members == [1]
    assert (point.decisions[2].joined, point.decisions[2].provider) == ([0], 1)
    assert point.heads["d"].synced == 2


def test_a_head_that_was_asked_to_leave_is_in_the_sync_and_gets_no_lease():
    point = meeting("a", "b", "c")
    answer(point, "a", 1, 1.0, leaving=True)
    for name in "bc":
        answer(point, name, 1, 2.0)
    assert point.decisions[1].members == [0, 1, 2]
    assert 0 not in point.ledger.leased
    point.goodbye("a", "left", 3.0)
    assert not point.ledger.returned


def test_after_a_restart_the_newest_checkpoint_counts_and_later_syncs_are_undone():
    point = meeting("a", "b", "c")
    for sync in (1, 2):
        for name in "abc":
            answer(point, name, sync, 5.0 * sync)
    again = MeetingPoint(point.terms, Ledger.from_json(point.ledger.to_json()), sync=point.sync)
    assert again.ledger.returned == [(48, 72)], "what was on lease is in nothing"
    hello(again, "d", 0.0, checkpoint=1, wanted=2)
    hello(again, "e", 0.0)
    hello(again, "f", 0.0, checkpoint=1, wanted=0)
    assert again.sync == 1
    decision = again.decisions[1]
    assert decision.members == [0, 2], "they keep their numbers"
    assert (decision.joined, decision.provider) == ([1], 0)
    assert places(again.ledger) == list(range(again.ledger.reached))
    assert again.ledger.merged_count == 24
    assert again.next("f", 1, 0.0).lease.ranges == [(24, 32)]


def test_a_checkpoint_from_after_all_that_is_known_is_refused():
    with pytest.raises(Refused, match="folder of this run's meeting point"):
        hello(MeetingPoint(Terms(**TERMS), Ledger()), "a", 0.0, checkpoint=3, wanted=0)


def test_the_run_ends_with_the_last_sync_and_reports_what_is_in_none():
    point = meeting("a", "b", "c", steps=6)
    for name in "abc":
        answer(point, name, 1, 1.0)
    for name in "ab":
        answer(point, name, 2, 2.0)
    point.look(12.0)
    assert point.next("a", 2, 13.0).verdict == Verdict.finished
    assert point.ledger.lost == [(32, 36)], "two steps of the head that was late"
    assert "32 to 35" in " ".join(point.said)
    hello(point, "d", 14.0)
    for name in "abc":
        point.goodbye(name, "is done", 15.0)
    assert point.finished
    assert not point.heads, "nobody is left who has the state for one that comes so late"


def test_ranges_of_a_lease_are_cut_step_by_step():
    ranges = [(10, 13), (40, 45)]
    assert [taken(ranges, start, 4) for start in (0, 4)] == [[(10, 13), (40, 41)], [(41, 45)]]


@dataclass
class Job:
    """A head as launch/training/elastic.py drives it, whose change is the set of positions in it."""

    pace: float
    incarnation: str
    saved: tuple = (0, None, 0)
    era: int = 0
    number: int | None = None
    have: int | None = None
    lease: object = None
    answered: bool = False
    busy_until: float = 0.0
    pending: list = field(default_factory=list)
    there: bool = True


class World:
    """Jobs of random speeds that are killed, cut off and started again."""

    def __init__(self, seed):
        self.draw = random.Random(seed)
        heads = self.draw.randrange(1, 5)
        quorum, steps = self.draw.randrange(1, heads + 1), self.draw.randrange(8, 60)
        self.point = MeetingPoint(Terms(**{**TERMS, "heads": heads, "quorum": quorum, "steps": steps}), Ledger())
        self.now, self.started = 0.0, 0
        self.handing = {}
        self.jobs = [self.new() for _ in range(heads)]
        self.done = 0

    def new(self, before=None):
        self.started += 1
        job = Job(self.draw.choice([0.2, 0.5, 2.0]), str(self.started))
        if before is not None:
            job.pace, job.saved = before.pace, before.saved
        hello(self.point, job.incarnation, self.now, *job.saved)
        return job

    def take(self, job, sync):
        """Process a sync's decision; returns whether there is one."""
        decision = self.point.decisions.get(sync)
        if decision is None:
            return False
        if job.number in decision.members and job.answered:
            assert joined(job.pending) == decision.trained[job.number], "in the sync is what was trained"
            job.pending = []
            if sync % 2 == 0:
                job.saved = sync, job.number, job.era
        if decision.provider == job.number:
            self.handing[sync] = self.now + self.draw.choice([0.1, 5.0]), job.incarnation
        job.have, job.answered, job.lease = sync, False, None
        return True

    def act(self, job):
        """One turn; returns whether the job goes on."""
        head = self.point.heads.get(job.incarnation)
        if head is None:
            return False
        if job.have is None:
            if head.standing == Standing.waiting or (
                head.standing == Standing.joining and not self.point.has_state(job.incarnation)
            ):
                return True
            job.number, job.have, job.era = head.number, head.synced, len(self.point.eras)
            decision = self.point.decisions.get(job.have)
            if head.standing == Standing.live and decision is not None and decision.provider == job.number:
                self.handing[job.have] = self.now + 1.0, job.incarnation
        if job.lease is not None and self.now >= job.busy_until:
            if not job.answered:
                job.pending += job.lease.ranges
                job.answered = True
                self.point.answer(job.incarnation, 0, job.lease.sync, [1.0], False, self.now)
            if self.point.sync >= job.lease.sync:
                return self.take(job, job.lease.sync)
        elif job.lease is None:
            reply = self.point.next(job.incarnation, job.have, self.now)
            if reply is None:
                return True
            if reply.verdict == Verdict.gone:
                return False
            if reply.verdict == Verdict.finished:
                self.point.goodbye(job.incarnation, "is done", self.now)
                self.done += 1
                return None
            if reply.verdict == Verdict.outcome:
                return self.take(job, job.have + 1)
            job.lease = reply.lease
            job.busy_until = self.now + job.lease.steps * job.pace
        return True

    def turn(self, failures):
        self.now += 0.2
        for sync, (when, who) in list(self.handing.items()):
            if who in self.point.heads and self.now >= when:
                self.point.state_is_here(sync)
                del self.handing[sync]
        for place, job in enumerate(self.jobs):
            if not job.there:
                continue
            if failures and self.draw.random() < 0.01:
                self.point.broken(job.incarnation, 0, self.now)
                job.there = False
                continue
            goes_on = self.act(job)
            job.there = goes_on is True
            if goes_on is None:
                self.jobs[place].there = False
                self.jobs[place].number = -1
        for place, job in enumerate(self.jobs):
            if not job.there and job.number != -1 and self.draw.random() < 0.1:
                self.jobs[place] = self.new(job)
        self.point.look(self.now)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_fails_every_position_is_in_one_sync_or_accounted_for(seed):
    world = World(seed)
    point = world.point
    for turn in range(4000):
        world.turn(failures=turn < 600)
        assert places(point.ledger) == list(range(point.ledger.reached)), "each position has one place"
        if point.finished and not point.heads:
            break
    else:
        raise AssertionError(f"no end: sync {point.sync} of {point.terms.last}, {point.said[-5:]}")
    ledger = point.ledger
    assert world.done
    assert not ledger.leased
    assert not ledger.returned
    assert ledger.merged_count + sum(stop - start for start, stop in ledger.lost) == ledger.reached
