"""What goes to the peer: frames in their order, DATA as far as windows and socket allow.

A message that fits goes out as one DATA frame at once. Else it waits at its stream, and streams that may send
take turns, a frame each.
"""

from __future__ import annotations

import struct
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

from extproc.transport.http2.faults import ConnectionFault, ErrorCode, FaultReason
from extproc.transport.http2.frames import (
    DATA,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    GREATEST_WINDOW,
    HEAD,
    HEADERS,
    LEAST_MAX_FRAME,
    frame,
    rst_stream,
)
from extproc.transport.http2.messages import PREFIX, PREFIX_BYTES
from extproc.transport.http2.requests import OK_BLOCK, RESPONSE_BLOCK, TABLE_SIZE_0
from extproc.transport.seam import Message, Pieces

OUTPUT_BYTES: Final = 262_144
"""Of frames for one write; more DATA waits at the streams until these are taken."""

MAX_UNSENT_BYTES: Final = 1 << 26
"""Of DATA that waits; with more, no new work is taken from the peer until half of it is gone."""

_MESSAGE_HEAD: Final = struct.Struct(">IBIBI")
"""The head of a DATA frame, then the prefix of the message that is all of its payload."""


class Outgoing:
    """One stream's part: its window and what waits.

    Args:
        stream_id: Its number.
        window: What the peer takes before it grants more.
        ended: Called when its last frame is out.
    """

    __slots__ = (
        *("block", "ended", "has_begun", "id", "is_half_closed", "is_over", "offset", "waiting", "window"),
    )

    def __init__(self, stream_id: int, window: int, ended: Callable[[int], None]) -> None:
        self.id = stream_id
        self.window = window
        self.ended = ended
        self.is_half_closed = False
        """The peer has ended its side."""

        self.is_over = False
        """The call has ended, though what was sent before may still wait. False while trailers go out: what
        comes is still read."""

        self.has_begun = False
        self.offset = 0
        """Bytes of the first in `waiting` that are out."""

        self.waiting: deque[tuple[memoryview, Callable[[], None] | None]] | None = None
        """Framed messages, large ones in pieces, each with its callback for when it is out; None if nothing
        ever waited."""

        self.block: bytes | None = None
        """The trailers, which wait behind the messages."""


class Outbox:
    """That of one connection.

    Args:
        wake: Called when there is something to take, once until it is taken.
    """

    __slots__ = (
        *("_first", "_frames", "_is_awake", "_ready", "_sent", "_wake"),
        *("initial_window", "is_blocked", "max_frame", "num_bytes", "unsent_bytes", "window"),
    )

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._is_awake = False
        self._frames: list[bytes | memoryview] = []
        self._ready: OrderedDict[int, Outgoing] = OrderedDict()
        self._sent: list[tuple[Outgoing, Callable[[], None]]] = []
        self._first = TABLE_SIZE_0
        self.num_bytes = 0
        """Of frames that are ready to be taken."""

        self.unsent_bytes = 0
        """Of DATA that waits for windows or the socket."""

        self.window = DEFAULT_WINDOW
        self.initial_window = DEFAULT_WINDOW
        self.max_frame = LEAST_MAX_FRAME
        self.is_blocked = False
        """The socket takes nothing now."""

    def put(self, frame_bytes: bytes | memoryview) -> None:
        """Send a frame, whatever the windows say."""
        self._frames.append(frame_bytes)
        self.num_bytes += len(frame_bytes)
        if not self._is_awake:
            self._is_awake = True
            self._wake()

    def message(self, out: Outgoing, message: Message, sent: Callable[[], None] | None = None) -> None:
        """Send a message; `sent` is called by `notify_sent` once it has been taken."""
        if isinstance(message, tuple):
            self._pieces(out, message, sent)
            return
        if not out.has_begun:
            out.has_begun = True
            self._block(out.id, RESPONSE_BLOCK, END_HEADERS)
        size = len(message) + PREFIX_BYTES
        if (
            not out.waiting
            and size <= out.window
            and size <= self.window
            and size <= self.max_frame
            and self.num_bytes < OUTPUT_BYTES
            and not self.is_blocked
        ):
            out.window -= size
            self.window -= size
            self.put(_MESSAGE_HEAD.pack(size << 8 | DATA, 0, out.id, 0, size - PREFIX_BYTES) + message)
            if sent is not None:
                self._sent.append((out, sent))
            return
        if out.waiting is None:
            out.waiting = deque()
        out.waiting.append((memoryview(PREFIX.pack(0, len(message)) + message), sent))
        self.unsent_bytes += size
        self._make_ready(out)

    def _pieces(self, out: Outgoing, pieces: Pieces, sent: Callable[[], None] | None) -> None:
        """The same of one in pieces: DATA is a row of bytes, and a frame may end where a piece does."""
        if not out.has_begun:
            out.has_begun = True
            self._block(out.id, RESPONSE_BLOCK, END_HEADERS)
        if out.waiting is None:
            out.waiting = deque()
        *others, last = (piece for piece in pieces if len(piece))
        num_bytes = len(last) + sum(map(len, others))
        out.waiting.append((memoryview(PREFIX.pack(0, num_bytes)), None))
        out.waiting.extend((memoryview(piece), None) for piece in others)
        out.waiting.append((memoryview(last), sent))
        self.unsent_bytes += num_bytes + PREFIX_BYTES
        self._make_ready(out)

    def end(self, out: Outgoing, block: bytes = OK_BLOCK) -> None:
        """End the stream by trailers, behind its messages."""
        if not out.has_begun:
            block = RESPONSE_BLOCK + block
        if out.waiting:
            out.block = block
        else:
            self._end(out, block)

    def end_at_once(self, out: Outgoing, block: bytes) -> None:
        """End the stream by a block that is its whole answer."""
        self._end(out, block)

    def drop(self, out: Outgoing) -> None:
        """The stream is over: nothing more of it goes out."""
        if out.waiting:
            self.unsent_bytes -= sum(len(data) for data, _ in out.waiting) - out.offset
            out.waiting.clear()
        out.block = None
        self._ready.pop(out.id, None)

    def grant(self, out: Outgoing | None, increment: int) -> None:
        """The peer takes more, of one stream or (None) of all together.

        Raises:
            ConnectionFault: It says that it takes more than there can be.
        """
        if out is None:
            self.window += increment
            if self.window > GREATEST_WINDOW:
                raise ConnectionFault(
                    FaultReason.FLOW_CONTROL, ErrorCode.FLOW_CONTROL_ERROR, "too wide a window"
                )
        else:
            out.window += increment
            if out.waiting:
                self._make_ready(out)
        if self._ready and not self._is_awake:
            self._is_awake = True
            self._wake()

    def take(self) -> bytes:
        """The bytes for the socket now, about `OUTPUT_BYTES`; empty if there are none."""
        self._is_awake = True
        if self._ready:
            self._pump()
        self._is_awake = False
        data = b"".join(self._frames)
        self._frames.clear()
        self.num_bytes = 0
        return data

    def notify_sent(self) -> None:
        """Call `sent` of messages that were taken, if their calls go on."""
        if self._sent:
            taken, self._sent = self._sent, []
            for out, sent in taken:
                if not out.is_over:
                    sent()

    def _make_ready(self, out: Outgoing) -> None:
        if out.window > 0:
            self._ready[out.id] = out
            if not self._is_awake:
                self._is_awake = True
                self._wake()

    def _pump(self) -> None:
        """Frames of the calls that may send, in turns."""
        ready = self._ready
        while ready and self.window > 0 and self.num_bytes < OUTPUT_BYTES and not self.is_blocked:
            _, out = ready.popitem(last=False)
            if out.window <= 0:  # the peer has made it smaller meanwhile
                continue
            waiting = out.waiting
            assert waiting
            data, sent = waiting[0]
            size = min(len(data) - out.offset, out.window, self.window, self.max_frame)
            out.window -= size
            self.window -= size
            self.unsent_bytes -= size
            stop = out.offset + size
            self.put(HEAD.pack(size << 8 | DATA, 0, out.id))
            self.put(data[out.offset : stop])
            if stop == len(data):
                out.offset = 0
                waiting.popleft()
                if sent is not None:
                    self._sent.append((out, sent))
                if not waiting:
                    if out.block is not None:
                        self._end(out, out.block)
                    continue
            else:
                out.offset = stop
            if out.window > 0:
                ready[out.id] = out

    def _end(self, out: Outgoing, block: bytes) -> None:
        self._block(out.id, block, END_HEADERS | END_STREAM)
        out.block = None
        if out.is_over:
            self.let_go(out)

    def let_go(self, out: Outgoing) -> None:
        """All is said: the peer need not send the rest. Source: RFC 9113, 8.1."""
        if not out.is_half_closed:
            self.put(rst_stream(out.id, ErrorCode.NO_ERROR))
        out.ended(out.id)

    def _block(self, stream_id: int, block: bytes, flags: int) -> None:
        if self._first:
            block, self._first = self._first + block, b""
        self.put(frame(HEADERS, flags, stream_id, block))
