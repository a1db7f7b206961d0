"""The ZeroMQ sockets that events and replays come through, and the numbers in their messages."""

from __future__ import annotations

from typing import Final

import zmq
import zmq.asyncio

from metadata_center.kv_events.decoding import MAX_PAYLOAD_BYTES

_MAX_FRAME_BYTES: Final = 4 * MAX_PAYLOAD_BYTES  # above it the connection is cut, below it is one bad batch
_HEARTBEAT_MS: Final = 5_000  # a peer that vanished without a word is noticed within three of them
_MAX_RECONNECT_MS: Final = 2_000  # from libzmq's 100 ms, doubling
_SEQUENCE_LIMIT: Final = 1 << 62


def open_live(socket: zmq.asyncio.Socket, address: str, *, bind: bool, messages: int) -> None:
    """Subscribe to everything that comes from `address`, or to it if `bind`; at most `messages` wait."""
    limit(socket, messages)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 2 * _HEARTBEAT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _MAX_RECONNECT_MS)
    socket.subscribe(b"")
    if bind:
        socket.bind(address)
    else:
        socket.connect(address)


def limit(socket: zmq.asyncio.Socket, messages: int) -> None:
    """Bound what waits in the socket, and let it go at once when it is closed."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.RCVHWM, messages)
    socket.setsockopt(zmq.MAXMSGSIZE, _MAX_FRAME_BYTES)


def sequence_of(frame: bytes) -> int | None:
    """A batch's number, or None if the frame holds none."""
    number = int.from_bytes(frame, "big") if len(frame) == 8 else _SEQUENCE_LIMIT
    return number if number < _SEQUENCE_LIMIT else None
