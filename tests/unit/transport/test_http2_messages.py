"""Messages cut out of DATA."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.transport.http2 import messages as messages_module
from extproc.transport.http2.messages import MessageError, MessageReader
from extproc.transport.large_memory import memory_for
from extproc.transport.seam import Status
from tests.http2_peers import framed


@given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(1, 30), min_size=1))
def test_any_cut_gives_the_same_messages(messages: list[bytes], sizes: list[int]) -> None:
    """In their order and whole; nothing is held behind the last."""
    reader, data, at, read, turn = MessageReader(100), framed(*messages), 0, [], 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        read += reader.feed(data[at : at + size])
        at, turn = at + size, turn + 1
    assert read == messages
    assert reader.is_between


@given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(1, 30), min_size=1))
def test_large_messages_are_the_same(messages: list[bytes], sizes: list[int]) -> None:
    """Those that are put together while they come, between small ones; what is missing is counted.

    There is a `place` for what lies within them, and for nothing that begins or ends one.
    """
    with patch.object(messages_module, "LARGE_BYTES", 12):
        reader, data, at, read, turn = MessageReader(100), framed(*messages), 0, [], 0
        while at < len(data):
            size = min(sizes[turn % len(sizes)], len(data) - at)
            missing = reader.missing
            place = reader.place(size)
            if place is not None:
                place[:] = data[at : at + size]
                assert reader.missing == missing - size
            else:
                read += reader.feed(data[at : at + size])
            at, turn = at + size, turn + 1
            if reader.size:
                assert 0 < reader.missing <= reader.size
    assert read == messages
    assert reader.is_between


def test_what_is_missing_is_known_with_the_length() -> None:
    """So that the peer can be granted just that."""
    reader = MessageReader(1_000)
    assert reader.feed(b"\0\0\0") == []
    assert (reader.size, reader.missing, reader.is_between) == (0, 0, False)
    assert reader.feed(b"\0\x64" + b"x" * 40) == []
    assert (reader.size, reader.missing) == (105, 60)


@pytest.mark.parametrize(
    ("prefix", "status"),
    [(b"\0\0\0\3\xe9", Status.RESOURCE_EXHAUSTED), (b"\1\0\0\0\1", Status.INTERNAL)],
)
def test_messages_that_are_not_taken(prefix: bytes, status: Status) -> None:
    """Too long by one byte, or compressed: known before any of it is held."""
    with pytest.raises(MessageError) as raised:
        MessageReader(1_000).feed(prefix)
    assert raised.value.status is status


def test_small_parts_are_kept_together() -> None:
    """A message that comes a byte at a time takes about as much memory as it has bytes."""
    reader = MessageReader(100_000)
    whole = framed(b"m" * 50_000)
    for at in range(len(whole) - 1):
        assert reader.feed(whole[at : at + 1]) == []
    assert len(reader._parts) <= 2
    assert reader.feed(whole[-1:]) == [b"m" * 50_000]


def test_many_messages_in_one_part() -> None:
    """Each is cut once; what is behind them is kept."""
    reader = MessageReader(100)
    messages = [b""] * 3_000 + [b"x" * 50]
    assert reader.feed(framed(*messages) + b"\0\0") == messages
    assert not reader.is_between
    assert reader.feed(b"\0\0\0") == [b""]
    assert reader.is_between


def test_a_message_longer_than_pages_of_2_mib_is_the_same_in_memory_of_its_own() -> None:
    """Put together from pieces, with the next message behind it."""
    body = bytes(range(256)) * (20 * 1024)
    reader = MessageReader(len(body), memory_for)
    data = framed(body, b"end")
    messages = [one for at in range(0, len(data), 100_000) for one in reader.feed(data[at : at + 100_000])]
    assert messages == [body, b"end"]
    assert reader.is_between
