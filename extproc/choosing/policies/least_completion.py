"""Least predicted completion as a policy; its costs are those of `extproc.choosing.least_completion`."""

from __future__ import annotations

from collections.abc import Sequence
from operator import neg

from extproc.choosing.completion import Costs
from extproc.choosing.least_completion import completion_costs, completion_terms
from extproc.choosing.picker import pick
from extproc.choosing.terms import Terms
from extproc.values.balancing import LoadBalancing
from extproc.values.choices import Choice, Rng, Snapshot


class LeastCompletion:
    """`least_completion`."""

    needs_engines = True
    may_wait = True
    takes_turns = False

    def terms(self, snapshot: Snapshot, settings: LoadBalancing) -> Terms:  # noqa: ARG002
        """`wait`, `room`, `work`, `others`, `stall` and `decode`: seconds, negated."""
        return completion_terms(snapshot)

    def choose(self, snapshot: Snapshot, settings: LoadBalancing, rng: Rng, turn: int) -> Choice:  # noqa: ARG002
        """The least cost."""
        return choose_least(completion_costs(snapshot), settings, rng, snapshot.weights)


def choose_least(costs_s: Costs, settings: LoadBalancing, rng: Rng, weights: Sequence[float] = ()) -> Choice:
    """Choose the least cost, ties by weight.

    Args:
        costs_s: One per row, at least one.
        settings: Number of fallbacks.
        rng: See Rule 2 of `picker`.
        weights: Of the rows; empty if all are equal.

    Raises:
        ValueError: There is no row.
    """
    scores = list(map(neg, costs_s.totals_s))
    rows = len(scores)
    if not rows:
        raise ValueError("nothing to choose from")
    return Choice(pick(scores, rows, 1, min(1 + settings.fallbacks, rows), rng, weights), scores, 1)
