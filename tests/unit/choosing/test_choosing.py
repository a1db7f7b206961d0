"""The choice: what is picked, what follows, what is drawn, and that it replays."""

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.choosing.choose import choose
from extproc.choosing.picker import pick
from extproc.choosing.policies import registry
from extproc.choosing.policies.registry import POLICIES
from extproc.choosing.replay import RecordingRng, ReplayRng
from extproc.predicting.ttft import TtftModel
from extproc.values.balancing import Algorithm, LoadBalancing
from extproc.values.choices import Learned, Snapshot
from metadata_center.load.counters import Counters
from metadata_center.load.table import LoadTable
from metadata_center.types import Charge, EndpointKey, RequestId

NO_DRAWS = ReplayRng([])

AIGW_WITHOUT_TERMS = LoadBalancing(
    algorithm=Algorithm.INFERENCE_LB, load_aware_enable=False, cache_aware_enable=False, fallbacks=1
)


def snapshot(
    requests: list[int], prefill: list[int] | None = None, matched: list[int] | None = None
) -> Snapshot:
    """Rows with these loads and matches out of 10 blocks, all of weight 1."""
    zeros = [0] * len(requests)
    return Snapshot(
        keys=tuple(EndpointKey(f"10.0.0.{row}:8000") for row in range(len(requests))),
        requests=requests,
        prefill_tokens=prefill or zeros,
        context_tokens=zeros,
        matched_blocks=matched or zeros,
        num_blocks=10,
        weights=(1.0,) * len(requests),
        prefilling=[min(1, row) for row in requests],
        cached_tokens=[100 * row for row in matched or zeros],
        steps_s=[0.01] * len(requests),
        kv_tokens=[0] * len(requests),
        prompt_tokens=1_000,
        output_tokens=200.0,
        learned=Learned(TtftModel().prices_s, 1.0, 50.0),
    )


@pytest.mark.parametrize(
    "algorithm", [Algorithm.INFERENCE_LB, Algorithm.PREFIX_CACHE, Algorithm.LEAST_REQUEST]
)
def test_without_ties_nothing_is_drawn_and_order_is_by_score(algorithm: Algorithm) -> None:
    """The best row is chosen and the next best follow, as many as there are fallbacks."""
    choice = choose(snapshot([3, 1, 2, 0]), LoadBalancing(algorithm=algorithm, fallbacks=2), NO_DRAWS, 0)
    assert choice.order == (3, 1, 2)
    assert choice.candidates == 1


@pytest.mark.parametrize("algorithm", list(Algorithm))
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_fallbacks_are_distinct_and_bounded_by_the_rows(algorithm: Algorithm, rows: int) -> None:
    """The order names 1 + fallbacks different rows, or all there are."""
    settings = LoadBalancing(algorithm=algorithm, fallbacks=2)
    order = choose(snapshot([0] * rows), settings, random.Random(1), 7).order
    assert len(order) == len(set(order)) == min(3, rows)


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_an_empty_snapshot_is_an_error(algorithm: Algorithm) -> None:
    """With no row there is no choice, only a `ValueError`."""
    with pytest.raises(ValueError):
        choose(snapshot([]), LoadBalancing(algorithm=algorithm), NO_DRAWS, 0)


def test_round_robin_follows_the_turn() -> None:
    """Each turn starts one row further, its fallbacks come after it in the same circle, nothing is drawn."""
    settings = LoadBalancing(algorithm=Algorithm.ROUND_ROBIN, fallbacks=1)
    orders = [choose(snapshot([9, 0, 5]), settings, NO_DRAWS, turn).order for turn in range(4)]
    assert orders == [(0, 1), (1, 2), (2, 0), (0, 1)]


@pytest.mark.parametrize(
    ("settings", "requests"),
    [
        (LoadBalancing(algorithm=Algorithm.RANDOM, fallbacks=1), [50, 0, 0]),
        (AIGW_WITHOUT_TERMS, [50, 0, 0]),
        (LoadBalancing(algorithm=Algorithm.LEAST_REQUEST, fallbacks=1), [4, 4, 4]),
        (LoadBalancing(algorithm=Algorithm.INFERENCE_LB, fallbacks=1), [4, 4, 4]),
        (LoadBalancing(algorithm=Algorithm.PREFIX_CACHE, fallbacks=1), [4, 4, 4]),
    ],
)
def test_ties_are_broken_uniformly(settings: LoadBalancing, requests: list[int]) -> None:
    """Rows that are equal to a policy are chosen, and follow, equally often: all six orders do."""
    rng = random.Random(5)
    seen = Counter(choose(snapshot(requests), settings, rng, 0).order for _ in range(6000))
    assert len(seen) == 6
    assert all(850 < count < 1150 for count in seen.values())


def test_random_has_no_scores_and_all_rows_as_candidates() -> None:
    """A policy without preference says so."""
    choice = choose(snapshot([1, 2, 3]), LoadBalancing(algorithm=Algorithm.RANDOM), random.Random(1), 0)
    assert (choice.scores, choice.candidates) == (None, 3)


def test_the_pick_is_uniform_among_candidates_with_a_random_cut() -> None:
    """Of scores 2, 1, 1, 1, 0 with two candidates: the best half the time, its equals a sixth each."""
    rng = random.Random(5)
    seen = Counter(pick([1.0, 2.0, 1.0, 0.0, 1.0], 5, 2, 1, rng)[0] for _ in range(6000))
    assert seen.keys() == {0, 1, 2, 4}
    assert 2850 < seen[1] < 3150
    assert all(850 < seen[row] < 1150 for row in (0, 2, 4))


def test_fallbacks_of_a_picked_candidate_start_at_the_best() -> None:
    """When the second best is picked, the best comes next and then the third."""
    assert pick([5.0, 4.0, 3.0, 2.0], 4, 2, 3, ReplayRng([0.5])) == (1, 0, 2)


@given(
    algorithm=st.sampled_from(list(Algorithm)),
    rows=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12
    ),
    percent=st.integers(0, 100),
    fallbacks=st.integers(0, 8),
    seed=st.integers(0, 99),
)
def test_a_recorded_decision_replays(
    algorithm: Algorithm, rows: list[tuple[int, int, int]], percent: int, fallbacks: int, seed: int
) -> None:
    """The draws on record give the same order again; all of them are used, and they are few."""
    requests, prefill, matched = (list(column) for column in zip(*rows, strict=True))
    settings = LoadBalancing(algorithm=algorithm, candidate_percent=percent, fallbacks=fallbacks)
    recording = RecordingRng(random.Random(seed))
    choice = choose(snapshot(requests, prefill, matched), settings, recording, seed)

    again = choose(snapshot(requests, prefill, matched), settings, ReplayRng(recording.draws), seed)

    assert again.order == choice.order
    assert len(recording.draws) <= fallbacks + 2
    if recording.draws:
        with pytest.raises(ValueError):
            choose(snapshot(requests, prefill, matched), settings, ReplayRng(recording.draws[:-1]), seed)


@given(
    scores=st.lists(st.integers(-2, 2).map(float), min_size=1, max_size=9),
    candidates=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_picks_respect_the_ranking(scores: list[float], candidates: int, seed: int) -> None:
    """The chosen row is no worse than the candidate cut, and no row left out beats a fallback."""
    candidates = min(candidates, len(scores))
    first, *rest = pick(scores, len(scores), candidates, len(scores), random.Random(seed))
    assert scores[first] >= sorted(scores, reverse=True)[candidates - 1]
    left = [scores[row] for row in rest]
    assert left == sorted(left, reverse=True)
    assert sorted([first, *rest]) == list(range(len(scores)))


@given(
    scores=st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=20),
    candidates=st.integers(1, 20),
    wanted=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_fewer_fallbacks_are_the_beginning_of_more(
    scores: list[float], candidates: int, wanted: int, seed: int
) -> None:
    """How many rows are wanted changes neither what comes first nor what follows, whatever ties there are."""
    rows = len(scores)
    candidates, wanted = min(candidates, rows), min(wanted, rows)
    everyone = pick(scores, rows, candidates, rows, random.Random(seed))
    assert pick(scores, rows, candidates, wanted, random.Random(seed)) == everyone[:wanted]


@pytest.mark.parametrize(
    "algorithm", [Algorithm.INFERENCE_LB, Algorithm.PREFIX_CACHE, Algorithm.LEAST_REQUEST]
)
def test_charging_at_the_choice_spreads_a_burst(algorithm: Algorithm) -> None:
    """64 choices over 8 equal endpoints, each charged at once, leave them at most one request apart."""
    table = LoadTable(Counters())
    base = snapshot([0] * 8)
    slots = table.slots(base.keys)
    rng = random.Random(3)
    for number in range(64):
        view = table.view(slots)
        now = snapshot(list(view.requests), list(view.prefill_tokens))
        row = choose(now, LoadBalancing(algorithm=algorithm), rng, number).order[0]
        table.charge(Charge(RequestId(str(number)), base.keys[row], 100, 500), float(number), None)
        spread = table.view(slots).requests
        assert max(spread) - min(spread) <= 1
    assert table.view(slots).requests == [8] * 8


def test_every_policy_is_found_by_its_name() -> None:
    """Each name of the configuration has its object, and each file of policies has one of them."""
    assert set(POLICIES) == set(Algorithm)
    modules = {type(policy).__module__.rpartition(".")[2] for policy in POLICIES.values()}
    folder = Path(registry.__file__).parent
    assert modules == {path.stem for path in folder.glob("*.py")} - {"__init__", "registry"}
