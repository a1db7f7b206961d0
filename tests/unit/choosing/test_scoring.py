"""Scores: worked cases of the peers, and what must hold for any snapshot."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import add

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.choosing.choose import choose, terms_of
from extproc.choosing.policies.inference_lb import inference_terms
from extproc.choosing.policies.prefix_cache import prefix_cache_terms
from extproc.choosing.terms import total
from extproc.values.balancing import Algorithm, LoadBalancing
from extproc.values.choices import Choice, Snapshot
from metadata_center.types import EndpointKey

DEFAULTS = LoadBalancing(algorithm=Algorithm.INFERENCE_LB)
PREFIX_CACHE = LoadBalancing(algorithm=Algorithm.PREFIX_CACHE)
LEAST_REQUEST = LoadBalancing(algorithm=Algorithm.LEAST_REQUEST)
SCORED = (DEFAULTS, PREFIX_CACHE, LEAST_REQUEST)


def scored(snapshot: Snapshot, settings: LoadBalancing = DEFAULTS) -> Choice:
    """The choice of some draw."""
    return choose(snapshot, settings, random.Random(1), 0)


def scores(snapshot: Snapshot, settings: LoadBalancing = DEFAULTS) -> list[float]:
    """The scores of a policy that has some."""
    found = scored(snapshot, settings).scores
    assert found is not None
    return list(found)


def best(values: Sequence[float]) -> int:
    """The first row of the highest score."""
    return values.index(max(values))


def snapshot(
    *rows: tuple[int, int, int], num_blocks: int = 10, weights: tuple[float, ...] | None = None
) -> Snapshot:
    """Rows of (requests, prefill tokens, matched blocks)."""
    requests, prefill_tokens, matched = zip(*rows, strict=True)
    return Snapshot(
        keys=tuple(EndpointKey(f"10.0.0.{row}:8000") for row in range(len(rows))),
        requests=requests,
        prefill_tokens=prefill_tokens,
        context_tokens=(0,) * len(rows),
        matched_blocks=matched,
        num_blocks=num_blocks,
        weights=weights or (1.0,) * len(rows),
    )


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """1 to 8 rows with arbitrary load, match and weight."""
    rows = draw(
        st.lists(
            st.tuples(st.integers(0, 40), st.integers(0, 20_000), st.integers(0, 10)), min_size=1, max_size=8
        )
    )
    weights = draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=len(rows), max_size=len(rows)))
    return snapshot(*rows, weights=tuple(weights))


def permuted(original: Snapshot, order: list[int]) -> Snapshot:
    """The same rows in another order."""
    return replace(
        original,
        keys=tuple(original.keys[row] for row in order),
        requests=[original.requests[row] for row in order],
        prefill_tokens=[original.prefill_tokens[row] for row in order],
        context_tokens=[original.context_tokens[row] for row in order],
        matched_blocks=[original.matched_blocks[row] for row in order],
        weights=[original.weights[row] for row in order],
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(3, 2048, 8), (1, 0, 0), (10, 512, 10)], [-1.844444, 0.0, -0.75]),
        ([(0, 0, 0), (6, 0, 10)], [0.0, 0.0]),
        ([(0, 0, 0), (5, 0, 10)], [0.0, 1.0]),
        ([(1, 500, 10), (0, 0, 0)], [0.035156, 0.0]),
    ],
)
def test_aigw_worked_scores(rows: list[tuple[int, int, int]], expected: list[float]) -> None:
    """With equal weights the scores are AIGW's."""
    assert scores(snapshot(*rows)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "percent", "expected"),
    [(1, 5, 1), (20, 5, 1), (39, 5, 1), (40, 5, 2), (100, 5, 5), (10, 0, 1), (10, 100, 10), (3, 50, 1)],
)
def test_aigw_candidate_counts(rows: int, percent: int, expected: int) -> None:
    """The candidates are the floor of the percentage, at least one and at most all."""
    choice = scored(snapshot(*[(0, 0, 0)] * rows), replace(DEFAULTS, candidate_percent=percent))
    assert choice.candidates == expected


def test_a_weight_divides_the_load() -> None:
    """Twice the requests and prefill on twice the capacity scores the same."""
    assert scores(snapshot((4, 3000, 0), (8, 6000, 0), weights=(1.0, 2.0))) == [-3.0, -3.0]
    rows = snapshot((4, 0, 0), (8, 0, 0), (5, 0, 0), weights=(1.0, 2.0, 1.0))
    assert scores(rows, LEAST_REQUEST) == [-4.0, -4.0, -5.0]


@pytest.mark.parametrize(
    ("load", "cache", "names"),
    [
        (True, True, ["cache", "requests", "prefill"]),
        (True, False, ["requests", "prefill"]),
        (False, True, ["cache"]),
    ],
)
def test_switches_drop_terms(load: bool, cache: bool, names: list[str]) -> None:
    """A term that is turned off is neither in the score nor in its parts."""
    settings = replace(DEFAULTS, load_aware_enable=load, cache_aware_enable=cache)
    assert list(inference_terms(snapshot((1, 1, 1), (0, 0, 0)), settings)) == names


def test_a_prompt_without_blocks_hits_nothing() -> None:
    """Zero matched of zero blocks is a hit ratio of zero, not an error."""
    terms = inference_terms(snapshot((0, 0, 0), num_blocks=0), DEFAULTS)
    assert terms["cache"] == [0.0]


@given(snapshots(), st.sampled_from(SCORED), st.booleans(), st.booleans())
def test_terms_sum_to_the_scores(
    any_snapshot: Snapshot, policy: LoadBalancing, load: bool, cache: bool
) -> None:
    """For each scored policy the named parts, added up in their order, are exactly the scores."""
    settings = replace(policy, load_aware_enable=load, cache_aware_enable=cache)
    terms = terms_of(any_snapshot, settings)
    found = scored(any_snapshot, settings).scores
    assert found == total(terms)
    if found is None:
        assert terms == {}
    else:
        assert found == [reduce(add, parts) for parts in zip(*terms.values(), strict=True)]
        assert len(found) == len(any_snapshot.keys)


@pytest.mark.parametrize("algorithm", [Algorithm.RANDOM, Algorithm.ROUND_ROBIN])
def test_policies_without_preference_have_no_terms(algorithm: Algorithm) -> None:
    """A policy that does not score has no parts, and no parts have no total."""
    terms = terms_of(snapshot((1, 1, 1), (0, 0, 0)), LoadBalancing(algorithm=algorithm))
    assert (terms, total(terms)) == ({}, None)


@given(snapshots(), st.data())
def test_scores_follow_their_rows(any_snapshot: Snapshot, data: st.DataObject) -> None:
    """Reordering the rows reorders the scores and changes none."""
    order = data.draw(st.permutations(range(len(any_snapshot.keys))))
    moved = permuted(any_snapshot, order)
    for settings in SCORED:
        after = terms_of(moved, settings)
        for name, values in terms_of(any_snapshot, settings).items():
            assert after[name] == pytest.approx([values[row] for row in order])


@given(snapshots(), st.data())
def test_a_better_row_never_loses_by_improving(any_snapshot: Snapshot, data: st.DataObject) -> None:
    """Less load or a longer match never narrows a row's lead over, or widens its gap to, any other row."""
    row = data.draw(st.integers(0, len(any_snapshot.keys) - 1))
    requests, prefill_tokens, matched = (
        list(column)
        for column in (any_snapshot.requests, any_snapshot.prefill_tokens, any_snapshot.matched_blocks)
    )
    requests[row] = data.draw(st.integers(0, requests[row]))
    prefill_tokens[row] = data.draw(st.integers(0, prefill_tokens[row]))
    matched[row] = data.draw(st.integers(matched[row], 10))
    better = replace(any_snapshot, requests=requests, prefill_tokens=prefill_tokens, matched_blocks=matched)
    for policy in (DEFAULTS, LEAST_REQUEST):
        before, after = scores(any_snapshot, policy), scores(better, policy)
        for other in range(len(before)):
            assert after[row] - after[other] >= before[row] - before[other] - 1e-9


def test_prefix_cache_counts_only_blocks_that_distinguish_rows() -> None:
    """A prefix that every row holds decides nothing; load does."""
    terms = prefix_cache_terms(snapshot((2, 0, 7), (1, 0, 7)), DEFAULTS)
    assert terms["cache"] == [0.0, 0.0]
    assert terms["requests"][1] > terms["requests"][0]


def test_prefix_cache_prefers_one_more_block_to_any_load_difference_within_the_guard() -> None:
    """Among rows within the guard the match comes first, load only breaks ties."""
    found = scores(snapshot((3, 0, 2), (0, 0, 1), (8, 0, 0), (3, 0, 2)), PREFIX_CACHE)
    assert found[0] == found[3] > found[1] > found[2]


@pytest.mark.parametrize(("spread", "expected"), [(8, 0), (9, 1)])
def test_prefix_cache_falls_back_on_imbalance(spread: int, expected: int) -> None:
    """A spread over 8 requests turns the cache off: AIBrix's absolute guard."""
    found = scores(snapshot((1, 0, 5), (0, 0, 0), (spread, 0, 0)), PREFIX_CACHE)
    assert best(found) == expected


@pytest.mark.parametrize(("holder", "expected"), [(4, 0), (8, 2)])
def test_prefix_cache_passes_over_an_overloaded_holder(holder: int, expected: int) -> None:
    """A holder above mean + sigma counts as holding nothing; the next holder is taken."""
    rows = [(holder, 0, 9), (4, 0, 0), (4, 0, 3), (3, 0, 0), (4, 0, 0), (4, 0, 0)]
    found = scores(snapshot(*rows), PREFIX_CACHE)
    assert best(found) == expected


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_prefix_cache_of_two_rows_passes_over_none(weight: float) -> None:
    """Of two rows the higher is exactly mean + sigma, which is not above it, however the sums round."""
    found = scores(snapshot((3, 0, 0), (4, 0, 1), weights=(weight, weight)), PREFIX_CACHE)
    assert best(found) == 1


def test_prefix_cache_obeys_the_switches() -> None:
    """Without load awareness the longest match wins whatever its load; without the cache, the least load."""
    rows = snapshot((90, 0, 5), (0, 0, 0))
    assert best(scores(rows, replace(PREFIX_CACHE, load_aware_enable=False))) == 0
    assert best(scores(rows, replace(PREFIX_CACHE, cache_aware_enable=False))) == 1
