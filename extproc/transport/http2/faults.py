"""What a peer can do wrong, and how far the damage reaches.

Source: RFC 9113, 5.4 and 7.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum, auto


class ErrorCode(IntEnum):
    """HTTP/2 error codes. Source: RFC 9113, 7."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    ENHANCE_YOUR_CALM = 0xB


class FaultReason(StrEnum):
    """Why a stream or a connection was ended by us; a metric label."""

    PREFACE = auto()
    FRAME = auto()
    FRAME_SIZE = auto()
    FLOW_CONTROL = auto()
    COMPRESSION = auto()
    REQUEST = auto()
    MESSAGE = auto()
    MESSAGE_SIZE = auto()
    HEADERS_SIZE = auto()
    RESET_FLOOD = auto()
    PING_FLOOD = auto()
    SETTINGS_FLOOD = auto()
    EMPTY_FLOOD = auto()
    WINDOW_FLOOD = auto()
    LATE_FLOOD = auto()
    TOO_MANY_STREAMS = auto()
    TOO_MANY_CONNECTIONS = auto()
    SLOW_READER = auto()
    SILENT = auto()
    TLS = auto()


class ConnectionFault(Exception):  # noqa: N818 - the name says what happened
    """The peer broke a rule that all streams depend on, or a bound: the connection ends.

    Args:
        reason: For the metric.
        code: For GOAWAY.
        detail: One sentence for the log and the peer; quotes nothing that the peer sent.
    """

    def __init__(self, reason: FaultReason, code: ErrorCode, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.code = code
        self.detail = detail


class StreamFault(Exception):  # noqa: N818 - the name says what happened
    """The peer broke a rule that concerns one stream: it is reset, the others go on.

    Args:
        reason: For the metric.
        code: For RST_STREAM.
        detail: One sentence; quotes nothing that the peer sent.
    """

    def __init__(self, reason: FaultReason, code: ErrorCode, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.code = code
        self.detail = detail
