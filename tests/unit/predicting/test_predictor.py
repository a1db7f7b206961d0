"""The predictor keeps models apart, bounded and paired with their outcomes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from extproc.predicting.predictor import KeyCalibration, Predictor
from extproc.predicting.prices import priced_tpot_s
from extproc.predicting.tpot import SegmentedTpotModel, TpotModel
from extproc.predicting.ttft import IDLE, Backlog, TtftModel, times_s, total_s
from extproc.values.prices import Prices

KEY = ("llama-8b", "h100")
OTHER = ("llama-8b", "a100")
WORKS = ((IDLE, 1_000, 0), (IDLE, 500, 500), (Backlog(1, 5_000, 5_000, 0, 0.0), 1, 1_000))
"""What is ahead, and uncached and cached tokens, of some candidates."""


def ttft_s(predictor: Predictor, key: tuple[str, str]) -> list[float]:
    """What is expected right now of each of `WORKS`."""
    return shown_ttft_s(predictor.prices(key))


def shown_ttft_s(prices: Prices) -> list[float]:
    """What prices say of each of `WORKS`."""
    return [total_s(*times_s(prices.ttft_prices_s, *work)) for work in WORKS]


def observe(predictor: Predictor, key: tuple[str, str] = KEY, **edits: Any) -> None:
    """Teach one TTFT outcome, 0.2 s where 0.1 s was predicted unless edited."""
    values: dict[str, Any] = {
        "uncached": 1_000,
        "cached": 0,
        "predicted_s": 0.1,
        "actual_s": 0.2,
    }
    predictor.observe_ttft(key, IDLE, **values | edits)


def test_an_unknown_key_is_predicted_by_the_prior_and_leaves_no_trace() -> None:
    """Predictions for a key never observed are the untrained models' and create nothing."""
    predictor = Predictor()
    assert ttft_s(predictor, KEY) == [TtftModel().predict(*work) for work in WORKS]
    prices = predictor.prices(KEY)
    assert priced_tpot_s(prices, 1, 1_000) == TpotModel().predict(1, 1_000)
    assert priced_tpot_s(prices, 64, 100_000) == TpotModel().predict(64, 100_000)
    assert predictor.calibration(KEY) == KeyCalibration(None, None)
    assert predictor.prompt_tokens("llama-8b", 400) == 100
    assert (len(predictor), list(predictor.calibrations()), list(predictor.token_ratios())) == (0, [], [])


@pytest.mark.parametrize("thresholds", [(), (10, 20)])
def test_prices_are_those_of_the_moment(thresholds: tuple[int, ...]) -> None:
    """Prices say what models with the same history say, and keep saying it when more is learned."""
    predictor, ttft, tpot = Predictor(tpot_thresholds=thresholds), TtftModel(), SegmentedTpotModel(thresholds)

    def shown(prices: Prices) -> list[float]:
        return [
            *shown_ttft_s(prices),
            *(priced_tpot_s(prices, batch, 9_000) for batch in (1, 10, 20)),
        ]

    held: list[tuple[Prices, list[float]]] = [(predictor.prices(KEY), shown(predictor.prices(KEY)))]
    for count in range(1, 30):
        observe(predictor, uncached=100 * count, actual_s=0.3)
        ttft.learn(IDLE, 100 * count, 0, 0.3)
        predictor.observe_tpot(KEY, batch=count, context=900, predicted_s=None, actual_s=0.001 * count)
        tpot.learn(count, 900, 0.001 * count)
        now = predictor.prices(KEY)
        assert shown(now) == [
            *(ttft.predict(*work) for work in WORKS),
            *(tpot.predict(batch, 9_000) for batch in (1, 10, 20)),
        ]
        held.append((now, shown(now)))
    assert all(shown(prices) == at_the_time for prices, at_the_time in held)
    assert held[0][1] != held[1][1] != held[-1][1]


def test_keys_learn_apart() -> None:
    """An endpoint group's outcomes teach its own key only."""
    predictor = Predictor()
    for _ in range(50):
        observe(predictor)
    assert ttft_s(predictor, KEY)[0] == pytest.approx(0.2, rel=0.05)
    assert ttft_s(predictor, OTHER) == [TtftModel().predict(*work) for work in WORKS]


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
    assert ttft_s(predictor, KEY)[0] > 0.1
    assert priced_tpot_s(predictor.prices(KEY), 1, 1_000) > 0.03


def test_tpot_is_learned_and_paired_by_segment() -> None:
    """TPOT outcomes teach the batch's segment and its calibration, not TTFT's."""
    predictor = Predictor(tpot_thresholds=(10,))
    for _ in range(50):
        predictor.observe_tpot(KEY, batch=4, context=4_000, predicted_s=0.01, actual_s=0.04)
    prices = predictor.prices(KEY)
    assert priced_tpot_s(prices, 4, 4_000) == pytest.approx(0.04, rel=0.05)
    assert priced_tpot_s(prices, 10, 4_000) == TpotModel().predict(10, 4_000)
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
    predictor.prices(b)
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
        {"uncached": -1},
        {"cached": -1},
        {"weight": math.inf},
    ],
)
def test_an_impossible_outcome_changes_nothing(edits: dict[str, Any]) -> None:
    """A bad value neither makes a key, nor moves a model, nor is counted."""
    predictor = Predictor()
    with pytest.raises(ValueError):
        observe(predictor, **edits)
    assert len(predictor) == 0
    observe(predictor)
    before = predictor.prices(KEY), predictor.calibration(KEY)
    with pytest.raises(ValueError):
        observe(predictor, **edits)
    after = predictor.prices(KEY), predictor.calibration(KEY)
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
