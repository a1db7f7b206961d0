"""A placement is charged leg by leg: all of it, or nothing."""

from __future__ import annotations

import pytest

from extproc.routing.charging import PREFILL_DUE_FLOOR_S, charge, due_s, whole
from extproc.values.placements import Leg, Placement
from metadata_center.errors import CapacityError
from metadata_center.load.counters import Counters
from metadata_center.load.ledger import LedgerBounds
from metadata_center.load.table import LoadTable
from metadata_center.types import Charge, RequestId
from tests.conftest import endpoint

PREFILL, DECODE = (endpoint(number).key for number in range(2))
R = RequestId("r")
TWO = Placement((Leg(Charge(R, PREFILL, 100, 100, 0, 2), None), Leg(Charge(R, DECODE, 0, 100, 1, 2), None)))
"""A prefill here and a decode there."""


def requests(table: LoadTable) -> list[int]:
    """Requests charged to each of the two."""
    return list(table.view(table.slots((PREFILL, DECODE))).requests)


def test_a_placement_of_one_leg() -> None:
    """It is charged once, at the one endpoint."""
    table = LoadTable(Counters())
    placement = whole(R, PREFILL, 60, 100, None)
    assert placement.endpoint == PREFILL
    assert charge(table, placement, 0.0)
    assert not charge(table, placement, 0.0)
    assert requests(table) == [1, 0]


def test_a_placement_of_two_legs() -> None:
    """Each is charged where it is, and one release takes off both."""
    table = LoadTable(Counters())
    assert TWO.endpoint == PREFILL
    assert charge(table, TWO, 0.0)
    assert requests(table) == [1, 1]
    assert not charge(table, TWO, 0.0)
    assert requests(table) == [1, 1]
    table.release(R, 1.0)
    assert requests(table) == [0, 0]


def test_a_leg_without_room_takes_the_others_with_it() -> None:
    """Where a leg finds no place, nothing of the request stays charged."""
    table = LoadTable(Counters(), LedgerBounds(max_legs=1))
    with pytest.raises(CapacityError):
        charge(table, TWO, 0.0)
    assert requests(table) == [0, 0]
    assert table.in_flight == 0
    other = RequestId("other")
    assert charge(table, whole(other, DECODE, 1, 1, None), 1.0)
    table.release(other, 1.0)
    assert charge(table, whole(R, DECODE, 1, 1, None), 1.0), "it did not end: it is placed again"


def test_a_request_that_ended_before_is_charged_nowhere() -> None:
    """Its tombstone voids every leg."""
    table = LoadTable(Counters(), LedgerBounds(tombstone_s=10.0))
    table.release(R, 0.0)
    assert not charge(table, TWO, 1.0)
    assert requests(table) == [0, 0]


def test_a_prefill_is_due_not_before_its_floor() -> None:
    """A prefill of nothing takes a moment all the same."""
    assert due_s(5.0, 0.0) == 5.0 + PREFILL_DUE_FLOOR_S
    assert due_s(5.0, 10.0) > 15.0
