"""How good the predictions are: each is paired with what then happened.

Rules:
    1. A prediction is paired with its own outcome and was made before the outcome was learned (progressive
       validation); this module is given both numbers and never calls a model.
    2. Memory is bounded: a few sums and `_WINDOW` numbers.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import isfinite
from statistics import median

_WINDOW = 256
"""Observations that the median is taken over: its standard error is then about 4 percentile ranks."""

_DECAY = 1.0 - 1.0 / _WINDOW
"""Means remember as far back as the median."""


@dataclass(frozen=True, slots=True)
class CalibrationSummary:
    """Errors of recent predictions; an error is predicted minus actual.

    Attributes:
        num_observed: Pairs observed in all.
        mean_abs_error_s: Decayed mean of the absolute error, seconds.
        mean_error_s: Decayed mean of the error, seconds: > 0 if predictions are too long.
        median_relative_error_ratio: Median of absolute error over actual, of the last 256.
        below_ratio: Decayed fraction of actuals below their prediction, in [0, 1]; 0.5 is even-handed.
    """

    num_observed: int
    mean_abs_error_s: float
    mean_error_s: float
    median_relative_error_ratio: float
    below_ratio: float


class Calibration:
    """Running error statistics of one predictor."""

    __slots__ = ("_abs_error_s", "_below", "_error_s", "_num_observed", "_relative_errors", "_weight")

    def __init__(self) -> None:
        self._num_observed = 0
        self._weight = 0.0
        self._abs_error_s = 0.0
        self._error_s = 0.0
        self._below = 0.0
        self._relative_errors: deque[float] = deque(maxlen=_WINDOW)

    def observe(self, predicted_s: float, actual_s: float) -> None:
        """Pair one prediction with its outcome, both in seconds.

        Raises:
            ValueError: A value is not finite, or `actual_s` is not > 0. Nothing is changed.
        """
        if not (isfinite(predicted_s) and isfinite(actual_s) and actual_s > 0.0):
            raise ValueError("predicted_s and actual_s must be finite, actual_s > 0")
        error_s = predicted_s - actual_s
        self._num_observed += 1
        self._weight = self._weight * _DECAY + 1.0
        self._abs_error_s = self._abs_error_s * _DECAY + abs(error_s)
        self._error_s = self._error_s * _DECAY + error_s
        self._below = self._below * _DECAY + (error_s > 0.0)
        self._relative_errors.append(abs(error_s) / actual_s)

    def summary(self) -> CalibrationSummary | None:
        """Return the statistics so far, or None before the first pair. Sorts 256 numbers: for scrapes."""
        if not self._num_observed:
            return None
        return CalibrationSummary(
            num_observed=self._num_observed,
            mean_abs_error_s=self._abs_error_s / self._weight,
            mean_error_s=self._error_s / self._weight,
            median_relative_error_ratio=median(self._relative_errors),
            below_ratio=self._below / self._weight,
        )
