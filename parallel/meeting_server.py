"""The meeting point's door: connections, frames, and the bytes of syncs that heads still need.

One thread and asyncio. What is decided is in parallel/meeting_point.py; after each decision the ledger is written to
a file, so that a restarted meeting point knows what every position of the data was used for.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from socket import gethostname
from typing import Any

from parallel.files import write_atomically
from parallel.frames import LENGTHS, TOKEN_VARIABLE, BrokenFrame, Bytes, header_of, lengths, packed
from parallel.ledger import Ledger
from parallel.meeting_outcome import Brought, Outcome, Parcels
from parallel.meeting_point import MeetingPoint, saved
from parallel.meeting_terms import ADDRESS, Decision, Refused, Standing, Terms, Verdict
from parallel.state_spool import StateSpool

FORMAT = 1
LEDGER, EVENTS = "ledger.json", "meeting.jsonl"
_BEAT_SECONDS = 1.0
"""How often a head that waits hears that it must."""
_LOOK_SECONDS = 0.1
_HELLO_SECONDS = 10.0
_LONGEST = 1 << 40
_FREE = ("layout", "quorum", "wait_seconds", "silence_seconds", "positions")
"""Terms that may change while no head is there."""


@dataclass(slots=True)
class _Guest:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    incarnation: str = ""
    position: int = 0
    brought: dict[int, Brought] = field(default_factory=dict)
    heard: float = 0.0

    async def receive(self, longest: int = _LONGEST) -> tuple[dict[str, Any], bytearray]:
        header, size = lengths(await self.reader.readexactly(LENGTHS.size), longest)
        words = header_of(await self.reader.readexactly(header))
        payload = bytearray()
        while len(payload) < size:
            part = await self.reader.read(min(1 << 20, size - len(payload)))
            if not part:
                raise BrokenFrame("the other end is gone")
            payload += part
            self.heard = time.monotonic()
        self.heard = time.monotonic()
        return words, payload

    async def send(self, header: dict[str, Any], *payload: Bytes) -> None:
        self.writer.write(packed(header, sum(len(part) for part in payload)))
        for part in payload:
            self.writer.write(part)
            await self.writer.drain()
            self.heard = time.monotonic()
        await self.writer.drain()


def _remembered(path: Path) -> MeetingPoint:
    """What a ledger's file knows."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        version = stored.get("format")
        if version == FORMAT:
            ledger = Ledger.from_json(stored["ledger"])
            return MeetingPoint(Terms(**stored["terms"]), ledger, sync=stored["sync"], eras=stored["eras"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): put back a copy of it, or name another --folder for a run from the start"
        ) from error
    raise ValueError(f"{path} has format {version!r}, and this version reads {FORMAT}")


class MeetingServer:
    """Serves one run, until its last head has said goodbye after the last sync."""

    def __init__(self, folder: Path, *, token: str, keep_bytes: int, say: Callable[[str], None]) -> None:
        """Read the ledger of the folder, if there is one.

        Raises:
            ValueError: it is damaged, or of another version.
        """
        self._folder, self._token, self._keep_bytes, self._say = folder, token, keep_bytes, say
        self._session = secrets.token_hex(8)
        self._point: MeetingPoint | None = None
        self._brought: dict[tuple[int, int], tuple[int, Parcels]] = {}  # by head and position: a sync and its parcels
        self._outcomes: dict[int, list[Outcome]] = {}  # by sync, then position
        self._spool = StateSpool(folder)
        self._last: Decision | None = None
        self._changed = asyncio.Event()
        self._done = asyncio.Event()
        self._making = asyncio.Lock()
        self._guests: dict[tuple[str, int], _Guest] = {}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LEDGER
        if path.exists():
            self._point = _remembered(path)
            merged = self._point.ledger.merged_count
            say(f"{path}: {self._point.sync} syncs were made, {merged:,} sequences are in them")

    async def serve(self, host: str | None, port: int, *, name: str | None = None) -> None:
        """Serve until the run is complete and all heads have left.

        Args:
            host: the address to listen on; None: all.
            port: 0: one that is free.
            name: what heads that are given the folder call this machine; None: the host, or the machine's own name.
        """
        server = await asyncio.start_server(self._guest, host, port)
        ports = {one.getsockname()[1] for one in server.sockets}
        if len(ports) > 1:  # IPv4 and IPv6 were each given a free one
            server.close()
            server = await asyncio.start_server(self._guest, host, ports.pop())
        address = f"{name or host or gethostname()}:{server.sockets[0].getsockname()[1]}"
        write_atomically(self._folder / ADDRESS, address + "\n")
        self._say(f"meeting point at {address}, ledger in {self._folder}")
        looking = asyncio.create_task(self._look())
        async with server:
            await self._done.wait()
        looking.cancel()

    def stop(self) -> None:
        """Let `serve` return; called from its thread."""
        self._done.set()

    # ---- connections

    async def _guest(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        guest = _Guest(reader, writer)
        reply: asyncio.Task[None] | None = None
        try:
            if not await asyncio.wait_for(self._hello(guest), _HELLO_SECONDS):
                return
            while True:
                header, payload = await guest.receive()
                work = self._heed(guest, header, payload)
                if work is not None:
                    if reply is not None:
                        await reply
                    reply = asyncio.create_task(_quietly(work))
        except (OSError, EOFError, asyncio.TimeoutError, KeyError, TypeError, ValueError):
            return  # whoever it was, the connection is closed, and a head may come again
        finally:
            if reply is not None:
                reply.cancel()
            writer.close()
            key = guest.incarnation, guest.position
            if self._guests.get(key) is guest:  # it has not come back by another connection
                del self._guests[key]
                self._open.broken(*key, time.monotonic())

    async def _hello(self, guest: _Guest) -> bool:
        header, _ = await guest.receive(longest=0)
        if not hmac.compare_digest(str(header.get("token", "")), self._token):
            await guest.send({"refused": "it does not have the meeting point's word: set " + TOKEN_VARIABLE})
            return False
        try:
            terms = Terms(**header["terms"])
            if self._point is None:
                self._point = MeetingPoint(terms, Ledger())
            if not self._point.heads:  # all jobs have stopped: how they run may change, but not what they train
                self._point.terms = replace(self._point.terms, **{key: asdict(terms)[key] for key in _FREE})
            _check_terms(self._point.terms, terms)
            counts = self._point.hello(
                str(header["incarnation"]),
                int(header["position"]),
                checkpoint=int(header["checkpoint"]),
                wanted=header["wanted"],
                era=int(header["era"]),
                now=time.monotonic(),
            )
        except Refused as error:
            await guest.send({"refused": str(error)})
            return False
        if not counts:
            await guest.send({"gone": True, "session": self._session})
            return False
        guest.incarnation, guest.position = str(header["incarnation"]), int(header["position"])
        self._guests[guest.incarnation, guest.position] = guest
        self._settle()
        await guest.send({"session": self._session})
        return True

    @property
    def _terms(self) -> Terms:
        return self._open.terms

    @property
    def _open(self) -> MeetingPoint:
        assert self._point is not None, "somebody has said hello"
        return self._point

    def _heed(self, guest: _Guest, header: dict[str, Any], payload: bytearray) -> Awaitable[None] | None:
        """Do what a frame asks for; returns what takes longer."""
        what, now = header["op"], time.monotonic()
        if what == "parcel":
            guest.brought[int(header["index"])] = Brought.from_header(header, payload)
        elif what == "answer":
            return self._answer(guest, header, now)
        elif what == "next":
            return self._next(guest, int(header["have"]), int(header["first"]))
        elif what == "admission":
            return self._admission(guest)
        elif what == "state":
            if header["first"]:
                self._spool.begin(int(header["sync"]), guest.position)
            self._spool.add(int(header["sync"]), guest.position, header, payload)
        elif what == "state_end":
            sync = int(header["sync"])
            if self._spool.finish(sync, guest.position) == self._terms.positions:
                self._open.state_is_here(sync)
                self._wake()
        elif what == "load":
            return self._load(guest)
        elif what == "goodbye":
            self._open.goodbye(guest.incarnation, str(header["reason"]), now)
            self._settle()
            return guest.send({"farewell": True})
        return None

    # ---- replies

    async def _until(self, guest: _Guest, ready: Callable[[], bool]) -> None:
        """Wait for something, and let the head know that it is waited for."""
        while not ready():
            await self._pause(guest)

    async def _pause(self, guest: _Guest) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), _BEAT_SECONDS)
        except asyncio.TimeoutError:
            await guest.send({"waiting": True})

    async def _admission(self, guest: _Guest) -> None:
        def admitted() -> bool:
            head = self._open.heads.get(guest.incarnation)
            return head is None or head.standing != Standing.waiting

        await self._until(guest, admitted)
        head = self._open.heads.get(guest.incarnation)
        if head is None:
            over = "the run is complete without this head: its results are in the folders of the others"
            await guest.send({"refused": over} if self._open.finished else {"gone": True})
            return
        decision = self._open.decisions.get(head.synced)
        told = None if decision is None else asdict(decision)
        joins = head.standing == Standing.joining
        await guest.send(
            {"number": head.number, "sync": head.synced, "joins": joins, "decision": told, "era": len(self._open.eras)}
        )

    def _answer(self, guest: _Guest, header: dict[str, Any], now: float) -> Awaitable[None]:
        sync, head = int(header["sync"]), self._open.heads.get(guest.incarnation)
        if head is not None and head.number is not None and sync == self._open.sync + 1:
            parcels = [guest.brought[index] for index in range(int(header["parcels"]))]
            self._brought[head.number, guest.position] = sync, parcels
            words = [float(word) for word in header["words"]]
            self._open.answer(guest.incarnation, guest.position, sync, words, bool(header["leaving"]), now)
            self._settle()
        guest.brought = {}
        return self._tell_outcome(guest, sync, int(header["first"]))

    async def _tell_outcome(self, guest: _Guest, sync: int, first: int) -> None:
        def decided() -> bool:
            return self._open.sync >= sync or guest.incarnation not in self._open.heads

        await self._until(guest, decided)
        decision = self._open.decisions.get(sync)
        if decision is None or sync not in self._outcomes:
            self._open.missed_too_much(guest.incarnation, time.monotonic())
            self._settle()
            await guest.send({"gone": True})
            return
        head = self._open.heads.get(guest.incarnation)
        own = decision.members.index(head.number) if head is not None and head.number in decision.members else None
        outcome = self._outcomes[sync][guest.position]
        await guest.send({"decision": asdict(decision)})
        for index in range(first, len(outcome)):
            if outcome.is_mean(index):
                async with self._making:
                    payload: list[Bytes] = [await asyncio.to_thread(outcome.mean, index)]
            else:
                payload = [b"" if place == own else data for place, data in enumerate(outcome.gathered(index))]
            sizes = [len(part) for part in payload]
            await guest.send({"parcel": outcome.told(index), "sizes": sizes}, *payload)
        await guest.send({"end": True, "products": outcome.products.tolist()})

    async def _next(self, guest: _Guest, have: int, first: int) -> None:
        while (reply := self._open.next(guest.incarnation, have, time.monotonic())) is None:
            await self._pause(guest)
        self._settle()
        if reply.verdict == Verdict.outcome:
            await self._tell_outcome(guest, have + 1, first)
            return
        lease = None if reply.lease is None else asdict(reply.lease)
        await guest.send({"verdict": reply.verdict.value, "lease": lease})

    async def _load(self, guest: _Guest) -> None:
        def known() -> bool:
            head = self._open.heads.get(guest.incarnation)
            return head is None or head.standing != Standing.joining or self._open.has_state(guest.incarnation)

        await self._until(guest, known)
        head = self._open.heads.get(guest.incarnation)
        if head is None or not self._open.has_state(guest.incarnation):
            await guest.send({"again": head is not None})
            return
        for frame in self._spool.frames(head.synced, guest.position):
            guest.writer.write(frame)
            await guest.writer.drain()
            guest.heard = time.monotonic()
        await guest.send({"end": True})

    # ---- decisions

    async def _look(self) -> None:
        while not self._done.is_set():
            await asyncio.sleep(_LOOK_SECONDS)
            if self._point is None:
                continue
            now = time.monotonic()
            for guest in list(self._guests.values()):
                if now - guest.heard > self._terms.silence_seconds:
                    guest.writer.transport.abort()
            self._point.look(now)
            self._settle()
            if self._point.finished and not self._point.heads:
                self._done.set()

    def _settle(self) -> None:
        """Take note of what was decided."""
        point = self._open
        for text in point.said:
            self._say(text)
        point.said.clear()
        decision = point.decisions.get(point.sync)
        if decision is None or decision is self._last:
            return
        self._last = decision
        members = [
            [self._brought[head, position] for head in decision.members if (head, position) in self._brought]
            for position in range(point.terms.positions)
        ]
        if decision.weights:
            self._outcomes[decision.sync] = [
                Outcome(decision.weights, [parcels for sync, parcels in brought if sync == decision.sync])
                for brought in members
            ]
        self._brought.clear()
        self._forget(point)
        self._spool.keep_only({head.synced for head in point.heads.values()})
        self._write(point, decision)
        self._wake()

    def _forget(self, point: MeetingPoint) -> None:
        """Let go of the oldest outcomes beyond the room for them, never of the last."""
        for sync in [one for one in self._outcomes if one > point.sync]:
            del self._outcomes[sync]  # the run has gone back
        while (
            len(self._outcomes) > 1
            and sum(outcome.size for outcomes in self._outcomes.values() for outcome in outcomes) > self._keep_bytes
        ):
            oldest = min(self._outcomes)
            del self._outcomes[oldest]
            point.drop(oldest)

    def _write(self, point: MeetingPoint, decision: Decision) -> None:
        stored = {"format": FORMAT, "terms": asdict(point.terms), **saved(point)}
        write_atomically(self._folder / LEDGER, json.dumps(stored) + "\n")
        with (self._folder / EVENTS).open("a", encoding="ascii") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **asdict(decision)}) + "\n")

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _check_terms(ours: Terms, theirs: Terms) -> None:
    for key, value in asdict(ours).items():
        if asdict(theirs)[key] != value:
            what = "the configuration or the data (its identity)" if key == "identity" else key
            raise Refused(
                f"{what} is {value!r} in the run that meets here and {asdict(theirs)[key]!r} in this head: start all "
                "heads with the same command but for run.dir, or name another meeting point"
            )


async def _quietly(work: Awaitable[None]) -> None:
    """A reply to a head that may be gone by now."""
    try:
        await work
    except OSError:
        return
