"""Calibration statistics say what they are called and stay bounded."""

from __future__ import annotations

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.predicting.calibration import Calibration, CalibrationSummary


def observed(pairs: list[tuple[float, float]]) -> Calibration:
    """Return a calibration that has seen these (predicted, actual) pairs."""
    calibration = Calibration()
    for predicted_s, actual_s in pairs:
        calibration.observe(predicted_s, actual_s)
    return calibration


def test_nothing_is_known_before_the_first_pair() -> None:
    """Without observations there is no summary rather than zeros."""
    assert Calibration().summary() is None


def test_the_first_pair_is_reported_as_it_is() -> None:
    """One pair gives its own error, undiluted by the decay."""
    assert observed([(3.0, 2.0)]).summary() == CalibrationSummary(1, 1.0, 1.0, 0.5, 1.0)
    assert observed([(1.0, 2.0)]).summary() == CalibrationSummary(1, 1.0, -1.0, 0.5, 0.0)
    assert observed([(2.0, 2.0)]).summary() == CalibrationSummary(1, 0.0, 0.0, 0.0, 0.0)


def test_signed_errors_cancel_and_absolute_ones_do_not() -> None:
    """Errors to both sides give no bias, a full absolute error and half of the actuals below."""
    summary = observed([(3.0, 2.0), (1.0, 2.0)] * 500).summary()
    assert summary is not None
    assert summary.mean_error_s == pytest.approx(0.0, abs=0.01)
    assert summary.mean_abs_error_s == pytest.approx(1.0)
    assert summary.below_ratio == pytest.approx(0.5, abs=0.01)
    assert summary.median_relative_error_ratio == 0.5


def test_the_median_is_of_the_last_256() -> None:
    """The window forgets what is older, and a minority of freaks does not move the median."""
    summary = observed([(9.0, 1.0)] * 300 + [(1.1, 1.0)] * 200 + [(50.0, 1.0)] * 56).summary()
    assert summary is not None
    assert summary.median_relative_error_ratio == pytest.approx(0.1)
    assert summary.num_observed == 556


def test_means_forget() -> None:
    """After 2,000 perfect predictions an earlier bias is gone."""
    summary = observed([(9.0, 1.0)] * 300 + [(1.0, 1.0)] * 2_000).summary()
    assert summary is not None
    assert summary.mean_abs_error_s < 0.01
    assert summary.below_ratio < 0.01


@given(st.lists(st.tuples(st.floats(-1e3, 1e6), st.floats(1e-6, 1e6)), min_size=1, max_size=50))
def test_summaries_are_consistent(pairs: list[tuple[float, float]]) -> None:
    """The bias never exceeds the absolute error and the fraction is one."""
    summary = observed(pairs).summary()
    assert summary is not None
    assert abs(summary.mean_error_s) <= summary.mean_abs_error_s * (1 + 1e-9)
    assert 0.0 <= summary.below_ratio <= 1.0
    assert summary.median_relative_error_ratio >= 0.0


def test_memory_is_bounded() -> None:
    """10,000 pairs take no more room than 256."""
    few = len(pickle.dumps(observed([(1.5, 1.0)] * 256)))
    assert len(pickle.dumps(observed([(1.5, 1.0)] * 10_000))) <= few + 16


@pytest.mark.parametrize(
    ("predicted_s", "actual_s"),
    [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf), (1.0, 0.0), (1.0, -1.0)],
)
def test_impossible_pairs_are_refused(predicted_s: float, actual_s: float) -> None:
    """A pair that is not finite, or took no time, raises and is not counted."""
    calibration = observed([(1.0, 2.0)])
    before = calibration.summary()
    with pytest.raises(ValueError):
        calibration.observe(predicted_s, actual_s)
    assert calibration.summary() == before
