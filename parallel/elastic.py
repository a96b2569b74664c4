"""The way to heads that are separate jobs: everything goes through their meeting point, up once and down once.

Of a parcel that is gathered all members' bytes come back, of a mean the mean, made at the meeting point. What the
processes of a head's data axis hold alike each sends a part of. The protocol is in docs/elastic.md.
"""

import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import broadcast_object, gather_objects
from parallel.frames import Bytes
from parallel.ledger import Range, ranges_of, taken
from parallel.meeting_line import Connection, Frames, GivenUp, MeetingLine, MeetingLost
from parallel.meeting_terms import Decision, Lease, Terms
from parallel.runtime import Runtime
from relora.compression import block_of, decode, encode, encoded_bytes
from relora.errors import ConfigError
from relora.heads import Compression, Parcel, Way
from relora.lte import Exchange, LteConfig

_FP32 = 4


@dataclass(kw_only=True, slots=True, frozen=True)
class Admission:
    """How a head begins."""

    sync: int
    """The sync whose state it begins with."""
    era: int
    """How often the run has gone back."""
    joins: bool
    """Whether it gets that from another head; otherwise its own checkpoint, or the beginning, is the state."""
    decision: Decision | None


class ElasticHeads:
    """The other heads, through the meeting point. Implements `relora.heads.Heads`.

    Collectives: every method but `by_factors`, by all processes of the head.
    """

    def __init__(
        self,
        runtime: Runtime,
        config: LteConfig,
        terms: Terms,
        *,
        token: str,
        checkpoint: int,
        wanted: int | None,
        era: int,
        patience_seconds: float,
    ) -> None:
        """Say hello; what `checkpoint`, `wanted` and `era` are, MeetingPoint.hello says.

        Raises:
            ConfigError: the meeting point refuses this head.
            MeetingLost: it is not there.
        """
        assert config.meeting is not None
        self._runtime, self._choice, self._compression = runtime, config.exchange, config.compression
        self.count = terms.heads
        self.hosted = [0]
        """This head's number, once it is admitted."""
        self.sent = 0
        """Bytes that this process has sent."""
        self.leaving = False
        """Whether the next sync is this head's last one."""
        self.admitted: Admission | None = None
        """How this head began."""
        self.decision: Decision | None = None
        """About the last sync that was exchanged or asked for."""
        self.lease: Lease | None = None
        """What this head does now."""
        self._terms = terms
        hello = {
            "op": "hello",
            "token": token,
            "incarnation": broadcast_object(runtime, secrets.token_hex(8)),
            "position": runtime.process_rank,
            "terms": asdict(terms),
            "checkpoint": checkpoint,
            "wanted": wanted,
            "era": era,
        }
        try:
            self.line = MeetingLine(
                config.meeting, hello, silence_seconds=terms.silence_seconds, patience_seconds=patience_seconds
            )
        except GivenUp as error:
            raise ConfigError("the meeting point knows this head as lost: start the same command again") from error

    @property
    def number(self) -> int:
        """This head's."""
        return self.hosted[0]

    def admission(self) -> Admission:
        """Wait until this head may take part."""
        reply = self.line.ask({"op": "admission"})
        decision = None if reply["decision"] is None else _decision(reply["decision"])
        self.hosted = [int(reply["number"])]
        self.decision = decision
        self.admitted = Admission(
            sync=int(reply["sync"]), era=int(reply["era"]), joins=bool(reply["joins"]), decision=decision
        )
        return self.admitted

    def come_again(self) -> None:
        """Ask to be admitted as a new head."""
        self.line.come_again(broadcast_object(self._runtime, secrets.token_hex(8)))

    def goodbye(self, reason: str) -> None:
        """Leave for good."""
        gather_objects(self._runtime, None)  # what the others still fetch is kept for heads that are there
        if self._runtime.is_main:
            with suppress(GivenUp, MeetingLost):
                self.line.ask({"op": "goodbye", "reason": reason})
        self.line.close()

    def by_factors(self, factors: int, part: int, *, alike: bool) -> bool:
        """Whether a layer's factors travel (so many entries a head), or its dense change (so many here).

        Own bytes go up; those of the other heads, or the mean in float32, come down.
        """
        if self._choice != Exchange.auto:
            return self._choice == Exchange.factors
        factors = encoded_bytes(self._share(factors, True), self._compression)
        part = self._share(part, alike)
        return self.count * factors <= encoded_bytes(part, self._compression) + _FP32 * part

    def step_of(self, sync: int) -> int:
        """Steps after which a sync comes."""
        return self._terms.step_of(sync)

    def leased(self, step: int, size: int, *, start: int, count: int) -> list[Range]:
        """Positions of the update after `step` steps, which takes `size`: `count` of them after the first `start`."""
        assert self.lease is not None
        done = self.lease.steps - (self.step_of(self.lease.sync) - step)
        return taken(self.lease.ranges, done * size + start, count)

    # ---- what those that join get

    def hand_over(self, sync: int, parts: Iterable[tuple[dict[str, Any], Bytes]]) -> None:
        """Bring the state after a sync to the meeting point, part by part."""

        def frames() -> Iterator[tuple[dict[str, Any], Sequence[Bytes]]]:
            for index, (header, data) in enumerate(parts):
                self.sent += len(data)
                yield {**header, "op": "state", "sync": sync, "first": index == 0}, [data]
            yield {"op": "state_end", "sync": sync}, []

        self.line.post(frames())

    def take_over(self) -> list[tuple[dict[str, Any], Bytes]] | None:
        """The parts of the state that this head begins with; None when who brings it was lost: ask for admission again.

        Raises:
            GivenUp: this head must join anew.
        """
        frames = self.line.stream(lambda connection, _: (connection.send({"op": "load"}), None)[1])
        parts: list[tuple[dict[str, Any], Bytes]] = []
        again = False
        for header, payload in frames:
            if "again" in header:
                again = True
                break
            if header.get("first"):
                parts = []  # the reply broke off, and began anew
            if "end" not in header:
                parts.append((header, payload))
        frames.close()
        return None if any(gather_objects(self._runtime, again)) else parts

    # ---- syncs

    def exchange(
        self, parcels: Sequence[Parcel], words: Sequence[Sequence[float]], *, background: bool = False
    ) -> "MeetingDelivery":
        """Bring parcels to the open sync, and wait until it is decided.

        Raises:
            GivenUp: this head must join anew; on all of its processes.
        """
        assert not background, "lte.delay is 0 with elastic heads"
        assert self.lease is not None, "a lease names the sync that it is for"
        kept = [[one.clone() for one in parcel.residuals or ()] for parcel in parcels]
        own = [self._encoded(parcel) for parcel in parcels]
        self.sent += sum(len(data) for data in own)
        sync = self.lease.sync

        def issue(connection: Connection, first: int) -> None:
            for index, (parcel, data) in enumerate(zip(parcels, own, strict=True)):
                if first:  # it has come, or there would be no outcome
                    break
                connection.send({"op": "parcel", "index": index, **self._told(parcel)}, [data])
            answer = {"sync": sync, "words": list(words[0]), "leaving": self.leaving, "parcels": len(parcels)}
            connection.send({"op": "answer", "first": first, **answer})

        frames = self.line.stream(issue)
        delivery = self._delivery(self._agreed(frames), frames, own)
        if self.number not in delivery.members:
            for parcel, before in zip(parcels, kept, strict=True):
                for residual, value in zip(parcel.residuals or (), before, strict=True):
                    residual.copy_(value)
        return delivery

    def after(self, have: int) -> "MeetingDelivery | Lease | None":
        """What comes after the sync whose state this head has.

        The next sync, if that was made without it; else a lease, or None when the run is complete.

        Raises:
            GivenUp: this head must join anew; on all of its processes.
        """

        def issue(connection: Connection, first: int) -> None:
            connection.send({"op": "next", "have": have, "first": first})

        frames = self.line.stream(issue)
        reply = self._agreed(frames)
        if "decision" in reply:
            return self._delivery(reply, frames, [])
        frames.close()
        if reply["verdict"] == "gone":
            raise GivenUp
        lease = reply["lease"]
        if lease is None:
            return None
        self.lease = Lease(sync=int(lease["sync"]), steps=int(lease["steps"]), ranges=ranges_of(lease["ranges"]))
        return self.lease

    def _delivery(self, reply: dict[str, Any], frames: Frames, own: list[Bytes]) -> "MeetingDelivery":
        self.decision = _decision(reply["decision"])
        return MeetingDelivery(self, self.decision, frames, own)

    def _agreed(self, frames: Frames) -> dict[str, Any]:
        """The first frame of a reply, unless any process of the head is told that it was given up."""
        reply: dict[str, Any] | None = None
        with suppress(GivenUp):
            reply, _ = next(frames)
        if not all(gather_objects(self._runtime, reply is not None)):
            frames.close()
            raise GivenUp
        assert reply is not None
        return reply

    # ---- parts of parcels

    def _share(self, entries: int, alike: bool) -> int:
        """Entries that each process of the data axis sends."""
        share = -(-entries // self._runtime.data.size) if alike else entries
        return -(-share // (block := block_of(self._compression))) * block

    def _told(self, parcel: Parcel) -> dict[str, Any]:
        """What the meeting point, and heads that bring none of their own, must know of a parcel."""
        parts = self._runtime.data.size if parcel.alike else 1
        return {
            "mean": parcel.way is Way.mean,
            "entries": self._share(parcel.entries, parcel.alike),
            "whole": parcel.entries,
            "alike": parcel.alike,
            "compression": Compression(parcel.compression).value,
            "share": parts / parcel.replicas if parcel.replicas else 0.0,
        }

    def _encoded(self, parcel: Parcel) -> Bytes:
        """This process's part, as it travels; what rounding loses goes to the residuals."""
        (own,) = parcel.own()
        data, share = self._runtime.data, self._share(parcel.entries, parcel.alike)
        padded = torch.zeros(share * (data.size if parcel.alike else 1), device=own.device)
        padded[: own.numel()] = own
        for residual in parcel.residuals or ():
            padded[: residual.numel()] += residual
        mine = padded[(data.index if parcel.alike else 0) * share :][:share]
        encoded = encode(mine, parcel.compression)
        for residual in parcel.residuals or ():
            lost = mine - decode(encoded, share, parcel.compression)
            residual.copy_(self.whole(lost[None], residual.numel(), alike=parcel.alike)[0])
        return encoded.cpu().contiguous().numpy().data

    def decoded(self, data: Bytes, entries: int, compression: Compression) -> Tensor:
        """The float32 entries of a part that has travelled."""
        bits = torch.frombuffer(data, dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)
        return decode(bits, entries, compression).to(self._runtime.device)

    def whole(self, parts: Tensor, entries: int, *, alike: bool) -> Tensor:
        """Rows from their parts in all processes of the data axis. Shapes: (rows, share), to (rows, entries)."""
        data = self._runtime.data
        if not alike or data.group is None:
            return parts[:, :entries]
        gathered = [torch.empty_like(parts) for _ in range(data.size)]
        dist.all_gather(gathered, parts.contiguous(), group=data.group)
        return torch.cat(gathered, dim=1)[:, :entries]


class MeetingDelivery:
    """What a sync brings, parcel by parcel from the line. Implements `relora.heads.Delivery`."""

    def __init__(self, heads: ElasticHeads, decision: Decision, frames: Frames, own: Sequence[Bytes]) -> None:
        """`own` is what this process has brought, if it has."""
        self._heads, self._frames, self._own = heads, frames, iter(own)
        self.members, self.weights, self.words = decision.members, decision.weights, decision.words

    def result(self) -> list[Tensor]:
        """The next parcel's outcome. Waits."""
        own = next(self._own, b"")
        header, payload = next(self._frames)
        told, start, rows = header["parcel"], 0, []
        compression = Compression.none if told["mean"] else Compression(told["compression"])
        brought_by = [None] if told["mean"] else self.members
        for member, size in zip(brought_by, header["sizes"], strict=True):
            data = own if member == self._heads.number and own else memoryview(payload)[start : start + size]
            rows.append(self._heads.decoded(data, told["entries"], compression))
            start += size
        return list(self._heads.whole(torch.stack(rows), told["whole"], alike=told["alike"]).unbind())

    def products(self) -> Tensor:
        """Inner products of what travelled as means, as far as this process sent it.

        Shapes: (members, members), float64, on the CPU.
        """
        closing, _ = next(self._frames)
        self._frames.close()
        return torch.tensor(closing["products"], dtype=torch.float64)


def _decision(told: dict[str, Any]) -> Decision:
    values = dict(told)
    values["trained"] = {int(head): ranges_of(ranges) for head, ranges in told["trained"].items()}
    values["returned"] = ranges_of(told["returned"])
    return Decision(**values)
