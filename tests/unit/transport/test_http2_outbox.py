"""What goes out, in which order, and what waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.transport.http2 import frames
from extproc.transport.http2.faults import ConnectionFault
from extproc.transport.http2.outbox import OUTPUT_BYTES, Outbox, Outgoing
from extproc.transport.http2.requests import TABLE_SIZE_0
from tests.http2_peers import Frame, framed, kinds, parsed


def taken(outbox: Outbox) -> list[Frame]:
    """All that may go now."""
    return list(parsed(b"".join(iter(outbox.take, b""))))


def streams(outbox: Outbox, *ids: int, window: int = 65_535) -> list[Outgoing]:
    """Streams whose end is not waited for."""
    return [Outgoing(stream_id, window, lambda _: None) for stream_id in ids]


def test_the_first_block_sizes_our_table() -> None:
    """Ours is empty, whatever the peer allows, and it is reported once."""
    outbox = Outbox(lambda: None)
    for out in streams(outbox, 1, 3):
        out.is_over = True
        outbox.end(out)
    first, _, second, _ = taken(outbox)
    assert first[3].startswith(TABLE_SIZE_0)
    assert first[3][1:] == second[3]


@given(
    st.lists(st.lists(st.integers(0, 60), max_size=4), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), max_size=40),
)
def test_windows_are_kept_and_nothing_is_lost(sizes: list[list[int]], grants: list[tuple[int, int]]) -> None:
    """Whatever the peer grants and when, it never gets more, and each stream's bytes come in order."""
    outbox = Outbox(lambda: None)
    outbox.window, outbox.max_frame = 30, 16
    outs = streams(outbox, *(2 * number + 1 for number in range(len(sizes))), window=20)
    expected = []
    for out, lengths in zip(outs, sizes, strict=True):
        messages = [bytes([65 + number]) * length for number, length in enumerate(lengths)]
        for message in messages:
            outbox.message(out, message)
        outbox.end(out)
        expected.append(framed(*messages))
    allowed, total = [20] * len(outs), 30
    got = [b""] * len(outs)

    def take() -> None:
        for kind, _, stream_id, payload in taken(outbox):
            if kind == frames.DATA:
                assert len(payload) <= 16
                got[stream_id // 2] += payload

    take()
    for which, increment in grants:
        if which < len(outs):
            outbox.grant(outs[which], increment)
            allowed[which] += increment
        else:
            outbox.grant(None, increment)
            total += increment
        take()
        assert sum(map(len, got)) <= total
        assert all(len(part) <= most for part, most in zip(got, allowed, strict=True))
    outbox.grant(None, 10_000)
    for out in outs:
        outbox.grant(out, 10_000)
    take()
    assert got == expected
    assert outbox.unsent_bytes == 0


def test_trailers_wait_behind_messages() -> None:
    """And the end is reported when they are out."""
    ended: list[int] = []
    outbox = Outbox(lambda: None)
    out = Outgoing(1, 4, ended.append)
    outbox.message(out, b"abc")
    out.is_over = True
    outbox.end(out)
    assert kinds(taken(outbox)) == [frames.HEADERS, frames.DATA]
    assert ended == []
    outbox.grant(out, 4)
    assert kinds(taken(outbox)) == [frames.DATA, frames.HEADERS, frames.RST_STREAM]
    assert ended == [1]


def test_no_write_is_much_larger_than_the_others() -> None:
    """What does not fit waits for the next one."""
    outbox = Outbox(lambda: None)
    outbox.window = frames.GREATEST_WINDOW
    for out in streams(outbox, 1, 3, window=frames.GREATEST_WINDOW):
        outbox.message(out, b"x" * 1_000_000)
    sizes = [len(data) for data in iter(outbox.take, b"")]
    assert max(sizes) < OUTPUT_BYTES + 2 * frames.LEAST_MAX_FRAME
    assert sum(sizes) > 2_000_000


def test_a_blocked_socket_is_given_no_data() -> None:
    """Until it takes some again."""
    outbox = Outbox(lambda: None)
    (out,) = streams(outbox, 1)
    outbox.is_blocked = True
    outbox.message(out, b"x")
    assert kinds(taken(outbox)) == [frames.HEADERS]
    outbox.is_blocked = False
    assert kinds(taken(outbox)) == [frames.DATA]


def test_dropped_streams_send_nothing() -> None:
    """What waited is forgotten, and so are those that waited for it."""
    heard: list[int] = []
    outbox = Outbox(lambda: None)
    (out,) = streams(outbox, 1, window=7)
    outbox.message(out, b"x" * 10, lambda: heard.append(1))
    outbox.end(out)
    taken(outbox)
    assert outbox.unsent_bytes == 8
    outbox.drop(out)
    outbox.grant(out, 100)
    assert (taken(outbox), outbox.unsent_bytes, heard) == ([], 0, [])


def test_a_window_beyond_the_greatest() -> None:
    """The peer cannot mean it."""
    with pytest.raises(ConnectionFault):
        Outbox(lambda: None).grant(None, frames.GREATEST_WINDOW)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=4), st.integers(1, 50), st.booleans())
def test_a_message_in_pieces_is_the_same_on_the_wire(pieces: list[bytes], grant: int, is_view: bool) -> None:
    """Byte for byte, whatever the windows; between others, and its callback comes when all of it is out."""
    pieces.append(b"last")
    outbox = Outbox(lambda: None)
    outbox.max_frame = 16
    (out,) = streams(outbox, 1, window=grant)
    heard: list[int] = []
    outbox.message(out, b"before")
    outbox.message(
        out, tuple(map(memoryview, pieces)) if is_view else tuple(pieces), lambda: heard.append(len(got))
    )
    outbox.message(out, b"after")
    outbox.end(out)
    whole, got = framed(b"before", b"".join(pieces), b"after"), b""
    for _ in range(len(whole) + 2):
        for kind, _flags, _stream, payload in taken(outbox):
            got += payload if kind == frames.DATA else b""
        outbox.notify_sent()
        if len(got) == len(whole):
            break
        outbox.grant(out, grant)
    assert got == whole
    assert not heard or heard[0] >= len(framed(b"before", b"".join(pieces)))
    assert outbox.unsent_bytes == 0


def test_a_message_in_pieces_that_is_dropped_leaves_nothing() -> None:
    """Its bytes wait no more."""
    outbox = Outbox(lambda: None)
    (out,) = streams(outbox, 1, window=7)
    outbox.message(out, (b"x" * 10, memoryview(b"y" * 20)))
    taken(outbox)
    outbox.drop(out)
    assert outbox.unsent_bytes == 0
    outbox.grant(out, 100)
    assert kinds(taken(outbox)) == []
