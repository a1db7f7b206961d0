"""A connection under test without sockets, and what its services and its faults received."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence

from extproc.transport.http2 import frames
from extproc.transport.http2.connection import Connection
from extproc.transport.http2.faults import FaultReason
from extproc.transport.http2.headers import encode
from extproc.transport.seam import Call, Received, Rpc

SERVICE = "tests.Http2"
PATH = f"/{SERVICE}/Echo"
MAX_MESSAGE_BYTES = 1_000_000

CALL_FIELDS = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", PATH.encode()),
    (b":authority", b"tests"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
)

GREETING = frames.PREFACE + frames.settings({}) + frames.SETTINGS_ACK

Frame = tuple[int, int, int, bytes]
"""Kind, flags, stream, payload."""


class Echo:
    """Answers each message with itself and the half-close with the end.

    Args:
        call: Its call.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.received: list[bytes | str] = []

    def on_message(self, message: Received) -> None:
        """See `Receiver`."""
        self.received.append(bytes(message))
        self.call.send(bytes(message))

    def on_half_close(self) -> None:
        """See `Receiver`."""
        self.received.append("half-close")
        self.call.finish()

    def on_reset(self) -> None:
        """See `Receiver`."""
        self.received.append("reset")


class Listener(Echo):
    """Answers nothing by itself."""

    def on_message(self, message: Received) -> None:
        """See `Receiver`."""
        self.received.append(bytes(message))

    def on_half_close(self) -> None:
        """See `Receiver`."""
        self.received.append("half-close")


class Served:
    """A connection whose service is `receiver`, and all that was received.

    Args:
        receiver: Makes the receiver of each call.
        is_greeted: The peer has sent its preface and SETTINGS, and knows ours.
        reads_on: See `Rpc`.
    """

    def __init__(
        self, receiver: Callable[[Call], Echo] = Echo, *, is_greeted: bool = True, reads_on: bool = False
    ) -> None:
        self._receiver = receiver
        self.receivers: list[Echo] = []
        self.faults: list[tuple[FaultReason, bool]] = []
        self.bugs: list[Exception] = []
        self.num_wakes = 0
        self.connection = Connection(
            {PATH: Rpc(SERVICE, "Echo", self._open, reads_on=reads_on)},
            MAX_MESSAGE_BYTES,
            "tests",
            self,
            self._wake,
            0.0,
        )
        if is_greeted:
            self.connection.receive(GREETING, 0.0)
            self.taken()

    def fault(self, reason: FaultReason, _: str, *, is_connection: bool) -> None:
        """See `Notices`."""
        self.faults.append((reason, is_connection))

    def bug(self, _: str, error: Exception) -> None:
        """See `Notices`."""
        self.bugs.append(error)

    def receive(self, *parts: bytes, now_s: float = 0.0) -> list[Frame]:
        """What the connection answers to bytes."""
        self.connection.receive(b"".join(parts), now_s)
        return self.taken()

    def taken(self) -> list[Frame]:
        """The frames that go to the peer now."""
        data = b"".join(iter(self.connection.take, b""))
        self.connection.outbox.notify_sent()
        return list(parsed(data))

    def _open(self, call: Call) -> Echo:
        self.receivers.append(self._receiver(call))
        return self.receivers[-1]

    def _wake(self) -> None:
        self.num_wakes += 1


def parsed(data: bytes) -> Iterator[Frame]:
    """The frames of what a connection sent, which are whole."""
    at = 0
    while at < len(data):
        word, flags, stream_id = frames.HEAD.unpack_from(data, at)
        start, stop = at + frames.HEAD_BYTES, at + frames.HEAD_BYTES + (word >> 8)
        assert stop <= len(data)
        yield word & 0xFF, flags, stream_id, data[start:stop]
        at = stop


def kinds(sent: Sequence[Frame]) -> list[int]:
    """Kinds of frames in their order."""
    return [kind for kind, _, _, _ in sent]


def code(sent: Sequence[Frame]) -> int:
    """The error code of the GOAWAY or RST_STREAM that comes last."""
    kind, _, _, payload = sent[-1]
    assert kind in (frames.GOAWAY, frames.RST_STREAM)
    at = 4 if kind == frames.GOAWAY else 0
    return int.from_bytes(payload[at : at + 4])


def framed(*messages: bytes) -> bytes:
    """Messages with their prefixes."""
    return b"".join(struct.pack(">BI", 0, len(message)) + message for message in messages)


def opening(
    stream_id: int, *more: tuple[bytes, bytes], end_stream: bool = False, fields: object = CALL_FIELDS
) -> bytes:
    """HEADERS of a call."""
    assert isinstance(fields, tuple)
    flags = frames.END_HEADERS | (frames.END_STREAM if end_stream else 0)
    return frames.frame(frames.HEADERS, flags, stream_id, encode((*fields, *more)))


def data(stream_id: int, content: bytes, *, end_stream: bool = False) -> bytes:
    """DATA in frames of the usual size."""
    size = frames.LEAST_MAX_FRAME
    pieces = [content[at : at + size] for at in range(0, len(content), size)] or [b""]
    return b"".join(
        frames.frame(
            frames.DATA,
            frames.END_STREAM if end_stream and number == len(pieces) - 1 else 0,
            stream_id,
            piece,
        )
        for number, piece in enumerate(pieces)
    )
