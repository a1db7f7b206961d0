"""How much a peer may send."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.transport.http2.faults import ConnectionFault
from extproc.transport.http2.flow import (
    CONNECTION_WINDOW,
    MAX_WIDE,
    ConnectionWindow,
    Room,
    WideWindows,
)


@given(st.lists(st.integers(0, 16_384), max_size=2_000))
def test_the_connection_window_is_kept_open(sizes: list[int]) -> None:
    """Whatever comes, more than a frame may always follow, and never more than was announced."""
    window = ConnectionWindow()
    left = 65_535 + window.opened()
    for size in sizes:
        left += window.take(size) - size
        assert CONNECTION_WINDOW // 2 - 16_384 <= left <= CONNECTION_WINDOW


def test_more_than_the_window_is_a_fault() -> None:
    """Before our announcement, what the protocol says holds."""
    window = ConnectionWindow()
    with pytest.raises(ConnectionFault):
        window.take(CONNECTION_WINDOW)


def test_room_is_given_in_turn() -> None:
    """The first to come is first, even if a later one would fit."""
    room = Room(100)
    assert room.ask(1, 60)
    assert not room.ask(3, 60)
    assert not room.ask(5, 10)
    assert room.ask(1, 60)
    assert room.next() is None
    room.leave(1)
    assert [room.next(), room.next(), room.next()] == [3, 5, None]


def test_room_that_is_not_wanted_any_more() -> None:
    """A stream that ends while it waits holds no other up."""
    room = Room(100)
    assert room.ask(1, 60)
    assert not room.ask(3, 60)
    assert not room.ask(5, 40)
    room.leave(3)
    assert room.next() == 5


def test_a_shut_window_gives_no_room() -> None:
    """Until it is opened again."""
    room = Room(100)
    room.is_shut = True
    assert not room.ask(1, 10)
    assert room.next() is None
    room.is_shut = False
    assert room.next() == 1


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 100) | st.none()), max_size=200))
def test_room_never_overflows(steps: list[tuple[int, int | None]]) -> None:
    """Streams ask and leave in any order; what is taken never exceeds what there is, and none starves."""
    room, wanted, given_to = Room(100), dict[int, int](), dict[int, int]()
    for stream_id, size in steps:
        if size is None:
            room.leave(stream_id)
            wanted.pop(stream_id, None)
            given_to.pop(stream_id, None)
        elif stream_id not in wanted:
            wanted[stream_id] = size
            if room.ask(stream_id, size):
                given_to[stream_id] = size
        while (admitted := room.next()) is not None:
            given_to[admitted] = wanted[admitted]
        assert sum(given_to.values()) <= 100
        assert given_to or not wanted


def test_wide_windows_are_few() -> None:
    """Whatever a peer opens; one that ends makes place for another."""
    windows = WideWindows()
    windows.sent_much()
    assert sum(windows.opened(2 * number + 1) for number in range(2 * MAX_WIDE)) == MAX_WIDE
    windows.sent_much()
    assert not windows.opened(1_001)
    windows.left(1)
    assert windows.opened(1_003)
