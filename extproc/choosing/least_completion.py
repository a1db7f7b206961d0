"""`least_completion` over a snapshot: the columns of `completion`, and its costs as terms of a score."""

from __future__ import annotations

from collections.abc import Sequence
from operator import neg

from extproc.choosing import array_costs, columns, places
from extproc.choosing.completion import (
    DECODE_TOKENS,
    MOST_TAKEN,
    TPOT_LIMIT_S,
    Costs,
    cost_columns,
    decode_price,
)
from extproc.choosing.displacing import displaced
from extproc.choosing.rows import learned_of
from extproc.predicting.sums import plain_sum
from extproc.values.choices import Learned, Snapshot
from metadata_center.types import MANY_ROWS


def completion_costs(snapshot: Snapshot) -> Costs:
    """What each row would cost, in seconds.

    Raises:
        ValueError: The snapshot has no learned prices.
    """
    learned = learned_of(snapshot)
    if len(snapshot.keys) >= MANY_ROWS:
        found = array_costs.completion_costs(snapshot, learned)
    else:
        waits_s, works_s = columns.times_s(snapshot, learned)
        taken = columns.taken_ratios(snapshot) if snapshot.max_num_seqs else ()
        found = cost_columns(
            waits_s,
            works_s,
            columns.rooms_s(snapshot, waits_s),
            snapshot.steps_s,
            max(learned.followers_per_s, _followers_per_s(taken, learned)),
            decode_price(learned.decode_tokens, learned.tpot_limit_s, snapshot.steps_s),
            snapshot.held_s,
            columns.turns_s(snapshot),
            _stalled(snapshot),
            snapshot.sunk_ratios,
            places.places_s(taken, snapshot.max_num_seqs, learned.place_s) if taken else (),
            displaced(learned.recomputed_ratio),
        )
    return found.behind(snapshot.ahead_s) if snapshot.ahead_s else found


def saved_s(costs: Costs, row: int, cached_tokens: Sequence[int]) -> float:
    """`places.saved_s`."""
    if len(costs) >= MANY_ROWS:
        return array_costs.saved_s(costs, row, cached_tokens)
    return places.saved_s(costs, row, cached_tokens)


def _followers_per_s(taken: Sequence[float], learned: Learned) -> float:
    """As `Traffic.followers_per_s`, by the share of `max_num_seqs` in use; 0 where it is unknown.

    It is counted, not estimated, and still believed no further than `MOST_TAKEN`: the idle share says how
    long a backlog lasts, and of a fleet that is full nobody knows how long it stays so.
    """
    if not taken:
        return 0.0
    return learned.rate_per_s / (1.0 - min(MOST_TAKEN, plain_sum(taken) / len(taken)))


def _stalled(snapshot: Snapshot) -> Sequence[float]:
    """Seconds that a second of prefill at each row costs what decodes, at the limits that most have.

    Each of them has its time per token lengthened by that second over the tokens of its answer. Of requests
    in flight an answer of the mean length is the usual one: the long ones are there for longer. Empty where
    nothing decodes.
    """
    decoding = sum(snapshot.requests) - sum(snapshot.prefilling)
    if decoding <= 0 or snapshot.output_tokens <= 0.0:
        return []
    price = decode_price(DECODE_TOKENS, TPOT_LIMIT_S, snapshot.steps_s)
    each_s = decoding / plain_sum(snapshot.weights) * price / snapshot.output_tokens
    return [each_s * weight for weight in snapshot.weights]


def completion_terms(snapshot: Snapshot) -> dict[str, list[float]]:
    """The parts of `completion.Cost`, in seconds, negated."""
    found = completion_costs(snapshot)
    zeros = [0.0] * len(found)
    return {
        "wait": list(map(neg, found.waits_s)),
        "room": list(map(neg, found.rooms_s)),
        "work": list(map(neg, found.works_s)),
        "others": list(map(neg, found.others_s)),
        "stall": list(map(neg, found.stalls_s)),
        "decode": list(map(neg, found.decodes_s)),
        "place": list(map(neg, found.places_s or zeros)),
        "displacement": list(map(neg, found.displacements_s or zeros)),
    }
