"""HTTP/2 frames: their layout, read and written.

Source: RFC 9113, 4 and 6.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from extproc.transport.http2.faults import ConnectionFault, ErrorCode, FaultReason

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client sends first."""

DATA: Final = 0x0
HEADERS: Final = 0x1
PRIORITY: Final = 0x2
RST_STREAM: Final = 0x3
SETTINGS: Final = 0x4
PUSH_PROMISE: Final = 0x5
PING: Final = 0x6
GOAWAY: Final = 0x7
WINDOW_UPDATE: Final = 0x8
CONTINUATION: Final = 0x9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
HAS_PRIORITY: Final = 0x20

HEADER_TABLE_SIZE: Final = 0x1
ENABLE_PUSH: Final = 0x2
MAX_CONCURRENT_STREAMS: Final = 0x3
INITIAL_WINDOW_SIZE: Final = 0x4
MAX_FRAME_SIZE: Final = 0x5
MAX_HEADER_LIST_SIZE: Final = 0x6

LEAST_MAX_FRAME: Final = 16_384
GREATEST_MAX_FRAME: Final = (1 << 24) - 1
DEFAULT_WINDOW: Final = 65_535
GREATEST_WINDOW: Final = (1 << 31) - 1
GREATEST_STREAM: Final = (1 << 31) - 1

HEAD: Final = struct.Struct(">IBI")
"""Length and type (24 and 8 bits), flags, stream: the head of every frame."""

HEAD_BYTES: Final = HEAD.size

GOAWAY_BYTES: Final = 8
"""Of a GOAWAY without debug data."""

PRIORITY_BYTES: Final = 5

_GOAWAY: Final = struct.Struct(">IBIII")
_FOUR_BYTES: Final = struct.Struct(">IBII")
_SETTING: Final = struct.Struct(">HI")


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """A whole frame; `payload` is at most as long as the peer allows."""
    return HEAD.pack(len(payload) << 8 | kind, flags, stream_id) + payload


def rst_stream(stream_id: int, code: int) -> bytes:
    """RST_STREAM."""
    return _FOUR_BYTES.pack(4 << 8 | RST_STREAM, 0, stream_id, code)


def window_update(stream_id: int, increment: int) -> bytes:
    """WINDOW_UPDATE; `stream_id` 0 is the connection."""
    return _FOUR_BYTES.pack(4 << 8 | WINDOW_UPDATE, 0, stream_id, increment)


def goaway(last_stream_id: int, code: int, detail: str = "") -> bytes:
    """GOAWAY; `detail` is shown by the peer's logs."""
    more = detail.encode()
    return _GOAWAY.pack((8 + len(more)) << 8 | GOAWAY, 0, 0, last_stream_id, code) + more


def settings(values: Mapping[int, int]) -> bytes:
    """SETTINGS."""
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(key, value) for key, value in values.items()))


SETTINGS_ACK: Final = frame(SETTINGS, ACK, 0)


def u31(data: bytes) -> int:
    """Four bytes without the reserved bit."""
    return int.from_bytes(data) & 0x7FFFFFFF


def unpadded(flags: int, data: bytes, start: int, stop: int) -> tuple[int, int]:
    """Where the content of a DATA or HEADERS payload begins and ends, without padding and priority.

    Raises:
        ConnectionFault: They are longer than the payload.
    """
    if flags & PADDED:
        if start == stop:
            raise ConnectionFault(FaultReason.FRAME, ErrorCode.FRAME_SIZE_ERROR, "no room for padding")
        stop -= data[start]
        start += 1
    if flags & HAS_PRIORITY:
        start += PRIORITY_BYTES
    if start > stop:
        raise ConnectionFault(FaultReason.FRAME, ErrorCode.PROTOCOL_ERROR, "padding is too long")
    return start, stop


def read_settings(payload: bytes) -> dict[int, int]:
    """The values of a SETTINGS payload; of a repeated one the last, so that repeating costs us nothing.

    Raises:
        ConnectionFault: The payload has another length, or a value is out of its range.
    """
    if len(payload) % _SETTING.size:
        raise ConnectionFault(FaultReason.FRAME, ErrorCode.FRAME_SIZE_ERROR, "SETTINGS of a wrong length")
    values: dict[int, int] = dict(_SETTING.iter_unpack(payload))
    if values.get(INITIAL_WINDOW_SIZE, 0) > GREATEST_WINDOW:
        raise ConnectionFault(
            FaultReason.FLOW_CONTROL, ErrorCode.FLOW_CONTROL_ERROR, "initial window is too large"
        )
    if not LEAST_MAX_FRAME <= values.get(MAX_FRAME_SIZE, LEAST_MAX_FRAME) <= GREATEST_MAX_FRAME:
        raise ConnectionFault(FaultReason.FRAME, ErrorCode.PROTOCOL_ERROR, "frame size is out of range")
    if values.get(ENABLE_PUSH, 0) > 1:
        raise ConnectionFault(FaultReason.FRAME, ErrorCode.PROTOCOL_ERROR, "ENABLE_PUSH is neither 0 nor 1")
    return values


def require_size(kind: str, size: int, expected: int) -> None:
    """Frames of a fixed size have it.

    Raises:
        ConnectionFault: This one has not.
    """
    if size != expected:
        raise ConnectionFault(
            FaultReason.FRAME, ErrorCode.FRAME_SIZE_ERROR, f"{kind} of {size} bytes, not {expected}"
        )
