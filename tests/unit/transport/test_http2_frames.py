"""Layout of frames, and what is refused of it."""

from __future__ import annotations

import pytest

from extproc.transport.http2 import frames
from extproc.transport.http2.faults import ConnectionFault, ErrorCode


def test_a_frame_is_its_head_and_its_payload() -> None:
    """Nine bytes of head: length, kind, flags, stream."""
    assert frames.frame(frames.DATA, frames.END_STREAM, 5, b"abc") == b"\0\0\3\0\1\0\0\0\5abc"
    assert frames.rst_stream(3, ErrorCode.CANCEL) == b"\0\0\4\3\0\0\0\0\3\0\0\0\x08"
    assert frames.window_update(0, 1) == b"\0\0\4\x08\0\0\0\0\0\0\0\0\1"
    assert frames.goaway(7, 2, "why") == b"\0\0\x0b\7\0\0\0\0\0\0\0\0\7\0\0\0\2why"
    assert frames.settings({frames.MAX_FRAME_SIZE: 16_384}) == b"\0\0\6\4\0\0\0\0\0\0\5\0\0\x40\0"


@pytest.mark.parametrize(
    ("flags", "payload", "content"),
    [
        (0, b"abc", b"abc"),
        (frames.PADDED, b"\2abc\0\0", b"abc"),
        (frames.PADDED, b"\0", b""),
        (frames.HAS_PRIORITY, b"\0\0\0\0\0abc", b"abc"),
        (frames.PADDED | frames.HAS_PRIORITY, b"\1\0\0\0\0\0abc\0", b"abc"),
    ],
)
def test_padding_and_priority_are_cut_off(flags: int, payload: bytes, content: bytes) -> None:
    """What is left is the content."""
    start, stop = frames.unpadded(flags, payload, 0, len(payload))
    assert payload[start:stop] == content


@pytest.mark.parametrize(
    ("flags", "payload"),
    [(frames.PADDED, b""), (frames.PADDED, b"\2a"), (frames.HAS_PRIORITY, b"\0\0\0\0")],
)
def test_padding_beyond_the_payload_is_a_fault(flags: int, payload: bytes) -> None:
    """The connection ends: what comes behind cannot be trusted."""
    with pytest.raises(ConnectionFault):
        frames.unpadded(flags, payload, 0, len(payload))


def test_of_a_repeated_setting_the_last_counts() -> None:
    """So a frame that is full of settings costs no more than one."""
    payload = b"\0\4\0\0\0\1" * 2_000 + b"\0\4\0\0\0\2" + b"\xff\xff\0\0\0\0"
    assert frames.read_settings(payload) == {frames.INITIAL_WINDOW_SIZE: 2, 0xFFFF: 0}


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"\0\4\0\0\0", ErrorCode.FRAME_SIZE_ERROR),
        (b"\0\4\x80\0\0\0", ErrorCode.FLOW_CONTROL_ERROR),
        (b"\0\5\0\0\0\1", ErrorCode.PROTOCOL_ERROR),
        (b"\0\5\1\0\0\0", ErrorCode.PROTOCOL_ERROR),
        (b"\0\2\0\0\0\2", ErrorCode.PROTOCOL_ERROR),
    ],
)
def test_settings_out_of_range(payload: bytes, code: ErrorCode) -> None:
    """Each with the code that RFC 9113, 6.5.2 asks for."""
    with pytest.raises(ConnectionFault) as raised:
        frames.read_settings(payload)
    assert raised.value.code is code
