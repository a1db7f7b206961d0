"""Frames and the body of a reservation: round trips, any cut, any bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadata_center.sharing.http_messages import (
    KEEP_ALIVE,
    Deframer,
    decode_reserve,
    encode_frames,
    encode_reserve,
    frame,
)
from metadata_center.sharing.messages import (
    MAX_MESSAGE_BYTES,
    Candidate,
    Chain,
    MessageError,
    Reservation,
    Row,
    Update,
    decode,
    encode,
    member_id,
)
from metadata_center.types import EndpointKey

A, B = EndpointKey("10.0.0.1:8000"), EndpointKey("10.0.0.2:8000")
UPDATE = Update(member_id("gw", 0, "x"), 7, (Row(A, 1, 2, 3, 4, 5),))
ASKED = [Reservation((Candidate(A, 1, 2, 3), Candidate(B, 0, 0, 0)))]


def taken(deframer: Deframer) -> list[bytes]:
    """All messages that are whole."""
    found = []
    while (message := deframer.take()) is not None:
        found.append(message)
    return found


@given(st.lists(st.binary(max_size=20), max_size=8), st.lists(st.integers(0, 40), max_size=12))
def test_frames_come_whole_however_they_are_cut(messages: list[bytes], cuts: list[int]) -> None:
    """In order, each once, and nothing is left."""
    data, deframer, found = b"".join(map(frame, messages)), Deframer(), []
    for size in [*cuts, len(data)]:
        piece, data = data[:size], data[size:]
        deframer.feed(piece)
        found += taken(deframer)
    assert found == messages
    assert deframer.is_empty


def test_a_cut_frame_is_not_empty() -> None:
    """Which distinguishes a stream that ended within a message from one that ended after it."""
    deframer = Deframer()
    deframer.feed(frame(b"abc")[:-1])
    assert deframer.take() is None
    assert not deframer.is_empty


def test_a_frame_longer_than_any_message_is_none() -> None:
    """Before a byte of it is waited for."""
    deframer = Deframer()
    deframer.feed((MAX_MESSAGE_BYTES + 1).to_bytes(4, "little"))
    with pytest.raises(MessageError, match="accepted"):
        deframer.take()


def test_a_keep_alive_is_an_empty_frame() -> None:
    """A reader passes over it."""
    deframer = Deframer()
    deframer.feed(KEEP_ALIVE + frame(b"x"))
    assert taken(deframer) == [b"", b"x"]


def test_updates_are_frames() -> None:
    """One each."""
    deframer = Deframer()
    deframer.feed(encode_frames([UPDATE, UPDATE]))
    assert list(map(decode, taken(deframer))) == [UPDATE, UPDATE]


def test_a_reservation_comes_back_as_it_was() -> None:
    """Update and candidates."""
    assert decode_reserve(encode_reserve(UPDATE, ASKED)) == (UPDATE, ASKED)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        frame(encode(UPDATE)),
        frame(encode(UPDATE)) + b"\x90",
        encode_reserve(UPDATE, ASKED) + b"\x00",
        encode_reserve(UPDATE, ASKED * 257),
        encode_reserve(Update(UPDATE.member, 1, leaving=True), ASKED),
        encode_reserve(Update(UPDATE.member, 1, blocks=(Chain.of(A, [1]),)), ASKED),
        encode_reserve(UPDATE, [Reservation((ASKED[0].candidates[0],) * 2)]),
        encode_reserve(UPDATE, [Reservation(())]),
    ],
)
def test_what_is_no_reservation_is_refused(body: bytes) -> None:
    """Nothing asked, too much asked, an endpoint twice, an update that says more than it may."""
    with pytest.raises(MessageError):
        decode_reserve(body)


@given(st.binary(max_size=60), st.integers(0, 60))
def test_no_bytes_are_anything_but_an_error(noise: bytes, at: int) -> None:
    """Alone, or in the middle of good ones."""
    good = encode_reserve(UPDATE, ASKED)
    for body in (noise, good[:at] + noise + good[at + len(noise) :]):
        try:
            update, asked = decode_reserve(body)
        except MessageError:
            continue
        assert decode_reserve(encode_reserve(update, asked)) == (update, asked)
