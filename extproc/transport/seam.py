"""What a service and a gRPC server know of each other: calls, what happens to them, what is done about it.

A service is a function from a `Call` to the `Receiver` of what happens to it. The server calls the receiver,
the receiver acts on the call. Neither waits: no side needs a task, a coroutine or a queue for each call.

Rules:
    1. All of it happens on one thread, in turns of one event loop. A receiver returns soon: while it runs no
       other call of the process goes on.
    2. A call ends once: by `finish`, by `abort`, by `on_reset`, or by an exception of its receiver, which the
       server answers with `Status.UNKNOWN` and logs. It is not called any more, and what is done to the call
       has no effect: an answer that comes late is no fault. `Rpc.reads_on` has what the peer sent before it
       knew of a `finish` delivered all the same, where the server can.
    3. A receiver may act while it is called, or at any later time, unasked.
    4. `on_half_close` says that the peer sends nothing more; answers may still be awaited. It may also be
       that the peer has gone: grpc.aio reports both alike while the call awaits a message, and Envoy closes
       its half before it resets. Work for that peer alone stops then.
    5. What is sent is kept until the network takes it: a service that sends many messages waits for `sent`.

Theory of operation:
    The server keeps the order: messages are delivered in the order they came, whole, and sent in the order of
    `send`. Acting never calls a receiver: `sent` is called in a later turn, or after the receiver returned.

Source of the statuses: https://github.com/grpc/grpc/blob/master/doc/statuscodes.md
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

from metadata_center.types import value

Pieces = tuple[bytes | bytearray | memoryview, ...]

Message = bytes | Pieces
"""A serialised message, or a large one in pieces, of which one at least is not empty."""


Received = bytes | memoryview
"""A message as it came; a large one is a view."""


def joined(message: Message) -> bytes:
    """A message in one piece."""
    return message if isinstance(message, bytes) else b"".join(message)


class Status(IntEnum):
    """gRPC's status codes, as far as a server gives them by itself."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class Call(Protocol):
    """One call that is open, to its service."""

    @property
    def peer(self) -> str:
        """The peer, for logs: an address, or empty."""

    def send(self, message: Message, sent: Callable[[], None] | None = None) -> None:
        """Send a message.

        Args:
            message: Serialised; its pieces are not changed any more.
            sent: Called once the network has taken it, never before `send` returns; not called if the call
                ends first.
        """

    def finish(self, last: Message | None = None) -> None:
        """End well.

        Args:
            last: A message to send together with the status; never None where `Rpc.has_last`.
        """

    def abort(self, status: Status, detail: str) -> None:
        """End with an error, after what was sent.

        Args:
            status: Any but `OK`.
            detail: For the peer's log; ASCII.
        """


class Receiver(Protocol):
    """What happens to one call."""

    def on_message(self, message: Received) -> None:
        """A whole message came."""

    def on_half_close(self) -> None:
        """No more messages come; see rule 4."""

    def on_reset(self) -> None:
        """The peer, its connection or this server ended the call: what is said now is not heard."""


@value
class Rpc:
    """A method that is served.

    Attributes:
        service: Full name, as `envoy.service.ext_proc.v3.ExternalProcessor`.
        method: As `Process`.
        open: Called for each call, before anything else of it.
        has_last: Each good ending brings a last message. A server may then send message and status in one.
        reads_on: A `finish` before the peer's end is heard by the peer at once, and lets the call go on to
            get messages until the peer ends it, or the service by another `finish` or by `abort`.
    """

    service: str
    method: str
    open: Callable[[Call], Receiver]
    has_last: bool = False
    reads_on: bool = False

    @property
    def path(self) -> str:
        """HTTP/2 `:path`."""
        return f"/{self.service}/{self.method}"
