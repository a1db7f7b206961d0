"""Frames that lie within large messages, which are copied once to where they stay."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.transport.http2 import frames
from extproc.transport.http2.faults import ErrorCode, FaultReason
from tests.http2_peers import Listener, Served, data, framed, kinds, opening

LARGE = bytes(range(256)) * 781  # 199,936 bytes
FRAME_BYTES = 16_384


def cut(number: int, message: bytes, size: int = FRAME_BYTES) -> list[bytes]:
    """The frames of a message; each payload is at most `size`."""
    whole = framed(message)
    return [data(number, whole[at : at + size]) for at in range(0, len(whole), size)]


def begun(number: int, message: bytes = LARGE) -> tuple[Served, list[bytes]]:
    """A call whose large message has begun to come, and the frames that follow."""
    served = Served(Listener)
    first, *others = cut(number, message)
    served.receive(opening(number), first)
    return served, others


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70_000), st.booleans(), st.sampled_from([1_000, FRAME_BYTES - 1, FRAME_BYTES]))
def test_any_cut_gives_the_same_messages(num_bytes: int, fills: bool, size: int) -> None:
    """Two at once, by turns, with a small one and a PING between; by both methods, or by `receive` alone."""
    served, other = Served(Listener), LARGE[::-1]
    rows = zip(cut(1, LARGE, size), cut(3, other, size), strict=True)
    sent = b"".join(a + b for a, b in rows)
    middle = 9 * (size + 9)
    between = opening(5) + data(5, framed(b"small")) + frames.frame(frames.PING, 0, 0, b"are you?")
    at = next(end for end in ends(sent) if end > middle)
    stream = memoryview(opening(1) + opening(3) + sent[:at] + between + sent[at:])
    for start in range(0, len(stream), num_bytes):
        piece = stream[start : start + num_bytes]
        if fills:
            piece = piece[served.connection.fill(piece) :]
        served.connection.receive(piece, 0.0)
    assert [each.received for each in served.receivers] == [[LARGE], [other], [b"small"]]
    assert served.faults == []
    assert frames.PING in kinds(served.taken())


def ends(sent: bytes) -> list[int]:
    """Where frames end."""
    found, at = list[int](), 0
    while at < len(sent):
        at += frames.HEAD_BYTES + (struct.unpack_from(">I", sent, at)[0] >> 8)
        found.append(at)
    return found


def test_all_frames_within_are_taken_before_anything_else() -> None:
    """But the last one, which ends the message."""
    served, others = begun(1)
    taken = served.connection.fill(memoryview(b"".join(others)))
    assert taken == sum(map(len, others[:-1]))
    served.receive(others[-1])
    assert served.receivers[0].received == [LARGE]


def test_frames_that_bring_little_are_taken_a_few_at_a_time() -> None:
    """A read of them may not hold the loop up."""
    served, _ = begun(1)
    small = data(1, b"m")
    assert served.connection.fill(memoryview(small * 1_000)) == 32 * len(small)


def test_frames_that_bring_nothing_are_a_flood_within_a_message_too() -> None:
    """They are for the budget, not for the message."""
    served, _ = begun(1)
    assert served.connection.fill(memoryview(data(1, b""))) == 0
    served.receive(data(1, b"") * 20_000)
    assert served.faults == [(FaultReason.EMPTY_FLOOD, True)]


def test_a_frame_that_is_too_long_is_a_fault_within_a_message_too() -> None:
    """It is not taken for being within one."""
    served, _ = begun(1)
    wrong = frames.frame(frames.DATA, 0, 1, b"m" * (FRAME_BYTES + 1))
    assert served.connection.fill(memoryview(wrong)) == 0
    served.receive(wrong)
    assert served.faults == [(FaultReason.FRAME_SIZE, True)]


def test_a_frame_with_padding_or_an_end_is_read_as_such() -> None:
    """Neither is all of it the message's."""
    served, _ = begun(1)
    padded = frames.frame(frames.DATA, frames.PADDED, 1, b"\3mmm\0\0\0")
    assert served.connection.fill(memoryview(padded)) == 0
    served.receive(padded, frames.frame(frames.DATA, frames.END_STREAM, 1, b"m"))
    assert served.faults == [(FaultReason.MESSAGE, False)]  # the stream ends within it


def test_a_call_that_is_reset_takes_nothing_more() -> None:
    """What is left of the frame under way is passed over, and the next call is served."""
    served, others = begun(1)
    served.receive(others[0][:5_000])
    served.receive(others[0][5_000:], frames.rst_stream(1, ErrorCode.CANCEL), others[1])
    served.receive(opening(3), data(3, framed(b"next")))
    assert [each.received for each in served.receivers] == [["reset"], [b"next"]]


def test_a_call_whose_time_is_over_within_a_frame() -> None:
    """The rest of the frame goes nowhere, and the connection goes on."""
    served = Served(Listener)
    first, second, *_ = cut(1, LARGE)
    served.receive(opening(1, (b"grpc-timeout", b"50m")), first, second[:5_000])
    served.connection.expire(1.0)
    served.receive(second[5_000:], opening(3), data(3, framed(b"next")))
    assert [each.received for each in served.receivers] == [["reset"], [b"next"]]
    assert served.faults == []
