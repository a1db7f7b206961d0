"""Recursive least squares equals the batch solution, stays sound for ever and never half-learns."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.predicting.least_squares import RecursiveLeastSquares

Row = tuple[list[float], float]

_P0 = [[4.0, 1.0, 0.5], [1.0, 3.0, -0.5], [0.5, -0.5, 2.0]]


def rows(n: int, num: int, seed: int, noise: float = 0.0) -> list[Row]:
    """Observations of y = 1*x0 + 2*x1 + ... with Gaussian noise."""
    rng = random.Random(seed)
    data = []
    for _ in range(num):
        x = [rng.uniform(-2.0, 2.0) for _ in range(n)]
        data.append((x, sum((i + 1) * v for i, v in enumerate(x)) + rng.gauss(0.0, noise)))
    return data


def learned(model: RecursiveLeastSquares, data: Sequence[Row]) -> RecursiveLeastSquares:
    """Return the model after learning `data`."""
    for x, y in data:
        model.learn(x, y)
    return model


def learned_by(model: RecursiveLeastSquares) -> tuple[list[float], list[float], list[float], int]:
    """A copy of all that learning changes: weights, U, D and the number of observations."""
    return model._w.copy(), model._u.copy(), model._d.copy(), model._num_learned


def observations(largest: float) -> st.SearchStrategy[list[Row]]:
    """Up to 40 observations of 3 features, no value beyond `largest`."""
    value = st.floats(-largest, largest, allow_nan=False)
    return st.lists(st.tuples(st.lists(value, min_size=3, max_size=3), value), max_size=40)


@given(observations(100.0), st.sampled_from([1.0, 1e-2, 25.0]))
@settings(max_examples=60)
def test_without_forgetting_it_is_ridge_regression(data: list[Row], p0: float) -> None:
    """With forgetting 1 the weights equal batch ridge regression with the same prior."""
    mean = np.array([1.0, -2.0, 0.5])
    model = learned(RecursiveLeastSquares(3, prior_mean=list(mean), prior_covariance=p0), data)
    x = np.array([row for row, _ in data]).reshape(-1, 3)
    y = np.array([target for _, target in data])
    ridge = mean + np.linalg.solve(x.T @ x + np.eye(3) / p0, x.T @ (y - x @ mean))
    scale = 1.0 + float(np.abs(ridge).max())
    assert np.abs(np.array(model.weights) - ridge).max() <= 1e-9 * scale


@pytest.mark.parametrize("n", [1, 3, 6, 7])
def test_batch_equality_holds_at_every_size(n: int) -> None:
    """Weights and P agree with the batch solution to 1e-9 at every number of features used."""
    data = rows(n, 500, seed=n, noise=0.5)
    model = learned(RecursiveLeastSquares(n, prior_covariance=10.0), data)
    x = np.array([row for row, _ in data])
    p = np.linalg.inv(x.T @ x + np.eye(n) / 10.0)
    assert np.abs(np.array(model.weights) - p @ x.T @ np.array([y for _, y in data])).max() < 1e-9
    assert np.abs(np.array(model.covariance()) - p).max() < 1e-9


def test_a_full_prior_covariance_is_the_ridge_prior() -> None:
    """A matrix prior couples the weights exactly as the batch solution does."""
    mean, p0 = np.array([1.0, 2.0, 3.0]), np.array(_P0)
    data = rows(3, 20, seed=5, noise=0.3)
    model = learned(RecursiveLeastSquares(3, prior_mean=list(mean), prior_covariance=_P0), data)
    x, y = np.array([row for row, _ in data]), np.array([target for _, target in data])
    ridge = mean + np.linalg.solve(x.T @ x + np.linalg.inv(p0), x.T @ (y - x @ mean))
    assert np.abs(np.array(model.weights) - ridge).max() < 1e-9
    assert np.abs(np.array(RecursiveLeastSquares(3, prior_covariance=_P0).covariance()) - p0).max() < 1e-15


def test_forgetting_is_the_exponentially_weighted_batch_solution() -> None:
    """With forgetting, weights equal batch least squares over decayed data and the decayed prior rows."""
    n, forgetting, num = 3, 0.9, 60
    mean = np.array([1.0, 2.0, 3.0])
    data = rows(n, num, seed=7, noise=0.4)
    model = RecursiveLeastSquares(n, prior_mean=list(mean), prior_covariance=_P0, forgetting=forgetting)
    learned(model, data)
    information = np.linalg.inv(np.array(_P0))
    target = information @ mean
    g = np.linalg.cholesky(information).T  # upper triangular: the rows of U^-1 over the roots of D
    for step, (x, y) in enumerate(data):
        row = g[step % n] * math.sqrt(n * (1.0 - forgetting))
        information = forgetting * information + np.outer(x, x) + np.outer(row, row)
        target = forgetting * target + np.array(x) * y + row * (row @ mean)
    assert np.abs(np.array(model.weights) - np.linalg.solve(information, target)).max() < 1e-9


@given(observations(1e6), st.sampled_from([1.0, 0.995, 0.9, 0.5]))
@settings(max_examples=60)
def test_everything_stays_finite_and_p_symmetric_and_bounded(data: list[Row], forgetting: float) -> None:
    """After any finite sequence P is symmetric, semidefinite, at most forgetting**-n * P0, and all finite."""
    model = learned(RecursiveLeastSquares(3, prior_covariance=_P0, forgetting=forgetting), data)
    p = np.array(model.covariance())
    assert np.isfinite(p).all()
    assert np.isfinite(model.weights).all()
    assert (p == p.T).all()
    assert np.linalg.eigvalsh(p).min() >= -1e-12
    assert np.linalg.eigvalsh(np.array(_P0) * forgetting**-3 - p).min() >= -1e-9


def test_an_unexcited_direction_does_not_wind_up() -> None:
    """10,000 observations along one direction leave the others at their prior and P bounded."""
    model = RecursiveLeastSquares(3, prior_mean=[0.0, 5.0, -5.0], prior_covariance=10.0, forgetting=0.99)
    for _ in range(10_000):
        model.learn([1.0, 0.0, 0.0], 2.0)
    assert model.weights == pytest.approx((2.0, 5.0, -5.0), abs=0.01)
    p = model.covariance()
    assert max(p[i][i] for i in range(3)) <= 10.0 * 0.99**-3
    assert p[0][0] < 0.02
    model.learn([0.0, 1.0, 0.0], 6.0)
    assert abs(model.predict([0.0, 1.0, 0.0])) < 7.0


def test_zero_observations_return_to_the_prior() -> None:
    """A direction that was excited and no longer is returns to the prior mean."""
    model = RecursiveLeastSquares(2, prior_mean=[1.0, 1.0], prior_covariance=10.0, forgetting=0.9)
    learned(model, rows(2, 200, seed=1))
    assert model.weights == pytest.approx((1.0, 2.0), abs=0.05)
    for _ in range(400):
        model.learn([0.0, 0.0], 0.0)
    assert model.weights == pytest.approx((1.0, 1.0), abs=1e-6)


def test_features_ten_orders_of_magnitude_apart_are_learned() -> None:
    """Raw token counts next to their squares and a constant 1 do not cost the weights their digits."""
    rng = random.Random(3)
    model = RecursiveLeastSquares(3)
    for _ in range(3_000):
        tokens = rng.uniform(1.0, 1e5)
        model.learn([tokens * tokens, tokens, 1.0], 4e-6 * tokens * tokens + 0.3 * tokens + 37.0)
    assert model.weights == pytest.approx((4e-6, 0.3, 37.0), rel=1e-6)


def test_forgetting_follows_a_change() -> None:
    """After weights change, they are relearned within a few memories."""
    model = learned(RecursiveLeastSquares(3, forgetting=0.98), rows(3, 500, seed=1, noise=0.1))
    for x, y in rows(3, 250, seed=2, noise=0.1):
        model.learn(x, -2.0 * y)
    assert model.weights == pytest.approx((-2.0, -4.0, -6.0), abs=0.15)


_BAD_VALUES = [math.nan, math.inf, -math.inf, 1e200]


@pytest.mark.parametrize("bad", _BAD_VALUES)
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("forgetting", [1.0, 0.99])
def test_a_bad_feature_is_refused_whole(bad: float, position: int, forgetting: float) -> None:
    """A feature that is not finite, or overflows, raises and leaves the state unchanged to the bit."""
    model = learned(RecursiveLeastSquares(3, forgetting=forgetting), rows(3, 2, seed=1))
    before = learned_by(model)
    x = [1.0, 1.0, 1.0]
    x[position] = bad
    with pytest.raises(ValueError, match="finite"):
        model.learn(x, 1.0)
    assert learned_by(model) == before


@pytest.mark.parametrize("x", [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_target_is_refused_whole(x: list[float], bad: float) -> None:
    """A target that is not finite raises and leaves the state unchanged, even where it says nothing."""
    model = RecursiveLeastSquares(3)
    before = learned_by(model)
    with pytest.raises(ValueError, match="finite"):
        model.learn(x, bad)
    assert learned_by(model) == before


def test_a_wrong_number_of_features_is_refused() -> None:
    """Too few or too many features raise from predict and learn and change nothing."""
    model = RecursiveLeastSquares(3)
    before = learned_by(model)
    for x in ([], [1.0, 2.0], [1.0, 2.0, 3.0, 4.0]):
        with pytest.raises(ValueError, match="length"):
            model.predict(x)
        with pytest.raises(ValueError, match="length"):
            model.learn(x, 1.0)
    assert learned_by(model) == before
    with pytest.raises(ValueError, match="finite"):
        learned(RecursiveLeastSquares(1, prior_mean=[1.0]), []).predict([math.inf])


@pytest.mark.parametrize(
    ("n", "kwargs"),
    [
        (0, {}),
        (2, {"forgetting": 0.0}),
        (2, {"forgetting": 1.01}),
        (2, {"forgetting": math.nan}),
        (2, {"prior_mean": [1.0]}),
        (2, {"prior_mean": [1.0, math.nan]}),
        (2, {"prior_covariance": 0.0}),
        (2, {"prior_covariance": -1.0}),
        (2, {"prior_covariance": math.nan}),
        (2, {"prior_covariance": [[1.0, 0.0]]}),
        (2, {"prior_covariance": [[1.0, 0.5], [0.4, 1.0]]}),
        (2, {"prior_covariance": [[1.0, 2.0], [2.0, 1.0]]}),
    ],
)
def test_arguments_out_of_range_are_refused(n: int, kwargs: dict[str, Any]) -> None:
    """The constructor refuses sizes, forgetting and priors that mean nothing."""
    with pytest.raises(ValueError):
        RecursiveLeastSquares(n, **kwargs)


@pytest.mark.parametrize("flipped", [(1,), (0, 2), (1, 2), (0, 1, 2)])
def test_nonnegative_weights_are_the_conditional_mean(flipped: tuple[int, ...]) -> None:
    """With negative weights at 0, the others are what batch ridge regression gives without those features."""
    data = [
        ([-v if i in flipped else v for i, v in enumerate(x)], y) for x, y in rows(3, 12, seed=9, noise=0.2)
    ]
    model = learned(RecursiveLeastSquares(3, prior_covariance=_P0), data)
    assert [w < 0.0 for w in model.weights] == [i in flipped for i in range(3)]
    kept = [i for i in range(3) if i not in flipped]
    x, y = np.array([row for row, _ in data])[:, kept], np.array([target for _, target in data])
    expected = np.zeros(3)
    expected[kept] = np.linalg.solve(x.T @ x + np.linalg.inv(np.array(_P0))[np.ix_(kept, kept)], x.T @ y)
    assert model.nonnegative_weights() == pytest.approx(expected, abs=1e-9)


@given(observations(10.0))
@settings(max_examples=60)
def test_nonnegative_weights_are_never_negative_and_change_nothing(data: list[Row]) -> None:
    """None is negative whatever was learned, none moves needlessly, and the model stays as it was."""
    model = learned(RecursiveLeastSquares(3, prior_covariance=_P0, forgetting=0.99), data)
    before = learned_by(model)
    weights = model.nonnegative_weights()
    assert min(weights) >= 0.0
    assert all(map(math.isfinite, weights))
    assert min(model.weights) < 0.0 or weights == model.weights
    assert learned_by(model) == before
