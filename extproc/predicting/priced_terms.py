"""A duration as a sum of priced terms, the prices learned online around physics known beforehand.

Rules:
    1. A duration is `sum(price_i * term_i)`, terms and prices >= 0. So a prediction never falls when work is
       added, and is never negative.
    2. Learning is relative: an observation is its ratio to what the prior prices say, its features are the
       terms' shares of that. 10 ms off at 20 ms counts as much as 10 s off at 20 s.
    3. Prior prices err together (a slower GPU makes all terms dearer) much more than apart. What is learned
       on short prompts therefore carries over to long ones never seen.
    4. No observation counts as further from its prediction than `_MAX_RESIDUALS` usual residuals, nor as
       further from the prior than `_MOST_OFF`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from operator import mul

from extproc.predicting.least_squares import RecursiveLeastSquares
from extproc.predicting.sums import plain_sum

_FORGETTING = 0.995
"""Memory of 200 observations: 90 % of a sudden change is learned within 460, and six prices fitted to noise
of relative size s are off by about s * sqrt(6 / 400), an eighth of it."""

_PRIOR_VARIANCE = 100.0
"""Variance of a price's ratio to its prior over that of an observation's. Observations scatter by about 0.25
of the prediction (BLIS's best fit has a median TTFT error of 0.18, P99 0.29), engines differ from the prior
by 2.5 of it (public fits span 0.013 to 0.096 ms per token), and (2.5 / 0.25)**2 = 100: one observation
outweighs the prior where it says anything."""

_SHARED_VARIANCE = 0.8
"""Part of that variance common to all prices. From 8B on H100 to 8B on A100 the prices per token and per pair
of tokens go up 2.7 and 2.3 times, to 70B on 4 H100 2.7 and 0.6 times: of a deviation of 2.5 about 1.1 is a
price's own, and (1.1 / 2.5)**2 = 0.2."""

_MAX_RESIDUALS = 4.0
"""Residuals are cut at this many mean absolute residuals, 3.2 standard deviations of a Gaussian: Huber's
estimator with the cut where normal noise is left alone."""

_RESIDUAL_GAIN = 1.0 / 16.0
"""Share of the newest residual in the usual one. A sudden change is let in after about 10 observations: cut
residuals still widen the usual one by 3/16 each."""

_FIRST_RESIDUAL = 1.0
"""Usual residual, relative to the prediction, before any was seen: the prior may be off by its own size, and
an engine 5 times slower than it is not an outlier."""

_LEAST_RESIDUAL = 0.02
"""The usual residual never falls below 2 % of the prediction, so a model of a perfectly even engine can still
learn that it changed."""

_MOST_OFF = 1000.0
"""What a duration may be of what the prior says: a CPU takes some hundred times as long as an H100. What is
further off is no engine but a wait, a stall or a lie, and would be remembered the longer the larger it is."""

CEILING_S = 3600.0
"""No prediction exceeds an hour; no client waits longer, and scores must stay finite."""


def priced(prices_s: Sequence[float], terms: Sequence[float], floor_s: float) -> float:
    """The sum of prices times terms, kept between `floor_s` and `CEILING_S`, seconds."""
    return max(floor_s, min(CEILING_S, plain_sum(map(mul, prices_s, terms))))


class PricedTerms:
    """Learned prices of n terms.

    Args:
        prices_s: Prior price of one unit of each term, seconds, shape (n,), finite and > 0.
        floor_s: No prediction is below this, seconds, > 0.
    """

    __slots__ = ("_floor_s", "_model", "_prices_s", "_prior_s", "_residual")

    def __init__(self, prices_s: Sequence[float], *, floor_s: float) -> None:
        if not all(isfinite(price) and price > 0.0 for price in (*prices_s, floor_s)):
            raise ValueError("prices and floor must be finite and > 0")
        n = len(prices_s)
        shared = _PRIOR_VARIANCE * _SHARED_VARIANCE
        self._prior_s = tuple(map(float, prices_s))
        self._floor_s = floor_s
        self._model = RecursiveLeastSquares(
            n,
            prior_mean=[1.0] * n,
            prior_covariance=[[_PRIOR_VARIANCE if i == j else shared for j in range(n)] for i in range(n)],
            forgetting=_FORGETTING,
        )
        self._residual = _FIRST_RESIDUAL
        self._prices_s = self._prior_s

    @property
    def prices_s(self) -> tuple[float, ...]:
        """Current prices, seconds per unit of each term, shape (n,), all >= 0."""
        return self._prices_s

    def predict(self, terms: Sequence[float]) -> float:
        """Return the predicted duration in seconds, between the floor and `CEILING_S`, for n terms >= 0."""
        return priced(self._prices_s, terms, self._floor_s)

    def learn(self, terms: Sequence[float], duration_s: float) -> None:
        """Learn from one observed duration.

        Args:
            terms: What was done, shape (n,), finite, >= 0, not all 0.
            duration_s: How long it took, seconds, finite and > 0.

        Raises:
            ValueError: A value is out of its range. The model is unchanged.
        """
        if not (0.0 < duration_s < float("inf")):
            raise ValueError("a duration must be finite and > 0")
        parts_s = [price * term for price, term in zip(self._prior_s, terms, strict=True)]
        prior_s = plain_sum(parts_s)
        if not (min(parts_s) >= 0.0 and 0.0 < prior_s < float("inf")):
            raise ValueError("terms must be finite, >= 0 and not all 0")
        duration_s = max(prior_s / _MOST_OFF, min(prior_s * _MOST_OFF, duration_s))
        shares = [part / prior_s for part in parts_s]
        expected = self._model.predict(shares)
        scale = self.predict(terms) / prior_s
        most = _MAX_RESIDUALS * self._residual
        residual = max(-most, min(most, (duration_s / prior_s - expected) / scale))
        self._model.learn(shares, expected + residual * scale)
        self._residual = max(
            _LEAST_RESIDUAL, self._residual + _RESIDUAL_GAIN * (abs(residual) - self._residual)
        )
        self._prices_s = tuple(map(mul, self._prior_s, self._model.nonnegative_weights()))
