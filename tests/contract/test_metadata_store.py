"""What a router may rely on, whichever kind of store it holds."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from metadata_center.sharing.messages import Candidate
from metadata_center.types import Charge, EndpointKey, RequestId, Waiter
from tests.contract.stores import KINDS, LEASE_S, Pair
from tests.waiting import until

A, B = EndpointKey("10.0.0.1:8000"), EndpointKey("[2001:db8::1]:8000")
BOTH = (A, B)
R1, R2 = RequestId("1"), RequestId("2")


@pytest.fixture(params=KINDS)
async def pair(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pair]:
    """The stores of two gateways."""
    async with KINDS[request.param](tmp_path) as pair:
        for store in pair.stores:
            store.load.retain(frozenset(BOTH))
        yield pair


def charge(request_id: RequestId, endpoint: EndpointKey = A) -> Charge:
    """A charge of 10 prefill and 20 context tokens."""
    return Charge(request_id, endpoint, 10, 20)


async def test_every_gateway_sees_every_charge(pair: Pair) -> None:
    """Charges of both count in the views of both, in every kind, until their release."""
    one, two = pair.stores
    now_s = time.monotonic()
    assert one.load.charge(charge(R1), now_s, None)
    assert two.load.charge(charge(R2, B), now_s, None)
    await pair.settled(BOTH, [1, 1])
    one.load.refresh(R1, now_s, 7)
    one.load.release_prefill(R1)
    await until(lambda: two.load.view(two.load.slots(BOTH)).generated_tokens == [7, 0])
    await until(lambda: two.load.view(two.load.slots(BOTH)).prefill_requests == [0, 1])
    view = two.load.view(two.load.slots(BOTH))
    assert (view.prefill_tokens, view.context_tokens) == ([0, 10], [20, 20])

    one.load.move(R1, B, now_s)
    await pair.settled(BOTH, [0, 2])
    assert one.load.get(R1) == Charge(R1, B, 0, 20)
    assert one.load.release(R1, now_s)
    assert two.load.release(R2, now_s)
    await pair.settled(BOTH, [0, 0])


async def test_a_request_is_charged_once(pair: Pair) -> None:
    """A duplicate charge, and one that comes after its release, count nothing."""
    one, _ = pair.stores
    now_s = time.monotonic()
    assert one.load.charge(charge(R1), now_s, None)
    assert not one.load.charge(charge(R1), now_s, None)
    assert not one.load.release(R2, now_s)
    assert not one.load.charge(charge(R2), now_s, None)
    await pair.settled(BOTH, [1, 0])
    assert one.load.in_flight == 1
    one.load.release(R1, now_s)
    await pair.settled(BOTH, [0, 0])


async def test_time_releases_requests_without_an_end(pair: Pair) -> None:
    """A predicted prefill ends, then the lease of the request, and every view returns to zero."""
    one, two = pair.stores
    now_s = time.monotonic()
    one.load.charge(charge(R1), now_s, now_s + 1.0)
    await pair.settled(BOTH, [1, 0])
    assert one.load.advance(now_s + 1.0).prefills == (R1,)
    await until(lambda: two.load.view(two.load.slots(BOTH)).prefill_requests == [0, 0])
    assert one.load.advance(now_s + LEASE_S).requests == (R1,)
    await until(lambda: two.load.view(two.load.slots(BOTH)).requests == [0, 0])


async def test_what_one_gateway_saw_cached_the_other_believes(pair: Pair) -> None:
    """Routing history is shared."""
    one, two = pair.stores
    one.prefixes.record(B, [1, 2, 3])
    one.share(B, [1, 2, 3])
    await until(lambda: two.prefixes.match([1, 2, 4], BOTH) == [0, 2])


async def test_who_waits_at_one_gateway_the_other_hears(pair: Pair) -> None:
    """In order, with its work, and that nobody waits any more; the teller does not hear itself."""
    one, _ = pair.stores
    now_s = time.monotonic()
    one.tell_line([Waiter(A, now_s - 2.0, 0.5, 0.25), Waiter(B, now_s - 1.0, 1.5, 1.0)])
    if not pair.syncs:
        return  # an embedded store has no other member: to tell is no fault
    await until(lambda: len(pair.lines[1]) == 1)
    (line,) = pair.lines[1]
    assert [(each.endpoint, each.work_s, each.least_s) for each in line] == [(A, 0.5, 0.25), (B, 1.5, 1.0)]
    assert all(each.rank - now_s >= -2.0 for each in line)
    assert line[1].rank - line[0].rank == pytest.approx(1.0)
    one.tell_line([])
    await until(lambda: len(pair.lines[1]) == 2)
    assert pair.lines[1][1] == []
    assert pair.lines[0] == []


async def test_many_changes_end_at_zero(pair: Pair) -> None:
    """Hundreds of requests of both gateways leave nothing behind."""
    now_s = time.monotonic()
    for number in range(300):
        for store in pair.stores:
            request_id = RequestId(f"{number}-{id(store)}")
            store.load.charge(charge(request_id, BOTH[number % 2]), now_s, None)
            if number % 3:
                store.load.release(request_id, now_s)
    expected = len({id(store) for store in pair.stores}) * 50
    await pair.settled(BOTH, [expected, expected])
    for number in range(0, 300, 3):
        for store in pair.stores:
            store.load.release(RequestId(f"{number}-{id(store)}"), now_s)
    await pair.settled(BOTH, [0, 0])


@pytest.mark.parametrize("pair", [kind for kind in KINDS if kind != "embedded"], indirect=True)
async def test_reservations_of_two_gateways_take_different_places(pair: Pair) -> None:
    """Both believe A to be empty; the rendezvous lets one of them have it, and all views agree."""
    places = []
    for store, sync, name in zip(pair.stores, pair.syncs, (R1, R2), strict=True):
        store.load.charge(charge(name), time.monotonic(), None)
        place = None
        while place is None:  # a machine under load may miss the bound on a decision's wait
            place = await sync.reserve(name, [Candidate(A, 0, 10, 20), Candidate(B, 0, 5, 20)])
        places.append(place)
    assert places == [A, B]
    assert pair.stores[1].load.get(R2) == Charge(R2, B, 5, 20)
    await pair.settled(BOTH, [1, 1])
    for store, name in zip(pair.stores, (R1, R2), strict=True):
        store.load.release(name, time.monotonic())
    await pair.settled(BOTH, [0, 0])


async def test_legs_of_a_placement_are_charged_and_released_each_by_itself(pair: Pair) -> None:
    """A prefill here, a decode there: each is counted where it is, and goes exactly once."""
    one, two, now_s = *pair.stores, time.monotonic()
    assert one.load.charge(Charge(R1, A, 10, 20, 0, 2), now_s, None)
    assert one.load.charge(Charge(R1, B, 0, 20, 1, 2), now_s, None)
    assert not one.load.charge(Charge(R1, B, 0, 20, 1, 2), now_s, None)
    await pair.settled(BOTH, [1, 1])
    assert one.load.release_leg(R1, 0, now_s)
    assert not one.load.release_prefill(R1)
    assert one.load.move(R1, A, now_s, leg=1)
    assert one.load.refresh(R1, now_s, 7, leg=1)
    await pair.settled(BOTH, [1, 0])
    await until(lambda: two.load.view(two.load.slots(BOTH)).generated_tokens == [7, 0])
    assert one.load.release(R1, now_s)
    assert not one.load.release(R1, now_s)
    assert not one.load.charge(Charge(R1, A, 10, 20, 0, 2), now_s, None)
    await pair.settled(BOTH, [0, 0])
    assert one.load.in_flight == 0
