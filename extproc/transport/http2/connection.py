"""An HTTP/2 connection that serves gRPC calls, without I/O: bytes and times in, bytes out, services called.

Rules:
    1. `receive` never raises for what a peer sends. A fault ends the stream where it can and the connection
       where it must; each is reported to `Notices` once.
    2. Nothing is held without a bound: messages in part by `flow`, unsent ones by `outbox`, header blocks by
       `headers`, streams by `MAX_STREAMS`, frames that bring nothing by `budgets`.
    3. What is not known to be wrong is taken: unknown frames, settings and late frames are passed over.
    4. A service that raises fails its own call alone.

Source: RFC 9113; https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from extproc.transport.http2 import frames
from extproc.transport.http2.budgets import Budgets
from extproc.transport.http2.calls import ANNOUNCED_STREAMS, Calls, Notices
from extproc.transport.http2.faults import ConnectionFault, ErrorCode, FaultReason, StreamFault
from extproc.transport.http2.flow import ConnectionWindow
from extproc.transport.http2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GREATEST_STREAM,
    HEAD,
    HEAD_BYTES,
    HEADERS,
    LEAST_MAX_FRAME,
    PADDED,
    PREFACE,
    SETTINGS,
    unpadded,
    window_update,
)
from extproc.transport.http2.headers import MAX_BLOCK_BYTES, MAX_LIST_BYTES, HeadersTooLargeError
from extproc.transport.http2.messages import allocated
from extproc.transport.http2.openings import OpeningReader
from extproc.transport.http2.outbox import Outbox
from extproc.transport.http2.requests import http_block
from extproc.transport.seam import Rpc

MAX_CONTINUATIONS: Final = 64
"""Frames of one header block. Source: CVE-2024-27316 and its kin."""

_MOST_FILLED: Final = 32
"""Frames within large messages that are taken in one go: half a MiB, if they are as long as they may be."""

_DRAIN_PING: Final = b"draining"
_PROBE_PING: Final = b"probing."


class Connection:
    """One connection.

    Args:
        rpcs: What is served, by `Rpc.path`.
        max_message_bytes: A longer message is refused.
        peer: For services' logs.
        notices: Gets faults.
        wake: Called when there is something to `take`, once until it is taken.
        now_s: A monotonic clock, also in later arguments of this name.
        allocate: Memory for large messages.
    """

    def __init__(
        self,
        rpcs: Mapping[str, Rpc],
        max_message_bytes: int,
        peer: str,
        notices: Notices,
        wake: Callable[[], None],
        now_s: float,
        allocate: Callable[[int], memoryview] = allocated,
    ) -> None:
        self._notices = notices
        self.outbox = Outbox(wake)
        self._budgets = Budgets(now_s)
        self._calls = Calls(rpcs, max_message_bytes, peer, notices, self.outbox, self._budgets, allocate)
        self._openings = OpeningReader()
        self._window = ConnectionWindow()
        self._rest = b""
        self._place: memoryview | None = None  # for what comes next, the rest of a frame of a large message
        self._block: _Block | None = None
        self._has_preface = self._has_settings = False
        self._awaits_ack = True
        self._is_leaving = False
        self._is_over = False
        settings = {
            frames.HEADER_TABLE_SIZE: 0,
            frames.MAX_CONCURRENT_STREAMS: ANNOUNCED_STREAMS,
            frames.MAX_HEADER_LIST_SIZE: MAX_LIST_BYTES,
        }
        self.outbox.put(frames.settings(settings) + window_update(0, self._window.opened()))

    # What the shell asks and says.

    @property
    def num_streams(self) -> int:
        """Calls whose last frame is not out yet."""
        return len(self._calls)

    @property
    def is_greeted(self) -> bool:
        """The peer has shown that it speaks HTTP/2."""
        return self._has_settings

    @property
    def is_over(self) -> bool:
        """Nothing more comes of it: to be closed when all is taken."""
        return self._is_over or (self._calls.refused_from is not None and not self._calls)

    @property
    def next_deadline_s(self) -> float | None:
        """When `expire` is to be called; None if there is no need."""
        return self._calls.next_deadline_s

    def receive(self, data: bytes | memoryview, now_s: float) -> None:
        """Take what came; it is taken over before this returns."""
        if self._is_over:
            return
        try:
            self._receive(data, now_s)
            self._calls.relieve()
        except ConnectionFault as fault:
            self.end(fault)

    def fill(self, data: memoryview) -> int:
        """Take what `data` begins with of large messages, copied once; returns how many bytes that were.

        What is behind them is for `receive`, which does the same first.
        """
        if (self._place is None and not self._calls.large) or self._is_over:
            return 0
        try:
            return self._fill(data)
        except ConnectionFault as fault:
            self.end(fault)
            return len(data)

    def take(self) -> bytes:
        """The next bytes for the socket; empty if there are none now."""
        return self.outbox.take()

    def unblock(self) -> None:
        """The socket takes more again."""
        self.outbox.is_blocked = False
        if not self._is_over:
            self._calls.relieve()

    def expire(self, now_s: float) -> None:
        """End the calls whose time is over."""
        self._calls.expire(now_s)

    def drain(self) -> None:
        """Take no new calls, and let those that are open end.

        The peer first gets GOAWAY without a number, so that calls on their way here are served, and with
        the last number when it has answered. Source: RFC 9113, 6.8.
        """
        if not self._is_leaving and not self._is_over:
            self._is_leaving = True
            self.outbox.put(frames.goaway(GREATEST_STREAM, ErrorCode.NO_ERROR))
            self.outbox.put(frames.frame(frames.PING, 0, 0, _DRAIN_PING))

    def finish_drain(self) -> None:
        """Refuse whatever calls come from now on; the connection is over when there are none left."""
        if self._calls.refused_from is None and not self._is_over:
            self._calls.refused_from = self._calls.last_id
            self.outbox.put(frames.goaway(self._calls.last_id, ErrorCode.NO_ERROR))

    def probe(self) -> None:
        """Make the peer show that it is alive."""
        self.outbox.put(frames.frame(frames.PING, 0, 0, _PROBE_PING))

    def end(self, fault: ConnectionFault | None = None) -> None:
        """All calls end: by a fault of the peer, or because it is gone."""
        if self._is_over:
            return
        self._is_over = True
        self._calls.end_all()
        if fault is not None:
            self.outbox.put(frames.goaway(self._calls.last_id, fault.code, fault.detail))
            self._notices.fault(fault.reason, fault.detail, is_connection=True)

    # Frames.

    def _fill(self, received: memoryview) -> int:
        at, end, taken = 0, len(received), 0
        place = self._place
        if place is None and self._rest:
            at = HEAD_BYTES - len(self._rest)
            if not 0 < at <= end:
                return 0
            place = self._place_of(*HEAD.unpack(self._rest + bytes(received[:at])))
            if place is None:
                return 0
            self._rest, taken = b"", len(place)
        unpack_head = HEAD.unpack_from
        for frames_left in range(_MOST_FILLED, -1, -1):
            if place is not None:
                stop = at + len(place)
                if stop > end:
                    place[: end - at] = received[at:]
                    place, at = place[end - at :], end
                    break
                place[:] = received[at:stop]
                place, at = None, stop
            if end - at < HEAD_BYTES or not frames_left:
                break
            place = self._place_of(*unpack_head(received, at))
            if place is None:
                break
            taken += len(place)
            at += HEAD_BYTES
        self._place = place
        increment = self._window.take(taken)
        if increment:
            self.outbox.put(window_update(0, increment))
        return at

    def _place_of(self, word: int, flags: int, stream_id: int) -> memoryview | None:
        """Where a frame's payload goes if the frame lies within a large message."""
        stream = self._calls.large.get(stream_id)
        if stream is None or flags or word & 0xFF or self._block is not None:  # DATA is 0
            return None
        size = word >> 8
        return stream.place(size) if 0 < size <= LEAST_MAX_FRAME else None

    def _receive(self, received: bytes | memoryview, now_s: float) -> None:
        at = 0 if self._place is None and not self._calls.large else self._fill(memoryview(received))
        # Made bytes before anything else: mypyc takes a part of a view for bytes.
        data = bytes(received[at:]) if at else bytes(received)
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        if not self._has_preface:
            if not PREFACE.startswith(data[: len(PREFACE)]):
                raise ConnectionFault(FaultReason.PREFACE, ErrorCode.PROTOCOL_ERROR, "this is no HTTP/2")
            if end < len(PREFACE):
                self._rest = data
                return
            self._has_preface = True
            at = len(PREFACE)
        unpack_head = HEAD.unpack_from
        while end - at >= HEAD_BYTES:
            word, flags, stream_id = unpack_head(data, at)
            kind, start = word & 0xFF, at + HEAD_BYTES
            stop = start + (word >> 8)
            if stop - start > LEAST_MAX_FRAME:
                raise ConnectionFault(
                    FaultReason.FRAME_SIZE, ErrorCode.FRAME_SIZE_ERROR, "a frame is longer than we take"
                )
            if stop > end:
                break
            at = stop
            self._frame(kind, flags, stream_id & 0x7FFFFFFF, data, start, stop, now_s)
        self._rest = b""
        if end - at >= HEAD_BYTES and self._calls.large:
            at += self._fill(memoryview(data)[at:])
        self._rest = data[at:]

    def _frame(
        self, kind: int, flags: int, stream_id: int, data: bytes, start: int, stop: int, now_s: float
    ) -> None:
        if self._block is not None and kind != CONTINUATION:
            raise _broken("a header block is interrupted")
        try:
            if kind == DATA:
                increment = self._window.take(stop - start)
                if increment:
                    self.outbox.put(window_update(0, increment))
                self._calls.data(stream_id, data, start, stop, flags, now_s)
            elif kind == HEADERS:
                self._on_headers(flags, stream_id, data, start, stop, now_s)
            elif not self._has_settings and (kind != SETTINGS or flags & ACK):
                raise ConnectionFault(FaultReason.PREFACE, ErrorCode.PROTOCOL_ERROR, "SETTINGS is not first")
            else:
                self._on_other(kind, flags, stream_id, data[start:stop], now_s)
        except StreamFault as fault:
            self._calls.break_off(stream_id, fault, now_s)

    def _on_other(self, kind: int, flags: int, stream_id: int, payload: bytes, now_s: float) -> None:
        if kind == frames.WINDOW_UPDATE:
            self._on_window_update(stream_id, payload, now_s)
        elif kind == frames.RST_STREAM:
            frames.require_size("RST_STREAM", len(payload), 4)
            self._calls.reset(stream_id, now_s)
        elif kind == frames.PING:
            self._on_ping(flags, stream_id, payload, now_s)
        elif kind == SETTINGS:
            self._on_settings(flags, stream_id, payload, now_s)
        elif kind == CONTINUATION:
            self._on_continuation(flags, stream_id, payload, now_s)
        elif kind == frames.PUSH_PROMISE:
            raise _broken("a client pushes")
        elif kind == frames.GOAWAY and (stream_id or len(payload) < frames.GOAWAY_BYTES):
            raise _broken("GOAWAY of a stream, or too short")
        elif kind == frames.PRIORITY and not stream_id:
            raise _broken("PRIORITY of the connection")
        else:
            self._budgets.empty.spend(now_s, self._calls.served)
            if kind == frames.PRIORITY and len(payload) != frames.PRIORITY_BYTES:
                raise StreamFault(FaultReason.FRAME, ErrorCode.FRAME_SIZE_ERROR, "PRIORITY of a wrong size")

    def _on_headers(
        self, flags: int, stream_id: int, data: bytes, start: int, stop: int, now_s: float
    ) -> None:
        if not self._has_settings:
            raise ConnectionFault(FaultReason.PREFACE, ErrorCode.PROTOCOL_ERROR, "SETTINGS is not first")
        if not stream_id & 1:
            raise _broken("HEADERS on a stream that a client cannot open")
        if flags & (PADDED | frames.HAS_PRIORITY):
            start, stop = unpadded(flags, data, start, stop)
        end_stream = bool(flags & END_STREAM)
        if flags & END_HEADERS:
            self._on_block(stream_id, data[start:stop], end_stream, now_s)
        else:
            self._block = _Block(stream_id, end_stream, data[start:stop])

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes, now_s: float) -> None:
        block = self._block
        if block is None or block.stream_id != stream_id:
            raise _broken("CONTINUATION of nothing")
        block.add(payload)
        if flags & END_HEADERS:
            self._block = None
            self._on_block(stream_id, bytes(block.data), block.end_stream, now_s)

    def _on_block(self, stream_id: int, block: bytes, end_stream: bool, now_s: float) -> None:
        """A whole header block: a new call, or trailers, which say nothing here but that they end."""
        if stream_id <= self._calls.last_id:
            self._openings.skip(block)
            self._calls.trailers(stream_id, end_stream=end_stream, now_s=now_s)
            return
        self._calls.last_id = stream_id
        try:
            asked = self._openings.read(block)
        except HeadersTooLargeError:
            self._notices.fault(FaultReason.HEADERS_SIZE, "headers are too large", is_connection=False)
            self._calls.answer(stream_id, http_block(431), end_stream=end_stream)
        else:
            self._calls.open(stream_id, asked, end_stream=end_stream, now_s=now_s)

    def _on_settings(self, flags: int, stream_id: int, payload: bytes, now_s: float) -> None:
        if stream_id:
            raise _broken("SETTINGS of a stream")
        if flags & ACK:
            frames.require_size("SETTINGS with ACK", len(payload), 0)
            if not self._awaits_ack:
                raise _broken("ACK of nothing")
            self._awaits_ack = False
            self._openings.table_is_gone()
            return
        if self._has_settings:
            self._budgets.settings.spend(now_s, self._calls.served)
        self._has_settings = True
        values, outbox = frames.read_settings(payload), self.outbox
        outbox.max_frame = values.get(frames.MAX_FRAME_SIZE, outbox.max_frame)
        initial = values.get(frames.INITIAL_WINDOW_SIZE, outbox.initial_window)
        if initial != outbox.initial_window:
            change, outbox.initial_window = initial - outbox.initial_window, initial
            self._calls.windows(change)
        outbox.put(frames.SETTINGS_ACK)

    def _on_ping(self, flags: int, stream_id: int, payload: bytes, now_s: float) -> None:
        frames.require_size("PING", len(payload), 8)
        if stream_id:
            raise _broken("PING of a stream")
        if not flags & ACK:
            self._budgets.pings.spend(now_s, self._calls.served)
            self.outbox.put(frames.frame(frames.PING, ACK, 0, payload))
        elif payload == _DRAIN_PING and self._is_leaving:
            self.finish_drain()

    def _on_window_update(self, stream_id: int, payload: bytes, now_s: float) -> None:
        frames.require_size("WINDOW_UPDATE", len(payload), 4)
        self._budgets.windows.spend(now_s, self._calls.served)
        increment = frames.u31(payload)
        if stream_id:
            self._calls.window(stream_id, increment, now_s)
        elif increment:
            self.outbox.grant(None, increment)
        else:
            raise _broken("WINDOW_UPDATE by nothing")


class _Block:
    """A header block whose end has yet to come."""

    __slots__ = ("data", "end_stream", "num_frames", "stream_id")

    def __init__(self, stream_id: int, end_stream: bool, data: bytes) -> None:
        self.stream_id = stream_id
        self.end_stream = end_stream
        self.data = bytearray(data)
        self.num_frames = 1

    def add(self, data: bytes) -> None:
        """Take another frame's part.

        Raises:
            ConnectionFault: The block is too long, or of too many frames.
        """
        self.data += data
        self.num_frames += 1
        if len(self.data) > MAX_BLOCK_BYTES or self.num_frames > MAX_CONTINUATIONS:
            raise ConnectionFault(
                FaultReason.HEADERS_SIZE, ErrorCode.ENHANCE_YOUR_CALM, "a header block without end"
            )


def _broken(detail: str) -> ConnectionFault:
    return ConnectionFault(FaultReason.FRAME, ErrorCode.PROTOCOL_ERROR, detail)
