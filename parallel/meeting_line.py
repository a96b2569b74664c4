"""A process's connection to the meeting point of elastic heads: requests, replies, signs of life, and coming back.

The thread that trains asks and waits; another one sends a beat now and then, and connects again when the network has
failed. A reply that breaks off is asked for again from where it broke.
"""

import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.frames import Bytes, Message, receive_frame, send_frame
from parallel.meeting_terms import ADDRESS, STATELESS
from relora.errors import ConfigError

Frames = Generator[Message, None, None]
Issue = Callable[["Connection", int], None]
"""Sends a request for the frames of a reply from a certain one on."""


class MeetingLost(RuntimeError):
    """The meeting point cannot be reached any more; the job's checkpoints are whole."""


class GivenUp(Exception):
    """The meeting point has given this head up: it must join anew."""


@dataclass(slots=True)
class Connection:
    """One connection, while it lasts; several threads send."""

    socket: socket.socket
    lock: threading.Lock

    def send(self, header: dict[str, Any], payload: Sequence[Bytes] = ()) -> int:
        """Send a frame; returns its bytes."""
        with self.lock:
            return send_frame(self.socket, header, payload)


class MeetingLine:
    """A connection that is made again when it breaks."""

    def __init__(self, address: str, hello: dict[str, Any], *, silence_seconds: float, patience_seconds: float) -> None:
        """Connect.

        Args:
            address: HOST:PORT, or the meeting point's folder, which has a / and tells them.
            hello: the message that makes this process known.
            patience_seconds: how long to try.

        Raises:
            ConfigError: the address is none, or the meeting point refuses this head.
            MeetingLost: nobody is there.
        """
        if "/" not in address:
            _host_and_port(address)
        self._address = address
        self._hello, self._silence = hello, silence_seconds
        self._session: str | None = None
        self._connection: Connection | None = None
        self._asking = threading.Lock()  # held by who reads, or connects
        self._closing = threading.Event()
        with self._asking:
            self._connect(patience_seconds)
        self._thread = threading.Thread(target=self._beat, name="meeting", daemon=True)
        self._thread.start()

    @property
    def incarnation(self) -> str:
        """The name of this start of the head."""
        return str(self._hello["incarnation"])

    def come_again(self, incarnation: str) -> None:
        """Say hello as another head, after this one was given up."""
        with self._asking:
            self._hang_up()
            self._hello = {**self._hello, "incarnation": incarnation, "checkpoint": STATELESS, "wanted": None}
            self._connect(self._silence)

    def ask(self, header: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its reply of one frame."""
        frames = self.stream(lambda connection, _: (connection.send(header), None)[1])
        reply, _ = next(frames)
        frames.close()
        return reply

    def stream(self, issue: Issue) -> Frames:
        """Send a request and yield the frames of its reply; who has enough closes the iterator.

        Raises:
            GivenUp: the meeting point does without this head.
            MeetingLost: it is gone.
        """
        with self._asking:
            got = 0
            while True:
                try:
                    connection = self._connected()
                    issue(connection, got)
                    while True:
                        message = receive_frame(connection.socket)
                        if "refused" in message[0]:
                            raise self._refusal(message[0])
                        if message[0].get("gone"):
                            raise GivenUp
                        if "waiting" in message[0] or ("decision" in message[0] and got):
                            continue
                        got += "parcel" in message[0]
                        yield message
                        if "end" in message[0]:
                            return
                except OSError:
                    self._hang_up()
                    self._connect(self._silence)

    def post(self, frames: Iterator[tuple[dict[str, Any], Sequence[Bytes]]]) -> None:
        """Send frames that nobody answers; if the connection breaks, the rest is lost."""
        with self._asking:
            try:
                connection = self._connected()
                for header, payload in frames:
                    connection.send(header, payload)
            except OSError:
                self._hang_up()

    def close(self) -> None:
        """Hang up for good."""
        self._closing.set()
        self._thread.join()
        self._hang_up()

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connect(self._silence)
        assert self._connection is not None
        return self._connection

    def _connect(self, patience: float) -> None:
        """Try until it works or patience ends."""
        deadline, pause = time.monotonic() + patience, 0.05
        while True:
            try:
                self._connection = self._open()
                return
            except OSError as error:
                if time.monotonic() + pause > deadline or self._closing.is_set():
                    raise MeetingLost(
                        f"the meeting point at {self._address} cannot be reached ({error}), for "
                        f"{patience:g} s now. Checkpoints are whole: see that it runs (accrete meet), then start the "
                        "same command again"
                    ) from error
                time.sleep(pause)
                pause = min(2 * pause, 2.0)

    def _open(self) -> Connection:
        end = socket.create_connection(self._place(), timeout=self._silence)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        send_frame(end, self._hello)
        reply, _ = receive_frame(end)
        if "refused" in reply:
            raise self._refusal(reply)
        if self._session not in (None, reply["session"]):
            raise MeetingLost(
                "the meeting point has been started anew, and does not know this head's lease any more. Checkpoints "
                "are whole: start the same command again"
            )
        if reply.get("gone"):
            raise GivenUp
        self._session = reply["session"]
        return Connection(end, threading.Lock())

    def _refusal(self, reply: dict[str, Any]) -> ConfigError:
        return ConfigError(f"the meeting point at {self._address} refuses: {reply['refused']}")

    def _place(self) -> tuple[str, int]:
        """Host and port; those in a folder change when another machine serves the run."""
        if "/" not in self._address:
            return _host_and_port(self._address)
        return _host_and_port((Path(self._address) / ADDRESS).read_text(encoding="utf-8").strip())

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.socket.close()
            self._connection = None

    def _beat(self) -> None:
        while not self._closing.wait(self._silence / 4):
            connection = self._connection
            try:
                if connection is not None:
                    connection.send({"op": "beat"})
                    continue
            except OSError:
                pass
            if not self._asking.acquire(blocking=False):
                continue  # who waits for a reply connects again
            try:
                self._hang_up()
                self._connection = self._open()
            except (OSError, MeetingLost, GivenUp, ConfigError):
                pass  # the next request tells
            finally:
                self._asking.release()


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"lte.meeting must be HOST:PORT, or a folder with a / in its path, got {address!r}")
    return host.strip("[]"), int(port)
