"""Scores: worked cases of the peers, and what must hold for any snapshot."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.choosing.policies import inference_lb, least_request, prefix_cache
from extproc.choosing.scoring import inference_terms, least_request_terms, prefix_cache_terms
from extproc.choosing.settings import LoadBalancing
from extproc.types import Snapshot
from metadata_center.types import EndpointKey

DEFAULTS = LoadBalancing()


def snapshot(
    *rows: tuple[int, int, int], num_blocks: int = 10, weights: tuple[float, ...] | None = None
) -> Snapshot:
    """Rows of (requests, prefill tokens, matched blocks)."""
    requests, prefill_tokens, matched = np.array(rows, np.int64).reshape(-1, 3).T
    return Snapshot(
        keys=tuple(EndpointKey(f"10.0.0.{row}:8000") for row in range(len(rows))),
        requests=requests,
        prefill_tokens=prefill_tokens,
        context_tokens=np.zeros(len(rows), np.int64),
        matched_blocks=matched,
        num_blocks=num_blocks,
        weights=np.ones(len(rows)) if weights is None else np.array(weights),
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
        requests=original.requests[order],
        prefill_tokens=original.prefill_tokens[order],
        context_tokens=original.context_tokens[order],
        matched_blocks=original.matched_blocks[order],
        weights=original.weights[order],
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
    assert inference_lb(snapshot(*rows), DEFAULTS).scores == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "percent", "expected"),
    [(1, 5, 1), (20, 5, 1), (39, 5, 1), (40, 5, 2), (100, 5, 5), (10, 0, 1), (10, 100, 10), (3, 50, 1)],
)
def test_aigw_candidate_counts(rows: int, percent: int, expected: int) -> None:
    """The candidates are the floor of the percentage, at least one and at most all."""
    ranking = inference_lb(snapshot(*[(0, 0, 0)] * rows), LoadBalancing(candidate_percent=percent))
    assert ranking.candidates == expected


def test_a_weight_divides_the_load() -> None:
    """Twice the requests and prefill on twice the capacity scores the same."""
    both = inference_lb(snapshot((4, 3000, 0), (8, 6000, 0), weights=(1.0, 2.0)), DEFAULTS)
    assert both.scores is not None
    assert both.scores[0] == both.scores[1] == -3.0
    loads = least_request(snapshot((4, 0, 0), (8, 0, 0), (5, 0, 0), weights=(1.0, 2.0, 1.0))).scores
    assert loads is not None
    assert loads.tolist() == [-4.0, -4.0, -5.0]


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
    settings = LoadBalancing(load_aware_enable=load, cache_aware_enable=cache)
    assert list(inference_terms(snapshot((1, 1, 1), (0, 0, 0)), settings)) == names


def test_a_prompt_without_blocks_hits_nothing() -> None:
    """Zero matched of zero blocks is a hit ratio of zero, not an error."""
    terms = inference_terms(snapshot((0, 0, 0), num_blocks=0), DEFAULTS)
    assert terms["cache"].tolist() == [0.0]


@given(snapshots())
def test_terms_sum_to_the_scores(any_snapshot: Snapshot) -> None:
    """For each scored policy the named parts, added up, are the score."""
    for ranking in (
        inference_lb(any_snapshot, DEFAULTS),
        prefix_cache(any_snapshot, DEFAULTS),
        least_request(any_snapshot),
    ):
        assert ranking.scores is not None
        assert ranking.scores == pytest.approx(sum(ranking.terms.values()))
        assert ranking.scores.shape == (len(any_snapshot.keys),)


@given(snapshots(), st.data())
def test_scores_follow_their_rows(any_snapshot: Snapshot, data: st.DataObject) -> None:
    """Reordering the rows reorders the scores and changes none."""
    order = data.draw(st.permutations(range(len(any_snapshot.keys))))
    moved = permuted(any_snapshot, order)
    for terms in (
        lambda s: inference_terms(s, DEFAULTS),
        least_request_terms,
        lambda s: prefix_cache_terms(s, DEFAULTS),
    ):
        for name, values in terms(any_snapshot).items():
            assert terms(moved)[name].tolist() == pytest.approx(values[order].tolist())


@given(snapshots(), st.data())
def test_a_better_row_never_loses_by_improving(any_snapshot: Snapshot, data: st.DataObject) -> None:
    """Less load or a longer match never narrows a row's lead over, or widens its gap to, any other row."""
    row = data.draw(st.integers(0, len(any_snapshot.keys) - 1))
    better = replace(
        any_snapshot,
        requests=any_snapshot.requests.copy(),
        prefill_tokens=any_snapshot.prefill_tokens.copy(),
        matched_blocks=any_snapshot.matched_blocks.copy(),
    )
    better.requests[row] = data.draw(st.integers(0, int(better.requests[row])))
    better.prefill_tokens[row] = data.draw(st.integers(0, int(better.prefill_tokens[row])))
    better.matched_blocks[row] = data.draw(st.integers(int(better.matched_blocks[row]), 10))
    for policy in (lambda s: inference_lb(s, DEFAULTS), least_request):
        before, after = policy(any_snapshot).scores, policy(better).scores
        assert before is not None
        assert after is not None
        assert ((after[row] - after) >= (before[row] - before) - 1e-9).all()


def test_prefix_cache_counts_only_blocks_that_tell_rows_apart() -> None:
    """A prefix that every row holds decides nothing; load does."""
    terms = prefix_cache_terms(snapshot((2, 0, 7), (1, 0, 7)), DEFAULTS)
    assert terms["cache"].tolist() == [0.0, 0.0]
    assert terms["requests"][1] > terms["requests"][0]


def test_prefix_cache_prefers_one_more_block_to_any_load_difference_within_the_guard() -> None:
    """Among rows within the guard the match comes first, load only breaks ties."""
    scores = prefix_cache(snapshot((3, 0, 2), (0, 0, 1), (8, 0, 0), (3, 0, 2)), DEFAULTS).scores
    assert scores is not None
    assert scores[0] == scores[3] > scores[1] > scores[2]


@pytest.mark.parametrize(("spread", "best"), [(8, 0), (9, 1)])
def test_prefix_cache_falls_back_on_imbalance(spread: int, best: int) -> None:
    """A spread over 8 requests turns the cache off: AIBrix's absolute guard."""
    scores = prefix_cache(snapshot((1, 0, 5), (0, 0, 0), (spread, 0, 0)), DEFAULTS).scores
    assert scores is not None
    assert scores.argmax() == best


@pytest.mark.parametrize(("holder", "best"), [(4, 0), (8, 2)])
def test_prefix_cache_passes_over_an_overloaded_holder(holder: int, best: int) -> None:
    """A holder above mean + sigma counts as holding nothing; the next holder is taken."""
    rows = [(holder, 0, 9), (4, 0, 0), (4, 0, 3), (3, 0, 0), (4, 0, 0), (4, 0, 0)]
    scores = prefix_cache(snapshot(*rows), DEFAULTS).scores
    assert scores is not None
    assert scores.argmax() == best


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_prefix_cache_of_two_rows_passes_over_nobody(weight: float) -> None:
    """Of two rows the higher is exactly mean + sigma, which is not above it, however the sums round."""
    scores = prefix_cache(snapshot((3, 0, 0), (4, 0, 1), weights=(weight, weight)), DEFAULTS).scores
    assert scores is not None
    assert scores.argmax() == 1


def test_prefix_cache_obeys_the_switches() -> None:
    """Without load awareness the longest match wins whatever its load; without the cache, the least load."""
    rows = snapshot((90, 0, 5), (0, 0, 0))
    blind = prefix_cache(rows, LoadBalancing(load_aware_enable=False)).scores
    cacheless = prefix_cache(rows, LoadBalancing(cache_aware_enable=False)).scores
    assert blind is not None
    assert cacheless is not None
    assert blind.argmax() == 0
    assert cacheless.argmax() == 1
