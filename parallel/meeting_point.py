"""What the meeting point of elastic heads decides: who takes part in a sync, joins, is lost, and trains on what.

A state machine without sockets and clocks: every call brings the time. Heads are jobs that come and go; a sync takes
the heads that have answered when all have or when the time is up, and what it decided never changes. What travels is
in parallel/meeting_server.py, how positions are accounted for in parallel/ledger.py, the protocol in docs/elastic.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from parallel.ledger import RECENT, Ledger, Range, shown
from parallel.meeting_terms import STATELESS, Decision, Head, Lease, Refused, Reply, Standing, Terms, Verdict


class MeetingPoint:
    """Decides; all methods are quick and none waits."""

    def __init__(self, terms: Terms, ledger: Ledger, *, sync: int = 0, eras: Sequence[int] = ()) -> None:
        """Begin, or go on after the sync that a file names, with all its leases returned."""
        self.terms, self.ledger, self.sync = terms, ledger, sync
        self.eras = list(eras)
        """The syncs that the run has gone back to; a checkpoint from before and of a later sync is of another run."""
        self.heads: dict[str, Head] = {}
        """By incarnation."""
        self.finished = False
        """Whether some head has said goodbye with the last sync in it."""
        self.running = False
        """Whether some head has the state of the last sync."""
        self.decisions: dict[int, Decision] = {}
        """Those whose outcome is still kept."""
        self.said: list[str] = []
        """What the audience has not heard yet."""
        self._given_up: set[str] = set()
        self._ready: set[int] = set()  # syncs whose state is here for those that join
        self._first_answer: float | None = None
        self._decided_at = 0.0
        self._period: float | None = None  # seconds between the last two decisions
        self._returned: list[Range] = ledger.give_all_back()
        self._gone: list[str] = []
        self._last_words = ""

    # ---- what heads do

    def hello(
        self, incarnation: str, position: int, *, checkpoint: int, wanted: int | None, era: int, now: float
    ) -> bool:
        """A process of a head has connected, for the first time or again; returns whether its head still counts.

        Args:
            checkpoint: the sync of the job's own checkpoint, 0 without, STATELESS where another's state is needed.
            wanted: the head's number in it.
            era: how often the run had gone back when it was written.

        Raises:
            Refused: its checkpoint is from after everything that is known here.
        """
        if incarnation in self._given_up or (checkpoint == STATELESS and not self.running):
            return False
        if incarnation not in self.heads:
            if any(checkpoint > base for base in self.eras[era:]):
                checkpoint = STATELESS
            if checkpoint > self.sync:
                raise Refused(
                    f"its checkpoint is of sync {checkpoint}, and the meeting point knows {self.sync} syncs: name the "
                    "folder of this run's meeting point"
                )
            self.heads[incarnation] = Head(incarnation=incarnation, since=now, checkpoint=checkpoint, wanted=wanted)
        head = self.heads[incarnation]
        head.present.add(position)
        if self._complete(head):
            head.away_since = None
        self.look(now)
        return True

    def answer(self, incarnation: str, position: int, sync: int, words: list[float], leaving: bool, now: float) -> None:
        """A process has brought its whole contribution to a sync; that it may be too late shows in the decision."""
        head = self.heads.get(incarnation)
        if head is None or head.lease is None or head.lease.sync != sync or sync != self.sync + 1:
            return
        head.answered.add(position)
        head.words, head.leaving = words, leaving
        if self._has_answered(head):
            if head.lease.steps:
                head.pace = (now - head.leased_at) / head.lease.steps
            if self._first_answer is None:
                self._first_answer = now
        self.look(now)

    def next(self, incarnation: str, have: int, now: float) -> Reply | None:
        """What comes after the sync whose state a head has; None: it must wait.

        All processes of a head are told the same.
        """
        head = self.heads.get(incarnation)
        if head is None or head.standing == Standing.waiting:
            return Reply(verdict=Verdict.gone)
        if have not in head.replies:
            reply = self._next(head, have, now)
            if reply is None:
                return None
            head.replies = {have: reply}
        return head.replies[have]

    def broken(self, incarnation: str, position: int, now: float) -> None:
        """A process's connection is gone; it may come back."""
        head = self.heads.get(incarnation)
        if head is not None:
            head.present.discard(position)
            head.away_since = now if head.away_since is None else head.away_since

    def goodbye(self, incarnation: str, reason: str, now: float) -> None:
        """A head leaves by its own will."""
        head = self.heads.get(incarnation)
        if head is not None:
            self.finished = self.finished or (self.running and self.sync == self.terms.last)
            self._remove(head, reason)
        self.look(now)

    def missed_too_much(self, incarnation: str, now: float) -> None:
        """A head asks for what is no longer kept."""
        head = self.heads.get(incarnation)
        if head is not None:
            self._remove(head, "has missed more syncs than are kept, and must join anew")
        self.look(now)

    def state_is_here(self, sync: int) -> None:
        """All positions of the provider have handed over the state after a sync."""
        self._ready.add(sync)

    def has_state(self, incarnation: str) -> bool:
        """Whether a joining head's state is here."""
        head = self.heads.get(incarnation)
        return head is not None and head.standing == Standing.joining and head.synced in self._ready

    def wants_state(self, sync: int) -> bool:
        """Whether some head joins with the state after a sync, and has not got it yet."""
        return any(head.standing == Standing.joining and head.synced == sync for head in self.heads.values())

    def drop(self, sync: int) -> None:
        """The outcome of a sync is no longer kept."""
        self.decisions.pop(sync, None)

    # ---- what time does

    def look(self, now: float) -> None:
        """Do whatever is due."""
        for head in list(self.heads.values()):
            if head.away_since is not None and now - head.away_since >= self.terms.silence_seconds and not head.lost:
                self._remove(head, "was lost: its connection broke and did not come back")
        while self._decide(now) if self.running else self._start(now):
            pass
        if self.running and self.sync == self.terms.last:
            self._look_after_the_end()

    def _next(self, head: Head, have: int, now: float) -> Reply | None:
        head.standing = Standing.live
        if have < self.sync:
            if have + 1 in self.decisions:
                return Reply(verdict=Verdict.outcome)
            self._remove(head, "has missed more syncs than are kept, and must join anew")
            return Reply(verdict=Verdict.gone)
        if have == self.terms.last:
            return Reply(verdict=Verdict.finished)
        if head.lease is None:
            steps = self._room(head, now)
            if not steps and not self._pending(head):
                return None  # nothing to bring, and no time for anything: the next sync is made without it
            self._lease(head, steps, now)
        return Reply(verdict=Verdict.lease, lease=head.lease)

    def _room(self, head: Head, now: float) -> int:
        """Steps that a head which comes in mid-period can make until the others are likely to have answered."""
        whole = self.terms.step_of(self.sync + 1) - self.terms.step_of(self.sync)
        # One step less with a change of its own still open: where the others have checkpoints, it has none to write.
        most = whole - 1 if self._pending(head) else whole
        if sum(one.lease is not None for one in self.heads.values()) < self.terms.quorum:
            return most  # no sync can be made without it
        known = [one.pace for one in self.heads.values() if one.pace is not None]
        if self._period is None or not known:
            return most
        pace = head.pace if head.pace is not None else sum(known) / len(known)
        left = self._decided_at + self._period - now
        return max(0, min(most, int(left / pace) if pace > 0 else most))

    def _pending(self, head: Head) -> bool:
        assert head.number is not None
        return bool(self.ledger.leased.get(head.number))

    def _lease(self, head: Head, steps: int, now: float) -> None:
        assert head.number is not None
        ranges = self.ledger.lease(head.number, steps * self.terms.batch)
        head.lease, head.leased_at = Lease(sync=self.sync + 1, steps=steps, ranges=ranges), now

    # ---- decisions

    def _start(self, now: float) -> bool:
        """Begin with the heads that have come, from the newest checkpoint among them."""
        comers = [head for head in self.heads.values() if self._complete(head) and head.checkpoint != STATELESS]
        if not comers:
            return False
        waited = now - min(head.since for head in comers)
        if len(comers) < self.terms.heads and (len(comers) < self.terms.quorum or waited < self.terms.wait_seconds):
            self._say(f"{len(comers)} of {self.terms.heads} heads have come; a quorum is {self.terms.quorum}")
            return False
        base = max(head.checkpoint for head in comers)
        if self.sync - base > RECENT:
            self._say(f"the newest checkpoint is of sync {base} of {self.sync}, and only {RECENT} can be undone")
            return False
        self._go_back(base)
        current: list[Head] = []
        taken: set[int] = set()
        for head in sorted(comers, key=lambda head: (head.wanted is None, head.wanted, head.since)):
            fits = head.checkpoint == base and len(current) < self.terms.heads
            if fits and (base == 0 or (head.wanted is not None and head.wanted not in taken)):
                head.number = self._free_number() if base == 0 or head.wanted is None else head.wanted
                taken.add(_number(head))
                head.standing, head.synced = Standing.live, base
                current.append(head)
        self.running, self._decided_at, self._period = True, now, None
        joined = self._admit(base)
        self._note(base, current, trained={}, joined=joined, provider=min(current, key=_number).number)
        for head in current:
            self._start_period(head, now)
        whose = "from the beginning" if base == 0 else f"from sync {base}"
        self._say(f"{len(current)} heads start {whose}" + (f", {len(joined)} join them" if joined else ""))
        return True

    def _go_back(self, base: int) -> None:
        if base == self.sync:
            return
        undone = self.ledger.undo(base)
        self._returned += undone
        self._say(
            f"nobody has the state of sync {self.sync}: the run goes back to the newest checkpoint, of sync {base}, "
            f"and the positions {shown(undone)} are trained on again"
        )
        self.decisions.clear()
        self._ready.clear()
        self.eras.append(base)
        self.sync = base

    def _decide(self, now: float) -> bool:
        """Make the open sync if it is time."""
        living = [head for head in self.heads.values() if head.standing == Standing.live]
        here = [head for head in living if self._has_answered(head)]
        if not here:
            if not self.finished and not any(
                head.standing != Standing.waiting and self._lives_on(head) for head in self.heads.values()
            ):
                self._stop_running()
                return True
            return False
        late = [head for head in living if head.lease is not None and not self._has_answered(head)]
        assert self._first_answer is not None
        timely = now - self._first_answer < self.terms.wait_seconds
        if late and timely:
            return False
        # Those that wait come in by a sync only, so one is made for them even of fewer heads.
        waiting = sum(head.standing == Standing.waiting and self._complete(head) for head in self.heads.values())
        if len(here) + waiting < self.terms.quorum:
            self._say(
                f"sync {self.sync + 1} waits: {len(here)} heads have answered, and lte.quorum={self.terms.quorum}"
            )
            return False
        self._period, self._decided_at, self._first_answer = now - self._decided_at, now, None
        self._make(sorted(here, key=_number), late, now)
        return True

    def _make(self, members: list[Head], late: list[Head], now: float) -> None:
        self.sync += 1
        trained = self.ledger.merge(self.sync, [_number(head) for head in members])
        for head in late:
            self._say(f"head {head.number} is late for sync {self.sync}, which is made without it")
        for head in [*members, *late]:
            head.lease = None
            head.answered.clear()
        for head in [one for one in members if one.lost]:
            del self.heads[head.incarnation]
        staying = [head for head in members if not head.lost and not head.leaving]
        joined = self._admit(self.sync) if staying else []
        provider = min(staying, key=_number).number if joined else None
        self._note(self.sync, members, trained=trained, joined=joined, provider=provider)
        if self.sync == self.terms.last:
            lost = self.ledger.finish()
            self._say("the run is complete" + (f"; in no sync are the positions {shown(lost)}" if lost else ""))
            return
        for head in staying:
            self._start_period(head, now)

    def _note(
        self,
        sync: int,
        members: list[Head],
        *,
        trained: dict[int, list[Range]],
        joined: list[int],
        provider: int | None,
    ) -> None:
        said = [head.words for head in members if head.words]
        total = sum(words[0] for words in said)
        self.decisions[sync] = Decision(
            sync=sync,
            members=[_number(head) for head in members],
            weights=[words[0] / total if total else 1 / len(said) for words in said],
            words=said,
            trained=trained,
            returned=self._returned,
            gone=self._gone,
            joined=joined,
            provider=provider if joined else None,
            merged=self.ledger.merged_count,
        )
        self._returned, self._gone = [], []

    def _start_period(self, head: Head, now: float) -> None:
        head.words = []
        if self.sync < self.terms.last:
            whole = self.terms.step_of(self.sync + 1) - self.terms.step_of(self.sync)
            self._lease(head, whole, now)

    def _admit(self, sync: int) -> list[int]:
        """Give numbers to the heads that wait, as far as there are any; they get the state after this sync."""
        joined = []
        for head in sorted(self.heads.values(), key=lambda head: head.since):
            number = self._free_number()
            if head.standing != Standing.waiting or not self._complete(head):
                continue
            if number is None:
                self._say(f"a head waits: all of lte.heads={self.terms.heads} are there")
                break
            old = f"; its checkpoint, of sync {head.checkpoint}, is not used" if head.checkpoint > 0 else ""
            head.number, head.standing, head.synced, head.replies = number, Standing.joining, sync, {}
            head.checkpoint = STATELESS
            joined.append(number)
            self._say(f"head {number} joins with the state after sync {sync}{old}")
        return joined

    def _look_after_the_end(self) -> None:
        """Let a head that has the last sync in its checkpoint finish what it has left to do."""
        for head in self.heads.values():
            if head.standing == Standing.waiting and head.checkpoint == self.sync and self._complete(head):
                head.standing, head.synced, head.number = Standing.live, self.sync, self._free_number()
        if self.finished and not any(self._lives_on(head) for head in self.heads.values()):
            self._give_up(list(self.heads.values()))

    def _free_number(self) -> int | None:
        taken = {head.number for head in self.heads.values() if head.number is not None}
        return next((number for number in range(self.terms.heads) if number not in taken), None)

    def _remove(self, head: Head, reason: str) -> None:
        self._given_up.add(head.incarnation)
        if self._has_answered(head) and self.running:
            head.lost = True
            self._say(f"head {head.number} {reason}; its answer to sync {self.sync + 1} counts")
            self._gone.append(f"head {head.number} {reason}")
            self._orphaned(head)
            return
        del self.heads[head.incarnation]
        if head.number is None:
            return
        back = self.ledger.give_back(head.number)
        self._returned += back
        self._gone.append(f"head {head.number} {reason}")
        self._say(f"head {head.number} {reason}" + (f"; it gives back the positions {shown(back)}" if back else ""))
        if head.standing == Standing.live:
            self._orphaned(head)

    def _orphaned(self, provider: Head) -> None:
        """Let heads wait again whose provider has gone before it had handed over the state."""
        for head in self.heads.values():
            decision = self.decisions.get(head.synced)
            if head.standing != Standing.joining or head.synced in self._ready or decision is None:
                continue
            if decision.provider == provider.number:
                head.standing, head.number = Standing.waiting, None

    def _stop_running(self) -> None:
        self.running = False
        self._say(f"no head has the state of sync {self.sync} any more: the run starts again when heads have come")
        self._give_up([head for head in self.heads.values() if head.checkpoint == STATELESS])
        self._returned += self.ledger.give_all_back()

    def _give_up(self, heads: list[Head]) -> None:
        """Let go of heads that would need a state which nobody has any more; their jobs may start again."""
        for head in heads:
            self._given_up.add(head.incarnation)
            del self.heads[head.incarnation]

    def _lives_on(self, head: Head) -> bool:
        return head.standing == Standing.live or head.synced in self._ready

    def _complete(self, head: Head) -> bool:
        return len(head.present) == self.terms.positions

    def _has_answered(self, head: Head) -> bool:
        return len(head.answered) == self.terms.positions

    def _say(self, text: str) -> None:
        if text != self._last_words:
            self.said.append(text)
            self._last_words = text


def saved(point: MeetingPoint) -> dict[str, Any]:
    """What a restarted meeting point must know."""
    return {"sync": point.sync, "eras": point.eras, "ledger": point.ledger.to_json()}


def _number(head: Head) -> int:
    assert head.number is not None
    return head.number
