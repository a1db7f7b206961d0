"""One call on a connection: what its service does with it, and what has come of it so far."""

from __future__ import annotations

from collections.abc import Callable

from extproc.transport.http2.frames import DEFAULT_WINDOW
from extproc.transport.http2.messages import MessageReader
from extproc.transport.http2.outbox import Outbox, Outgoing
from extproc.transport.http2.requests import trailers
from extproc.transport.seam import Message, Receiver, Status


class Stream(Outgoing):
    """A call that is open; see `extproc.transport.seam.Call`.

    Args:
        stream_id: Its number.
        outbox: Of its connection.
        ended: Called when its last frame is out.
        peer: Address of the peer.
        path: Which method.
    """

    __slots__ = (
        *("_outbox", "deadline_s", "full_window", "path", "peer", "reader", "receive_window", "receiver"),
    )

    def __init__(
        self, stream_id: int, outbox: Outbox, ended: Callable[[int], None], peer: str, path: str
    ) -> None:
        super().__init__(stream_id, outbox.initial_window, ended)
        self._outbox = outbox
        self.peer = peer
        self.path = path
        self.receiver: Receiver | None = None
        """None until its service has opened the call, and again when the call is over: each of the two knows
        the other, and a cycle would keep both, with all that they hold, until a collection of garbage."""

        self.reader: MessageReader | None = None
        """None as long as each message came in a DATA frame of its own."""

        self.full_window = DEFAULT_WINDOW
        """What the peer may send before it says how much there is."""

        self.receive_window = DEFAULT_WINDOW
        """What the peer may send before we grant more."""

        self.deadline_s: float | None = None

    def place(self, num_bytes: int) -> memoryview | None:
        """Memory for a DATA frame within a large message; None if it is not, or is not to be taken."""
        if self.reader is None or self.is_over or num_bytes > self.receive_window:
            return None
        place = self.reader.place(num_bytes)
        if place is not None:
            self.receive_window -= num_bytes
        return place

    def send(self, message: Message, sent: Callable[[], None] | None = None) -> None:
        """See `Call`."""
        if not self.is_over:
            self._outbox.message(self, message, sent)

    def finish(self, last: Message | None = None) -> None:
        """See `Call`."""
        if not self.is_over:
            if last is not None:
                self._outbox.message(self, last)
            self.is_over = True
            self.receiver = None
            self._outbox.end(self)

    def abort(self, status: Status, detail: str) -> None:
        """See `Call`."""
        if not self.is_over:
            self.is_over = True
            self.receiver = None
            self._outbox.end(self, trailers(status, detail))


class ReadingStream(Stream):
    """A call of an `Rpc` that reads on: it is over when both sides have ended, not when ours has."""

    __slots__ = ("is_finished",)

    def __init__(
        self, stream_id: int, outbox: Outbox, ended: Callable[[int], None], peer: str, path: str
    ) -> None:
        super().__init__(stream_id, outbox, ended, peer, path)
        self.is_finished = False
        """Our side has ended."""

    def send(self, message: Message, sent: Callable[[], None] | None = None) -> None:
        """See `Call`."""
        if not self.is_finished:
            super().send(message, sent)

    def finish(self, last: Message | None = None) -> None:
        """See `Rpc.reads_on`."""
        if self.is_finished:
            self._conclude()
        elif self.is_half_closed or self.is_over:
            super().finish(last)
        else:
            self.is_finished = True
            if last is not None:
                self._outbox.message(self, last)
            self._outbox.end(self)

    def abort(self, status: Status, detail: str) -> None:
        """See `Call`."""
        if self.is_finished:
            self._conclude()
        else:
            super().abort(status, detail)

    def _conclude(self) -> None:
        """Read no more; trailers that still wait are the end of it."""
        if not self.is_over:
            self.is_over = True
            self.receiver = None
            if self.block is None:
                self._outbox.let_go(self)
