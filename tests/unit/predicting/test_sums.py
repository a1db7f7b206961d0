"""Sums of floats, the same on every Python."""

from __future__ import annotations

import pytest

from extproc.predicting.sums import plain_sum


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], 0.0),
        ([3], 3.0),
        ([0.1] * 10, 0.9999999999999999),
        ([1e16, 1.0, -1e16], 0.0),
        ([0.1, 0.2, 0.3], 0.1 + 0.2 + 0.3),
    ],
)
def test_each_addition_is_rounded(values: list[float], expected: float) -> None:
    """Python 3.12's `sum` gives 1.0 for the third and the fourth."""
    assert plain_sum(values) == expected
    assert isinstance(plain_sum(iter(values)), float)
