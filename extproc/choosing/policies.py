"""One function per algorithm: a snapshot becomes a ranking; and the one picker over rankings.

Rules:
    1. A policy ranks, `pick` draws: no policy touches the rng.
    2. Equal scores are a tie and every tie is broken uniformly at random, the one at the candidate cut
       included: the outcome is that of shuffling the rows, sorting them stably and choosing uniformly
       among the first `candidates`.
    3. A draw is made only where there is more than one possibility, in this order: the candidate's
       position, if the candidates differ in score; the row among its equals, if it has any; then for
       each fallback the row among its equals, if it has any.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import numpy as np

from extproc.choosing.scoring import Terms, inference_terms, least_request_terms, prefix_cache_terms
from extproc.choosing.settings import LoadBalancing
from extproc.types import FloatArray, Rng, Snapshot


@dataclass(frozen=True, slots=True)
class Ranking:
    """What a policy thinks of the rows.

    Attributes:
        scores: Higher is better, shape (n,), float64; None if all rows are equal to it.
        terms: Parts that sum to `scores`; empty when that is None.
        candidates: Of how many best rows one is picked, 1..n.
    """

    scores: FloatArray | None
    terms: Terms
    candidates: int


def inference_lb(snapshot: Snapshot, settings: LoadBalancing) -> Ranking:
    """AIGW's weighted score; uniform among the best `candidate_percent` of the rows."""
    rows = len(snapshot.keys)
    candidates = min(max(1, rows * settings.candidate_percent // 100), rows)
    return _ranking(inference_terms(snapshot, settings), candidates, rows)


def prefix_cache(snapshot: Snapshot, settings: LoadBalancing) -> Ranking:
    """AIBrix's longest match under a load guard; the best row."""
    return _ranking(prefix_cache_terms(snapshot, settings), 1, len(snapshot.keys))


def least_request(snapshot: Snapshot) -> Ranking:
    """The fewest requests per weight; the best row. The awareness switches do not apply."""
    return _ranking(least_request_terms(snapshot), 1, len(snapshot.keys))


def uniform(snapshot: Snapshot) -> Ranking:
    """Every row is as good as another."""
    return _ranking({}, 1, len(snapshot.keys))


def pick(ranking: Ranking, rows: int, wanted: int, rng: Rng) -> tuple[int, ...]:
    """Draw `wanted` distinct rows, the chosen one first, then by rank.

    Args:
        ranking: Over `rows` rows.
        rows: n, >= 1.
        wanted: 1..n.
        rng: Drawn from at most `wanted` + 1 times, see Rule 3.
    """
    if ranking.scores is None:
        order = list(range(rows))
        costs = [0.0] * rows
    else:
        by_rank = np.argsort(-ranking.scores)
        order = by_rank.tolist()
        costs = (-ranking.scores[by_rank]).tolist()
    position = 0
    if costs[0] != costs[ranking.candidates - 1]:
        position = _draw(rng, ranking.candidates)
    picked = []
    for _ in range(wanted):
        first = bisect_left(costs, costs[position])
        equals = bisect_right(costs, costs[position]) - first
        at = first + (_draw(rng, equals) if equals > 1 else 0)
        picked.append(order.pop(at))
        del costs[at]
        position = 0
    return tuple(picked)


def _draw(rng: Rng, options: int) -> int:
    return int(rng.random() * options)


def _ranking(terms: Terms, candidates: int, rows: int) -> Ranking:
    """Sum the terms; without any, all rows are candidates."""
    if not terms:
        return Ranking(None, {}, rows)
    parts = iter(terms.values())
    scores = next(parts)
    for part in parts:
        scores = scores + part
    return Ranking(scores, terms, candidates)
