"""The table of load kinds, and that all that is written by hand beside it agrees with it."""

from dataclasses import fields

import msgspec
import pytest

from metadata_center.load.counters import Counters
from metadata_center.load.kinds import (
    KINDS,
    NAMES,
    NOTHING,
    Until,
    difference,
    each,
    least,
    of_charge,
    replaced,
    sum_of,
)
from metadata_center.load.ledger import Entry
from metadata_center.load.table import LoadView
from metadata_center.sharing.messages import Row
from metadata_center.types import EndpointKey

A = EndpointKey("10.0.0.1:8000")


def test_views_and_rows_have_one_field_per_kind_in_order() -> None:
    """Typed values spell the names out; the table is what they spell."""
    assert tuple(field.name for field in fields(LoadView)) == NAMES
    assert tuple(field.name for field in msgspec.structs.fields(Row)) == ("endpoint", *NAMES)
    assert Row(A, 1, 2, 3, 4, 5).amounts == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("held", [True, False])
def test_counters_add_and_take_off_what_the_table_says(held: bool) -> None:
    """A charge adds its amounts, its prefill takes those that end with it, its release the rest."""
    counters = Counters()
    slots = counters.slots([A])
    entry = Entry("1", 0, 1, A, slots[0], 30, 40, 0, 0.0)

    counters.put(entry)
    assert counters.totals(slots) == [[amount] for amount in of_charge(30, 40)]
    if not held:
        counters.take_prefill(entry)
        entry.prefill_held = False
        left = [
            amount if kind.until is Until.RELEASED else 0
            for kind, amount in zip(KINDS, of_charge(30, 40), strict=True)
        ]
        assert counters.totals(slots) == [[amount] for amount in left]
    counters.take(entry)
    assert counters.totals(slots) == [[amount] for amount in NOTHING]


def test_amounts_are_added_and_bounded_kind_by_kind() -> None:
    """Requests and tokens have bounds of their own."""
    one = of_charge(30, 40, times=2)
    assert one == (2, 2, 60, 80, 0)
    assert sum_of(one, one) == (4, 4, 120, 160, 0)
    assert difference(sum_of(one, one), one) == one
    assert replaced(sum_of(one, one), one, NOTHING) == one
    assert least(one, each(requests=1, tokens=70)) == (1, 1, 60, 70, 0)
