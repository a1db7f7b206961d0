"""The calls of one connection: opened, their messages delivered, ended; and what their peers may send.

Rules:
    1. A receiver is not called after its call is over: each callback checks `is_over` first.
    2. A stream stays known until its last frame is out, that is, longer than its call if windows hold it up.
    3. Any callback may end the call, and with it anything on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

from extproc.transport.http2.budgets import Budgets
from extproc.transport.http2.deadlines import Deadlines
from extproc.transport.http2.faults import ConnectionFault, ErrorCode, FaultReason, StreamFault
from extproc.transport.http2.flow import WIDE_WINDOW, Room, WideWindows
from extproc.transport.http2.frames import (
    DEFAULT_WINDOW,
    END_STREAM,
    GREATEST_WINDOW,
    PADDED,
    rst_stream,
    unpadded,
    window_update,
)
from extproc.transport.http2.messages import PREFIX, PREFIX_BYTES, MessageError, MessageReader
from extproc.transport.http2.outbox import MAX_UNSENT_BYTES, OUTPUT_BYTES, Outbox
from extproc.transport.http2.requests import Opening, refused
from extproc.transport.http2.streams import ReadingStream, Stream
from extproc.transport.seam import Receiver, Rpc, Status

ANNOUNCED_STREAMS: Final = 512
"""At once on a connection, for a peer that knows; Envoy opens another connection beyond. It resets each
stream that we end, and takes 1,000 resets that it could not send yet for a flood
(`max_outbound_control_frames`)."""

MAX_STREAMS: Final = 1_024
"""For one that does not know yet: Envoy opens as many by default before it has seen our settings."""


class Notices(Protocol):
    """Gets what goes wrong."""

    def fault(self, reason: FaultReason, detail: str, *, is_connection: bool) -> None:
        """A stream or the whole connection was ended for what the peer did."""

    def bug(self, path: str, error: Exception) -> None:
        """A service raised; its call ended."""


class Calls:
    """Those of one connection.

    Args:
        rpcs: What is served, by `Rpc.path`.
        max_message_bytes: A longer message is refused.
        peer: For services' logs.
        notices: Gets faults.
        outbox: The connection's.
        budgets: The connection's.
        allocate: Memory for large messages.
    """

    def __init__(
        self,
        rpcs: Mapping[str, Rpc],
        max_message_bytes: int,
        peer: str,
        notices: Notices,
        outbox: Outbox,
        budgets: Budgets,
        allocate: Callable[[int], memoryview],
    ) -> None:
        self._rpcs = rpcs
        self._max_message_bytes = max_message_bytes
        self._peer = peer
        self._notices = notices
        self._outbox = outbox
        self._budgets = budgets
        self._allocate = allocate
        self._room = Room(2 * max_message_bytes)
        self._wide = WideWindows()
        self._streams: dict[int, Stream] = {}
        self._deadlines = Deadlines()
        self.large: dict[int, Stream] = {}
        """Those of which a large message is being put together."""

        self.last_id = 0
        """The highest number that the peer has used."""

        self.refused_from: int | None = None
        """Calls with higher numbers are refused: this side is leaving."""

        self.served = 0
        """Calls that were answered to their end."""

    def __len__(self) -> int:
        """Streams whose last frame is not out yet."""
        return len(self._streams)

    @property
    def next_deadline_s(self) -> float | None:
        """When `expire` is to be called; None if there is no need."""
        return self._deadlines.next_s

    # Opened.

    def open(self, stream_id: int, asked: Opening, *, end_stream: bool, now_s: float) -> None:
        """A call begins; `stream_id` is `last_id`.

        Raises:
            StreamFault: It is one too many.
        """
        if self.refused_from is not None:
            self._outbox.put(rst_stream(stream_id, ErrorCode.REFUSED_STREAM))
            return
        if self._room.is_shut:
            raise StreamFault(FaultReason.SLOW_READER, ErrorCode.REFUSED_STREAM, "answers are not taken")
        if len(self._streams) >= MAX_STREAMS:
            raise StreamFault(FaultReason.TOO_MANY_STREAMS, ErrorCode.REFUSED_STREAM, "too many streams")
        rpc = self._rpcs.get(asked.path)
        if asked.refusal is not None or rpc is None:
            block = asked.refusal or refused(Status.UNIMPLEMENTED, "no such method")
            self.answer(stream_id, block, end_stream=end_stream)
            return
        kind = ReadingStream if rpc.reads_on else Stream
        stream = kind(stream_id, self._outbox, self._ended, self._peer, asked.path)
        self._streams[stream_id] = stream
        if not end_stream and self._wide.opened(stream_id):
            self._outbox.put(window_update(stream_id, WIDE_WINDOW - DEFAULT_WINDOW))
            stream.full_window = stream.receive_window = WIDE_WINDOW
        if asked.timeout_s is not None:
            stream.deadline_s = now_s + asked.timeout_s
            self._deadlines.add(stream.deadline_s, stream_id, self._streams)
        try:
            receiver = rpc.open(stream)
        except Exception as error:
            self._bug(stream, error)
        else:
            stream.receiver = None if stream.is_over else receiver
        if end_stream:
            self._half_close(stream)

    def answer(self, stream_id: int, block: bytes, *, end_stream: bool) -> None:
        """Answer what is no call to us by one block."""
        stream = Stream(stream_id, self._outbox, self._ended, self._peer, "")
        stream.is_half_closed, stream.is_over = end_stream, True
        self._outbox.end_at_once(stream, block)

    # What the connection reports.

    def data(self, stream_id: int, data: bytes, start: int, stop: int, flags: int, now_s: float) -> None:
        """A DATA frame; its payload is `data[start:stop]`.

        Raises:
            ConnectionFault: There never was such a stream, the padding is too long, or it is one too many.
            StreamFault: The stream takes none.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            self.late(stream_id, now_s)
            return
        if stream.is_half_closed:
            raise StreamFault(FaultReason.FRAME, ErrorCode.STREAM_CLOSED, "DATA behind the end")
        stream.receive_window -= stop - start
        if stream.receive_window < 0:
            raise StreamFault(
                FaultReason.FLOW_CONTROL, ErrorCode.FLOW_CONTROL_ERROR, "stream window is exceeded"
            )
        if flags & PADDED:
            start, stop = unpadded(PADDED, data, start, stop)
        if start != stop:
            if not stream.is_over:
                self._content(stream, data, start, stop)
        elif not flags & END_STREAM:
            self._budgets.empty.spend(now_s, self.served)
        if flags & END_STREAM:
            self._half_close(stream)
        elif stream.reader is not None or stream.receive_window < stream.full_window // 2:
            self._replenish(stream)

    def trailers(self, stream_id: int, *, end_stream: bool, now_s: float) -> None:
        """A second header block.

        Raises:
            ConnectionFault: It is one too many for a stream that is over.
            StreamFault: It does not end the stream, or the stream has ended.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            self.late(stream_id, now_s)
        elif stream.is_half_closed or not end_stream:
            raise StreamFault(FaultReason.REQUEST, ErrorCode.PROTOCOL_ERROR, "a second block that is no end")
        else:
            self._half_close(stream)

    def _content(self, stream: Stream, data: bytes, start: int, stop: int) -> None:
        """Deliver the messages that are whole now."""
        receiver = stream.receiver
        assert receiver is not None
        reader = stream.reader
        if reader is None:
            if stop - start >= PREFIX_BYTES:
                flag, size = PREFIX.unpack_from(data, start)
                if size == stop - start - PREFIX_BYTES and not flag and size <= self._max_message_bytes:
                    try:
                        receiver.on_message(data[start + PREFIX_BYTES : stop])
                    except Exception as error:
                        self._bug(stream, error)
                    return
            reader = stream.reader = MessageReader(self._max_message_bytes, self._allocate)
        try:
            messages = reader.feed(data[start:stop])
        except MessageError as error:
            self._refuse(stream, error)
            return
        for message in messages:
            if stream.is_over:
                break
            try:
                receiver.on_message(message)
            except Exception as error:
                self._bug(stream, error)
        if reader.is_between:
            stream.reader = None
        if messages:
            self._leave_room(stream.id)
        if reader.is_large:
            self.large[stream.id] = stream

    def _half_close(self, stream: Stream) -> None:
        stream.is_half_closed = True
        if stream.is_over:
            return
        if stream.reader is not None:
            self._refuse(stream, MessageError(Status.INTERNAL, "the stream ends within a message"))
            return
        assert stream.receiver is not None
        try:
            stream.receiver.on_half_close()
        except Exception as error:
            self._bug(stream, error)

    def late(self, stream_id: int, now_s: float) -> None:
        """A frame for a stream that is over, which the peer may not have known.

        Raises:
            ConnectionFault: There never was such a stream, or it is one frame too many.
        """
        if stream_id > self.last_id or not stream_id & 1:
            raise ConnectionFault(
                FaultReason.FRAME, ErrorCode.PROTOCOL_ERROR, "a frame for a stream that is not open"
            )
        self._budgets.late.spend(now_s, self.served)

    # Ended.

    def reset(self, stream_id: int, now_s: float) -> None:
        """The peer ends a stream.

        Raises:
            ConnectionFault: There never was such a stream, or it is one too many.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            self.late(stream_id, now_s)
            return
        budget = self._budgets.left if stream.has_begun else self._budgets.resets
        if self._forget(stream):
            budget.spend(now_s, self.served)

    def break_off(self, stream_id: int, fault: StreamFault, now_s: float) -> None:
        """End a stream for what the peer did.

        Raises:
            ConnectionFault: There never was such a stream, or it is one fault too many.
        """
        if stream_id > self.last_id:
            raise ConnectionFault(fault.reason, fault.code, fault.detail)
        self._notices.fault(fault.reason, fault.detail, is_connection=False)
        self._outbox.put(rst_stream(stream_id, fault.code))
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._forget(stream)
        self._budgets.resets.spend(now_s, self.served)

    def expire(self, now_s: float) -> None:
        """End the calls whose time is over."""
        for stream_id in self._deadlines.due(now_s):
            stream = self._streams.get(stream_id)
            if stream is not None and not stream.is_over:
                self._abort(stream, Status.DEADLINE_EXCEEDED, "the caller's deadline is over")

    def end_all(self) -> None:
        """The connection is over."""
        streams, self._streams = list(self._streams.values()), {}
        self.large.clear()
        for stream in streams:
            self._outbox.drop(stream)
            if not stream.is_over:
                self._tell_reset(stream)

    def _refuse(self, stream: Stream, error: MessageError) -> None:
        is_too_large = error.status is Status.RESOURCE_EXHAUSTED
        reason = FaultReason.MESSAGE_SIZE if is_too_large else FaultReason.MESSAGE
        self._notices.fault(reason, error.detail, is_connection=False)
        stream.reader = None
        self._abort(stream, error.status, error.detail)
        self._leave_room(stream.id)

    def _bug(self, stream: Stream, error: Exception) -> None:
        self._notices.bug(stream.path, error)
        stream.abort(Status.UNKNOWN, "internal error")

    def _abort(self, stream: Stream, status: Status, detail: str) -> None:
        """End a call for its peer and for its service."""
        receiver = stream.receiver
        stream.abort(status, detail)
        self._tell(stream, receiver)

    def _tell_reset(self, stream: Stream) -> None:
        stream.is_over = True
        receiver, stream.receiver = stream.receiver, None
        self._tell(stream, receiver)

    def _tell(self, stream: Stream, receiver: Receiver | None) -> None:
        if receiver is not None:
            try:
                receiver.on_reset()
            except Exception as error:
                self._notices.bug(stream.path, error)

    def _forget(self, stream: Stream) -> bool:
        """The stream is over, and with it the call; True if that was not over yet."""
        self._outbox.drop(stream)
        self._remove(stream)
        if stream.is_over:
            return False
        self._tell_reset(stream)
        return True

    def _ended(self, stream_id: int) -> None:
        """A stream's last frame is out, and nothing of it is read."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self.served += 1
            self._remove(stream)

    def _remove(self, stream: Stream) -> None:
        del self._streams[stream.id]
        self._wide.left(stream.id)
        if stream.reader is not None:
            self._leave_room(stream.id)

    # Windows.

    def window(self, stream_id: int, increment: int, now_s: float) -> None:
        """The peer takes more of a stream.

        Raises:
            ConnectionFault: There never was such a stream, or it is over and this is one frame too many.
            StreamFault: It takes nothing more, or more than there can be.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            self.late(stream_id, now_s)
        elif not increment:
            raise StreamFault(FaultReason.FRAME, ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
        elif stream.window + increment > GREATEST_WINDOW:
            raise StreamFault(FaultReason.FLOW_CONTROL, ErrorCode.FLOW_CONTROL_ERROR, "too wide a window")
        else:
            self._outbox.grant(stream, increment)

    def windows(self, change: int) -> None:
        """The peer takes more or less of every stream.

        Raises:
            ConnectionFault: It takes more than there can be.
        """
        for stream in self._streams.values():
            if stream.window + change > GREATEST_WINDOW:
                raise ConnectionFault(
                    FaultReason.FLOW_CONTROL, ErrorCode.FLOW_CONTROL_ERROR, "too wide a window"
                )
            self._outbox.grant(stream, change)

    def relieve(self) -> None:
        """Take no more from a peer that does not take what it is sent, until it does.

        Raises:
            ConnectionFault: It makes us answer all the same.
        """
        outbox, room = self._outbox, self._room
        if outbox.is_blocked and outbox.num_bytes > 4 * OUTPUT_BYTES:
            raise ConnectionFault(
                FaultReason.SLOW_READER, ErrorCode.ENHANCE_YOUR_CALM, "answers are not taken"
            )
        if not room.is_shut:
            room.is_shut = outbox.unsent_bytes > MAX_UNSENT_BYTES
        elif outbox.unsent_bytes < MAX_UNSENT_BYTES // 2:
            room.is_shut = False
            self._admit()
            for stream in self._streams.values():
                self._replenish(stream)

    def _replenish(self, stream: Stream) -> None:
        """Let the peer send what there is room for."""
        if stream.is_over or stream.is_half_closed or self._room.is_shut:
            return
        goal, reader = stream.full_window, stream.reader
        if reader is not None and reader.size > DEFAULT_WINDOW:
            goal = reader.missing
            if goal <= stream.receive_window or not self._room.ask(stream.id, reader.size):
                return
        elif stream.receive_window >= goal // 2:
            return
        if type(stream) is Stream:  # not a log, which sends little at a time for ever
            self._wide.sent_much()
        self._outbox.put(window_update(stream.id, goal - stream.receive_window))
        stream.receive_window = goal

    def _leave_room(self, stream_id: int) -> None:
        self.large.pop(stream_id, None)
        self._room.leave(stream_id)
        self._admit()

    def _admit(self) -> None:
        """Give the room that was left to the calls that wait for it."""
        while (stream_id := self._room.next()) is not None:
            stream = self._streams.get(stream_id)
            if stream is None:
                self._room.leave(stream_id)
            else:
                self._replenish(stream)
