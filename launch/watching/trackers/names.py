"""What the runs of one training are called in a tracker, and which processes have one.

The first process has the run itself. LTE's heads may have one each, by the first process of each head, and a node whose
load is sampled has one where none of its processes has any yet. All of them share a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from launch.watching.trackers.config import SystemMetrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """Of one run."""

    run_id: str
    """The same for all attempts."""
    name: str
    group: str | None
    job_type: str

    def of_head(self, head: int) -> "Names":
        """Those of the run of one of LTE's heads."""
        return self._beside("head", head)

    def of_node(self, node: int) -> "Names":
        """Those of the run that has a further node's load and nothing else."""
        return self._beside("node", node)

    def _beside(self, kind: str, number: int) -> "Names":
        named = f"{kind}-{number}"
        return replace(self, run_id=f"{self.run_id}-{named}", name=f"{self.name}-{named}", job_type=kind)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """What a process tells a tracker."""

    heads: list[int]
    """LTE's heads, without the first, whose runs it has."""
    node: int | None
    """The number of its machine, if it has a run for its load only."""
    samples: bool
    """Whether its run has its machine's load."""


def seats(hosts: Sequence[str], heads: Sequence[Sequence[int]], system_metrics: SystemMetrics) -> list[Seat]:
    """What each process has, in order of ranks.

    Args:
        hosts: the machine of each.
        heads: the heads of LTE that each is the first process of, where these have runs of their own.
    """
    nodes = list(dict.fromkeys(hosts))
    found = []
    for rank, (host, own) in enumerate(zip(hosts, heads, strict=True)):
        wanted = system_metrics is SystemMetrics.nodes or (system_metrics is SystemMetrics.first and rank == 0)
        samples = wanted and host not in hosts[:rank]
        node = nodes.index(host) if samples and rank > 0 and not own else None
        found.append(Seat(heads=[head for head in own if head > 0], node=node, samples=samples))
    return found
