"""Flow control of what we receive: how much a peer may send before it must wait.

Each stream may send `DEFAULT_WINDOW` bytes as it likes. What a message needs beyond that is granted at once
when its length is known and there is room for all of it; else the stream waits for room, first come, first
served. So a connection holds at most `DEFAULT_WINDOW` bytes for each stream and the room for large messages,
and every message that was given room can be received to its end: none waits for another that waits.

A peer that has sent much of late need not wait for the grant that answers a length: calls that it opens then
may send `WIDE_WINDOW` as they like. These are few, and apart from the room, so that neither waits for the
other.

The window of the connection is no bound of its own; it is kept open.

Source: RFC 9113, 5.2 and 6.9.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from extproc.transport.http2.faults import ConnectionFault, ErrorCode, FaultReason
from extproc.transport.http2.frames import DEFAULT_WINDOW

CONNECTION_WINDOW: Final = 1 << 24
"""What is on its way to us at most: a hundred times what a local peer sends in one turn."""


WIDE_WINDOW: Final = 262_144
"""Of a call that is opened soon after much was sent: a long prompt fits."""

MAX_WIDE: Final = 32
"""Such calls at once: 6 MiB more than others may send."""

WIDE_CALLS: Final = 64
"""So many calls later it counts as long ago."""


class ConnectionWindow:
    """How much the peer may send on all streams together."""

    __slots__ = ("_left",)

    def __init__(self) -> None:
        self._left = DEFAULT_WINDOW

    def opened(self) -> int:
        """The increment to announce at the start."""
        increment = CONNECTION_WINDOW - self._left
        self._left = CONNECTION_WINDOW
        return increment

    def take(self, num_bytes: int) -> int:
        """So much came; returns the increment to announce now, mostly 0.

        Raises:
            ConnectionFault: It is more than we allowed.
        """
        self._left -= num_bytes
        if self._left >= CONNECTION_WINDOW // 2:
            return 0
        if self._left < 0:
            raise ConnectionFault(
                FaultReason.FLOW_CONTROL, ErrorCode.FLOW_CONTROL_ERROR, "connection window is exceeded"
            )
        return self.opened()


class Room:
    """The bytes that large messages of one connection may take up together.

    Args:
        num_bytes: At least as many as the largest message has.
    """

    __slots__ = ("_left", "_taken", "_waiting", "is_shut")

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes
        self._taken: dict[int, int] = {}
        self._waiting: OrderedDict[int, int] = OrderedDict()
        self.is_shut = False
        """Nothing is given now: the peer does not take what it is sent."""

    def ask(self, stream_id: int, num_bytes: int) -> bool:
        """True if the stream has room for a message of so many bytes; else it waits for it."""
        if stream_id in self._taken:
            return True
        if self.is_shut or self._waiting or num_bytes > self._left:
            self._waiting[stream_id] = num_bytes
            return False
        self._take(stream_id, num_bytes)
        return True

    def leave(self, stream_id: int) -> None:
        """The stream has no large message any more, or is over."""
        self._left += self._taken.pop(stream_id, 0)
        self._waiting.pop(stream_id, None)

    def next(self) -> int | None:
        """A stream that waited and has room now; None if there is no such. To be asked until then."""
        if self.is_shut or not self._waiting:
            return None
        stream_id, num_bytes = next(iter(self._waiting.items()))
        if num_bytes > self._left:
            return None
        del self._waiting[stream_id]
        self._take(stream_id, num_bytes)
        return stream_id

    def _take(self, stream_id: int, num_bytes: int) -> None:
        self._left -= num_bytes
        self._taken[stream_id] = num_bytes


class WideWindows:
    """Which calls of one connection may send `WIDE_WINDOW` from the start."""

    __slots__ = ("_calls_left", "_wide")

    def __init__(self) -> None:
        self._calls_left = 0
        self._wide: set[int] = set()

    def sent_much(self) -> None:
        """A call has been granted more than it had from the start."""
        self._calls_left = WIDE_CALLS

    def opened(self, stream_id: int) -> bool:
        """A call begins; True if it is one of them, until `left`."""
        if not self._calls_left:
            return False
        self._calls_left -= 1
        if len(self._wide) >= MAX_WIDE:
            return False
        self._wide.add(stream_id)
        return True

    def left(self, stream_id: int) -> None:
        """A call is over."""
        self._wide.discard(stream_id)
