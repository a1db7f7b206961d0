"""Least predicted completion as a policy; its costs are those of `extproc.choosing.least_completion`."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, nextafter
from operator import neg

from extproc.choosing import array_costs
from extproc.choosing.completion import Costs
from extproc.choosing.least_completion import completion_costs, completion_terms
from extproc.choosing.picker import pick
from extproc.choosing.terms import Terms
from extproc.values.balancing import LoadBalancing
from extproc.values.choices import Choice, Rng, Snapshot
from metadata_center.types import MANY_ROWS


class LeastCompletion:
    """`least_completion`."""

    needs_engines = True
    may_wait = True
    takes_turns = False

    def terms(self, snapshot: Snapshot, settings: LoadBalancing) -> Terms:  # noqa: ARG002
        """`wait`, `room`, `work`, `others`, `stall`, `decode` and `place`: seconds, negated."""
        return completion_terms(snapshot)

    def choose(self, snapshot: Snapshot, settings: LoadBalancing, rng: Rng, turn: int) -> Choice:  # noqa: ARG002
        """The least cost."""
        return choose_least(
            completion_costs(snapshot), settings, rng, snapshot.weights, snapshot.cached_tokens
        )


def choose_least(
    costs_s: Costs,
    settings: LoadBalancing,
    rng: Rng,
    weights: Sequence[float] = (),
    cached_tokens: Sequence[int] = (),
) -> Choice:
    """Choose the least cost; of equal ones where most is cached, other ties by weight.

    Args:
        costs_s: One per row, at least one.
        settings: Number of fallbacks.
        rng: See Rule 2 of `picker`.
        weights: Of the rows; empty if all are equal.
        cached_tokens: Of the prompt, per row; empty if nothing is cached.

    Raises:
        ValueError: There is no row.
    """
    rows = len(costs_s)
    if not rows:
        raise ValueError("nothing to choose from")
    scores: Sequence[float]
    if rows < MANY_ROWS:
        scores = list(map(neg, costs_s.totals_s))
        if any(cached_tokens) and scores.count(max(scores)) > 1:
            scores = most_cached_first(scores, cached_tokens)
    else:
        scores = array_costs.negated(costs_s.totals_s)
        if cached_tokens:
            scores = array_costs.most_cached_first(scores, cached_tokens)
    return Choice(pick(scores, rows, 1, min(1 + settings.fallbacks, rows), rng, weights), scores, 1)


def most_cached_first(scores: list[float], cached_tokens: Sequence[int]) -> list[float]:
    """Of the best, those with less cached are put last by the least that a score can be less.

    Prefill may have been learned to cost nothing, where all prompts are short: the engine still computes it.
    """
    best = max(scores)
    most = max(cached for score, cached in zip(scores, cached_tokens, strict=True) if score == best)
    return [
        nextafter(score, -inf) if score == best and cached < most else score
        for score, cached in zip(scores, cached_tokens, strict=True)
    ]
