"""The decision: a snapshot, a model's settings and some randomness give the order to try endpoints in.

Rules:
    1. Pure: equal arguments and equal draws give the equal choice, so a recorded decision replays.
    2. The chosen row comes first, then up to `settings.fallbacks` others by the policy's preference.
    3. Who may be chosen at all (health, labels, draining) was settled when the snapshot was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nlargest
from operator import neg

from extproc.choosing.completion import Costs
from extproc.choosing.least_completion import completion_costs
from extproc.choosing.picker import pick
from extproc.choosing.scoring import inference_scores, terms_of, total
from extproc.choosing.settings import Algorithm, LoadBalancing
from extproc.types import Choice, Rng, Snapshot


def choose(snapshot: Snapshot, settings: LoadBalancing, rng: Rng, turn: int) -> Choice:
    """Choose one endpoint and its fallbacks.

    Args:
        snapshot: At least one row.
        settings: Algorithm, weights and number of fallbacks.
        rng: See Rule 2 of `picker` for the draws; round-robin makes none.
        turn: Counts up with each choice among these keys, >= 0; round-robin alone looks at it, and only where
            the snapshot does not say what each row is owed.

    Raises:
        ValueError: The snapshot is empty.
    """
    rows = len(snapshot.keys)
    if not rows:
        raise ValueError("nothing to choose from")
    wanted = min(1 + settings.fallbacks, rows)
    if settings.algorithm is Algorithm.ROUND_ROBIN:
        owed = snapshot.owed
        if owed:
            return Choice(tuple(nlargest(wanted, range(rows), key=owed.__getitem__)), None, 1)
        return Choice(tuple((turn + step) % rows for step in range(wanted)), None, 1)
    if settings.algorithm is Algorithm.LEAST_COMPLETION:
        return choose_least(completion_costs(snapshot), settings, rng, snapshot.weights)
    if settings.algorithm is Algorithm.INFERENCE_LB:
        scores = inference_scores(snapshot, settings)
        candidates = min(max(1, rows * settings.candidate_percent // 100), rows)
    else:
        scores = total(terms_of(snapshot, settings))
        candidates = 1
    if scores is None:
        candidates = rows
    return Choice(pick(scores, rows, candidates, wanted, rng, snapshot.weights), scores, candidates)


def choose_least(costs_s: Costs, settings: LoadBalancing, rng: Rng, weights: Sequence[float] = ()) -> Choice:
    """Choose the least cost, as `choose` does for `least_completion`.

    Args:
        costs_s: One per row, at least one.
        settings: Number of fallbacks.
        rng: See `choose`.
        weights: Of the rows; empty if all are equal.

    Raises:
        ValueError: There is no row.
    """
    scores = list(map(neg, costs_s.totals_s))
    rows = len(scores)
    if not rows:
        raise ValueError("nothing to choose from")
    return Choice(pick(scores, rows, 1, min(1 + settings.fallbacks, rows), rng, weights), scores, 1)
