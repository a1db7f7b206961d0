"""What a connection makes of what comes: calls, faults, floods, and its own end."""

from __future__ import annotations

from functools import partial

import pytest

from extproc.transport.http2 import frames
from extproc.transport.http2.calls import ANNOUNCED_STREAMS, MAX_STREAMS
from extproc.transport.http2.connection import MAX_CONTINUATIONS
from extproc.transport.http2.faults import ErrorCode, FaultReason
from extproc.transport.http2.flow import CONNECTION_WINDOW, WIDE_CALLS, WIDE_WINDOW
from extproc.transport.http2.headers import MAX_BLOCK_BYTES, MAX_LIST_BYTES, encode
from extproc.transport.http2.outbox import MAX_UNSENT_BYTES, OUTPUT_BYTES
from extproc.transport.seam import Call, Received, Status
from tests.http2_peers import (
    CALL_FIELDS,
    GREETING,
    MAX_MESSAGE_BYTES,
    Echo,
    Frame,
    Listener,
    Served,
    code,
    data,
    framed,
    kinds,
    opening,
)

WIDE = frames.settings({frames.INITIAL_WINDOW_SIZE: frames.GREATEST_WINDOW}) + frames.window_update(
    0, frames.GREATEST_WINDOW - frames.DEFAULT_WINDOW
)


def granted(sent: list[Frame], stream_id: int) -> int:
    """How much a peer was allowed to send."""
    return sum(
        int.from_bytes(payload)
        for kind, _, stream, payload in sent
        if kind == frames.WINDOW_UPDATE and stream == stream_id
    )


def content(sent: list[Frame], stream_id: int) -> bytes:
    """All DATA of a stream."""
    return b"".join(
        payload for kind, _, stream, payload in sent if (kind, stream) == (frames.DATA, stream_id)
    )


# Calls.


def test_the_first_bytes_are_our_settings() -> None:
    """No table, bounded streams and headers, and a wide window."""
    served = Served(is_greeted=False)
    settings, window = served.taken()
    assert frames.read_settings(settings[3]) == {
        frames.HEADER_TABLE_SIZE: 0,
        frames.MAX_CONCURRENT_STREAMS: ANNOUNCED_STREAMS,
        frames.MAX_HEADER_LIST_SIZE: MAX_LIST_BYTES,
    }
    assert granted([window], 0) == CONNECTION_WINDOW - frames.DEFAULT_WINDOW


def test_a_call_from_its_opening_to_its_trailers() -> None:
    """Headers, the echo, the end; nothing is left."""
    served = Served()
    assert kinds(served.receive(opening(1), data(1, framed(b"hello")))) == [frames.HEADERS, frames.DATA]
    (trailers,) = served.receive(data(1, b"", end_stream=True))
    assert trailers[:3] == (frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 1)
    assert served.receivers[0].received == [b"hello", "half-close"]
    assert served.connection.num_streams == 0
    assert not served.faults


def test_an_early_end_lets_the_peer_stop_sending() -> None:
    """RST_STREAM(NO_ERROR) behind the trailers, and what is still on its way is passed over."""
    served = Served(Listener)
    served.receive(opening(1))
    served.receivers[0].call.finish(b"done")
    sent = served.taken()
    assert kinds(sent) == [frames.HEADERS, frames.DATA, frames.HEADERS, frames.RST_STREAM]
    assert code(sent) == ErrorCode.NO_ERROR
    late = data(1, framed(b"late")), frames.window_update(1, 5), opening(1, end_stream=True, fields=())
    assert served.receive(*late, frames.rst_stream(1, ErrorCode.CANCEL)) == []
    assert served.receivers[0].received == []
    assert not served.faults


@pytest.mark.parametrize("end", ["half-close", "reset", "finish", "abort"])
def test_a_call_that_reads_on_gets_what_was_on_its_way(end: str) -> None:
    """The end is heard, but the peer is not cut short: messages come until it ends, or the service does."""
    served = Served(Listener, reads_on=True)
    served.receive(opening(1), data(1, framed(b"before")))
    call, received = served.receivers[0].call, served.receivers[0].received
    call.finish(b"done")
    call.send(b"nothing more")
    assert kinds(served.taken()) == [frames.HEADERS, frames.DATA, frames.HEADERS]
    assert served.connection.num_streams == 1
    whole = framed(b"behind" * 20_000)
    sent = served.receive(*(data(1, whole[at : at + 16_000]) for at in range(0, len(whole), 16_000)))
    assert granted(sent, 1) > 0, "windows are kept open"
    assert received == [b"before", b"behind" * 20_000]
    if end == "half-close":
        assert served.receive(data(1, b"", end_stream=True)) == []
        assert received[2:] == [end]
        call.finish()
        assert served.taken() == []
    elif end == "reset":
        assert served.receive(frames.rst_stream(1, ErrorCode.CANCEL)) == []
        assert received[2:] == [end]
    else:
        call.finish() if end == "finish" else call.abort(Status.UNKNOWN, "enough")
        (reset,) = served.taken()
        assert (reset[0], code([reset])) == (frames.RST_STREAM, ErrorCode.NO_ERROR)
        assert served.receive(data(1, framed(b"late"))) == []
        assert len(received) == 2
    assert served.connection.num_streams == 0
    assert not served.faults
    assert not served.bugs


def test_a_call_that_reads_on_ends_when_its_last_words_are_out() -> None:
    """It lets go before the peer takes its trailers: they still go out, and the stream ends with them."""
    served = Served(Listener, reads_on=True)
    served.receive(frames.settings({frames.INITIAL_WINDOW_SIZE: 0}), opening(1))
    call = served.receivers[0].call
    call.finish(b"done")
    call.finish()
    served.taken()
    assert served.connection.num_streams == 1
    sent = served.receive(frames.window_update(1, 100), data(1, framed(b"late")))
    assert kinds(sent) == [frames.DATA, frames.HEADERS, frames.RST_STREAM]
    assert served.receivers[0].received == []
    assert served.connection.num_streams == 0


def test_a_reset_is_reported_to_its_stream_once() -> None:
    """And its unsent answers are forgotten."""
    served = Served()
    served.receive(frames.settings({frames.INITIAL_WINDOW_SIZE: 0}), opening(1), data(1, framed(b"x" * 100)))
    assert served.connection.outbox.unsent_bytes == 105
    assert served.receive(frames.rst_stream(1, ErrorCode.CANCEL)) == []
    assert served.connection.outbox.unsent_bytes == 0
    assert served.receivers[0].received == [b"x" * 100, "reset"]
    served.receivers[0].call.send(b"y")
    served.receivers[0].call.finish()
    assert served.taken() == []


def test_a_call_without_messages() -> None:
    """Its opening is its end; trailers come with the headers."""
    served = Served()
    (only,) = served.receive(opening(1, end_stream=True))
    assert only[1] == frames.END_HEADERS | frames.END_STREAM
    assert served.receivers[0].received == ["half-close"]


def test_trailers_of_the_peer_end_its_side() -> None:
    """A second block that ends the stream."""
    served = Served()
    served.receive(opening(1), opening(1, end_stream=True, fields=((b"x", b"y"),)))
    assert served.receivers[0].received == ["half-close"]


def test_a_block_in_many_frames_with_padding_and_priority() -> None:
    """CONTINUATION frames of any size."""
    served, block = Served(), encode(CALL_FIELDS)
    flags = frames.PADDED | frames.HAS_PRIORITY
    parts = [frames.frame(frames.HEADERS, flags, 1, b"\3\0\0\0\0\0" + block[:5] + b"\0\0\0")]
    parts += [frames.frame(frames.CONTINUATION, 0, 1, block[at : at + 9]) for at in range(5, len(block), 9)]
    parts += [frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1)]
    assert kinds(served.receive(*parts, data(1, framed(b"x")))) == [frames.HEADERS, frames.DATA]


def test_an_unknown_method() -> None:
    """UNIMPLEMENTED, in one frame."""
    served = Served()
    sent = served.receive(
        opening(1, fields=((b":path", b"/a/b"), *(f for f in CALL_FIELDS if f[0] != b":path")))
    )
    assert kinds(sent) == [frames.HEADERS, frames.RST_STREAM]
    assert str(int(Status.UNIMPLEMENTED)).encode() in sent[0][3]
    assert served.receivers == []


def test_a_deadline_ends_its_call() -> None:
    """DEADLINE_EXCEEDED to the peer, a reset to the service; others go on."""
    served = Served(Listener)
    served.receive(opening(1, (b"grpc-timeout", b"2S")), opening(3), now_s=10.0)
    assert served.connection.next_deadline_s == 12.0
    served.connection.expire(11.9)
    assert served.taken() == []
    served.connection.expire(12.0)
    sent = served.taken()
    assert kinds(sent) == [frames.HEADERS, frames.RST_STREAM]
    assert b"grpc-status\x014" in sent[0][3]
    assert [receiver.received for receiver in served.receivers] == [["reset"], []]
    assert served.connection.next_deadline_s is None


def test_deadlines_of_ended_calls_do_not_pile_up() -> None:
    """A thousand calls of an hour each, one after the other."""
    served = Served()
    for number in range(1_000):
        served.receive(opening(2 * number + 1, (b"grpc-timeout", b"1H"), end_stream=True))
    assert len(served.connection._calls._deadlines._heap) <= 70


def test_a_service_that_raises_fails_its_call_alone() -> None:
    """UNKNOWN for that one, and the connection goes on."""

    class Faulty(Echo):
        def on_message(self, message: Received) -> None:
            raise ValueError("a bug")

    served = Served(Faulty)
    sent = served.receive(opening(1), opening(3), data(1, framed(b"x", b"y")))
    assert kinds(sent) == [frames.HEADERS, frames.RST_STREAM]
    assert b"grpc-status\x012" in sent[0][3]
    assert len(served.bugs) == 1
    assert served.connection.num_streams == 1


def test_a_service_that_cannot_open() -> None:
    """The same."""

    def fail(_: Call) -> Echo:
        raise ValueError("a bug")

    served = Served(fail)
    assert kinds(served.receive(opening(1), data(1, framed(b"x")))) == [frames.HEADERS, frames.RST_STREAM]
    assert len(served.bugs) == 1


# Messages and windows.


def test_a_large_message_is_granted_what_it_needs() -> None:
    """With its length, at once; and the usual window again when it is there."""
    served, message = Served(Listener), b"m" * 500_000
    whole = framed(message)
    served.receive(opening(1))
    assert granted(served.receive(data(1, whole[:5])), 1) == len(message) - (frames.DEFAULT_WINDOW - 5)
    assert granted(served.receive(data(1, whole[5:-1])), 1) == 0
    assert granted(served.receive(data(1, whole[-1:])), 1) == frames.DEFAULT_WINDOW
    assert served.receivers[0].received == [message]


def test_large_messages_wait_for_each_other() -> None:
    """There is room for two of the largest; the third may go on when one is there or gone."""
    served, size = Served(Listener), 2 * MAX_MESSAGE_BYTES // 3
    prefix = framed(b"m" * size)[:5]
    for number in range(4):
        sent = served.receive(opening(2 * number + 1), data(2 * number + 1, prefix))
        assert (granted(sent, 2 * number + 1) > WIDE_WINDOW) == (number < 2)
    assert granted(served.receive(frames.rst_stream(1, ErrorCode.CANCEL)), 5) > 0
    assert granted(served.receive(data(3, b"m" * size)), 7) > 0
    assert served.receivers[1].received == [b"m" * size]


def test_calls_behind_a_large_message_may_send_more() -> None:
    """A long prompt then comes without a grant, for some calls; those of small messages get none."""
    served, much = Served(Listener), WIDE_WINDOW - frames.DEFAULT_WINDOW
    assert granted(served.receive(opening(1), data(1, framed(b"m" * 1_000))), 1) == 0
    assert granted(served.receive(opening(3)), 3) == 0
    assert granted(served.receive(data(3, framed(b"m" * 200_000))), 3) > 0
    message = b"m" * 200_000
    whole = framed(message)
    assert granted(served.receive(opening(5)), 5) == much
    assert granted(served.receive(data(5, whole[:150_000])), 5) == 0
    served.receive(data(5, whole[150_000:]), frames.rst_stream(5, ErrorCode.CANCEL))
    assert served.receivers[2].received == [message, "reset"]
    later = [2 * number + 1 for number in range(3, 4 + WIDE_CALLS)]
    widened = []  # the one before, which went on, was granted more as well
    for number in later:
        widened.append(granted(served.receive(opening(number)), number))
        served.receive(frames.rst_stream(number, ErrorCode.CANCEL))
    assert widened == [much] * WIDE_CALLS + [0]
    assert not served.faults


def test_a_wide_call_may_send_more_still() -> None:
    """What its window does not hold is granted with the length, as to any."""
    served = Served(Listener)
    served.receive(opening(1), data(1, framed(b"m" * 200_000)))
    message = b"m" * 500_000
    whole = framed(message)
    served.receive(opening(3))
    assert granted(served.receive(data(3, whole[:5])), 3) == len(message) - (WIDE_WINDOW - 5)
    assert granted(served.receive(data(3, whole[5:-1])), 3) == 0
    assert granted(served.receive(data(3, whole[-1:])), 3) == WIDE_WINDOW
    assert served.receivers[1].received == [message]


def test_a_message_that_is_too_large() -> None:
    """RESOURCE_EXHAUSTED as soon as its length is known; the service hears of a reset."""
    served = Served(Listener)
    sent = served.receive(opening(1), data(1, framed(b"m" * (MAX_MESSAGE_BYTES + 1))[:10]))
    assert b"grpc-status\x018" in sent[0][3]
    assert served.receivers[0].received == ["reset"]
    assert served.faults == [(FaultReason.MESSAGE_SIZE, False)]


@pytest.mark.parametrize("flag_or_end", ["compressed", "cut off"])
def test_messages_that_are_none(flag_or_end: str) -> None:
    """INTERNAL: compressed without an encoding, or cut off by the end of the stream."""
    served = Served(Listener)
    broken = b"\1\0\0\0\1x" if flag_or_end == "compressed" else b"\0\0\0\0\5abc"
    sent = served.receive(opening(1), data(1, broken, end_stream=True))
    assert any(b"grpc-status\x0213" in payload for _, _, _, payload in sent)
    assert served.receivers[0].received == ["reset"]
    assert served.faults == [(FaultReason.MESSAGE, False)]


def test_padding_is_granted_again() -> None:
    """A stream whose peer pads every frame is not starved."""
    served = Served(Listener)
    served.receive(opening(1))
    padded = frames.frame(frames.DATA, frames.PADDED, 1, b"\xff" + framed(b"x") + b"\0" * 255)
    window = frames.DEFAULT_WINDOW
    for _ in range(2_000):
        window += granted(served.receive(padded), 1) - 262
        assert window > 0
    assert len(served.receivers[0].received) == 2_000


def test_answers_wait_for_windows_and_go_in_turns() -> None:
    """Two streams share what the connection may send."""
    served = Served()
    wide = frames.settings({frames.INITIAL_WINDOW_SIZE: 1_000_000})
    served.receive(
        wide, *(opening(stream) + data(stream, framed(b"%d" % stream * 50_000)) for stream in (1, 3))
    )
    sent = served.receive(frames.window_update(0, 10))
    assert len(content(sent, 1)) + len(content(sent, 3)) == 10
    sent = served.receive(frames.window_update(0, 60_000))
    assert content(sent, 1)
    assert content(sent, 3)


def test_a_smaller_window_may_be_below_nothing() -> None:
    """SETTINGS on the way: what was sent counts, and the stream waits until it is positive again."""
    served = Served()
    served.receive(opening(1), data(1, framed(b"x" * 16_000)))
    served.receive(frames.settings({frames.INITIAL_WINDOW_SIZE: 10}))
    assert content(served.receive(data(1, framed(b"y" * 100))), 1) == b""
    assert content(served.receive(frames.window_update(1, 16_005 - 10)), 1) == b""
    assert len(content(served.receive(frames.window_update(1, 7)), 1)) == 7


def test_what_a_peer_does_not_take_is_bounded() -> None:
    """It is sent nothing more to answer: no windows, no new calls; until it takes half."""
    served, message = Served(), b"m" * 900_000
    wide_streams = frames.settings({frames.INITIAL_WINDOW_SIZE: frames.GREATEST_WINDOW})
    served.receive(wide_streams, *(opening(2 * number + 1) for number in range(MAX_STREAMS)))
    number = 0
    while served.connection.outbox.unsent_bytes <= MAX_UNSENT_BYTES:
        served.receive(data(2 * number + 1, framed(message)))
        number += 1
    assert number < 80
    assert granted(served.receive(data(2 * number + 1, framed(message)[:60_000])), 2 * number + 1) == 0
    served.receive(frames.rst_stream(1_901, ErrorCode.CANCEL))
    assert code(served.receive(opening(2 * MAX_STREAMS + 1))) == ErrorCode.REFUSED_STREAM
    sent = served.receive(frames.window_update(0, MAX_UNSENT_BYTES))
    sent += served.receive(b"")
    assert granted(sent, 2 * number + 1) > 0
    assert kinds(served.receive(opening(2 * MAX_STREAMS + 3, end_stream=True))) == [frames.HEADERS]


def test_a_blocked_socket_ends_a_peer_that_makes_us_answer() -> None:
    """Answers to PINGs would pile up else."""
    served = Served()
    served.connection.outbox.is_blocked = True
    ping = frames.frame(frames.PING, 0, 0, b"12345678")
    for second in range(4 * OUTPUT_BYTES // 17 // 100 + 20):
        served.connection.receive(ping * 100, float(second))
    assert served.faults == [(FaultReason.SLOW_READER, True)]
    assert served.connection.is_over


def test_sent_is_called_when_it_was_taken() -> None:
    """Not while it waits for a window."""
    served, heard = Served(Listener), list[int]()
    served.receive(opening(1))
    call = served.receivers[0].call
    for number in range(3):
        call.send(b"x" * 30_000, partial(heard.append, number))
    assert heard == []
    served.taken()
    assert heard == [0, 1]
    served.receive(frames.window_update(0, 100_000), frames.window_update(1, 100_000))
    assert heard == [0, 1, 2]


def test_each_write_is_asked_for_once() -> None:
    """The shell is woken when there is something to take, and not again until it was taken."""
    served = Served(Listener)
    served.receive(opening(1))
    before = served.num_wakes
    call = served.receivers[0].call
    call.send(b"1")
    call.send(b"2")
    assert served.num_wakes == before + 1
    served.taken()
    call.finish()
    assert served.num_wakes == before + 2


# Faults.


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"GET / HTTP/1.1\r\n", ErrorCode.PROTOCOL_ERROR),
        (frames.PREFACE + frames.SETTINGS_ACK, ErrorCode.PROTOCOL_ERROR),
        (frames.PREFACE + opening(1), ErrorCode.PROTOCOL_ERROR),
        (GREETING + frames.SETTINGS_ACK, ErrorCode.PROTOCOL_ERROR),
        (GREETING + data(1, b""), ErrorCode.PROTOCOL_ERROR),
        (GREETING + data(0, b""), ErrorCode.PROTOCOL_ERROR),
        (GREETING + opening(2), ErrorCode.PROTOCOL_ERROR),
        (GREETING + opening(0), ErrorCode.PROTOCOL_ERROR),
        (GREETING + frames.rst_stream(1, 0), ErrorCode.PROTOCOL_ERROR),
        (GREETING + frames.rst_stream(0, 0), ErrorCode.PROTOCOL_ERROR),
        (GREETING + frames.window_update(1, 1), ErrorCode.PROTOCOL_ERROR),
        (GREETING + frames.window_update(0, 0), ErrorCode.PROTOCOL_ERROR),
        (GREETING + frames.window_update(0, frames.GREATEST_WINDOW), ErrorCode.FLOW_CONTROL_ERROR),
        (GREETING + frames.frame(frames.DATA, 0, 1, b"x" * 16_385), ErrorCode.FRAME_SIZE_ERROR),
        (GREETING + frames.frame(frames.RST_STREAM, 0, 1, b"123"), ErrorCode.FRAME_SIZE_ERROR),
        (GREETING + frames.frame(frames.PING, 0, 0, b"1234567"), ErrorCode.FRAME_SIZE_ERROR),
        (GREETING + frames.frame(frames.PING, 0, 1, b"12345678"), ErrorCode.PROTOCOL_ERROR),
        (GREETING + frames.frame(frames.SETTINGS, 0, 1), ErrorCode.PROTOCOL_ERROR),
        (GREETING + frames.frame(frames.SETTINGS, frames.ACK, 0, b"123456"), ErrorCode.FRAME_SIZE_ERROR),
        (GREETING + frames.frame(frames.PUSH_PROMISE, 0, 1, b"\0\0\0\2"), ErrorCode.PROTOCOL_ERROR),
        (GREETING + frames.frame(frames.PRIORITY, 0, 0, b"12345"), ErrorCode.PROTOCOL_ERROR),
        (GREETING + frames.frame(frames.GOAWAY, 0, 1, b"12345678"), ErrorCode.PROTOCOL_ERROR),
        (GREETING + frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1), ErrorCode.PROTOCOL_ERROR),
        (GREETING + frames.frame(frames.HEADERS, 0, 1) + data(1, b""), ErrorCode.PROTOCOL_ERROR),
        (
            GREETING + frames.frame(frames.HEADERS, frames.END_HEADERS, 1, b"\xff"),
            ErrorCode.COMPRESSION_ERROR,
        ),
        (
            GREETING + frames.frame(frames.HEADERS, frames.END_HEADERS | frames.PADDED, 1, b"\5"),
            ErrorCode.PROTOCOL_ERROR,
        ),
    ],
)
def test_faults_that_end_the_connection(sent: bytes, expected: ErrorCode) -> None:
    """GOAWAY with the code that RFC 9113 asks for; open calls hear of it, and nothing more is read."""
    served = Served(Listener, is_greeted=False)
    answers = served.receive(sent)
    assert kinds(answers)[-1] == frames.GOAWAY
    assert code(answers) == expected
    assert [is_connection for _, is_connection in served.faults] == [True]
    assert served.connection.is_over
    assert served.receive(opening(101)) == []


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (opening(3, fields=((b":method", b"POST"),)), ErrorCode.PROTOCOL_ERROR),
        (opening(1), ErrorCode.PROTOCOL_ERROR),
        (frames.window_update(1, 0), ErrorCode.PROTOCOL_ERROR),
        (frames.window_update(1, frames.GREATEST_WINDOW), ErrorCode.FLOW_CONTROL_ERROR),
        (frames.frame(frames.PRIORITY, 0, 1, b"1234"), ErrorCode.FRAME_SIZE_ERROR),
    ],
)
def test_faults_that_end_their_stream(sent: bytes, expected: ErrorCode) -> None:
    """RST_STREAM with the code, and the call beside it goes on."""
    served = Served(Listener)
    answers = served.receive(opening(1), sent)
    assert kinds(answers)[-1] == frames.RST_STREAM
    assert code(answers) == expected
    assert [is_connection for _, is_connection in served.faults] == [False]
    assert kinds(served.receive(opening(5), frames.frame(frames.PING, 0, 0, b"12345678"))) == [frames.PING]


def test_more_than_the_window_of_a_stream() -> None:
    """A message for which there is no room yet is not waited for by its peer."""
    served, size = Served(Listener), 2 * MAX_MESSAGE_BYTES // 3
    large = framed(b"m" * size)
    served.receive(*(opening(number) + data(number, large[:5]) for number in (1, 3)))
    sent = served.receive(opening(5), data(5, large[:WIDE_WINDOW]))
    assert (len(sent), granted(sent, 5)) == (1, WIDE_WINDOW - frames.DEFAULT_WINDOW)
    sent = served.receive(data(5, b"m"))
    assert code(sent) == ErrorCode.FLOW_CONTROL_ERROR
    assert served.receivers[2].received == ["reset"]


def test_data_behind_the_end() -> None:
    """STREAM_CLOSED while the answer is awaited."""
    served = Served(Listener)
    assert (
        code(served.receive(opening(1), data(1, b"", end_stream=True), data(1, b"x")))
        == ErrorCode.STREAM_CLOSED
    )
    assert served.receivers[0].received == ["half-close", "reset"]


def test_too_many_streams_are_refused() -> None:
    """The peer may try them again elsewhere; those that are open go on."""
    served = Served(Listener)
    served.receive(*(opening(2 * number + 1) for number in range(MAX_STREAMS)))
    assert code(served.receive(opening(2 * MAX_STREAMS + 1))) == ErrorCode.REFUSED_STREAM
    assert served.connection.num_streams == MAX_STREAMS


def test_oversize_headers_end_the_stream() -> None:
    """With 431, while a block without end ends the connection."""
    served = Served()
    large = (*CALL_FIELDS, (b"baggage", b"b" * 17_000))
    block = encode(large)
    sent = served.receive(
        frames.frame(frames.HEADERS, 0, 1, block[:16_000]),
        frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, block[16_000:]),
    )
    assert b"431" in sent[0][3]
    assert served.faults == [(FaultReason.HEADERS_SIZE, False)]
    assert kinds(served.receive(opening(3, end_stream=True))) == [frames.HEADERS]


@pytest.mark.parametrize("part", [b"x" * 16_384, b""])
def test_a_block_without_end(part: bytes) -> None:
    """Long, or of very many frames."""
    served = Served()
    more = frames.frame(frames.CONTINUATION, 0, 1, part)
    sent = served.receive(
        frames.frame(frames.HEADERS, 0, 1), more * max(MAX_CONTINUATIONS, MAX_BLOCK_BYTES // 16_384)
    )
    assert code(sent) == ErrorCode.ENHANCE_YOUR_CALM
    assert served.faults == [(FaultReason.HEADERS_SIZE, True)]


# Floods.


def _resets(number: int) -> bytes:
    return opening(2 * number + 1) + frames.rst_stream(2 * number + 1, ErrorCode.CANCEL)


def _made_resets(number: int) -> bytes:
    """CVE-2025-8671: resets that we are made to send."""
    return opening(2 * number + 1) + frames.window_update(2 * number + 1, 0)


def _late(number: int) -> bytes:
    return frames.rst_stream(1, ErrorCode.CANCEL) if number else _resets(0)


def _empty(number: int) -> bytes:
    return data(1, b"") if number else opening(1)


FLOODS = {
    FaultReason.RESET_FLOOD: _resets,
    FaultReason.PING_FLOOD: lambda _: frames.frame(frames.PING, 0, 0, b"12345678"),
    FaultReason.SETTINGS_FLOOD: lambda _: frames.settings({}),
    FaultReason.EMPTY_FLOOD: _empty,
    FaultReason.WINDOW_FLOOD: lambda _: frames.window_update(0, 1),
    FaultReason.LATE_FLOOD: _late,
}


@pytest.mark.parametrize("reason", FLOODS)
def test_floods_end_the_connection(reason: FaultReason) -> None:
    """Each kind by its own reason, within tens of thousands of frames."""
    served = Served(Listener)
    served.connection.receive(b"".join(map(FLOODS[reason], range(30_000))), 0.0)
    assert served.faults == [(reason, True)]
    assert code(served.taken()) == ErrorCode.ENHANCE_YOUR_CALM


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (lambda _: frames.frame(frames.PRIORITY, 0, 1, b"12345"), FaultReason.EMPTY_FLOOD),
        (lambda _: frames.frame(0xEE, 0, 1, b""), FaultReason.EMPTY_FLOOD),
        (lambda _: frames.frame(frames.GOAWAY, 0, 0, b"12345678"), FaultReason.EMPTY_FLOOD),
    ],
)
def test_more_floods_by_the_same_bound(frame: object, reason: FaultReason) -> None:
    """Whatever else brings nothing."""
    assert callable(frame)
    served = Served(Listener)
    served.connection.receive(b"".join(map(frame, range(30_000))), 0.0)
    assert served.faults == [(reason, True)]


def test_resets_that_we_are_made_to_send_are_counted() -> None:
    """CVE-2025-8671."""
    served = Served(Listener)
    served.connection.receive(b"".join(map(_made_resets, range(30_000))), 0.0)
    assert served.faults[-1] == (FaultReason.RESET_FLOOD, True)
    assert len(served.faults) < 6_000


def test_a_busy_peer_is_no_flood() -> None:
    """Twenty-five thousand calls at once that end as Envoy ends them: by a reset behind our trailers."""

    class Answer(Echo):
        def on_message(self, message: Received) -> None:
            self.call.finish(bytes(message))

    served = Served(Answer)
    served.receive(WIDE)
    for number in range(25_000):
        stream_id = 2 * number + 1
        served.receive(
            opening(stream_id),
            data(stream_id, framed(b"x")),
            frames.rst_stream(stream_id, ErrorCode.NO_ERROR),
        )
    assert served.faults == []


def _left(number: int) -> bytes:
    stream_id = 2 * number + 1
    call = opening(stream_id) + data(stream_id, framed(b"x"))
    return call + frames.rst_stream(stream_id, ErrorCode.CANCEL)


class _AnswersFirst(Echo):
    """Asks for more, as for a request's body."""

    def on_message(self, message: Received) -> None:
        self.call.send(bytes(message))


def test_clients_that_leave_are_no_flood_of_their_proxys() -> None:
    """Ten seconds of three thousand half requests each by some end no call of the others."""
    served = Served(_AnswersFirst)
    served.receive(WIDE)
    served.receive(opening(1))
    for number in range(1, 10 * 3_000):
        served.receive(_left(number), now_s=number / 3_000)
    assert served.faults == []
    assert kinds(served.receive(data(1, framed(b"y")), now_s=10.0)) == [frames.HEADERS, frames.DATA]


def test_calls_that_are_left_have_a_bound_as_well() -> None:
    """No thread of Envoy brings thirty thousand at once."""
    served = Served(_AnswersFirst)
    served.receive(WIDE)
    served.connection.receive(b"".join(map(_left, range(30_000))), 0.0)
    assert served.faults == [(FaultReason.RESET_FLOOD, True)]


# The end.


def test_a_drain_serves_what_is_on_its_way() -> None:
    """First without a number, then with the last one; over when the last call has ended."""
    served = Served()
    served.receive(opening(1))
    served.connection.drain()
    goaway, ping = served.taken()
    assert int.from_bytes(goaway[3][:4]) == frames.GREATEST_STREAM
    served.receive(opening(3))
    (last,) = served.receive(frames.frame(frames.PING, frames.ACK, 0, ping[3]))
    assert int.from_bytes(last[3][:4]) == 3
    assert code(served.receive(opening(5))) == ErrorCode.REFUSED_STREAM
    assert not served.connection.is_over
    served.receive(data(1, b"", end_stream=True), data(3, b"", end_stream=True))
    assert served.connection.is_over
    assert served.faults == []


def test_a_drain_does_not_wait_for_the_answer_for_ever() -> None:
    """The shell finishes it."""
    served = Served()
    served.connection.drain()
    served.connection.finish_drain()
    assert kinds(served.taken()) == [frames.GOAWAY, frames.PING, frames.GOAWAY]
    assert served.connection.is_over


def test_the_end_of_the_connection_reaches_every_call() -> None:
    """Once."""
    served = Served(Listener)
    served.receive(opening(1), opening(3))
    served.connection.end()
    served.connection.end()
    assert [receiver.received for receiver in served.receivers] == [["reset"], ["reset"]]
    assert served.connection.num_streams == 0


def test_a_probe_is_a_ping() -> None:
    """Whatever the peer answers is taken."""
    served = Served()
    served.connection.probe()
    (ping,) = served.taken()
    assert served.receive(frames.frame(frames.PING, frames.ACK, 0, ping[3])) == []
