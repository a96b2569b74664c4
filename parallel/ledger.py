"""Who trains on what: the training sequence is one line of positions, and every position has one place in this ledger.

A head gets a lease on ranges of positions, which is merged with the head's change, or returned when the head is lost:
then it is leased again before anything new. Pure bookkeeping without processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Range = tuple[int, int]
"""Half-open."""

RECENT = 1000
"""Syncs that can be undone."""


@dataclass(kw_only=True, slots=True)
class Ledger:
    """Every position below `reached` is merged, leased, returned or lost, and only one of these."""

    reached: int = 0
    """Where new leases begin."""
    leased: dict[int, list[Range]] = field(default_factory=dict)
    """By head: what it trains on, or has trained on without a sync since."""
    returned: list[Range] = field(default_factory=list)
    """What lost heads had not brought to a sync; the next leases take it."""
    recent: dict[int, dict[int, list[Range]]] = field(default_factory=dict)
    """By sync and head: what the last syncs merged."""
    merged: list[Range] = field(default_factory=list)
    """What all syncs before those merged."""
    lost: list[Range] = field(default_factory=list)
    """What was trained on or returned when the run ended, and is in no sync."""

    def lease(self, head: int, count: int) -> list[Range]:
        """Give a head `count` further positions, returned ones first, in the order in which it is to train on them."""
        given: list[Range] = []
        while count and self.returned:
            start, stop = self.returned.pop(0)
            taken = min(count, stop - start)
            given.append((start, start + taken))
            count -= taken
            if start + taken < stop:
                self.returned.insert(0, (start + taken, stop))
        if count:
            given.append((self.reached, self.reached + count))
            self.reached += count
        self.leased.setdefault(head, []).extend(given)
        return given

    def merge(self, sync: int, heads: Iterable[int]) -> dict[int, list[Range]]:
        """Note that a sync has taken up what these heads had on lease; returns what that was."""
        done = {head: joined(self.leased.pop(head, [])) for head in heads}
        self.recent[sync] = done
        for old in [one for one in self.recent if one <= sync - RECENT]:
            self.merged = joined([*self.merged, *_all(self.recent.pop(old))])
        return done

    def give_back(self, head: int) -> list[Range]:
        """Take a lost head's leases back; returns what they were."""
        ranges = joined(self.leased.pop(head, []))
        self.returned = joined([*self.returned, *ranges])
        return ranges

    def give_all_back(self) -> list[Range]:
        """Take all leases back."""
        return joined([one for head in list(self.leased) for one in self.give_back(head)])

    def undo(self, after: int) -> list[Range]:
        """Return what the syncs after a certain one merged: the model goes back to that one, and so does the data."""
        undone = joined([one for sync in list(self.recent) if sync > after for one in _all(self.recent.pop(sync))])
        self.returned = joined([*self.returned, *undone])
        return undone

    def finish(self) -> list[Range]:
        """Give up what no sync will take up any more; returns all of it."""
        self.give_all_back()
        self.lost = joined([*self.lost, *self.returned])
        self.returned = []
        return self.lost

    @property
    def merged_count(self) -> int:
        """Positions that syncs have taken up."""
        return length(self.merged) + sum(length(_all(heads)) for heads in self.recent.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {
            "reached": self.reached,
            "leased": {str(head): ranges for head, ranges in self.leased.items()},
            "returned": self.returned,
            "recent": {
                str(sync): {str(head): ranges for head, ranges in heads.items()} for sync, heads in self.recent.items()
            },
            "merged": self.merged,
            "lost": self.lost,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Ledger:
        """The ledger that `to_json` wrote."""
        return cls(
            reached=int(values["reached"]),
            leased=_by_head(values["leased"]),
            returned=ranges_of(values["returned"]),
            recent={int(sync): _by_head(heads) for sync, heads in values["recent"].items()},
            merged=ranges_of(values["merged"]),
            lost=ranges_of(values["lost"]),
        )


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same positions in order, neighbours as one range."""
    together: list[Range] = []
    for start, stop in sorted(ranges):
        if together and together[-1][1] == start:
            together[-1] = (together[-1][0], stop)
        elif start < stop:
            assert not together or together[-1][1] < start, "a position has one place"
            together.append((start, stop))
    return together


def length(ranges: Iterable[Range]) -> int:
    """Positions in them."""
    return sum(stop - start for start, stop in ranges)


def taken(ranges: Iterable[Range], start: int, count: int) -> list[Range]:
    """The `count` positions that come after the first `start` ones."""
    found: list[Range] = []
    for first, last in ranges:
        begin, end = first + start, min(last, first + start + count)
        if begin < end:
            found.append((begin, end))
            count -= end - begin
        start = max(0, start - (last - first))
    assert not count, "a lease has as many positions as its steps need"
    return found


def shown(ranges: Iterable[Range]) -> str:
    """Ranges as a user reads them."""
    return ", ".join(f"{start:,} to {stop - 1:,}" for start, stop in ranges) or "none"


def ranges_of(values: Iterable[Iterable[int]]) -> list[Range]:
    """Ranges from JSON's lists."""
    return [(int(start), int(stop)) for start, stop in values]


def _by_head(values: dict[str, Any]) -> dict[int, list[Range]]:
    return {int(head): ranges_of(ranges) for head, ranges in values.items()}


def _all(heads: dict[int, list[Range]]) -> list[Range]:
    return [one for ranges in heads.values() for one in ranges]
