"""`least_completion` over a snapshot: the columns of `completion`, and its costs as terms of a score."""

from __future__ import annotations

from operator import neg
from typing import Final

from extproc.choosing import arrays, columns
from extproc.choosing.completion import Costs, cost_columns
from extproc.choosing.rows import batch_s, learned_of
from extproc.values.choices import Learned, Snapshot

_MOST_TAKEN: Final = 0.99
"""No larger share of `max_num_seqs` in use is believed, for a bound: it is counted, not estimated."""


def completion_costs(snapshot: Snapshot) -> Costs:
    """What each row would cost, in seconds.

    Raises:
        ValueError: The snapshot has no learned prices.
    """
    learned = learned_of(snapshot)
    read = columns.times_s if len(snapshot.keys) < arrays.MANY_ROWS else arrays.times_s
    waits_s, works_s = read(snapshot, learned)
    found = cost_columns(
        waits_s,
        works_s,
        columns.rooms_s(snapshot, waits_s),
        snapshot.steps_s,
        max(learned.followers_per_s, _followers_per_s(snapshot, learned)),
        learned.decode_tokens,
        snapshot.held_s,
        [batch_s(snapshot, row)[1] for row in range(len(snapshot.keys))]
        if any(snapshot.max_num_seqs)
        else (),
    )
    return found.behind(snapshot.ahead_s) if snapshot.ahead_s else found


def _followers_per_s(snapshot: Snapshot, learned: Learned) -> float:
    """As `Traffic.followers_per_s`, by the share of `max_num_seqs` in use; 0 where it is unknown."""
    if not snapshot.max_num_seqs:
        return 0.0
    taken = [
        min(1.0, requests / limit) if limit else 0.0
        for requests, limit in zip(snapshot.requests, snapshot.max_num_seqs, strict=True)
    ]
    return learned.rate_per_s / (1.0 - min(_MOST_TAKEN, sum(taken) / len(taken)))


def completion_terms(snapshot: Snapshot) -> dict[str, list[float]]:
    """Terms `wait`, `room`, `work`, `others` and `decode`: seconds, negated."""
    found = completion_costs(snapshot)
    return {
        "wait": list(map(neg, found.waits_s)),
        "room": list(map(neg, found.rooms_s)),
        "work": list(map(neg, found.works_s)),
        "others": list(map(neg, found.others_s)),
        "decode": list(map(neg, found.decodes_s)),
    }
