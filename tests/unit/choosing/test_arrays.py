"""What arrays give over many rows is what the loops give, to the last bit, draws included."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.choosing import array_costs, arrays, completion, picker, places, snapshots, weights
from extproc.choosing import columns as columns_of
from extproc.choosing.array_types import floats_of
from extproc.choosing.completion import Costs
from extproc.choosing.kept_columns import MAX_COLUMNS, KeptColumns
from extproc.choosing.least_completion import completion_costs
from extproc.choosing.policies.least_completion import most_cached_first
from extproc.choosing.rows import learned_of
from extproc.choosing.snapshots import Engines, Load
from extproc.choosing.weights import MAX_KEPT, weights_of
from extproc.predicting.sums import plain_sum
from extproc.routing import caches
from extproc.routing.engines import under_way_s
from extproc.values.by_kind import ByKind, Kinds
from extproc.values.choices import Learned, Snapshot
from extproc.values.prices import Prices
from metadata_center.load.counters import Counters
from metadata_center.load.table import LoadTable
from metadata_center.types import MANY_ROWS, EndpointKey

seconds = st.one_of(st.just(0.0), st.floats(0.0, 100.0))
rows = st.integers(1, 90)


def columns(data: st.DataObject, count: int, number: int) -> list[list[float]]:
    """So many columns of `count` rows."""
    return [data.draw(st.lists(seconds, min_size=count, max_size=count)) for _ in range(number)]


@given(st.data(), rows, seconds, seconds, seconds, st.booleans(), st.booleans(), st.booleans(), seconds)
def test_costs(
    data: st.DataObject,
    count: int,
    followers_per_s: float,
    price: float,
    held_s: float,
    is_stalled: bool,
    is_sunk: bool,
    is_full: bool,
    displaced_s: float,
) -> None:
    """Each column and the totals; without stalled sequences, crowded prefixes and dear places as well."""
    waits_s, works_s, rooms_s, steps_s, stalled, places_s = columns(data, count, 6)
    sunk = data.draw(st.lists(st.floats(0.0, 1.0), min_size=count, max_size=count))
    of, paces = (waits_s, works_s, rooms_s, steps_s), (followers_per_s, price, held_s, ())
    sunk = sunk if is_sunk else []
    more = stalled if is_stalled else (), sunk, places_s if is_full else (), displaced_s
    few = completion.cost_columns(*of, *paces, *more)
    stalls, places = floats_of(stalled) if is_stalled else 0.0, floats_of(places_s) if is_full else None
    waits, works, rooms, steps = map(floats_of, of)
    many = array_costs.costs_of(waits, works, rooms, steps, *paces, stalls, sunk, places, displaced_s)
    for name in ("others_s", "stalls_s", "decodes_s", "places_s", "displacements_s", "totals_s"):
        assert list(getattr(many, name)) == list(getattr(few, name))


def snapshot_of(rng: random.Random) -> Snapshot:
    """Rows that the loops are for; each column may be known of all, of some, or of none."""
    rows = rng.randrange(1, MANY_ROWS)

    def some_tokens() -> int:
        return rng.choice([0, rng.randrange(1 << 20)])

    def prices() -> tuple[float, ...]:
        return tuple(rng.choice([0.0, rng.random() / 10]) for _ in range(6))

    def column(of: Callable[[], Any], *, may_be_absent: bool = False) -> list[Any]:
        if may_be_absent and rng.random() < 0.5:
            return []
        values = [of() for _ in range(rng.randrange(1, 4))]  # few: equal rows are frequent
        return [rng.choice(values) for _ in range(rows)]

    def as_given(values: Sequence[int]) -> Sequence[int]:
        return array("q", values) if rng.random() < 0.5 else values

    prompt_tokens = some_tokens()
    kv_tokens = column(lambda: rng.choice([0, 1 << 12, 1 << 20]), may_be_absent=True)
    used: list[int | None] = []
    if kv_tokens:
        used = column(lambda: rng.choice([None, some_tokens(), some_tokens()]), may_be_absent=True)
    prices_s = prices()
    rows_s: Sequence[tuple[float, ...]] = column(prices, may_be_absent=True)
    if rng.random() < 0.3:
        rows_s = ByKind([prices(), prices()], array("q", column(lambda: rng.randrange(2))))
    place_s, recomputed_ratio = rng.choice([0.0, 1.0]), rng.choice([0.0, 0.1, 0.7])
    paces = rng.random() * 9, rng.random() * 99, rng.random() * 9
    learned = Learned(prices_s, *paces, rows_s, 0.1, place_s, recomputed_ratio)
    return Snapshot(
        keys=tuple(EndpointKey(str(row)) for row in range(rows)),
        requests=as_given(column(lambda: rng.randrange(9))),
        prefill_tokens=as_given(column(some_tokens)),
        context_tokens=as_given(column(some_tokens)),
        matched_blocks=[0] * rows,
        num_blocks=1,
        weights=tuple(column(lambda: rng.choice([0.5, 1.0, 3.0]))),
        prefilling=as_given(column(lambda: rng.randrange(9))),
        cached_tokens=as_given(column(lambda: rng.choice([0, rng.randrange(prompt_tokens + 1)]))),
        steps_s=column(lambda: 0.001 + rng.random() / 5),
        kv_tokens=kv_tokens,
        prompt_tokens=prompt_tokens,
        output_tokens=rng.choice([0.0, 7.0, 333.3]),
        learned=learned,
        held_s=rng.choice([0.0, rng.random()]),
        max_num_seqs=column(lambda: rng.randrange(9), may_be_absent=True),
        kv_used=used if None in used else array("q", [each or 0 for each in used]),
        sunk_ratios=column(rng.random, may_be_absent=True),
    )


@pytest.mark.parametrize("seed", range(10))
def test_whole_costs(seed: int) -> None:
    """Each column of what each row costs, whatever is known of engines and rows."""
    rng = random.Random(seed)
    for _ in range(50):
        seen = snapshot_of(rng)
        few, many = completion_costs(seen), array_costs.completion_costs(seen, learned_of(seen))
        for name in Costs.__slots__:
            assert [each.hex() for each in getattr(many, name)] == [each.hex() for each in getattr(few, name)]
        if len(few) > 1:
            row = rng.randrange(len(few))
            found = places.saved_s(few, row, seen.cached_tokens)
            assert array_costs.saved_s(many, row, seen.cached_tokens).hex() == found.hex()


@pytest.mark.parametrize("limits", [[128] * 50, [0, 8, 128, 256, 1024] * 10])
def test_places(limits: list[int]) -> None:
    """Of engines of one kind, and of several, of which one has a limit that nobody knows."""
    taken = [(row % 7) / 6 if limit else 0.0 for row, limit in enumerate(limits)]
    few, many = places.places_s(taken, limits, 0.7), array_costs.places_of(floats_of(taken), limits, 0.7)
    assert many is not None
    assert [each.hex() for each in many.tolist()] == [each.hex() for each in few]


@pytest.mark.parametrize("seed", range(50))
def test_steps(seed: int) -> None:
    """The pace of each row."""
    seen = snapshot_of(random.Random(seed))
    prices = Prices((0.0,) * 6, ((0.0001, 0.002, 0.01),), ())
    load = Load(seen.requests, seen.prefilling, seen.prefill_tokens, seen.context_tokens)
    few = snapshots.steps_s([prices], seen.weights, load, seen.prompt_tokens, seen.output_tokens)
    columns = seen.weights, load.requests, load.prefilling, load.context_tokens
    many = arrays.steps_s(prices.tpot_prices_s[0], *columns, seen.prompt_tokens, seen.output_tokens / 2)
    assert list(many) == few


@pytest.mark.parametrize("thresholds", [(), (4,)])
def test_steps_by_kind(thresholds: tuple[int, ...]) -> None:
    """Rows of two kinds have the pace that each has with the prices of its kind; of segments as well."""
    segments = ((0.0001, 0.002, 0.01),) * (1 + len(thresholds))
    other = tuple((2 * one, two, 3 * three) for one, two, three in segments)
    each = tuple(Prices((0.0,) * 6, prices_s, thresholds) for prices_s in (segments, other))
    for seed in range(20):
        rng = random.Random(seed)
        seen = snapshot_of(rng)
        load = Load(seen.requests, seen.prefilling, seen.prefill_tokens, seen.context_tokens)
        kinds = array("q", [rng.randrange(2) for _ in seen.keys] or [0])
        prices = ByKind(each, kinds)
        found = snapshots.steps_s(prices, seen.weights, load, seen.prompt_tokens, seen.output_tokens)
        for row, kind in enumerate(kinds):
            one = Load(
                *([column[row]] for column in (load.requests, load.prefilling, [0] * 99, load.context_tokens))
            )
            of_row = [each[kind]], [seen.weights[row]], one, seen.prompt_tokens, seen.output_tokens
            assert [found[row]] == list(snapshots.steps_s(*of_row))


def test_kinds() -> None:
    """Names in the order in which they come first; of a tuple remembered, of a list not."""
    kinds, names = Kinds(most=2), ("b", "a", "b")
    assert kinds.of(names) == (("b", "a"), array("q", [0, 1, 0]))
    assert kinds.of(names)[1] is kinds.of(names)[1]
    changing = ["b", "a"]
    assert kinds.of(changing)[1] == array("q", [0, 1])
    changing[1] = "b"
    assert kinds.of(changing)[1] == array("q", [0, 0])
    for number in range(9):
        assert kinds.of((str(number),)) == ((str(number),), array("q", [0]))
    assert len(kinds._kept) <= 2


def test_by_kind() -> None:
    """It is the sequence of its rows' values."""
    found = ByKind(("x", "y"), array("q", [0, 1, 1]))
    assert (len(found), found[2], list(found[1:])) == (3, "y", ["y", "y"])
    assert found == ["x", "y", "y"]
    assert found != ["x", "y"]


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
    assert list(array_costs.most_cached_first(scores, cached)) == most_cached_first(scores, cached)


@pytest.mark.parametrize("depths", [[0] * 8, [0, 1, 5, 3, 0, 70, 2, 9]])
def test_cached_tokens(depths: list[int]) -> None:
    """By the bytes of the blocks, and never the whole prompt."""
    few = caches.tokens_of(depths, 64, 4_001, 997)
    times = -(-MANY_ROWS // len(depths))
    assert list(caches.tokens_of(depths * times, 64, 4_001, 997)) == list(few) * times
    assert max(few) < 997


tokens = st.integers(0, 1 << 20)


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), tokens, tokens, st.floats(0.1, 1.0)), min_size=1
    ),
    st.floats(0.0, 1_000.0),
)
def test_kv_used(of_rows: list[tuple[int, int, int, int, float]], output_tokens: float) -> None:
    """Whole tokens, as Python rounds."""
    *columns, ratios = (list(column) for column in zip(*of_rows, strict=True))
    times = -(-MANY_ROWS // len(of_rows))
    found = []
    for count in (1, times):
        requests, prefilling, prefill_tokens, context_tokens = (column * count for column in columns)
        load = Load(requests, prefilling, prefill_tokens, context_tokens)
        engines = Engines(kv_tokens=[1] * len(requests), distinct_ratios=ratios * count)
        found.append(list(snapshots.kv_used(load, engines, output_tokens)))
    assert found[1] == found[0] * times


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), seconds), min_size=1), st.floats(0.0, 99.0))
def test_sequences(of_rows: list[tuple[int, int, float]], output_tokens: float) -> None:
    """The share of the limit that is taken, and the time from one end to the next."""
    requests, limits, steps_s = map(list, zip(*of_rows, strict=True))
    keys = tuple(EndpointKey(str(row)) for row in range(len(of_rows)))
    zeros = [0] * len(of_rows)
    seen = Snapshot(
        keys,
        requests,
        zeros,
        zeros,
        zeros,
        1,
        zeros,
        steps_s=steps_s,
        output_tokens=output_tokens,
        max_num_seqs=limits,
    )
    assert list(arrays.taken_ratios(seen)) == columns_of.taken_ratios(seen)
    assert list(arrays.turns_s(seen)) == list(columns_of.turns_s(seen))


@pytest.mark.parametrize("rows", [2, MANY_ROWS])
def test_a_column_is_kept_until_something_changes(rows: int) -> None:
    """For the same keys it is the same object; what changed is in the next one."""
    known = {EndpointKey(str(row)): row for row in range(rows)}
    kept = KeptColumns(lambda key: known.get(key, 0))
    keys, others = tuple(known), tuple(known)[:1]
    first = kept.of(keys)
    assert list(first) == list(range(rows))
    assert kept.of(others) != first
    known[keys[1]] = 7
    assert kept.of(keys) is first
    kept.changed()
    assert kept.of(keys)[1] == 7
    for number in range(3 * MAX_COLUMNS):
        kept.of((EndpointKey(f"other {number}"),))
    assert len(kept._columns) <= MAX_COLUMNS


@pytest.mark.parametrize("seed", range(20))
def test_views(seed: int) -> None:
    """What runs beyond history speaks for its row, in lists and in arrays."""
    rng = random.Random(seed)
    matched, running = ([rng.choice([0, 0, 3, 5]) for _ in range(80)] for _ in range(2))
    if seed == 0:
        running = [0] * 80
    many = array("q", matched)
    spoke = caches.deepen(many, array("q", running))
    assert list(spoke) == list(caches.deepen(matched, running))
    assert list(many) == matched


@pytest.mark.parametrize("rows", [2, MANY_ROWS])
def test_what_is_under_way(rows: int) -> None:
    """Since the last prefill ended, where one waits; nothing where none does, or where none ended yet."""
    keys = tuple(EndpointKey(str(row)) for row in range(rows))
    table = LoadTable(Counters())
    slots = table.slots(keys)
    table.prefill_turned(keys[0], 3.0)
    table.prefill_turned(keys[1], 4.0)
    prefilling = [1, 0, *[1] * (rows - 2)]
    assert list(under_way_s(table.prefill_since_s(slots), prefilling, 5.0)) == [2.0] + [0.0] * (rows - 1)
    # Another worker said it after this one had looked at the clock.
    assert list(under_way_s(table.prefill_since_s(slots), prefilling, 2.5)) == [0.0] * rows


def test_weights_are_looked_at_once() -> None:
    """A tuple's weights are remembered while it lives, a list may change."""
    same, others = (2.0,) * 3, [1.0, 1.0, 3.0]
    assert weights_of(same) is weights_of(same)
    assert (weights_of(same).each, weights_of(same).one, weights_of(same).total) == (None, 2.0, 6.0)
    assert weights_of(others).each is not None
    others[2] = 1.0
    assert weights_of(others).each is None
    for number in range(3 * MAX_KEPT):
        assert weights_of((float(number), 1.0)).one == number
    assert len(weights._kept) <= MAX_KEPT
