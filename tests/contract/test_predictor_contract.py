"""What every learner owes its caller, and AIGW's published tables for its predictors.

The checks follow river's `check_estimator`: inputs unmodified, errors without effect, a pickle round trip,
seeded repeatability, bounded size.
"""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.predicting.least_squares import RecursiveLeastSquares
from extproc.predicting.prices import priced_tpot_s
from extproc.predicting.tpot import SegmentedTpotModel, TpotModel, TpotPrices
from extproc.predicting.ttft import IDLE, Backlog, TtftModel
from extproc.values.prices import Prices
from tests.builds import pickles


@dataclass(frozen=True)
class Learner:
    """One kind of learner behind the contract: features are a list of `n` numbers >= 0."""

    make: Callable[[], Any]
    n: int
    predict: Callable[[Any, list[float]], float]
    learn: Callable[[Any, list[float], float], None]


def _spread(model: Any, x: list[float]) -> float:
    return float(model.predict(*x))


def _spread_learn(model: Any, x: list[float], y: float) -> None:
    model.learn(*x, y)


def _tokens(number: float) -> Any:
    """A count where there is one."""
    return int(number) if math.isfinite(number) else number


def _ttft(model: Any, x: list[float]) -> float:
    uncached, cached, context = map(_tokens, x)
    return float(model.predict(Backlog(0, 0, 0, 1, context), uncached, cached))


def _ttft_learn(model: Any, x: list[float], y: float) -> None:
    uncached, cached, context = map(_tokens, x)
    model.learn(Backlog(0, 0, 0, 1, context), uncached, cached, y)


LEARNERS = {
    "least_squares": Learner(
        lambda: RecursiveLeastSquares(4), 4, lambda m, x: float(m.predict(x)), lambda m, x, y: m.learn(x, y)
    ),
    "least_squares_forgetting": Learner(
        lambda: RecursiveLeastSquares(4, forgetting=0.98),
        4,
        lambda m, x: float(m.predict(x)),
        lambda m, x, y: m.learn(x, y),
    ),
    "ttft": Learner(TtftModel, 3, _ttft, _ttft_learn),
    "tpot": Learner(TpotModel, 2, _spread, _spread_learn),
    "segmented_tpot": Learner(lambda: SegmentedTpotModel((10, 100)), 2, _spread, _spread_learn),
}


@pytest.fixture(params=list(LEARNERS))
def learner(request: pytest.FixtureRequest) -> Learner:
    """Each learner in turn."""
    return LEARNERS[request.param]


def taught(learner: Learner, num: int, seed: int = 1) -> Any:
    """Return a learner that has seen `num` random observations."""
    model, rng = learner.make(), random.Random(seed)
    for _ in range(num):
        x = [rng.uniform(0.0, 200.0) for _ in range(learner.n)]
        learner.learn(model, x, rng.uniform(0.01, 2.0))
    return model


def test_a_fresh_learner_predicts(learner: Learner) -> None:
    """A prediction is possible, and finite, before anything was learned."""
    assert math.isfinite(learner.predict(learner.make(), [1.0] * learner.n))


def test_inputs_are_not_modified(learner: Learner) -> None:
    """Neither predict nor learn edits the caller's features."""
    model, x = learner.make(), [3.0] * learner.n
    learner.predict(model, x)
    learner.learn(model, x, 0.5)
    assert x == [3.0] * learner.n


def test_predicting_changes_nothing(learner: Learner) -> None:
    """A prediction leaves the learner as it was."""
    model = taught(learner, 20)
    before = pickle.dumps(model)
    learner.predict(model, [5.0] * learner.n)
    assert pickle.dumps(model) == before


def test_the_same_history_gives_the_same_learner(learner: Learner) -> None:
    """Two learners taught alike are equal to the bit."""
    assert pickle.dumps(taught(learner, 200)) == pickle.dumps(taught(learner, 200))


@pickles
def test_a_copy_goes_on_alone(learner: Learner) -> None:
    """A pickled copy predicts the same, and learning in one does not reach the other."""
    model = taught(learner, 50)
    copy = pickle.loads(pickle.dumps(model))
    x = [7.0] * learner.n
    assert learner.predict(copy, x) == learner.predict(model, x)
    before = learner.predict(model, x)
    learner.learn(copy, x, 30.0)
    assert learner.predict(model, x) == before != learner.predict(copy, x)


def test_a_constant_is_learned(learner: Learner) -> None:
    """100 equal observations, far from any prior, are predicted within 2 %."""
    model, x = learner.make(), [4.0] * learner.n
    for _ in range(100):
        learner.learn(model, x, 0.75)
    assert learner.predict(model, x) == pytest.approx(0.75, rel=0.02)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_errors_leave_the_learner_unchanged(learner: Learner, bad: float) -> None:
    """Non-finite features or targets are refused (where compiled, counts by their type) without effect."""
    model = taught(learner, 20)
    before = pickle.dumps(model)
    for i in range(learner.n):
        x = [1.0] * learner.n
        x[i] = bad
        with pytest.raises((TypeError, ValueError)):
            learner.learn(model, x, 1.0)
    with pytest.raises((TypeError, ValueError)):
        learner.learn(model, [1.0] * learner.n, bad)
    assert pickle.dumps(model) == before


def test_size_does_not_grow(learner: Learner) -> None:
    """3,000 observations take the room of 100."""
    assert len(pickle.dumps(taught(learner, 3_000))) <= len(pickle.dumps(taught(learner, 100))) + 64


@pytest.mark.parametrize("name", list(LEARNERS))
@given(data=st.data())
@settings(max_examples=25)
def test_any_finite_history_leaves_predictions_finite(name: str, data: st.DataObject) -> None:
    """Whatever finite values are learned, the next prediction is finite."""
    learner = LEARNERS[name]
    model, value = learner.make(), st.floats(0.0, 1e6)
    rows = data.draw(st.lists(st.lists(value, min_size=learner.n, max_size=learner.n), max_size=30))
    for x in rows:
        learner.learn(model, x, data.draw(st.floats(1e-4, 1e4)))
    assert math.isfinite(learner.predict(model, [1.0] * learner.n))


# AIGW: 6 features of (input, cached) lengths, P0 = 1e6 * I, nothing forgotten, milliseconds.


def aigw_features(length: float, cached: float) -> list[float]:
    """Return AIGW's features, prompt and cached length in tokens."""
    return [length * length, cached * cached, length * cached, length, cached, 1.0]


AIGW_PARAMETERS = (4.449991e-6, -8.410021e-6, -3.189973e-6, 0.2780002, -0.0502001, 37.198632)


def aigw_default_model() -> RecursiveLeastSquares:
    """AIGW's default model, from rows on the quadratic that its own 39 rows lie on."""
    model = RecursiveLeastSquares(6)
    lengths = [2**i for i in range(1, 18)]
    for length in lengths:
        for cached in (0, length // 4, length // 2, length * 3 // 4):
            x = aigw_features(length, cached)
            model.learn(x, sum(a * b for a, b in zip(AIGW_PARAMETERS, x, strict=True)))
    return model


def aigw_ttft_ms(model: RecursiveLeastSquares, length: int) -> int:
    """AIGW's PredictTTFT: whole milliseconds, at least 100."""
    return max(100, int(model.predict(aigw_features(length, 0))))


def test_aigw_features() -> None:
    """The test's feature map is AIGW's."""
    assert aigw_features(2, 3) == [4, 9, 6, 2, 3, 1]


def test_aigw_all_ones_predict_their_sum() -> None:
    """With all six weights 1, (2, 3) predicts 25."""
    assert RecursiveLeastSquares(6, prior_mean=[1.0] * 6).predict(aigw_features(2, 3)) == 25.0


@pytest.mark.parametrize(
    ("length", "cached", "y", "expected"),
    [(0, 0, 1.0, 0.999999000001), (10, 20, 30.0, 29.99999999985748)],
)
def test_aigw_one_observation(length: int, cached: int, y: float, expected: float) -> None:
    """One observation is reproduced up to the prior, to the digits of the table."""
    model = RecursiveLeastSquares(6)
    model.learn(aigw_features(length, cached), y)
    assert model.predict(aigw_features(length, cached)) == pytest.approx(expected, rel=0, abs=1e-13)


def test_aigw_random_rows_recover_the_polynomial() -> None:
    """2,000 random rows of x*x + y*y + x*y + x + y + 1 give six weights of 1."""
    rng, model = random.Random(1), RecursiveLeastSquares(6)
    for _ in range(2_000):
        x = aigw_features(rng.randint(0, 100), rng.randint(0, 100))
        model.learn(x, sum(x))
    assert model.weights == pytest.approx([1.0] * 6, abs=1e-3)


def test_aigw_default_parameters() -> None:
    """Raw token counts up to 131,072 and their squares still give the published weights."""
    assert aigw_default_model().weights == pytest.approx(AIGW_PARAMETERS, rel=1e-4)


@pytest.mark.parametrize(
    ("length", "ttft_ms"),
    [
        (1, 100),
        (500, 177),
        (1024, 326),
        (2048, 625),
        (4096, 1250),
        (8192, 2613),
        (16384, 5786),
        (32768, 13924),
        (65536, 37368),
        (131072, 112925),
    ],
)
def test_aigw_default_predictions(length: int, ttft_ms: int) -> None:
    """The default model predicts the published milliseconds."""
    assert aigw_ttft_ms(aigw_default_model(), length) == pytest.approx(ttft_ms, abs=1)


def test_aigw_metrics_stats_inequalities() -> None:
    """After five noisy rows predictions keep AIGW's order and bounds, from its model and from a fresh one."""
    for model in (aigw_default_model(), RecursiveLeastSquares(6)):
        for length, ttft_ms in ((1024, 800), (1024, 500), (1024, 1000), (2048, 2000), (3048, 3500)):
            model.learn(aigw_features(length, 0), ttft_ms)
        for length, bound_ms in ((100, 1000), (1024, 1000), (3048, 4000), (4048, 6000)):
            assert 100 <= aigw_ttft_ms(model, length) < bound_ms


def test_the_product_keeps_the_same_inequalities() -> None:
    """The same five rows, in tokens and seconds, keep the product's model within the same bounds, rising."""
    model = TtftModel()
    for length, ttft_s in ((1024, 0.8), (1024, 0.5), (1024, 1.0), (2048, 2.0), (3048, 3.5)):
        model.learn(IDLE, length, 0, ttft_s)
    predictions_s = [model.predict(IDLE, length, 0) for length in (100, 1024, 3048, 4048)]
    assert predictions_s == sorted(predictions_s)
    assert all(p < bound_s for p, bound_s in zip(predictions_s, (1.0, 1.0, 4.0, 6.0), strict=True))


@pytest.mark.parametrize(("batch", "segment"), [(5, 0), (10, 1), (15, 1), (25, 2), (100, 3)])
def test_aigw_tpot_segments(batch: int, segment: int) -> None:
    """A batch at a threshold belongs to the segment above it."""
    assert SegmentedTpotModel((10, 20, 30)).segment(batch) == segment


@pytest.mark.parametrize(
    ("batch", "context", "tpot_ms"), [(5, 1000, 13.5), (20, 2000, 30), (100, 5000, 87.5)]
)
def test_aigw_tpot_predictions(batch: int, context: int, tpot_ms: float) -> None:
    """Segments with AIGW's parameters predict its milliseconds."""
    parameters = [(0.5, 0.001, 10.0), (0.3, 0.002, 20.0), (0.8, 0.0005, 5.0)]
    priors = [TpotPrices(a / 1e3, b, c / 1e3) for a, b, c in parameters]
    model = SegmentedTpotModel((10, 30), priors=priors)
    assert model.predict(batch, context) * 1e3 == pytest.approx(tpot_ms)
    prices = Prices((), model.prices_s, model.thresholds)
    assert priced_tpot_s(prices, batch, context) * 1e3 == pytest.approx(tpot_ms)


def test_aigw_tpot_one_observation() -> None:
    """One TPOT observation is reproduced up to the prior; untrained, AIGW's zero prior predicts 0."""
    model = RecursiveLeastSquares(3)
    assert model.predict([5.0, 100.0, 1.0]) == 0.0
    model.learn([5.0, 100.0, 1.0], 50.0)
    assert model.predict([5.0, 100.0, 1.0]) == pytest.approx(49.999999995, rel=0, abs=1e-10)


def test_aigw_tpot_repeated_observation() -> None:
    """100 times (5, 1000, 25 ms) predicts 25 ms within 1."""
    model = SegmentedTpotModel((10, 20, 30))
    for _ in range(100):
        model.learn(5, 1000, 0.025)
    assert model.predict(5, 1000) * 1e3 == pytest.approx(25.0, abs=1.0)


def test_aigw_tpot_noisy_observations() -> None:
    """3,000 noisy samples give a mean error below 5 ms and none of 15 ms."""
    rng, model = random.Random(1), SegmentedTpotModel((10, 20, 30))

    def truth_ms(batch: int, context: int) -> float:
        return 0.5 * batch + 0.001 * context + 10.0

    def sample() -> tuple[int, int]:
        return rng.randint(1, 60), rng.randint(100, 10_000)

    for _ in range(3_000):
        batch, context = sample()
        model.learn(batch, context, (truth_ms(batch, context) + rng.uniform(-2.0, 2.0)) / 1e3)
    errors_ms = [abs(model.predict(*s) * 1e3 - truth_ms(*s)) for s in (sample() for _ in range(200))]
    assert sum(errors_ms) / len(errors_ms) < 5.0
    assert max(errors_ms) < 15.0
