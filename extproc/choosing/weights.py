"""Weights of rows, looked at once: a pool has the same ones for each of its decisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from extproc.predicting.sums import plain_sum
from metadata_center.types import value

MAX_KEPT: Final = 64
"""Columns of weights that are remembered; one more takes the place of all."""


@value
class Weights:
    """What a column of weights is.

    Attributes:
        each: One per row; None if all are the same.
        one: That of the first row.
        total: Their `plain_sum`.
    """

    each: NDArray[np.float64] | None
    one: float
    total: float


_kept: dict[int, tuple[tuple[float, ...], Weights]] = {}


def weights_of(column: Sequence[float]) -> Weights:
    """What a column of at least one weight is; a tuple's is remembered, for it stays what it is."""
    kept = _kept.get(id(column))
    if kept is not None:  # it holds its tuple, so that the id stays its own
        return kept[1]
    one = column[0]
    each = None if column.count(one) == len(column) else np.array(column, np.float64)
    found = Weights(each, one, plain_sum(column))
    if isinstance(column, tuple):
        if len(_kept) >= MAX_KEPT:
            _kept.clear()
        _kept[id(column)] = column, found
    return found
