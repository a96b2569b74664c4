"""Messages between elastic heads and their meeting point: a JSON header and raw bytes, each with its length before it.

Nothing is unpickled, and lengths are checked before memory is taken. This end is for threads that wait; the meeting
point reads the same frames in parallel/meeting_server.py.
"""

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

LENGTHS = struct.Struct("!IQ")
"""Bytes of the header, bytes of what follows it."""
LONGEST_HEADER = 1 << 24
TOKEN_VARIABLE = "ACCRETE_MEETING_TOKEN"
"""The environment variable with the word that heads and meeting point share; it keeps strangers out."""

Bytes = bytes | bytearray | memoryview
Message = tuple[dict[str, Any], bytearray]


class BrokenFrame(OSError):
    """What came is no frame, or the other end is gone."""


def packed(header: dict[str, Any], size: int = 0) -> bytes:
    """A frame but for its `size` raw bytes."""
    words = json.dumps(header).encode()
    return LENGTHS.pack(len(words), size) + words


def lengths(data: bytes, longest: int) -> tuple[int, int]:
    """Bytes of header and payload.

    Raises:
        BrokenFrame: they are too many.
    """
    header, size = LENGTHS.unpack(data)
    if header > LONGEST_HEADER or size > longest:
        raise BrokenFrame(f"a frame of {header} and {size} bytes")
    return header, size


def header_of(data: Bytes) -> dict[str, Any]:
    """A frame's header.

    Raises:
        BrokenFrame: it is not a JSON object.
    """
    try:
        header = json.loads(bytes(data))
    except ValueError as error:
        raise BrokenFrame("a header that is not JSON") from error
    if not isinstance(header, dict):
        raise BrokenFrame("a header that is not an object")
    return header


def send_frame(end: socket.socket, header: dict[str, Any], payload: Sequence[Bytes] = ()) -> int:
    """Send one frame; returns its bytes."""
    size = sum(len(part) for part in payload)
    first = packed(header, size)
    end.sendall(first)
    for part in payload:
        end.sendall(part)
    return len(first) + size


def receive_frame(end: socket.socket) -> Message:
    """Wait for one frame.

    Raises:
        OSError: the connection is broken, or silent for longer than its time limit.
    """
    header, size = lengths(bytes(_exactly(end, LENGTHS.size)), 1 << 62)
    return header_of(_exactly(end, header)), _exactly(end, size)


def _exactly(end: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        received = end.recv_into(view[got:])
        if not received:
            raise BrokenFrame("the other end is gone")
        got += received
    return data
