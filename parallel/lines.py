"""Lines between the main process and every other: small messages over TCP, apart from the process groups.

A collective that waits for a dead process says nothing, but a line breaks at the very moment when the process at its
other end dies. Messages are JSON objects, one a row.
"""

import ipaddress
import json
import os
import secrets
import socket
import time
from typing import Any

from parallel.collectives import broadcast_object
from parallel.runtime import NotMet, Runtime

_SEND_SECONDS = 2.0
"""How long a message may take to leave; a process that is stopped reads nothing."""


class Line:
    """This process's end of a line."""

    def __init__(self, end: socket.socket) -> None:
        end.settimeout(_SEND_SECONDS)
        self.socket = end
        self._rest = b""

    def send(self, **message: Any) -> None:
        """Send a message; that the line is broken shows when it is read."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come since, waiting for one at most; None when the other end is gone."""
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *rows, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(row) for row in rows]


def open_lines(runtime: Runtime, *, seconds: float) -> dict[int, Line]:
    """By process rank: in the main process a line to every other, in these a line to the main one.

    Collectives: one broadcast.

    Raises:
        NotMet: a process cannot reach the main one.
    """
    if runtime.is_main:
        address = _own_address()
        family = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server(("", 0), family=family, backlog=runtime.world_size) as server:
            token = secrets.token_hex(16)
            broadcast_object(runtime, (address, server.getsockname()[1], token))
            return _accept(server, token, runtime.world_size - 1, seconds)
    place: tuple[str, int, str] = broadcast_object(runtime, None)
    address, port, token = place
    try:
        line = Line(socket.create_connection((address, port), timeout=seconds))
    except OSError as error:
        raise NotMet(
            f"process {runtime.process_rank} on {socket.gethostname()} cannot reach the main process at "
            f"{address}:{port} ({error}): let the machines of a run talk to each other on all ports"
        ) from error
    line.send(rank=runtime.process_rank, token=token)
    return {0: line}


def _accept(server: socket.socket, token: str, count: int, seconds: float) -> dict[int, Line]:
    lines: dict[int, Line] = {}
    deadline = time.monotonic() + seconds
    while len(lines) < count:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            line = Line(server.accept()[0])
        except TimeoutError as error:
            raise NotMet(
                f"only {len(lines)} of {count} processes reached the main process within {seconds:g} s: let the "
                "machines of a run talk to each other on all ports"
            ) from error
        for hello in line.receive() or []:
            if hello.get("token") == token:
                lines[hello["rank"]] = line
    return lines


def _own_address() -> str:
    """This machine as the others reach it: the one of its addresses that lies toward the meeting point."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, kind, _, _, meeting = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(meeting)  # sends nothing
        own = str(probe.getsockname()[0])
    return host if ipaddress.ip_address(own).is_loopback else own  # then the meeting point is this machine
