"""An engine's limit on sequences, learned from what it says of itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.choosing.max_num_seqs import FORGET_READINGS, FULL_CACHE_RATIO, SURE_VISITS, SequenceLimit


def visited(times: int, most: int = 128, *, waiting: int = 3, kv_usage: float = 0.5) -> SequenceLimit:
    """An engine that was at `most` so often, and below it in between."""
    known = SequenceLimit()
    for _ in range(times):
        known.observe(most, waiting, kv_usage)
        known.observe(most - 1, waiting, kv_usage)
    return known


def test_an_engine_that_comes_back_to_the_same_number_is_full() -> None:
    """Four times is chance, five are a limit."""
    assert visited(SURE_VISITS - 1).limit == 0
    assert visited(SURE_VISITS).limit == 128


def test_staying_is_one_visit() -> None:
    """A number that is read again and again while nothing happens says nothing new."""
    known = SequenceLimit()
    for _ in range(50):
        known.observe(20, 4, 0.3)
    assert known.limit == 0


def test_no_request_waits_below_the_limit() -> None:
    """Without a queue the largest number is that of the traffic."""
    assert visited(20, waiting=0).limit == 0


def test_a_full_cache_says_nothing_of_the_limit() -> None:
    """A request that waits for blocks may be below the limit."""
    assert visited(20, kv_usage=FULL_CACHE_RATIO).limit == 0


def test_one_more_refutes_the_limit() -> None:
    """It is unknown again until the new number has proved itself."""
    known = visited(SURE_VISITS, 30)
    known.observe(31, 0, 0.5)
    assert known.limit == 0
    for _ in range(SURE_VISITS):
        known.observe(31, 1, 0.5)
        known.observe(29, 1, 0.5)
    assert known.limit == 31


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 9), st.floats(0.0, 1.0))))
def test_a_limit_was_seen_and_the_last_reading_is_within(seen: list[tuple[int, int, float]]) -> None:
    """Or there is none."""
    known = SequenceLimit()
    for running, waiting, kv_usage in seen:
        known.observe(running, waiting, kv_usage)
        assert not known.limit or running <= known.limit
    assert known.limit in {0, *(running for running, _, _ in seen)}


@pytest.mark.parametrize("lie", [129, 1 << 20])
def test_a_number_said_once_does_not_hide_the_limit_for_good(lie: int) -> None:
    """A busy engine's limit is known again some readings after one that was false."""
    known = visited(SURE_VISITS)
    known.observe(lie, 0, 0.5)
    assert known.limit == 0
    for _ in range(FORGET_READINGS // 2 + SURE_VISITS):
        known.observe(128, 3, 0.5)
        known.observe(127, 1, 0.5)
    assert known.limit == 128


def test_a_limit_that_proved_itself_is_not_forgotten() -> None:
    """Hours below it with others waiting (for prefill) change nothing."""
    known = visited(SURE_VISITS)
    for _ in range(10 * FORGET_READINGS):
        known.observe(90, 2, 0.5)
    assert known.limit == 128
