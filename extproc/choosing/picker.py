"""The one picker over rankings: scores and some draws become an order.

Rules:
    1. Equal scores are a tie and every tie is broken uniformly at random, the one at the candidate cut
       included: the outcome is that of shuffling the rows, sorting them stably and choosing uniformly
       among the first `candidates`.
    2. A draw is made only where there is more than one possibility, in this order: the candidate's
       position, if the candidates differ in score; the row among its equals, if it has any; then for
       each fallback the row among its equals, if it has any.
    3. Weights are capacity: of equals the heavier is drawn more often, in proportion. Where all weigh the
       same, that is Rule 1 to the last draw.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from itertools import accumulate
from math import inf
from typing import Final

import numpy as np

from extproc.choosing.weights import weights_of
from extproc.values.choices import Rng
from metadata_center.types import MANY_ROWS

_TAKEN: Final = -inf
"""In place of the score of a row that was picked: no cost is infinite."""


def pick(
    scores: Sequence[float] | None,
    rows: int,
    candidates: int,
    wanted: int,
    rng: Rng,
    weights: Sequence[float] = (),
) -> tuple[int, ...]:
    """Draw `wanted` distinct rows, the chosen one first, then by rank.

    Args:
        scores: Higher is better, one per row; None if all rows are equal.
        rows: n, >= 1.
        candidates: Of how many best rows the first is picked, 1..n.
        wanted: 1..n.
        rng: Drawn from at most `wanted` + 1 times, see Rule 2.
        weights: See Rule 3, > 0, one per row; empty if all are equal.
    """
    if weights:
        are_many = rows >= MANY_ROWS  # whose weights are looked at once
        if weights_of(weights).each is None if are_many else weights.count(weights[0]) == rows:
            weights = ()
    if scores is not None and candidates == 1:
        return (best if rows < MANY_ROWS else best_of_many)(scores, wanted, rng, weights)
    if scores is None:
        order = list(range(rows))
        costs = [0.0] * rows
    else:
        order = sorted(range(rows), key=scores.__getitem__, reverse=True)
        costs = [-scores[row] for row in order]
    position = 0
    if costs[0] != costs[candidates - 1]:
        position = _draw(rng, candidates)
    picked = []
    for _ in range(wanted):
        cost = costs[position]
        first = bisect_left(costs, cost)
        equals = bisect_right(costs, cost) - first
        at = first
        if equals > 1:
            if weights:
                at += _draw_weighted(rng, [weights[row] for row in order[first : first + equals]])
            else:
                at += _draw(rng, equals)
        picked.append(order.pop(at))
        del costs[at]
        position = 0
    return tuple(picked)


def best(scores: Sequence[float], wanted: int, rng: Rng, weights: Sequence[float]) -> tuple[int, ...]:
    """`pick` among the first alone: without sorting, for all but the best few stay where they are."""
    left = list(scores)
    picked = []
    for _ in range(wanted):
        best = max(left)
        row = left.index(best)
        equals = left.count(best)
        if equals > 1:
            if weights:
                rows = [row for row, score in enumerate(left) if score == best]
                row = rows[_draw_weighted(rng, [weights[each] for each in rows])]
            else:
                for _ in range(_draw(rng, equals)):
                    row = left.index(best, row + 1)
        picked.append(row)
        left[row] = _TAKEN
    return tuple(picked)


def best_of_many(scores: Sequence[float], wanted: int, rng: Rng, weights: Sequence[float]) -> tuple[int, ...]:
    """`best`, by numpy: of one score after the other, whose rows are drawn among together."""
    left = np.array(scores, np.float64)
    picked: list[int] = []
    while True:
        first = int(np.argmax(left))
        is_best = left == left[first]
        equals = int(np.count_nonzero(is_best))
        rows = [first] if equals == 1 else is_best.nonzero()[0]
        of_rows = [weights[row] for row in rows] if weights and equals > 1 else []
        gone: list[int] = []  # positions in `rows`, the least first
        while len(gone) < equals:
            at = 0
            if equals - len(gone) > 1:
                at = _draw_weighted(rng, of_rows) if of_rows else _draw(rng, equals - len(gone))
            if of_rows:
                del of_rows[at]
            for other in gone:
                at += at >= other
            insort(gone, at)
            picked.append(int(rows[at]))
            if len(picked) == wanted:
                return tuple(picked)
        left[is_best] = _TAKEN


def _draw(rng: Rng, options: int) -> int:
    return int(rng.random() * options)


def _draw_weighted(rng: Rng, weights: Sequence[float]) -> int:
    bounds = list(accumulate(weights))
    return min(bisect_right(bounds, rng.random() * bounds[-1]), len(bounds) - 1)
