"""Ledger and cache views: what a gateway knows, and when."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadata_center.types import EndpointKey
from tokenway.simulator.replay.caches import EventBlocks, Events, History
from tokenway.simulator.replay.ledger import GatewayLedger

KEYS = (EndpointKey("10.0.0.1:8000"), EndpointKey("10.0.0.2:8000"))


def _columns(ledger: GatewayLedger) -> list[list[int]]:
    return [
        ledger.requests,
        ledger.prefilling,
        ledger.prefill_tokens,
        ledger.prompt_tokens,
        ledger.context_tokens,
    ]


def test_a_prefill_is_taken_off_once_and_the_rest_with_the_request() -> None:
    """Uncached and prompt tokens leave at the first token, context and the request at the end."""
    ledger = GatewayLedger(2)
    ledger.charge(7, 1, 60, 100, 1.0)
    assert _columns(ledger) == [[0, 1], [0, 1], [0, 60], [0, 100], [0, 100]]
    ledger.prefilled(7, 2.0)
    assert ledger.prefilled(7, 3.0) is None
    assert _columns(ledger) == [[0, 1], [0, 0], [0, 0], [0, 0], [0, 100]]
    ledger.release(7, 4.0)
    assert _columns(ledger) == [[0, 0]] * 5
    assert ledger.prefilled(7, 5.0) is None


def test_the_prefill_at_the_head_is_under_way_since_the_one_before_ended() -> None:
    """The first since it was sent, another sent meanwhile changes nothing, an answer's end neither."""
    ledger = GatewayLedger(2)
    ledger.charge(1, 0, 60, 100, 1.0)
    ledger.charge(2, 0, 60, 100, 2.0)
    assert ledger.since_s == [1.0, 0.0]
    ledger.prefilled(1, 3.0)
    assert ledger.since_s == [3.0, 0.0]
    ledger.release(1, 4.0)
    assert ledger.since_s == [3.0, 0.0]
    ledger.release(2, 5.0)
    ledger.charge(3, 0, 60, 100, 6.0)
    assert ledger.since_s == [6.0, 0.0]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("cpr"), st.integers(0, 2)), max_size=40))
def test_changes_keep_another_gateway_equal(
    steps: list[tuple[int, str, int]],
) -> None:
    """Entries applied elsewhere give the same columns, and all of it ends at zero."""
    own, other = GatewayLedger(3), GatewayLedger(3)
    open_ids = set()
    for request_id, what, row in steps:
        entry = None
        if what == "c" and request_id not in open_ids:
            open_ids.add(request_id)
            entry = own.charge(request_id, row, 10 + request_id, 50 + request_id, 0.0)
        elif what == "p":
            entry = own.prefilled(request_id, 0.0)
        elif what == "r" and request_id in open_ids:
            open_ids.discard(request_id)
            entry = own.release(request_id, 0.0)
        if entry is not None:
            other.apply(entry, 0.0)
        assert _columns(own) == _columns(other)
    for request_id in open_ids:
        other.apply(own.release(request_id, 0.0), 0.0)
    assert _columns(own) == _columns(other) == [[0, 0, 0]] * 5


def test_history_counts_from_the_sending_and_confirmed_history_from_the_first_token() -> None:
    """Both know the same prompt, the second one later."""
    for confirmed in (False, True):
        view = History(KEYS, (10, 10), confirmed=confirmed)
        view.sent(1, 1, [1, 2, 3])
        assert view.match([1, 2, 9]) == ([0, 0] if confirmed else [0, 2])
        view.prefilled(1)
        assert view.match([1, 2, 9]) == [0, 2]


@pytest.mark.parametrize("confirmed", [False, True])
def test_confirmed_history_forgets_what_an_engine_must_have_evicted(confirmed: bool) -> None:
    """A reported miss drops all last used no later than the missing blocks; else it may be a race."""
    view = History(KEYS, (10, 10), confirmed=confirmed)
    for request_id, blocks in enumerate(([1, 2], [5], [8], [5, 6], [8, 9])):
        view.sent(request_id, 0, blocks)
        view.prefilled(request_id)
    view.settled(4, missing=True)
    kept = [view.match(blocks)[0] for blocks in ([1, 2], [5, 6], [8, 9])]
    assert kept == ([0, 2, 2] if confirmed else [2, 2, 2])


def test_history_holds_no_more_than_the_engine() -> None:
    """The least recently used blocks leave first."""
    view = History(KEYS, (3, 3), confirmed=False)
    view.sent(1, 0, [1, 2])
    view.sent(2, 0, [5, 6])
    assert view.match([1, 2]) == [1, 0]
    assert view.match([5, 6]) == [2, 0]


def test_pending_prompts_bridge_the_lag_of_events() -> None:
    """Between sending and announcement only the view with pending blocks knows the prompt."""
    event_blocks = EventBlocks(2)
    plain, bridged = (Events(event_blocks, 2, pending=pending) for pending in (False, True))
    for view in (plain, bridged):
        view.sent(1, 0, [1, 2])
    assert plain.match([1, 2, 3]) == [0, 0]
    assert bridged.match([1, 2, 3]) == [2, 0]
    event_blocks.stored(0, [1, 2, 3])
    for view in (plain, bridged):
        view.settled(1, missing=False)
        assert view.match([1, 2, 3, 4]) == [3, 0]


def test_a_block_is_gone_when_its_last_copy_is() -> None:
    """Copies are announced and removed one by one."""
    event_blocks = EventBlocks(1)
    event_blocks.stored(0, [1])
    event_blocks.stored(0, [1])
    assert event_blocks.removed(0, [1]) == []
    assert event_blocks.removed(0, [1]) == [1]
    assert Events(event_blocks, 1, pending=False).match([1]) == [0]


def test_what_was_lost_on_its_way_is_passed_over_when_it_is_removed() -> None:
    """The announcement of a block may be lost, its removal not; others of the same message count."""
    event_blocks = EventBlocks(1)
    event_blocks.stored(0, [1])
    assert event_blocks.removed(0, [2, 1]) == [1]
    assert event_blocks.removed(0, [1]) == []
    event_blocks.stored(0, [1])
    assert Events(event_blocks, 1, pending=False).match([1]) == [1]


def test_two_pending_prompts_share_their_beginning() -> None:
    """The end of one leaves the other's blocks pending."""
    view = Events(EventBlocks(1), 1, pending=True)
    view.sent(1, 0, [1, 2])
    view.sent(2, 0, [1, 3])
    view.settled(1, missing=False)
    assert view.match([1, 2]) == [1]
    assert view.match([1, 3]) == [2]
