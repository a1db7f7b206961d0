"""TTFT is sane from the first request, learned quickly, relearned after drift, and hard to fool."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.predicting.priced_terms import CEILING_S, PricedTerms
from extproc.predicting.ttft import (
    IDLE,
    STEP_TOKENS,
    Backlog,
    TtftModel,
    TtftPrices,
    step_s,
    times_s,
    total_s,
)

Work = tuple[int, int, int]
"""Uncached and cached tokens of the prompt, uncached tokens of one request ahead."""


def ahead(pending: int) -> Backlog:
    """One request ahead that prefills so many tokens, or none."""
    return Backlog(1, pending, pending, 0, 0.0) if pending else IDLE


def predict(model: TtftModel, work: Work) -> float:
    """What the model expects."""
    uncached, cached, pending = work
    return model.predict(ahead(pending), uncached, cached)


def learn(model: TtftModel, work: Work, ttft_s: float) -> None:
    """Teach one request."""
    uncached, cached, pending = work
    model.learn(ahead(pending), uncached, cached, ttft_s)


def engine_s(work: Work, *, speed: float = 1.0) -> float:
    """TTFT of a 70B-like engine: 30 ms, 0.06 ms a token, 8e-7 ms a pair, 0.002 ms a cached token."""
    u, c, p = work
    pairs = u * (c + u / 2) + p * p / 2
    return (0.030 + 0.06e-3 * (u + p) + 8e-10 * pairs + 0.002e-3 * c) / speed


def workload(seed: int, num: int) -> list[Work]:
    """Log-uniform prompts of 16 to 16,384 tokens, half of each cached on average, idle half of the time."""
    rng = random.Random(seed)
    work = []
    for _ in range(num):
        tokens = 16.0 * 1024.0 ** rng.random()
        cached = tokens * rng.choice((0.0, rng.random()))
        pending = rng.choice((0, rng.randint(0, 20_000)))
        work.append((max(1, round(tokens - cached)), round(cached), pending))
    return work


def relative_error(model: TtftModel, truth_s: Callable[[Work], float], seed: int = 99) -> float:
    """Median relative error over a workload the model was not trained on."""
    return median(abs(predict(model, w) / truth_s(w) - 1.0) for w in workload(seed, 300))


def trained(
    num: int, *, noise: float = 0.1, speed: float = 1.0, model: TtftModel | None = None, seed: int = 1
) -> TtftModel:
    """Return a model that has seen `num` requests of the engine, with log-normal noise."""
    model = model or TtftModel()
    rng = random.Random(seed)
    for work in workload(seed, num):
        learn(model, work, engine_s(work, speed=speed) * math.exp(rng.gauss(0.0, noise)))
    return model


@pytest.mark.parametrize(
    ("work", "expected_s"),
    [
        ((1, 0, 0), 0.010),
        ((1_000, 0, 0), 0.03265),
        ((2_048, 0, 0), 0.0578),
        ((2_048, 30_000, 0), 0.1527),
        ((131_072, 0, 0), 14.06),
        ((100, 0, 40_000), 1.9322),
    ],
)
def test_the_first_prediction_is_the_published_physics(work: Work, expected_s: float) -> None:
    """Before any observation TTFT is that of an 8B model on H100, attention included."""
    assert predict(TtftModel(), work) == pytest.approx(expected_s, rel=3e-3)


def test_one_observation_sets_the_scale() -> None:
    """After one request on an engine 3 times slower, a very different one is predicted slower too."""
    model = TtftModel()
    long, short = (30_000, 0, 0), (1_000, 500, 0)
    before_s = predict(model, long)
    learn(model, short, 3.0 * predict(model, short))
    assert 2.0 < predict(model, long) / before_s < 3.5


def test_an_engine_is_learned_within_a_hundred_requests() -> None:
    """100 noisy observations of an engine unlike the prior bring the median error within 8 %."""
    assert relative_error(TtftModel(), engine_s) > 0.3
    assert relative_error(trained(100), engine_s) < 0.08


def test_noise_free_observations_are_reproduced() -> None:
    """Without noise, predictions converge to the engine's own formula, through both quadratic terms."""
    assert relative_error(trained(2_000, noise=0.0), engine_s) < 0.005


@pytest.mark.parametrize("speed", [0.5, 2.0])
def test_drift_is_relearned_within_a_few_hundred_requests(speed: float) -> None:
    """An engine that becomes twice slower, or quicker, is predicted within 20 % after 400 more requests."""
    model = trained(1_000)
    assert relative_error(model, lambda w: engine_s(w, speed=speed)) > 0.4
    trained(400, speed=speed, model=model, seed=2)
    assert relative_error(model, lambda w: engine_s(w, speed=speed)) < 0.2


def test_outliers_are_mostly_ignored() -> None:
    """One request in 50 that takes 100 times as long moves predictions by less than 20 %."""
    model = TtftModel()
    for i, work in enumerate(workload(1, 1_000)):
        learn(model, work, engine_s(work) * (100.0 if i % 50 == 49 else 1.0))
    assert relative_error(model, engine_s) < 0.2


def test_a_single_freak_does_not_matter() -> None:
    """One request of an hour, as a stalled engine may show, moves a trained model by less than 3 %."""
    model = trained(500)
    work = (2_000, 0, 0)
    before_s = predict(model, work)
    learn(model, work, 3_600.0)
    assert predict(model, work) == pytest.approx(before_s, rel=0.03)


def test_absurdly_quick_answers_are_unlearned() -> None:
    """After 200 requests answered at once, as by a stub, 200 real ones bring predictions within 40 %."""
    model = TtftModel()
    for work in workload(1, 200):
        learn(model, work, engine_s(work, speed=1e6))
    for work in workload(2, 200):
        learn(model, work, engine_s(work))
    assert relative_error(model, engine_s) < 0.4


@pytest.mark.parametrize(
    "far", [(32_000, 0, 0), (8_000, 90_000, 0), (500, 0, 200_000), (1_000, 1_000, 1_000)]
)
def test_far_outside_the_trained_range_predictions_stay_sane(far: Work) -> None:
    """Trained on short prompts alone, all else is the prior's physics at the learned speed."""
    rng = random.Random(4)
    model = TtftModel()
    for _ in range(3_000):
        work = (rng.randint(10, 300), 0, 0)
        learn(model, work, 3.0 * predict(TtftModel(), work) * math.exp(rng.gauss(0.0, 0.2)))
    assert 0.4 < predict(model, far) / (3.0 * predict(TtftModel(), far)) < 2.5


counts = st.integers(0, 1_000_000)
durations = st.floats(1e-4, 1e3)
backlogs = st.builds(
    lambda prefilling, pending, cached, decoding, read: Backlog(
        prefilling, pending * bool(prefilling), (pending + cached) * bool(prefilling), decoding, float(read)
    ),
    st.integers(0, 50),
    counts,
    counts,
    st.integers(0, 500),
    counts,
)


@given(
    st.lists(st.tuples(backlogs, st.integers(1, 1_000_000), counts, durations), max_size=40),
    backlogs,
    st.integers(1, 1_000_000),
    counts,
    counts,
)
@settings(max_examples=60)
def test_more_work_never_takes_less_time(
    history: list[tuple[Backlog, int, int, float]], backlog: Backlog, uncached: int, cached: int, more: int
) -> None:
    """Whatever was observed, predictions are finite, positive and never fall as there is more to do."""
    model = TtftModel()
    for then, u, c, ttft_s in history:
        model.learn(then, u, c, ttft_s)
    here = model.predict(backlog, uncached, cached)
    assert 0.001 <= here <= CEILING_S
    assert model.predict(backlog, uncached + more, cached) >= here
    assert model.predict(backlog, uncached, cached + more) >= here
    busier = replace(backlog, context_tokens=backlog.context_tokens + more)
    assert model.predict(busier, uncached, cached) >= here * (1 - 1e-12)


def test_prices_say_what_the_model_predicts() -> None:
    """Prices taken from a model give its prediction to the bit."""
    model = trained(50)
    for uncached, cached, pending in workload(5, 50):
        parts_s = times_s(model.prices_s, ahead(pending), uncached, cached)  # nothing decodes beside it
        assert total_s(*parts_s) == model.predict(ahead(pending), uncached, cached)


def test_nothing_ahead_is_no_wait() -> None:
    """The own prefill is a constant, tokens, pairs and what is read from the cache."""
    wait_s, work_s = times_s(TtftModel().prices_s, IDLE, 2_000, 1_000)
    assert wait_s == 0.0
    assert work_s == pytest.approx(0.010 + 2 * 0.022 + 2_000 * (1_000 + 1_000) * 0.0013e-6 + 0.0005)


def test_what_is_ahead_waits_by_its_tokens_and_pairs() -> None:
    """Two prompts of 4,000 tokens, half of each cached, as if each were computed by itself."""
    wait_s, _ = times_s(TtftModel().prices_s, Backlog(2, 4_000, 8_000, 0, 0.0), 100, 0)
    assert wait_s == pytest.approx(4 * 0.022 + 2 * 2_000 * (2_000 + 1_000) * 0.0013e-6)


def test_decodes_slow_prefill_down() -> None:
    """Each step carries the decodes' sequences and context, and so does the one that is running."""
    model = TtftModel()
    alone_s = model.predict(IDLE, 8_192, 0)
    crowded_s = model.predict(Backlog(0, 0, 0, 48, 200_000.0), 8_192, 0)
    steps = 8_192 / (STEP_TOKENS - 48) + 1.0
    assert crowded_s - alone_s == pytest.approx(steps * (48 * 0.00001 + 200 * 0.00006))


def test_more_decodes_than_a_step_holds_leave_some_room() -> None:
    """Times stay finite and positive whatever the ledger says."""
    _, work_s = times_s(TtftModel().prices_s, Backlog(0, 0, 0, 10_000, 1e9), 1_000, 0)
    assert 0.0 < work_s < math.inf


def test_a_slower_group_is_learned_beside_decodes() -> None:
    """Prices follow what is observed, for prompts of other lengths too."""
    model, truth, rng = TtftModel(), TtftModel(), random.Random(1)
    for _ in range(300):
        backlog = Backlog(1, rng.randint(0, 8000), 9000, rng.randint(0, 40), rng.random() * 3e5)
        uncached = rng.randint(1, 6000)
        model.learn(backlog, uncached, 500, 3.0 * truth.predict(backlog, uncached, 500))
    assert model.predict(IDLE, 20_000, 0) == pytest.approx(3.0 * truth.predict(IDLE, 20_000, 0), rel=0.05)
    assert step_s(model.prices_s, IDLE) == pytest.approx(3.0 * step_s(truth.prices_s, IDLE), rel=0.05)


@pytest.mark.parametrize(
    ("backlog", "values"),
    [
        (IDLE, (-1, 0, 1.0)),
        (IDLE, (1, -1_000_000, 1.0)),
        (Backlog(1, -1, 1, 0, 0.0), (0, 0, 1.0)),
        (Backlog(0, 0, 0, 1, math.nan), (1, 0, 1.0)),
        (Backlog(0, 0, 0, 1, math.inf), (1, 0, 1.0)),
        (IDLE, (1, 1, 0.0)),
        (IDLE, (1, 1, -1.0)),
        (IDLE, (1, 1, math.nan)),
        (IDLE, (1, 1, math.inf)),
    ],
)
def test_impossible_observations_are_refused_whole(backlog: Backlog, values: tuple[int, int, float]) -> None:
    """A negative or non-finite value raises and leaves the model as it was."""
    model = trained(10)
    before = pickle.dumps(model)
    with pytest.raises(ValueError):
        model.learn(backlog, *values)
    assert pickle.dumps(model) == before


def test_prices_read_in_their_own_units() -> None:
    """After learning, the prices are the engine's, per 1,000 tokens."""
    prices = trained(3_000, noise=0.0).prices
    assert prices.token_s == pytest.approx(0.06, rel=0.05)
    assert prices.pair_s == pytest.approx(0.0008, rel=0.2)
    assert prices.cached_s == pytest.approx(0.002, rel=0.5)  # a thousandth of what computing them costs


def test_a_price_of_zero_is_no_prior() -> None:
    """Prior prices and the floor must be above 0, for learning is relative to them."""
    with pytest.raises(ValueError):
        TtftModel(TtftPrices(cached_s=0.0))
    with pytest.raises(ValueError):
        PricedTerms([1.0], floor_s=0.0)
    with pytest.raises(ValueError):
        PricedTerms([1.0], floor_s=1.0).learn([0.0], 1.0)
