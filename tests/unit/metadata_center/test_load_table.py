"""The load table: every way a request's load comes and goes."""

import pytest

from metadata_center.errors import CapacityError
from metadata_center.load.counters import KEY_BYTES, Counters
from metadata_center.load.ledger import Expired, LedgerBounds
from metadata_center.load.table import LoadTable
from metadata_center.types import Charge, EndpointKey, RequestId

A, B = EndpointKey("10.0.0.1:8000"), EndpointKey("[2001:db8::1]:8000")
R1, R2 = RequestId("1"), RequestId("2")


def charge(
    request_id: str = "1", endpoint: EndpointKey = A, prefill: int = 512, context: int = 700
) -> Charge:
    """A charge with amounts that do not matter."""
    return Charge(RequestId(request_id), endpoint, prefill, context)


def loads(table: LoadTable, *keys: EndpointKey) -> list[tuple[int, int, int]]:
    """(requests, prefill, context) per key."""
    view = table.view(table.slots(keys))
    return list(zip(view.requests, view.prefill_tokens, view.context_tokens, strict=True))


def test_aigw_load_test_cases() -> None:
    """The cases of metadata-center's load_test.go hold: add, duplicate, prompt delete, delete, unknown."""
    table = LoadTable(Counters())

    assert table.charge(charge("1", context=0), 0.0, None)
    assert loads(table, A) == [(1, 512, 0)]
    assert not table.charge(charge("1", context=0), 0.0, None)
    assert loads(table, A) == [(1, 512, 0)]
    assert table.charge(charge("2", context=0), 0.0, None)
    assert loads(table, A) == [(2, 1024, 0)]
    assert table.release_prefill(R1)
    assert table.release(R1, 0.0)
    assert loads(table, A) == [(1, 512, 0)]
    assert not table.release(RequestId("unknown"), 0.0)
    assert loads(table, A) == [(1, 512, 0)]
    assert table.release(R2, 0.0)
    assert loads(table, A) == [(0, 0, 0)]


def test_release_before_charge_voids_the_charge() -> None:
    """metadata-center's delete-before-add case leaves no load at any moment, however often it is added."""
    table = LoadTable(Counters(), LedgerBounds(tombstone_s=10.0))

    assert not table.release(R1, 0.0)
    assert not table.charge(charge(), 0.5, None)
    assert not table.charge(charge(), 9.9, None)
    assert loads(table, A) == [(0, 0, 0)]
    assert table.charge(charge(), 10.0, None)
    assert loads(table, A) == [(1, 512, 700)]


@pytest.mark.parametrize("advanced", [True, False])
def test_tombstone_expires(advanced: bool) -> None:
    """A charge that comes later than `tombstone_s` after its release counts, advanced or not."""
    table = LoadTable(Counters(), LedgerBounds(tombstone_s=10.0))
    table.release(R1, 0.0)

    if advanced:
        assert table.advance(10.0) == Expired((), ())

    assert table.charge(charge(), 10.0, None)


def test_repeated_release_renews_its_tombstone() -> None:
    """The lifetime of a tombstone counts from the last release."""
    table = LoadTable(Counters(), LedgerBounds(tombstone_s=10.0))
    table.release(R1, 0.0)
    table.release(R2, 1.0)
    table.release(R1, 6.0)
    table.advance(12.0)

    assert table.charge(charge("2"), 12.0, None)
    assert not table.charge(charge("1"), 12.0, None)


def test_tombstones_are_bounded_and_the_oldest_goes_first() -> None:
    """With room for one tombstone the second release displaces the first."""
    table = LoadTable(Counters(), LedgerBounds(max_tombstones=1))
    table.release(R1, 0.0)
    table.release(R2, 0.0)

    assert table.charge(charge("1"), 0.0, None)
    assert not table.charge(charge("2"), 0.0, None)


def test_prefill_is_released_once_whichever_end_comes_first() -> None:
    """First token and predicted end both release the prefill; only the first of them does anything."""
    table = LoadTable(Counters())
    table.charge(charge("1"), 0.0, 2.0)
    table.charge(charge("2"), 0.0, 1.0)

    assert table.release_prefill(R1)
    assert not table.release_prefill(R1)
    assert table.advance(0.999) == Expired((), ())
    assert table.advance(2.0) == Expired((R2,), ())
    assert not table.release_prefill(R2)
    assert loads(table, A) == [(2, 0, 1400)]
    assert table.get(R2) == charge("2", prefill=0)


def test_prefill_of_a_reused_id_is_released_at_its_own_time() -> None:
    """The due time of an earlier life of the same id does not release the later one."""
    table = LoadTable(Counters())
    table.charge(charge(), 0.0, 1.0)
    table.release(R1, 0.5)
    table.charge(charge(), 0.5, 3.0)

    assert table.advance(2.0) == Expired((), ())
    assert table.advance(3.0) == Expired((R1,), ())


def test_release_of_unknown_prefill_is_false() -> None:
    """No prefill is released for a request that is not in flight."""
    assert not LoadTable(Counters()).release_prefill(R1)


def test_lease_expiry_takes_everything_off() -> None:
    """A request without a mention for `lease_s` leaves, prefill included, and its release is harmless."""
    table = LoadTable(Counters(), LedgerBounds(lease_s=180.0))
    table.charge(charge("1"), 0.0, None)
    table.charge(charge("2", B), 100.0, None)

    assert table.advance(179.9) == Expired((), ())
    assert table.advance(180.0) == Expired((), (R1,))
    assert loads(table, A, B) == [(0, 0, 0), (1, 512, 700)]
    assert not table.release(R1, 181.0)
    assert loads(table, A) == [(0, 0, 0)]


def test_refresh_and_move_extend_the_lease() -> None:
    """A refreshed request outlives one charged after it; unknown requests are neither refreshed nor moved."""
    table = LoadTable(Counters(), LedgerBounds(lease_s=10.0))
    for request_id in "123":
        table.charge(charge(request_id), 0.0, None)

    assert table.refresh(R1, 5.0)
    assert table.move(R2, B, 6.0)
    assert not table.refresh(RequestId("9"), 6.0)
    assert not table.move(RequestId("9"), B, 6.0)
    assert table.advance(14.9) == Expired((), (RequestId("3"),))
    assert table.advance(15.0) == Expired((), (R1,))
    assert table.advance(16.0) == Expired((), (R2,))
    assert table.in_flight == 0


def test_move_carries_what_is_still_charged() -> None:
    """A fallback endpoint gets request, context and the prefill not yet released; then gives them back."""
    table = LoadTable(Counters())
    table.charge(charge("1"), 0.0, None)
    table.charge(charge("2"), 0.0, None)
    table.release_prefill(R2)

    assert table.move(R1, B, 1.0)
    assert table.move(R2, B, 1.0)
    assert table.move(R2, B, 1.0)
    assert loads(table, A, B) == [(0, 0, 0), (2, 512, 1400)]
    assert table.get(R1) == charge("1", B)
    table.release(R1, 2.0)
    table.release(R2, 2.0)
    assert loads(table, A, B) == [(0, 0, 0), (0, 0, 0)]


@pytest.mark.parametrize(
    ("bad", "due_s"),
    [
        (charge(prefill=-1), None),
        (charge(context=-1), None),
        (charge(), float("nan")),
        (charge(), float("inf")),
    ],
)
def test_invalid_charge_changes_nothing(bad: Charge, due_s: float | None) -> None:
    """A negative amount or a due time that is not finite is refused whole."""
    table = LoadTable(Counters())

    with pytest.raises(ValueError):
        table.charge(bad, 0.0, due_s)

    assert loads(table, A) == [(0, 0, 0)]
    assert table.in_flight == 0


def test_requests_are_bounded() -> None:
    """At `max_requests` a charge is refused, a duplicate is still just a duplicate, a release makes room."""
    table = LoadTable(Counters(), LedgerBounds(max_legs=1))
    table.charge(charge("1"), 0.0, None)

    with pytest.raises(CapacityError):
        table.charge(charge("2"), 0.0, None)
    assert not table.charge(charge("1"), 0.0, None)
    table.release(R1, 0.0)
    assert table.charge(charge("2"), 0.0, None)
    assert loads(table, A) == [(1, 512, 700)]


def test_predicted_ends_do_not_pile_up() -> None:
    """Far-off due times of requests long gone are swept: memory follows what is in flight."""
    table = LoadTable(Counters())
    table.charge(charge("last"), 0.0, 1e9)
    for number in range(10_000):
        table.charge(charge(str(number)), 0.0, 1e6)
        table.release(RequestId(str(number)), 0.0)

    assert len(table._ledger._due) < 1100
    assert table.advance(100.0) == Expired((), ())
    table.refresh(RequestId("last"), 1e9)
    assert table.advance(1e9) == Expired((RequestId("last"),), ())


def test_slots_of_endpoints_that_are_gone_are_used_again() -> None:
    """A slot is free once its endpoint is not retained and nothing is in flight there, and not before."""
    table = LoadTable(Counters(capacity=1))
    table.charge(charge("1"), 0.0, None)
    table.retain(frozenset())

    with pytest.raises(CapacityError):
        table.slots([B])
    assert table.release(R1, 0.0)
    assert loads(table, B) == [(0, 0, 0)]
    table.retain(frozenset([B]))
    with pytest.raises(CapacityError):
        table.charge(charge("2", A), 0.0, None)
    assert table.in_flight == 0


def test_an_endpoint_that_comes_back_finds_its_load() -> None:
    """Requests in flight on an endpoint that was gone for a while still count when it returns."""
    table = LoadTable(Counters())
    table.charge(charge("1"), 0.0, None)
    table.retain(frozenset())

    assert loads(table, B, A) == [(0, 0, 0), (1, 512, 700)]


@pytest.mark.parametrize("key", ["", "x" * (KEY_BYTES + 1), "h\u00f6st:1"])
def test_keys_that_cannot_be_stored_are_refused(key: str) -> None:
    """An empty, overlong or non-ASCII key is an error, not a truncated name."""
    with pytest.raises(ValueError):
        Counters().place(EndpointKey(key))


def test_worker_must_have_a_row() -> None:
    """A worker outside 0..workers-1 is refused."""
    with pytest.raises(ValueError):
        Counters(workers=2, worker=2)


def test_lock_of_one_process_is_reentrant() -> None:
    """Locking costs nothing and nests."""
    table = LoadTable(Counters())
    with table.lock(), table.lock():
        assert table.charge(charge(), 0.0, None)


def test_prefill_requests_are_those_whose_prefill_is_held() -> None:
    """A request counts as prefilling from its charge to the end of its prefill, wherever it is moved."""
    table = LoadTable(Counters())
    slots = table.slots([A, B])
    table.charge(charge("1"), 0.0, None)
    table.charge(charge("2"), 0.0, None)
    table.release_prefill(R2)
    assert table.view(slots).prefill_requests == [1, 0]

    table.move(R1, B, 0.0)
    table.move(R2, B, 0.0)
    assert table.view(slots).prefill_requests == [0, 1]
    table.release(R1, 0.0)
    table.release(R2, 0.0)
    assert table.view(slots).prefill_requests == [0, 0]


def test_a_move_may_change_the_prefill() -> None:
    """What is cached differs by endpoint: a prefill still held takes the amount given, one released none."""
    table = LoadTable(Counters())
    table.charge(charge("1"), 0.0, None)
    table.charge(charge("2"), 0.0, None)
    table.release_prefill(R2)

    table.move(R1, B, 0.0, prefill_tokens=100)
    table.move(R2, B, 0.0, prefill_tokens=100)

    assert loads(table, A, B) == [(0, 0, 0), (2, 100, 1400)]
    assert table.get(R1) == charge("1", B, prefill=100)
    assert table.release(R1, 0.0)
    table.release(R2, 0.0)
    assert loads(table, B) == [(0, 0, 0)]


def test_generated_tokens_follow_their_request() -> None:
    """A refresh says how many there are by now; they move and go with the request."""
    table = LoadTable(Counters())
    slots = table.slots([A, B])
    table.charge(charge("1"), 0.0, None)

    assert table.refresh(R1, 1.0, 10)
    assert table.refresh(R1, 2.0, 25)
    assert table.refresh(R1, 3.0)
    assert table.view(slots).generated_tokens == [25, 0]
    with pytest.raises(ValueError):
        table.refresh(R1, 4.0, -1)
    table.move(R1, B, 5.0)
    assert table.view(slots).generated_tokens == [0, 25]
    table.release(R1, 6.0)
    assert table.view(slots).generated_tokens == [0, 0]


def test_what_others_count_is_added_to_views() -> None:
    """Amounts of others are asked for when an endpoint is claimed, and follow `set_others`."""
    for workers in (1, 2):
        counters = Counters(workers=workers)
        table = LoadTable(counters)
        slots = table.slots([A])
        counters.add_others(lambda key: (1, 2, 3, 4, 5) if key == A else (6, 0, 0, 0, 0))
        slots += table.slots([B])
        table.charge(charge("1"), 0.0, None)

        view = table.view(slots)
        assert (view.requests, view.prefill_requests) == ([2, 6], [3, 0])
        assert (view.prefill_tokens, view.context_tokens) == ([515, 0], [704, 0])
        assert view.generated_tokens == [5, 0]
        counters.set_others(B, (0, 0, 0, 0, 0))
        counters.set_others(EndpointKey("unknown:1"), (9, 9, 9, 9, 9))
        assert table.view(slots).requests == [2, 0]
