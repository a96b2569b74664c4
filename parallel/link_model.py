"""How long heads wait for a link that joins them: sizes over bandwidth, and messages that wait for one another.

Pure arithmetic. A link carries what one head (a site) sends to all others, and as much towards it at the same time;
headers, lost packets and a connection's slow beginning are not in it. benchmarks/lte_link.py measures how far it holds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_HANDSHAKE = 2  # gloo sends when it has heard that the receiver is ready, so each message takes two latencies
_SLOWEST, _FASTEST = 1e2, 1e15  # bytes per second between which crossovers are looked for
_HALVINGS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What joins a head to the others."""

    bandwidth: float
    """Bytes per second, each way at the same time."""
    latency: float
    """Seconds from one head to another, one way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trip:
    """What travels in one go."""

    bytes: float
    """That one head sends."""
    hops: int
    """Messages that wait for one another."""
    hidden: float = 0.0
    """Seconds of training that go on meanwhile."""

    def seconds(self, link: Link) -> float:
        """From beginning to end."""
        return self.bytes / link.bandwidth + _HANDSHAKE * self.hops * link.latency

    def waiting(self, link: Link) -> float:
        """Seconds of it in which training stands still."""
        return max(0.0, self.seconds(link) - self.hidden)


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A way to train one model on several heads; times are those of one head."""

    name: str
    computing: float
    """Seconds of a step without waiting for other heads."""
    every: int
    """Steps between two times that all trips travel."""
    trips: Sequence[Trip]

    def waiting(self, link: Link) -> float:
        """Seconds of waiting in `every` steps."""
        return sum(trip.waiting(link) for trip in self.trips)

    def step_seconds(self, link: Link) -> float:
        """Of a step, waiting included."""
        return self.computing + self.waiting(link) / self.every

    def idle_share(self, link: Link) -> float:
        """Of the time, what is waiting."""
        return 1 - self.computing / self.step_seconds(link)

    @property
    def bytes_per_step(self) -> float:
        """That one head sends."""
        return sum(trip.bytes for trip in self.trips) / self.every

    def steps_for(self, link: Link, idle_share: float) -> int:
        """The least `every` with which no more than so much of the time is waiting."""
        return max(1, math.ceil(self.waiting(link) * (1 - idle_share) / (idle_share * self.computing)))


def gather_hops(heads: int) -> int:
    """A ring: each message goes on when it has come."""
    return heads - 1


def mean_hops(heads: int) -> int:
    """All pieces to their owners at once, then a ring with the means."""
    return gather_hops(heads) + 1 if heads > 1 else 0


def sum_trip(size: float, heads: int, *, messages: int, hidden: float) -> Trip:
    """A ring's all-reduce of so many bytes, in so many messages one after another."""
    passes = 2 * (heads - 1)
    return Trip(bytes=passes / heads * size, hops=passes * messages, hidden=hidden)


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossover:
    """Where one of two methods is the faster."""

    on_slow: bool
    """Whether it is on the slowest links."""
    on_fast: bool
    """Whether it is on the fastest."""
    bandwidth: float | None
    """Bytes per second in between where it turns; None when it does not."""


def crossover(one: Method, other: Method, latency: float) -> Crossover:
    """Links on which `one` takes less time for a step than `other`."""

    def ahead(bandwidth: float) -> bool:
        link = Link(bandwidth=bandwidth, latency=latency)
        return one.step_seconds(link) < other.step_seconds(link)

    slow, fast = ahead(_SLOWEST), ahead(_FASTEST)
    low, high = _SLOWEST, _FASTEST
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if ahead(middle) == slow else (low, middle)
    return Crossover(on_slow=slow, on_fast=fast, bandwidth=None if slow == fast else low)
