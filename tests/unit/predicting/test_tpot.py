"""TPOT is sane from the first token, learned per batch segment, and finite whatever happens."""

from __future__ import annotations

import math
import pickle
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.predicting.priced_terms import CEILING_S
from extproc.predicting.prices import priced_tpot_s
from extproc.predicting.tpot import SegmentedTpotModel, TpotModel, TpotPrices
from extproc.values.prices import Prices


@pytest.mark.parametrize(
    ("batch", "context_tokens", "expected_s"), [(1, 500, 0.008), (64, 131_072, 0.017), (128, 262_144, 0.026)]
)
def test_the_first_prediction_is_the_published_physics(
    batch: int, context_tokens: int, expected_s: float
) -> None:
    """Before any observation TPOT is that of an 8B model on H100."""
    assert TpotModel().predict(batch, context_tokens) == pytest.approx(expected_s, rel=0.05)


def test_an_engine_is_learned() -> None:
    """300 noisy observations of a slower engine bring its three prices out."""
    rng = random.Random(1)
    model = TpotModel()
    for _ in range(300):
        batch = rng.randint(1, 128)
        context = batch * rng.uniform(100.0, 4_000.0)
        model.learn(batch, context, (0.02 + 1e-4 * batch + 1.2e-7 * context) * math.exp(rng.gauss(0.0, 0.05)))
    assert model.prices.base_s == pytest.approx(0.02, rel=0.1)
    assert model.prices.sequence_s == pytest.approx(1e-4, rel=0.3)
    assert model.prices.context_s == pytest.approx(1.2e-4, rel=0.2)


@given(st.lists(st.tuples(st.floats(0, 4096), st.floats(0, 1e7), st.floats(1e-5, 100.0)), max_size=40))
@settings(max_examples=60)
def test_more_load_never_makes_tokens_quicker(history: list[tuple[float, float, float]]) -> None:
    """Whatever was observed, TPOT is finite, positive and never falls with batch or context."""
    model = TpotModel()
    for batch, context, tpot_s in history:
        model.learn(batch, context, tpot_s)
    here = model.predict(8, 10_000)
    assert 0.0005 <= here <= CEILING_S
    assert model.predict(9, 10_000) >= here
    assert model.predict(8, 20_000) >= here


@pytest.mark.parametrize("thresholds", [(), (10,), (10, 20, 30)])
def test_prices_say_what_the_model_predicts(thresholds: tuple[int, ...]) -> None:
    """Prices taken from a model give its prediction to the bit, each batch by its own segment."""
    model = SegmentedTpotModel(thresholds)
    for batch in range(1, 60):
        model.learn(batch, 1_000.0 * batch, 0.01 + 0.001 * (batch % 7))
    prices = Prices((), model.prices_s, model.thresholds)
    for batch in range(45):
        context = batch * 2_273
        assert priced_tpot_s(prices, batch, context) == model.predict(batch, context)


def test_segments_learn_apart() -> None:
    """What one segment learns leaves the others at their prior."""
    model = SegmentedTpotModel((10, 20))
    for _ in range(50):
        model.learn(15, 15_000, 0.1)
    assert model.predict(15, 15_000) == pytest.approx(0.1, rel=0.05)
    assert model.predict(9, 9_000) == TpotModel().predict(9, 9_000)
    assert model.predict(20, 9_000) == TpotModel().predict(20, 9_000)


@pytest.mark.parametrize("thresholds", [(0,), (-1, 2), (10, 10), (20, 10)])
def test_thresholds_must_increase_from_above_zero(thresholds: tuple[int, ...]) -> None:
    """Segments that could hold no batch are refused."""
    with pytest.raises(ValueError, match="thresholds"):
        SegmentedTpotModel(thresholds)


@pytest.mark.parametrize("num", [0, 1, 3])
def test_priors_are_one_per_segment(num: int) -> None:
    """A list of priors of another length than the segments is refused."""
    with pytest.raises(ValueError, match="prior"):
        SegmentedTpotModel((10,), priors=[TpotPrices()] * num)


@pytest.mark.parametrize(
    "values", [(-1, 0, 1), (1, -1, 1), (math.nan, 1, 1), (1, math.inf, 1), (1, 1, 0), (1, 1, math.nan)]
)
def test_impossible_observations_are_refused_whole(values: tuple[float, float, float]) -> None:
    """A negative or non-finite value raises and leaves the model as it was."""
    model = SegmentedTpotModel((10,))
    before = pickle.dumps(model)
    with pytest.raises(ValueError):
        model.learn(*values)
    assert pickle.dumps(model) == before
