"""Terms of a score: how much each row of a snapshot is worth to a policy, part by part.

Rules:
    1. Higher is better. A term has one value per row; a policy's score is the plain sum of its terms.
    2. Load counts relative to capacity: amounts are divided by the endpoint's weight first.
    3. Nothing here draws, rounds for display or depends on the order of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import add

Terms = Mapping[str, list[float]]


def total(terms: Terms) -> list[float] | None:
    """The scores: terms added up in their order; None if there are none."""
    scores: list[float] | None = None
    for part in terms.values():
        scores = part if scores is None else list(map(add, scores, part))
    return scores
