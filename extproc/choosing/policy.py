"""What a policy is: one object, in one file of `policies`, found by its name in `policies/registry.py`.

Rules:
    1. A policy keeps nothing: equal arguments and equal draws give the equal choice, so a decision replays.
    2. It says what it needs to know; the snapshot is made with that.
    3. Its terms are what it goes by: explain shows them, and their sum is its score.
"""

from __future__ import annotations

from typing import Protocol

from extproc.choosing.picker import pick
from extproc.choosing.terms import Terms, total
from extproc.values.balancing import LoadBalancing
from extproc.values.choices import Choice, Rng, Snapshot


class Policy(Protocol):
    """One way to choose among endpoints."""

    @property
    def needs_engines(self) -> bool:
        """It looks at pace, KV caches, sequence limits, traffic: its snapshot is `completion_snapshot`."""

    @property
    def may_wait(self) -> bool:
        """Its requests may wait at the gateway."""

    @property
    def takes_turns(self) -> bool:
        """It goes by what each row is owed, see `extproc.choosing.rotation`."""

    def choose(self, snapshot: Snapshot, settings: LoadBalancing, rng: Rng, turn: int) -> Choice:
        """Choose one endpoint and its fallbacks.

        Args:
            snapshot: At least one row.
            settings: Weights and number of fallbacks.
            rng: See Rule 2 of `picker` for the draws.
            turn: Counts up with each choice, >= 0.
        """

    def terms(self, snapshot: Snapshot, settings: LoadBalancing) -> Terms:
        """What each row is worth, part by part; empty for one that does not score, or has all terms off."""


class ByTerms:
    """A policy whose score is the sum of its terms, and whose choice is the best of it."""

    needs_engines = False
    may_wait = False
    takes_turns = False

    def terms(self, snapshot: Snapshot, settings: LoadBalancing) -> Terms:
        """See `Policy`."""
        raise NotImplementedError

    def choose(self, snapshot: Snapshot, settings: LoadBalancing, rng: Rng, turn: int) -> Choice:  # noqa: ARG002
        """See `Policy`."""
        return best(total(self.terms(snapshot, settings)), snapshot, settings, rng, 1)


def best(
    scores: list[float] | None, snapshot: Snapshot, settings: LoadBalancing, rng: Rng, candidates: int
) -> Choice:
    """The choice by scores.

    Args:
        scores: Higher is better, one per row; None if all rows are equal.
        snapshot: At least one row.
        settings: Number of fallbacks.
        rng: See Rule 2 of `picker`.
        candidates: Of how many best rows the first is picked, if there are scores.
    """
    rows = len(snapshot.keys)
    among = rows if scores is None else candidates
    wanted = min(1 + settings.fallbacks, rows)
    return Choice(pick(scores, rows, among, wanted, rng, snapshot.weights), scores, among)
