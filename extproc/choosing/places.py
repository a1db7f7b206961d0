"""What the last places of an engine that runs only so many sequences are worth to those who come later.

Rules:
    1. Who is kept from a place goes to the next best endpoint, and the place is free again for all who come
       then: so it is worth at most what that one loses there. It is learned, as the mean over what was placed
       lately of what the next best would have cost more, where less was cached there: what else endpoints
       differ by is no reason to keep a place for anyone.
    2. It is worth that if the places run out while the request is there. The chance is `taken^sqrt(2 limit)`,
       the share of places in use raised to a power: about `exp(-free / sqrt(limit / 2))`, for what runs
       scatters by the root of it.
    3. And if there is room elsewhere then: where the emptiest endpoint is full, a place is worth as much at
       all of them, and nobody is kept from a better one.

Source of the idea: T. Ott, K. Krishnan, "Separable routing: a scheme for state-dependent routing of circuit
switched telephone traffic", Annals of Operations Research 35 (1992): a circuit costs what a call would have
earned that is lost for it, by the chance that one is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from extproc.choosing.completion import Costs

LEAST_S: Final = 1e-4
"""Places that are worth less are worth nothing."""


def squarings(limit: int) -> int:
    """How often a share of `limit` places is squared for the power of Rule 2, which is one of two so."""
    return (2 * limit).bit_length() // 2


def places_s(taken: Sequence[float], limits: Sequence[int], worth_s: float) -> Sequence[float]:
    """What a place at each row costs others, in seconds; empty if nothing anywhere.

    Args:
        taken: Share of places in use, 0..1; shape (n,).
        limits: Places; 0 where it is unknown, and then nothing is taken.
        worth_s: See Rule 1.
    """
    if worth_s < LEAST_S:
        return ()
    chances = []
    for ratio, limit in zip(taken, limits, strict=True):
        chance = ratio
        for _ in range(squarings(limit)):
            chance *= chance
        chances.append(chance)
    worth_s *= 1.0 - min(chances)
    return [worth_s * chance for chance in chances]


def saved_s(costs: Costs, row: int, cached_tokens: Sequence[int]) -> float:
    """What a request costs more at the next best row than at its own, but for queues, places and decoding.

    Args:
        costs: Of the decision.
        row: Where it goes.
        cached_tokens: Of each row.

    Returns:
        0 if no more is cached at its own, or if there is no other.
    """
    own_s, next_s, next_row = 0.0, None, row
    displacements_s = costs.displacements_s or [0.0] * len(costs)
    for each, (work_s, other_s, stall_s, displacement_s) in enumerate(
        zip(costs.works_s, costs.others_s, costs.stalls_s, displacements_s, strict=True)
    ):
        cost_s = work_s + other_s + stall_s + displacement_s
        if each == row:
            own_s = cost_s
        elif next_s is None or cost_s < next_s:
            next_s, next_row = cost_s, each
    if next_s is None or cached_tokens[row] <= cached_tokens[next_row]:
        return 0.0
    return max(0.0, next_s - own_s)
