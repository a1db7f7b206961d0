"""The predictor keeps models apart, bounded and paired with their outcomes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from extproc.predicting.predictor import KeyCalibration, Predictor
from extproc.predicting.tpot import TpotModel
from extproc.predicting.ttft import TtftModel

KEY = ("llama-8b", "h100")
OTHER = ("llama-8b", "a100")
UNCACHED, CACHED, PENDING = (
    np.array([1e3, 500.0, 0.0]),
    np.array([0.0, 500.0, 1e3]),
    np.array([0.0, 0.0, 5e3]),
)


def observe(predictor: Predictor, key: tuple[str, str] = KEY, **edits: Any) -> None:
    """Teach one TTFT outcome, 0.2 s where 0.1 s was predicted unless edited."""
    values: dict[str, Any] = {
        "uncached": 1_000,
        "cached": 0,
        "pending": 0,
        "predicted_s": 0.1,
        "actual_s": 0.2,
    }
    predictor.observe_ttft(key, **values | edits)


def test_an_unknown_key_is_predicted_by_the_prior_and_leaves_no_trace() -> None:
    """Predictions for a key never observed are the untrained models' and create nothing."""
    predictor = Predictor()
    ttft_s = predictor.predict_ttft(KEY, UNCACHED, CACHED, PENDING)
    tpot_s = predictor.predict_tpot(KEY, np.array([1.0, 64.0]), np.array([1e3, 1e5]))
    assert ttft_s.tolist() == TtftModel().predict_many(UNCACHED, CACHED, PENDING).tolist()
    assert tpot_s == pytest.approx([TpotModel().predict(1, 1e3), TpotModel().predict(64, 1e5)])
    assert predictor.calibration(KEY) == KeyCalibration(None, None)
    assert predictor.prompt_tokens("llama-8b", 400) == 100
    assert (len(predictor), list(predictor.calibrations()), list(predictor.token_ratios())) == (0, [], [])


def test_no_candidates_give_no_predictions() -> None:
    """Empty arrays give an empty prediction."""
    none = np.zeros(0)
    assert Predictor().predict_ttft(KEY, none, none, none).shape == (0,)
    assert Predictor(tpot_thresholds=(4,)).predict_tpot(KEY, none, none).shape == (0,)


def test_keys_learn_apart() -> None:
    """An endpoint group's outcomes teach its own key only."""
    predictor = Predictor()
    for _ in range(50):
        observe(predictor)
    learned = predictor.predict_ttft(KEY, UNCACHED, CACHED, PENDING)
    assert learned[0] == pytest.approx(0.2, rel=0.05)
    untouched = predictor.predict_ttft(OTHER, UNCACHED, CACHED, PENDING)
    assert untouched.tolist() == TtftModel().predict_many(UNCACHED, CACHED, PENDING).tolist()


def test_a_prediction_is_paired_before_its_outcome_is_learned() -> None:
    """Calibration holds the error of the prediction that was made, not of the model that knows the answer."""
    predictor = Predictor()
    observe(predictor, predicted_s=0.1, actual_s=0.2)
    calibration = predictor.calibration(KEY)
    assert calibration.tpot is None
    assert calibration.ttft is not None
    assert calibration.ttft.mean_error_s == pytest.approx(-0.1)
    assert [key for key, _ in predictor.calibrations()] == [KEY]


def test_an_outcome_without_a_prediction_is_learned_but_not_paired() -> None:
    """A request that was routed without predicting still teaches."""
    predictor = Predictor()
    observe(predictor, predicted_s=None)
    predictor.observe_tpot(KEY, batch=1, context=1_000, predicted_s=None, actual_s=0.05)
    assert predictor.calibration(KEY) == KeyCalibration(None, None)
    assert predictor.predict_ttft(KEY, UNCACHED, CACHED, PENDING)[0] > 0.1
    assert predictor.predict_tpot(KEY, np.array([1.0]), np.array([1e3]))[0] > 0.03


def test_tpot_is_learned_and_paired_by_segment() -> None:
    """TPOT outcomes teach the batch's segment and its calibration, not TTFT's."""
    predictor = Predictor(tpot_thresholds=(10,))
    for _ in range(50):
        predictor.observe_tpot(KEY, batch=4, context=4_000, predicted_s=0.01, actual_s=0.04)
    tpot_s = predictor.predict_tpot(KEY, np.array([4.0, 10.0]), np.array([4e3, 4e3]))
    assert tpot_s[0] == pytest.approx(0.04, rel=0.05)
    assert tpot_s[1] == pytest.approx(TpotModel().predict(10, 4e3))
    calibration = predictor.calibration(KEY)
    assert calibration.ttft is None
    assert calibration.tpot is not None
    assert calibration.tpot.mean_error_s == pytest.approx(-0.03)


def test_usage_is_learned_per_model() -> None:
    """Reported usage changes the token estimate of that model only."""
    predictor = Predictor()
    for _ in range(20):
        predictor.observe_usage("cjk", 10_000, 6_000)
    assert predictor.prompt_tokens("cjk", 1_000) == pytest.approx(600, rel=0.02)
    assert predictor.prompt_tokens("other", 1_000) == 250
    assert [(model, round(ratio, 2)) for model, ratio in predictor.token_ratios()] == [("cjk", 0.6)]


def test_the_least_recently_learned_key_is_dropped() -> None:
    """Beyond `max_keys`, learning a new key drops the one learned longest ago; predicting does not count."""
    predictor = Predictor(max_keys=2)
    a, b, c = (("m", group) for group in "abc")
    observe(predictor, a)
    observe(predictor, b)
    observe(predictor, a)
    predictor.predict_ttft(b, UNCACHED, CACHED, PENDING)
    observe(predictor, c)
    assert [key for key, _ in predictor.calibrations()] == [a, c]
    for model in ("x", "y", "x", "z"):
        predictor.observe_usage(model, 100, 25)
    assert [model for model, _ in predictor.token_ratios()] == ["x", "z"]


def test_the_number_of_keys_is_bounded_by_default() -> None:
    """A flood of model names keeps 1,024 of them."""
    predictor = Predictor()
    for i in range(1_100):
        observe(predictor, (str(i), ""))
        predictor.observe_usage(str(i), 100, 25)
    assert len(predictor) == 1_024
    assert len(list(predictor.token_ratios())) == 1_024


@pytest.mark.parametrize(
    "edits",
    [
        {"predicted_s": math.nan},
        {"predicted_s": math.inf},
        {"actual_s": 0.0},
        {"actual_s": math.nan},
        {"uncached": -1.0},
        {"pending": math.inf},
    ],
)
def test_an_impossible_outcome_changes_nothing(edits: dict[str, Any]) -> None:
    """A bad value neither makes a key, nor moves a model, nor is counted."""
    predictor = Predictor()
    with pytest.raises(ValueError):
        observe(predictor, **edits)
    assert len(predictor) == 0
    observe(predictor)
    before = predictor.predict_ttft(KEY, UNCACHED, CACHED, PENDING).tolist(), predictor.calibration(KEY)
    with pytest.raises(ValueError):
        observe(predictor, **edits)
    after = predictor.predict_ttft(KEY, UNCACHED, CACHED, PENDING).tolist(), predictor.calibration(KEY)
    assert after == before


def test_impossible_tpot_and_usage_change_nothing() -> None:
    """The other observations refuse as wholly as TTFT's."""
    predictor = Predictor()
    for values in ((math.nan, 0.01), (0.01, math.nan), (0.01, 0.0)):
        with pytest.raises(ValueError):
            predictor.observe_tpot(KEY, batch=1, context=1, predicted_s=values[0], actual_s=values[1])
    with pytest.raises(ValueError):
        predictor.observe_usage("m", 0, 1)
    assert (len(predictor), list(predictor.token_ratios())) == (0, [])


def test_at_least_one_key_is_kept() -> None:
    """A bound of no keys is refused."""
    with pytest.raises(ValueError, match="max_keys"):
        Predictor(max_keys=0)
