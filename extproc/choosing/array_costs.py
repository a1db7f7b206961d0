"""What each of many rows costs: as `least_completion`, `completion` and `places` have it, by `arrays`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from extproc.choosing.array_types import Floats, floats_of, given, ints_of, sum_of
from extproc.choosing.arrays import rooms_of, taken_of, times_of, turns_s
from extproc.choosing.completion import (
    DECODE_TOKENS,
    MOST_TAKEN,
    TPOT_LIMIT_S,
    Costs,
    mean_backlog_s,
    price_at_pace,
)
from extproc.choosing.displacing import displaced
from extproc.choosing.places import LEAST_S, squarings
from extproc.choosing.weights import weights_of
from extproc.values.choices import Learned, Snapshot


def completion_costs(snapshot: Snapshot, learned: Learned) -> Costs:
    """`least_completion.completion_costs`, but for those that wait."""
    endpoints, steps = len(snapshot.keys), floats_of(snapshot.steps_s)
    followers_per_s, taken = learned.followers_per_s, None
    if snapshot.max_num_seqs:
        taken = taken_of(snapshot)
        in_use = sum_of(taken) / endpoints
        followers_per_s = max(followers_per_s, learned.rate_per_s / (1.0 - min(MOST_TAKEN, in_use)))
    waits, works = times_of(snapshot, learned)
    turns = turns_s(snapshot)
    rooms = rooms_of(snapshot, waits, turns)
    pace_s = sum_of(steps) / endpoints
    price = price_at_pace(learned.decode_tokens, learned.tpot_limit_s, pace_s)
    stalled = _stalled(snapshot, pace_s)
    columns = waits, works, rooms, steps
    held_s, sunk = snapshot.held_s, snapshot.sunk_ratios
    places = places_of(taken, snapshot.max_num_seqs, learned.place_s)
    again = displaced(learned.recomputed_ratio)
    return costs_of(*columns, followers_per_s, price, held_s, turns, stalled, sunk, places, again)


def places_of(taken: Floats | None, limits: Sequence[int], worth_s: float) -> Floats | None:
    """`places.places_s`; None if they cost nothing, or if nobody knows how many there are."""
    if taken is None or worth_s < LEAST_S:
        return None
    chances, counts = taken.copy(), ints_of(limits)
    least, most = squarings(int(np.min(counts))), squarings(int(np.max(counts)))
    for _ in range(least):
        chances *= chances
    if least != most:
        times = np.zeros(len(chances), np.int64)
        for limit in np.unique(counts).tolist():
            times[counts == limit] = squarings(limit)
        for done in range(least, most):
            np.multiply(chances, chances, out=chances, where=times > done)
    worth_s *= 1.0 - float(np.min(chances))
    chances *= worth_s
    return chances


def saved_s(costs: Costs, row: int, cached_tokens: Sequence[int]) -> float:
    """`places.saved_s`, of at least two rows."""
    if cached_tokens[row] == 0:
        return 0.0
    found = floats_of(costs.works_s) + floats_of(costs.others_s)
    found += floats_of(costs.stalls_s)
    if costs.displacements_s:
        found += floats_of(costs.displacements_s)
    own_s = float(found[row])
    found[row] = np.inf
    next_row = int(np.argmin(found))
    if cached_tokens[row] <= cached_tokens[next_row]:
        return 0.0
    return max(0.0, float(found[next_row]) - own_s)


def _stalled(snapshot: Snapshot, pace_s: float) -> Floats | float:
    """As in `least_completion`; one number where it is the same for all rows."""
    decoding = int(ints_of(snapshot.requests).sum()) - int(ints_of(snapshot.prefilling).sum())
    if decoding <= 0 or snapshot.output_tokens <= 0.0:
        return 0.0
    weights, price = weights_of(snapshot.weights), price_at_pace(DECODE_TOKENS, TPOT_LIMIT_S, pace_s)
    each_s = decoding / weights.total * price / snapshot.output_tokens
    return each_s * (weights.one if weights.each is None else weights.each)


def costs_of(
    waits: Floats,
    works: Floats,
    rooms: Floats | None,
    steps: Floats,
    followers_per_s: float,
    pace_price: float,
    held_s: float,
    turns_s: Sequence[float],
    stalled: Floats | float,
    sunk_ratios: Sequence[float],
    places: Floats | None,
    displaced_s: float,
) -> Costs:
    """`completion.cost_columns`, of arrays of numpy; None and one number stand for columns of one value."""
    endpoints = len(waits)
    backlogs = waits if rooms is None else waits + rooms
    others = works / (2 * endpoints)
    others += _mean_backlog_s(backlogs, held_s)
    others *= followers_per_s * works
    stalls = stalled * works
    displacements = displaced_s * works if displaced_s else None
    if sunk_ratios:
        charged = 1.0 - floats_of(sunk_ratios)
        others *= charged
        stalls *= charged
        if displacements is not None:
            displacements *= charged
    decodes = pace_price * steps
    totals = backlogs + works
    totals += others
    totals += stalls
    totals += decodes
    if places is not None:
        totals += places
    if displacements is not None:
        totals += displacements
    return Costs(
        _read_by_row(waits),
        _read_by_row(np.zeros(endpoints) if rooms is None else rooms),
        _read_by_row(works),
        _read_by_row(others),
        _read_by_row(stalls),
        _read_by_row(decodes),
        turns_s,
        _read_by_row(totals),
        () if places is None else _read_by_row(places),
        () if displacements is None else _read_by_row(displacements),
    )


def _read_by_row(column: Floats) -> Sequence[float]:
    """The array itself, each of whose numbers is read as one of Python's: most are of no further interest."""
    return cast("Sequence[float]", column.data)


def _mean_backlog_s(backlogs: Floats, held_s: float) -> float:
    """`completion.mean_backlog_s`, of backlogs in any order."""
    endpoints = len(backlogs)
    half = min(endpoints, max(2, (endpoints + 1) // 2))
    if endpoints - np.count_nonzero(backlogs) >= half:  # the emptier half has none at all
        return held_s / endpoints
    return mean_backlog_s(given(np.sort(backlogs)), held_s)


def negated(column: Sequence[float]) -> Sequence[float]:
    """Each number's negative."""
    return given(-floats_of(column))


def most_cached_first(scores: Sequence[float], cached_tokens: Sequence[int]) -> Sequence[float]:
    """`least_completion.most_cached_first`."""
    values = floats_of(scores)
    best = float(np.max(values))
    is_best = values == best
    if np.count_nonzero(is_best) == 1:
        return scores
    cached = ints_of(cached_tokens)
    most = int(np.max(cached[is_best]))
    if most == 0:
        return scores
    is_less = is_best & (cached < most)
    return given(np.where(is_less, np.nextafter(best, -np.inf), values))
