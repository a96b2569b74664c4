"""The words that elastic heads and their meeting point share: terms, leases, decisions. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from parallel.ledger import Range

ADDRESS = "address"
"""The file in a meeting point's folder that tells HOST:PORT."""
STATELESS = -1
"""In place of a checkpoint's sync: a head that has begun once and can only begin again with another one's state."""


class Refused(ValueError):
    """A head that cannot take part in this run; the message says why."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Terms:
    """What all heads of a run must agree on; the first one that comes brings it."""

    identity: str
    """Of the configuration and the data."""
    layout: str
    """How the processes of a head share its model."""
    heads: int
    """How many there can be at once, and how many the start waits for."""
    quorum: int
    """Fewest heads that make a sync."""
    wait_seconds: float
    """How long a sync waits after its first answer."""
    silence_seconds: float
    """How long a process may be silent, or its connection broken, before its head counts as lost."""
    sync_every: int
    """Steps between syncs."""
    steps: int
    """Of the whole run."""
    batch: int
    """Sequences of one step of a head."""
    positions: int
    """Processes of a head."""

    @property
    def last(self) -> int:
        """Index of the sync that ends the run."""
        return -(-self.steps // self.sync_every)

    def step_of(self, sync: int) -> int:
        """Steps after which a sync comes."""
        return min(sync * self.sync_every, self.steps)


class Standing(str, Enum):
    """Where a head is in its life here."""

    waiting = "waiting"
    """It wants to be admitted."""
    joining = "joining"
    """It is admitted, and gets the state of the others."""
    live = "live"


@dataclass(kw_only=True, slots=True, frozen=True)
class Lease:
    """What a head does next."""

    sync: int
    """It trains towards this one."""
    steps: int
    """Updates until then; a head that is late gets as many as it can make in time, perhaps none."""
    ranges: list[Range]
    """Positions of the training sequence, in order, for these updates."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Decision:
    """A sync as it was decided; the same for all processes of all heads."""

    sync: int
    members: list[int]
    """Heads whose changes are in it, ascending."""
    weights: list[float]
    """How much each counts; they sum to 1."""
    words: list[list[float]]
    """What each member said."""
    trained: dict[int, list[Range]]
    """Positions that each member's change brings."""
    returned: list[Range]
    """Positions that lost heads gave back since the sync before."""
    gone: list[str]
    """Heads that were lost or left since then."""
    joined: list[int]
    """Heads that begin with this sync's state, as if they had never been there before."""
    provider: int | None
    """The head that hands them this state."""
    merged: int
    """Positions that all syncs up to this one have taken up."""


@dataclass(kw_only=True, slots=True)
class Head:
    """One start of one job."""

    incarnation: str
    since: float
    checkpoint: int
    """The sync after which the job's own checkpoint was written."""
    wanted: int | None
    """Its number in that checkpoint."""
    number: int | None = None
    standing: Standing = Standing.waiting
    synced: int = 0
    """The state that a joining head gets is of this sync."""
    present: set[int] = field(default_factory=set)
    """Positions with a connection."""
    away_since: float | None = None
    lost: bool = False
    """It is gone, but its answer counts in the next sync."""
    lease: Lease | None = None
    """For the sync that is open; None before it has asked for one."""
    leased_at: float = 0.0
    pace: float | None = None
    """Seconds a step."""
    answered: set[int] = field(default_factory=set)
    """Positions whose contribution to the open sync is complete."""
    words: list[float] = field(default_factory=list)
    leaving: bool = False
    replies: dict[int, Reply] = field(default_factory=dict)
    """What was told to the first position that asked; all others are told the same."""


class Verdict(str, Enum):
    """What a head that has asked what comes next is told."""

    outcome = "outcome"
    """The sync after the one that it has: it was decided without this head."""
    lease = "lease"
    finished = "finished"
    gone = "gone"
    """This head was given up, or has missed more than is kept: it must join anew."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Reply:
    """The answer to `next`."""

    verdict: Verdict
    lease: Lease | None = None
