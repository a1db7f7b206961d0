"""Sums of floats that are the same on every version of Python.

From Python 3.12 on the built-in `sum` carries along what rounding lost (Neumaier's summation), so its last
digits differ from those of the same additions written out, and from Python 3.11's. Decisions are made,
explained and replayed by code that writes some of its additions out: all of it adds like that. So does numpy
where it accumulates, though not where it sums.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np


def plain_sum(values: Iterable[float]) -> float:
    """Return `values` added from left to right, each addition rounded; 0.0 if there are none.

    Of an array, whose numbers are of 64 bits, in a tenth of the time.
    """
    if isinstance(values, array):
        return float(np.add.accumulate(np.frombuffer(values, np.float64))[-1]) if values else 0.0
    total = 0.0
    for value in values:
        total += value
    return total
