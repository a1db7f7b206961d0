"""The decision: a snapshot, a model's settings and some randomness give the order to try endpoints in.

Rules:
    1. Pure: equal arguments and equal draws give the equal choice, so a recorded decision replays.
    2. The chosen row comes first, then up to `settings.fallbacks` others by the policy's preference.
    3. Which endpoints may be chosen at all (health, labels, draining) was settled when the snapshot was made.
"""

from __future__ import annotations

from extproc.choosing.policies.registry import POLICIES
from extproc.choosing.terms import Terms
from extproc.values.balancing import LoadBalancing
from extproc.values.choices import Choice, Rng, Snapshot


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
    if not snapshot.keys:
        raise ValueError("nothing to choose from")
    return POLICIES[settings.algorithm].choose(snapshot, settings, rng, turn)


def terms_of(snapshot: Snapshot, settings: LoadBalancing) -> Terms:
    """The terms of the algorithm in `settings`; empty for one that does not score, or has all terms off."""
    return POLICIES[settings.algorithm].terms(snapshot, settings)
