"""TTFT is sane from the first request, learned quickly, relearned after drift, and hard to fool."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Callable
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.predicting.priced_terms import CEILING_S, PricedTerms
from extproc.predicting.prices import Prices
from extproc.predicting.ttft import TtftModel, TtftPrices

Work = tuple[float, float, float]


def engine_s(work: Work, *, speed: float = 1.0) -> float:
    """TTFT of a 70B-like engine: 30 ms, 0.06 ms a token, 8e-7 ms a pair, 0.05 ms a pending token."""
    u, c, p = work
    return (0.030 + 0.06e-3 * u + 8e-10 * u * (c + u / 2) + 0.05e-3 * p) / speed


def workload(seed: int, num: int) -> list[Work]:
    """Log-uniform prompts of 16 to 16,384 tokens, half of each cached on average, idle half of the time."""
    rng = random.Random(seed)
    work = []
    for _ in range(num):
        tokens = 16.0 * 1024.0 ** rng.random()
        cached = tokens * rng.choice((0.0, rng.random()))
        work.append((tokens - cached, cached, rng.choice((0.0, rng.uniform(0.0, 20_000.0)))))
    return work


def relative_error(model: TtftModel, truth_s: Callable[[Work], float], seed: int = 99) -> float:
    """Median relative error over a workload the model was not trained on."""
    return median(abs(model.predict(*w) / truth_s(w) - 1.0) for w in workload(seed, 300))


def trained(
    num: int, *, noise: float = 0.1, speed: float = 1.0, model: TtftModel | None = None, seed: int = 1
) -> TtftModel:
    """Return a model that has seen `num` requests of the engine, with log-normal noise."""
    model = model or TtftModel()
    rng = random.Random(seed)
    for work in workload(seed, num):
        model.learn(*work, engine_s(work, speed=speed) * math.exp(rng.gauss(0.0, noise)))
    return model


@pytest.mark.parametrize(
    ("work", "expected_s"),
    [
        ((0, 0, 0), 0.010),
        ((1_000, 0, 0), 0.03565),
        ((2_048, 0, 0), 0.0639),
        ((2_048, 30_000, 0), 0.1588),
        ((131_072, 0, 0), 14.454),
        ((100, 0, 40_000), 1.0125),
    ],
)
def test_the_first_prediction_is_the_published_physics(work: Work, expected_s: float) -> None:
    """Before any observation TTFT is that of an 8B model on H100, attention included."""
    assert TtftModel().predict(*work) == pytest.approx(expected_s, rel=1e-3)


def test_one_observation_sets_the_scale() -> None:
    """After one request on an engine 3 times slower, a very different one is predicted slower too."""
    model = TtftModel()
    long = (30_000.0, 0.0, 0.0)
    before_s = model.predict(*long)
    model.learn(1_000, 500, 0, 3.0 * model.predict(1_000, 500, 0))
    assert 2.0 < model.predict(*long) / before_s < 3.5


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
        model.learn(*work, engine_s(work) * (100.0 if i % 50 == 49 else 1.0))
    assert relative_error(model, engine_s) < 0.2


def test_a_single_freak_does_not_matter() -> None:
    """One request of an hour, as a stalled engine may show, moves a trained model by less than 3 %."""
    model = trained(500)
    before_s = model.predict(2_000, 0, 0)
    model.learn(2_000, 0, 0, 3_600.0)
    assert model.predict(2_000, 0, 0) == pytest.approx(before_s, rel=0.03)


def test_absurdly_quick_answers_are_unlearned() -> None:
    """After 200 requests answered at once, as by a stub, 200 real ones bring predictions within 40 %."""
    model = TtftModel()
    for work in workload(1, 200):
        model.learn(*work, engine_s(work, speed=1e6))
    for work in workload(2, 200):
        model.learn(*work, engine_s(work))
    assert relative_error(model, engine_s) < 0.4


@pytest.mark.parametrize(
    "far", [(32_000, 0, 0), (8_000, 90_000, 0), (500, 0, 200_000), (1_000, 1_000, 1_000)]
)
def test_far_outside_the_trained_range_predictions_stay_sane(far: Work) -> None:
    """Trained on short prompts alone, all else is the prior's physics at the learned speed."""
    rng = random.Random(4)
    model = TtftModel()
    for _ in range(3_000):
        u = rng.uniform(10.0, 300.0)
        model.learn(u, 0, 0, 3.0 * TtftModel().predict(u, 0, 0) * math.exp(rng.gauss(0.0, 0.2)))
    assert 0.4 < model.predict(*far) / (3.0 * TtftModel().predict(*far)) < 2.5


counts = st.floats(0.0, 1e6)
durations = st.floats(1e-4, 1e3)


@given(
    st.lists(st.tuples(counts, counts, counts, durations), max_size=40),
    st.lists(counts, min_size=6, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_more_work_never_takes_less_time(history: list[tuple[float, ...]], at: list[float]) -> None:
    """Whatever was observed, predictions are finite, positive and never fall as any count grows."""
    model = TtftModel()
    for u, c, p, ttft_s in history:
        model.learn(u, c, p, ttft_s)
    u, c, p, *more = at
    here = model.predict(u, c, p)
    assert 0.001 <= here <= CEILING_S
    for grown in ((u + more[0], c, p), (u, c + more[1], p), (u, c, p + more[2])):
        assert model.predict(*grown) >= here


@given(st.lists(st.tuples(*[st.integers(0, 3_000_000)] * 3), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_prices_say_what_the_model_predicts(works: list[tuple[int, int, int]]) -> None:
    """Prices taken from a model give its prediction to the bit, for counts however large."""
    model = trained(50)
    prices = Prices(model.prices_s, (), ())
    assert [prices.ttft_s(*work) for work in works] == [model.predict(*work) for work in works]


def test_a_count_that_is_not_a_number_makes_the_worst_candidate() -> None:
    """NaN predicts the ceiling: never finite by luck, never the best."""
    assert TtftModel().predict(math.nan, 0.0, 0.0) == CEILING_S
    assert TtftModel().predict(0.0, math.nan, 0.0) == CEILING_S
    assert TtftModel().predict(0.0, 0.0, math.nan) == CEILING_S


@pytest.mark.parametrize(
    "values",
    [
        (-1, 0, 0, 1),
        (0, -1, 0, 1),
        (0, 0, -1, 1),
        (math.nan, 0, 0, 1),
        (0, math.inf, 0, 1),
        (1e200, 0, 0, 1),
        (1, 1, 1, 0),
        (1, 1, 1, -1),
        (1, 1, 1, math.nan),
        (1, 1, 1, math.inf),
    ],
)
def test_impossible_observations_are_refused_whole(values: tuple[float, ...]) -> None:
    """A negative or non-finite value raises and leaves the model as it was."""
    model = trained(10)
    before = pickle.dumps(model)
    with pytest.raises(ValueError):
        model.learn(*values)
    assert pickle.dumps(model) == before


def test_prices_read_in_their_own_units() -> None:
    """After learning, the prices are the engine's, per 1,000 tokens."""
    prices = trained(3_000, noise=0.0).prices
    assert prices.uncached_s == pytest.approx(0.06, rel=0.05)
    assert prices.pending_s == pytest.approx(0.05, rel=0.05)
    assert prices.cached_pairs_s == pytest.approx(0.0008, rel=0.2)


def test_a_price_of_zero_is_no_prior() -> None:
    """Prior prices and the floor must be above 0, for learning is relative to them."""
    with pytest.raises(ValueError):
        TtftModel(TtftPrices(cached_s=0.0))
    with pytest.raises(ValueError):
        PricedTerms([1.0], floor_s=0.0)
    with pytest.raises(ValueError):
        PricedTerms([1.0], floor_s=1.0).learn([0.0], 1.0)
