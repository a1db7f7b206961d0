"""The ring of decision records."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.choosing.foreseen import foreseen_tpot_s, foreseen_ttft_s
from extproc.choosing.snapshots import Load, Prompt, plain_snapshot
from extproc.observing.records import RecordRing
from extproc.predicting.tpot import SegmentedTpotModel
from extproc.predicting.ttft import Backlog, TtftModel
from extproc.values.choices import Choice, Snapshot
from extproc.values.decisions import DecisionRecord
from extproc.values.endings import Ending
from extproc.values.outcomes import Ended, Outcome
from extproc.values.prices import Prices
from metadata_center.types import EndpointKey, RequestId
from tests.unit.ended import sent

A, B = EndpointKey("10.0.0.1:8000"), EndpointKey("10.0.0.2:8000")


def record(request_id: str) -> DecisionRecord:
    """Build a record that holds nothing but its id."""
    return DecisionRecord(request_id=RequestId(request_id), time_unix_s=1.0, data_age_s={})


def test_row_and_chosen_refer_to_the_snapshot() -> None:
    """`chosen` is the first of the order and `row` finds candidates only."""
    zeros = (0, 0)
    snapshot = Snapshot((A, B), zeros, zeros, zeros, zeros, 0, (1.0, 1.0))
    made = DecisionRecord(
        request_id=RequestId("r"),
        time_unix_s=1.0,
        data_age_s={},
        snapshot=snapshot,
        choice=Choice(order=(1, 0), scores=None, candidates=2),
    )
    assert made.snapshot is snapshot
    assert (made.chosen, made.row(A), made.row(B), made.row(EndpointKey("x:1"))) == (B, 0, 1, None)
    assert (record("q").chosen, record("q").row(A)) == (None, None)


def test_predictions_are_made_of_each_rows_own_columns() -> None:
    """TTFT comes of a row's prompt and of what is ahead, TPOT of its batch, this request included."""
    prices = Prices(TtftModel().prices_s, SegmentedTpotModel().prices_s, ())
    made = DecisionRecord(
        request_id=RequestId("r"),
        time_unix_s=1.0,
        data_age_s={},
        prompt_tokens=1_000,
        snapshot=plain_snapshot(
            (A, B),
            (1.0, 2.0),
            Load((7, 3), (1, 0), (500, 0), (9_000, 80_000)),
            Prompt(1_000, (0, 800), (0, 4), 5),
            (prices,),
            200.0,
        ),
        prices=(prices,),
        cached_tokens=(0, 800),
    )
    ahead = Backlog(1, 500, 1_285, 6, 9_000 - 1_285 + 6 * 100.0)
    assert foreseen_ttft_s(made, 0) == pytest.approx(TtftModel().predict(ahead, 1_000, 0))
    decoding = Backlog(0, 0, 0, 3, 80_000 + 3 * 100.0)
    assert foreseen_ttft_s(made, 1) == pytest.approx(TtftModel().predict(decoding, 200, 800) / 2)
    assert foreseen_tpot_s(made, 0) == SegmentedTpotModel().predict(8, 9_000 + 1_000 + 600)
    assert foreseen_tpot_s(made, 1) == SegmentedTpotModel().predict(4, 80_000 + 1_000 + 300) / 2
    assert (foreseen_ttft_s(record("q"), 0), foreseen_tpot_s(record("q"), 0)) == (None, None)


def test_an_outcome_reaches_the_record_of_its_request() -> None:
    """The newest record of an id has the outcome; of what is no longer held nothing is kept."""
    ring = RecordRing(2)
    older, newer = record("a"), record("a")
    ring.add(older)
    ring.add(newer)
    outcome = Outcome(Ended.COMPLETED, 1.0)
    ring.ended(Ending(older, outcome, 0.0, sent()))
    assert (older.outcome, newer.outcome) == (None, outcome)
    ring.ended(Ending(record("b"), outcome, 0.0, sent()))
    assert ring.get(RequestId("b")) is None


def test_a_refusal_is_held_when_it_ends() -> None:
    """It was not added before: it was never decided."""
    ring = RecordRing(2)
    refused = record("a")
    ring.ended(Ending(refused, Outcome(Ended.REJECTED, 0.0, status=400), 0.0))
    assert ring.get(RequestId("a")) is refused


def test_overwriting_an_older_record_keeps_the_newer_one_of_the_same_id() -> None:
    """When an id repeats, evicting its older record leaves the newer findable."""
    ring = RecordRing(2)
    older, newer = record("a"), record("a")
    ring.add(older)
    ring.add(newer)
    ring.add(record("b"))
    assert ring.get(RequestId("a")) is newer
    ring.add(record("c"))
    assert ring.get(RequestId("a")) is None


def test_ring_of_size_zero_holds_nothing() -> None:
    """Size 0 switches recording off; a negative size is refused."""
    ring = RecordRing(0)
    ring.add(record("a"))
    assert (len(ring), ring.last(5), ring.get(RequestId("a"))) == (0, [], None)
    with pytest.raises(ValueError, match="size"):
        RecordRing(-1)


@given(st.integers(1, 5), st.lists(st.sampled_from("abcdef"), max_size=20), st.integers(0, 8))
def test_ring_equals_the_tail_of_everything_added(size: int, ids: list[str], count: int) -> None:
    """The ring is the last `size` records: `last` newest first, `get` the newest of an id, len bounded."""
    ring = RecordRing(size)
    added = [record(request_id) for request_id in ids]
    for made in added:
        ring.add(made)
    held = added[-size:]
    assert len(ring) == len(held)
    assert ring.last(count) == held[::-1][:count]
    for request_id in "abcdef":
        newest = next((made for made in reversed(held) if made.request_id == request_id), None)
        assert ring.get(RequestId(request_id)) is newest
