"""Publishers that several endpoints claim."""

from __future__ import annotations

from metadata_center.kv_events.claims import refused
from metadata_center.kv_events.sources import Source
from metadata_center.types import EndpointKey

A, B, C = (EndpointKey(f"10.0.0.{number}:8000") for number in range(3))


def source(endpoint: EndpointKey, port: int, *, rank: int = 0, topic: str = "", bind: bool = False) -> Source:
    """One that publishes at a port of one host."""
    return Source(endpoint, rank, f"tcp://10.0.0.9:{port}", None, topic, bind)


def test_the_first_that_says_so_has_it() -> None:
    """Whatever the other says beside it; a third one is not concerned."""
    said = {A: [source(A, 1)], B: [source(B, 2), source(B, 1, rank=1)], C: [source(C, 3)]}
    assert refused(said, ()) == {B: f"it names a publisher of {A}"}


def test_who_is_followed_keeps_it() -> None:
    """An endpoint that was known for longer, and says so only now, comes second."""
    own = source(B, 1)
    assert refused({A: [source(A, 1)], B: [own]}, {own}) == {A: f"it names a publisher of {B}"}


def test_on_one_socket_of_ours_topics_tell_endpoints_apart() -> None:
    """Until one has the name of another."""
    mine, other = source(A, 1, topic="a", bind=True), source(B, 1, topic="b", bind=True)
    assert not refused({A: [mine], B: [other]}, ())
    assert list(refused({A: [mine], B: [source(B, 1, topic="a", bind=True)]}, ())) == [B]


def test_an_endpoint_with_more_than_there_is_room_for_is_left_out_alone() -> None:
    """Two fit, whichever they are."""
    said = {A: [source(A, port, rank=port) for port in (1, 2, 3)], B: [source(B, 4)], C: [source(C, 5)]}
    assert refused(said, (), most=2) == {A: "more than 2 publishers"}


def test_two_ranks_of_one_publisher_are_none() -> None:
    """Nothing tells their messages apart."""
    assert refused({A: [source(A, 1), source(A, 1, rank=1)]}, ()) == {
        A: "two of its ranks have one publisher"
    }
