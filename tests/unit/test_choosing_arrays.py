"""What arrays give over many rows is what the loops give, to the last bit, draws included."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.choosing import arrays, completion, picker
from extproc.choosing.policies.least_completion import most_cached_first
from extproc.predicting.sums import plain_sum
from extproc.routing import caches

seconds = st.one_of(st.just(0.0), st.floats(0.0, 100.0))
rows = st.integers(1, 90)


def columns(data: st.DataObject, count: int, number: int) -> list[list[float]]:
    """So many columns of `count` rows."""
    return [data.draw(st.lists(seconds, min_size=count, max_size=count)) for _ in range(number)]


@given(st.data(), rows, seconds, seconds, seconds, st.booleans(), st.booleans())
def test_costs(
    data: st.DataObject,
    count: int,
    followers_per_s: float,
    price: float,
    held_s: float,
    is_stalled: bool,
    is_sunk: bool,
) -> None:
    """Each column and the totals; without stalled sequences and crowded prefixes as well."""
    waits_s, works_s, rooms_s, steps_s, stalled = columns(data, count, 5)
    sunk = data.draw(st.lists(st.floats(0.0, 1.0), min_size=count, max_size=count))
    of = (waits_s, works_s, rooms_s, steps_s, followers_per_s, price, held_s, ())
    more = (stalled if is_stalled else (), sunk if is_sunk else ())
    few, many = completion.cost_columns(*of, *more), arrays.cost_columns(*of, *more)
    for name in ("others_s", "stalls_s", "decodes_s", "totals_s"):
        assert list(getattr(many, name)) == getattr(few, name)


@given(st.lists(st.floats(-1e9, 1e9)))
def test_sums(values: list[float]) -> None:
    """One addition after the other, whatever the numbers are kept in."""
    assert plain_sum(array("d", values)) == plain_sum(values) == plain_sum(tuple(values))


@given(st.lists(st.tuples(st.integers(-3, 0), st.integers(1, 2)), min_size=1), st.integers(0, 99), st.data())
def test_picks(of_rows: list[tuple[int, int]], seed: int, data: st.DataObject) -> None:
    """The same rows by the same draws, of equal weights and of others."""
    wanted = data.draw(st.integers(1, len(of_rows)))
    scores = [float(score) for score, _ in of_rows]
    weights: Sequence[float]
    for weights in ((), [float(weight) for _, weight in of_rows]):
        few, many = random.Random(seed), random.Random(seed)
        assert picker.best(scores, wanted, few, weights) == picker.best_of_many(scores, wanted, many, weights)
        assert few.random() == many.random()


@given(st.lists(st.tuples(st.integers(-2, 0), st.integers(0, 2)), min_size=1))
def test_ties(of_rows: list[tuple[int, int]]) -> None:
    """Of equal scores those with less cached come behind."""
    scores, cached = [score / 3 for score, _ in of_rows], [cached for _, cached in of_rows]
    assert list(arrays.most_cached_first(scores, cached)) == most_cached_first(scores, cached)


@pytest.mark.parametrize("depths", [[0] * 8, [0, 1, 5, 3, 0, 70, 2, 9]])
def test_cached_tokens(depths: list[int]) -> None:
    """By the bytes of the blocks, and never the whole prompt."""
    few = caches.tokens_of(depths, 64, 4_001, 997)
    times = -(-arrays.MANY_ROWS // len(depths))
    assert list(caches.tokens_of(depths * times, 64, 4_001, 997)) == list(few) * times
    assert max(few) < 997
