"""Tokenway's members and AIGW's callers at one service: which sees which load, where requests are placed."""

from __future__ import annotations

import random
from typing import Any

import pytest

from metadata_center.errors import CapacityError
from metadata_center.load.counters import MAX_ENDPOINTS
from metadata_center.service import rendezvous as rendezvous_module
from metadata_center.service.cluster_loads import ClusterLoads, EngineLoad, Limits
from metadata_center.service.rendezvous import AIGW, Rendezvous
from metadata_center.sharing.messages import (
    MAX_AMOUNT,
    Candidate,
    MessageError,
    Reservation,
    Reserved,
    Row,
    Update,
    decode,
    encode,
    member_id,
)
from metadata_center.sharing.peers import Peers
from metadata_center.types import EndpointKey, RequestId

HOST = "10.0.0.1"
A, B, C = (EndpointKey(name) for name in (f"{HOST}:8000", "10.0.0.2:8000", f"{HOST}:8001"))
SIX = EndpointKey("[fd00::1]:8000")
ONE, TWO = member_id("gw1", 0, "a"), member_id("gw2", 0, "a")


class Service:
    """A rendezvous, and what AIGW reports to the service, at time 0 unless said."""

    def __init__(self) -> None:
        self.loads = ClusterLoads(Limits())
        self.rendezvous = Rendezvous(self.loads, "1")

    def aigw(self, request_id: str, address: str, tokens: int = 10, cluster: str = "c") -> None:
        """A request of an AIGW."""
        self.loads.add(RequestId(request_id), cluster, address, 4 * tokens, 0.0)

    def publish(self, *rows: Row, sequence: int = 1, member: Any = ONE, **fields: Any) -> None:
        """A member says something."""
        update = Update(member, sequence, rows, **fields)
        self.rendezvous.publish(update, encode(update), 0.0)

    def messages(self) -> list[Update]:
        """The messages for followers since the last time."""
        return list(map(decode, self.rendezvous.take_messages()))

    def rows(self) -> dict[EndpointKey, Row]:
        """AIGW's share as followers get it now."""
        self.messages()
        self.rendezvous.add_changes()
        return {row.endpoint: row for update in self.messages() for row in update.rows}

    def load(self, cluster: str = "c") -> dict[str, tuple[int, int]]:
        """Requests and prompt length by address, as AIGW sees them."""
        found = self.rendezvous.load_of(cluster, 0.0) or []
        return {load.address: (load.amounts[0], load.prompt_length) for load in found}


def test_a_message_is_passed_on_byte_for_byte() -> None:
    """In the order they came, once, so that fields of a next version survive."""
    service = Service()
    update = Update(ONE, 1, (Row(A, 1),))
    for message in (b"one", b"two"):
        service.rendezvous.publish(update, message, 0.0)
    assert service.rendezvous.take_messages() == [b"one", b"two"]
    assert service.rendezvous.take_messages() == []


def test_a_request_of_aigw_is_a_row_of_one_more_member() -> None:
    """Requests, prefills and tokens, over all clusters; gone requests are zeros."""
    service = Service()
    service.aigw("r", A, tokens=10)
    service.aigw("s", A, tokens=20, cluster="d")
    assert service.rows() == {A: Row(A, 2, 2, 30, 30)}
    service.loads.delete_prompt(RequestId("r"), 0.0)
    service.loads.refresh(RequestId("r"), 0.0, generated_tokens=7)
    assert service.rows() == {A: Row(A, 2, 1, 20, 30, 7)}
    service.loads.delete(RequestId("r"), 0.0)
    service.loads.delete(RequestId("s"), 0.0)
    assert service.rows() == {A: Row(A)}
    assert service.rows() == {}


def test_an_address_without_a_port_stands_for_the_endpoints_there() -> None:
    """Those members have named, whenever they did; an engine that no member knows is in no message."""
    service = Service()
    service.aigw("r", HOST)
    assert service.rows() == {}
    service.publish(Row(A, 1))
    assert service.rendezvous.has_news
    assert service.rows() == {A: Row(A, 1, 1, 10, 10)}
    service.publish(Row(C), sequence=2)
    service.aigw("s", A)
    assert service.rows() == {A: Row(A, 2, 2, 20, 20), C: Row(C, 1, 1, 10, 10)}


def test_ipv6_without_a_port_is_found_too() -> None:
    """Brackets are the endpoint's alone."""
    service = Service()
    service.publish(Row(SIX))
    service.aigw("r", "fd00::1")
    assert service.rows() == {SIX: Row(SIX, 1, 1, 10, 10)}


def test_what_followers_get_adds_up_to_a_snapshot() -> None:
    """Whenever a member joins: snapshot, then messages, give what one that heard all has."""
    rng = random.Random(1)
    service, all_along, joined = Service(), Peers(), Peers()
    for step in range(300):
        if step == 150:
            service.rendezvous.add_changes()
            for update in service.rendezvous.snapshot(0.0):
                joined.apply(update, 0.0)
        name = str(rng.randrange(6))
        match rng.randrange(5):
            case 0:
                service.aigw(f"{step}", rng.choice((HOST, A, B)))
            case 1:
                service.loads.delete(RequestId(str(rng.randrange(step + 1))), 0.0)
            case 2:
                service.publish(
                    Row(rng.choice((A, B, C)), rng.randrange(5)),
                    sequence=step + 1,
                    member=member_id(name, 0, "a"),
                )
            case 3:
                service.rendezvous.add_changes()
            case _:
                service.publish(
                    Row(A, 3), sequence=step + 1, member=member_id(name, 0, "a"), full=True, lease_s=60.0
                )
        for update in service.messages():
            all_along.apply(update, 0.0)
            if step >= 150:
                joined.apply(update, 0.0)
    service.rendezvous.renew(0.0)
    for update in service.messages():
        all_along.apply(update, 0.0)
        joined.apply(update, 0.0)
    assert all_along.totals == joined.totals
    assert len(joined.totals) == 3


def test_the_share_of_aigw_lives_as_long_as_an_engine_of_its() -> None:
    """It is renewed in full; with no engine left nothing is said, and its lease ends it."""
    service = Service()
    service.rendezvous.renew(0.0)
    assert service.messages() == []
    service.aigw("r", A)
    service.rendezvous.renew(0.0)
    *_, renewed = service.messages()
    assert (renewed.full, renewed.rows) == (True, (Row(A, 1, 1, 10, 10),))
    peers = Peers()
    peers.apply(renewed, 0.0)
    assert peers.live_gateways == 1
    service.rendezvous.renew(700.0)
    (ended,) = service.messages()
    assert (ended.full, ended.rows) == (False, (Row(A),))
    service.rendezvous.renew(701.0)
    assert service.messages() == []


def test_no_gateway_may_take_the_services_name() -> None:
    """Its rows would be AIGW's."""
    service = Service()
    update = Update(member_id(AIGW, 0, "x"), 1)
    with pytest.raises(MessageError, match="no gateway may be called"):
        service.rendezvous.publish(update, b"", 0.0)
    with pytest.raises(MessageError, match="no gateway may be called"):
        service.rendezvous.reserve(update, [Reservation((Candidate(A, 0, 0, 0),))], 0.0)
    assert service.messages() == []


def test_aigw_sees_the_load_of_members() -> None:
    """Under the name its cluster has for the engine, else by address; bytes are four per token."""
    service = Service()
    service.publish(Row(A, 2, 1, 100, 300, 7), Row(B, 1), Row(C, 4))
    assert service.load() == {HOST: (6, 400), "10.0.0.2": (1, 0)}
    service.aigw("r", HOST)
    service.aigw("s", B)
    assert service.load() == {HOST: (7, 440), B: (2, 40)}
    service.aigw("t", A)
    assert service.load() == {HOST: (5, 40), A: (3, 440), B: (2, 40)}
    assert service.load("d") == {HOST: (6, 400), "10.0.0.2": (1, 0)}
    (load,) = [load for load in service.rendezvous.load_of("c", 3.0) or [] if load.address == A]
    assert load == EngineLoad(A, 440, (3, 2, 110, 310, 7), 3.0)


def test_a_cluster_without_any_load_is_unknown() -> None:
    """As to AIGW's metadata center."""
    service = Service()
    assert service.rendezvous.load_of("c", 0.0) is None
    service.publish(Row(A, 1), lease_s=5.0)
    assert service.load() == {HOST: (1, 0)}
    assert service.rendezvous.load_of("c", 5.0) is None


def test_a_place_counts_everybody() -> None:
    """Members' requests and AIGW's, with and without a port, and the reservations before it."""
    service = Service()
    service.publish(Row(A, 1), Row(B, 5), member=TWO)
    service.aigw("r", HOST)
    service.aigw("s", A)
    service.messages()
    candidates = (Candidate(A, 4, 10, 20), Candidate(B, 0, 30, 40))
    places = service.rendezvous.reserve(Update(ONE, 1, (Row(A, 1),)), [Reservation(candidates)] * 3, 0.0)
    assert places == [Reserved(0, (4, 5)), Reserved(0, (5, 5)), Reserved(0, (6, 5))]
    (update,) = service.messages()
    assert (update.member, update.sequence, update.rows) == (ONE, 1, (Row(A, 4, 3, 30, 60),))


def test_a_place_is_added_to_what_the_member_has() -> None:
    """Also where the update does not name the endpoint; the next update, absolute, has the last word."""
    service = Service()
    service.publish(Row(A, 3, 1, 5, 50, 9))
    service.messages()
    service.rendezvous.reserve(Update(ONE, 2), [Reservation((Candidate(A, 9, 10, 20),))], 0.0)
    (update,) = service.messages()
    assert update.rows == (Row(A, 4, 2, 15, 70, 9),)
    assert service.rendezvous.shares.total(A) == (4, 2, 15, 70, 9)
    service.publish(Row(A, 1), sequence=3)
    assert service.rendezvous.shares.total(A) == (1, 0, 0, 0, 0)


def test_amounts_stay_within_a_message() -> None:
    """The largest count does not grow."""
    service = Service()
    service.publish(Row(A, *(MAX_AMOUNT,) * 5))
    (place,) = service.rendezvous.reserve(
        Update(ONE, 2), [Reservation((Candidate(A, 0, MAX_AMOUNT, MAX_AMOUNT),))], 0.0
    )
    assert place == Reserved(0, (MAX_AMOUNT,))
    assert service.messages()[-1].rows == (Row(A, *(MAX_AMOUNT,) * 5),)


def test_a_member_that_left_gets_no_place() -> None:
    """No member would ever take the charge off."""
    service = Service()
    service.publish(Row(A, 1))
    service.publish(sequence=2, leaving=True)
    with pytest.raises(CapacityError):
        service.rendezvous.reserve(Update(ONE, 1), [Reservation((Candidate(A, 0, 0, 0),))], 0.0)
    assert service.rendezvous.shares.totals == {}


def test_a_member_never_has_too_many_rows() -> None:
    """The message would be none."""
    service = Service()
    rows = tuple(
        Row(EndpointKey(f"10.1.{number // 250}.{number % 250}:80")) for number in range(MAX_ENDPOINTS)
    )
    with pytest.raises(CapacityError):
        service.rendezvous.reserve(
            Update(ONE, 1, rows, full=True), [Reservation((Candidate(A, 0, 0, 0),))], 0.0
        )
    assert service.messages() == []


def test_a_member_gets_no_more_rows_by_many_reservations() -> None:
    """All together name more endpoints than it may have: what newcomers get stays a message."""
    service = Service()
    service.publish(Row(A, 1), full=True)
    for number in range(MAX_ENDPOINTS - 1):
        asked = Reservation((Candidate(EndpointKey(f"10.1.{number // 250}.{number % 250}:80"), 0, 0, 1),))
        service.rendezvous.reserve(Update(ONE, 2), [asked], 0.0)
    new = Reservation((Candidate(EndpointKey("10.2.0.1:80"), 0, 0, 1),))
    with pytest.raises(CapacityError):
        service.rendezvous.reserve(Update(ONE, 2), [new], 0.0)
    service.rendezvous.reserve(Update(ONE, 2), [Reservation((Candidate(A, 9, 0, 1),))], 0.0)
    assert [len(update.rows) for update in service.rendezvous.snapshot(0.0)][-1] == MAX_ENDPOINTS
    assert service.rendezvous.shares.total(A)[0] == 2


def test_endpoints_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one named longest ago makes room."""
    monkeypatch.setattr(rendezvous_module, "MAX_ENDPOINTS", 2)
    service = Service()
    for sequence, endpoint in enumerate((A, B, A, C), 1):
        service.publish(Row(endpoint), sequence=sequence)
    service.aigw("r", HOST)
    service.aigw("s", "10.0.0.2")
    assert service.rows().keys() == {A, C}
