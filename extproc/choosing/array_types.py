"""Columns of a snapshot as arrays of numpy, and back."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Rows = NDArray[np.intp]


def ints_of(column: Sequence[int]) -> Ints:
    """Not to be written to."""
    if type(column) is array and column.typecode == "q":
        return np.frombuffer(column, np.int64)
    return np.array(column, np.int64)


def floats_of(column: Sequence[float]) -> Floats:
    """Not to be written to."""
    if type(column) is memoryview or (type(column) is array and column.typecode == "d"):
        return np.frombuffer(column, np.float64)
    return np.array(column, np.float64)


def counts_of(column: Sequence[int]) -> Floats:
    """Integers as floats, in an array of its own."""
    return ints_of(column).astype(np.float64)


def given(column: Floats) -> array[float]:
    """An array of Python, whose bytes numpy reads again."""
    return array("d", column.tobytes())


def sum_of(column: Floats) -> float:
    """As `plain_sum`."""
    return float(np.add.accumulate(column)[-1])
