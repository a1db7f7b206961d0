"""What `columns`, `completion` and `snapshots` compute over rows, for many rows: the same values by numpy.

Rules:
    1. Equal to the loops to the last bit: the same operations in the same order, each in 64 bits. Sums are
       one addition after the other, for numpy's own adds in another order. Counts are below 2**53, so that
       they are the same numbers as floats.
    2. Arrays of numpy stay inside: lists or arrays of Python go in, and arrays of Python come out, whose
       bytes numpy reads again without a look at each number; costs, which nobody keeps, are not copied.
    3. What most rows do not have is computed for those that have it: prefill ahead, cached prompts, too
       little room.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from extproc.choosing.completion import (
    DECODE_TOKENS,
    MOST_TAKEN,
    TPOT_LIMIT_S,
    Costs,
    mean_backlog_s,
    price_at_pace,
)
from extproc.choosing.places import LEAST_S, squarings
from extproc.choosing.rows import BLANK_PROMPT
from extproc.choosing.weights import Weights, weights_of
from extproc.predicting.priced_terms import CEILING_S
from extproc.predicting.tpot import FLOOR_S
from extproc.predicting.tpot import TOKENS as TPOT_TOKENS
from extproc.predicting.ttft import STEP_TOKENS, TOKENS
from extproc.values.by_kind import ByKind
from extproc.values.choices import Learned, Snapshot

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]
_Rows = NDArray[np.intp]

_FEW_ROWS: Final = 8
"""Up to so many one after the other is quicker."""


def _ints(column: Sequence[int]) -> _Ints:
    """Not to be written to."""
    if type(column) is array and column.typecode == "q":
        return np.frombuffer(column, np.int64)
    return np.array(column, np.int64)


def _floats(column: Sequence[float]) -> _Floats:
    """Not to be written to."""
    if type(column) is memoryview or (type(column) is array and column.typecode == "d"):
        return np.frombuffer(column, np.float64)
    return np.array(column, np.float64)


def _counts(column: Sequence[int]) -> _Floats:
    """Integers as floats, in an array of its own."""
    return _ints(column).astype(np.float64)


def _given(column: _Floats) -> array[float]:
    return array("d", column.tobytes())


def _sum(column: _Floats) -> float:
    """As `plain_sum`."""
    return float(np.add.accumulate(column)[-1])


def _over_weights(column: _Floats, weights: Weights) -> _Floats:
    """In place."""
    if weights.each is not None:
        column /= weights.each
    elif weights.one != 1.0:
        column /= weights.one
    return column


def _decoding(requests: Sequence[int], prefilling: Sequence[int]) -> _Floats:
    """Requests known to be prefilled, in an array of its own."""
    decoding = (_ints(requests) - _ints(prefilling)).astype(np.float64)
    return np.maximum(decoding, 0.0, out=decoding)


def of_rows(prices_s: Sequence[Sequence[float]], rows: Sequence[int]) -> Sequence[_Floats]:
    """One column per price, of the prices of each kind and the kind of each row."""
    return list(np.array(prices_s, np.float64).T.take(_ints(rows), axis=1))


def steps_s(
    prices_s: Sequence[_Floats | float],
    weights: Sequence[float],
    requests: Sequence[int],
    prefilling: Sequence[int],
    context_tokens: Sequence[int],
    prompt_tokens: int,
    half_tokens: float,
) -> Sequence[float]:
    """`snapshots.steps_s` at prices of one segment, of all rows or of each."""
    per_request, per_context, base = prices_s
    read = _counts(context_tokens)
    read += prompt_tokens
    decoding = _decoding(requests, prefilling)
    decoding *= half_tokens
    read += decoding
    read /= TPOT_TOKENS
    read *= per_context
    step_s = _counts(requests)
    step_s += 1.0
    step_s *= per_request
    step_s += read
    step_s += base
    np.minimum(np.maximum(step_s, FLOOR_S, out=step_s), CEILING_S, out=step_s)
    return _given(_over_weights(step_s, weights_of(weights)))


def kv_used(
    distinct_ratios: Sequence[float],
    requests: Sequence[int],
    prefilling: Sequence[int],
    prefill_tokens: Sequence[int],
    context_tokens: Sequence[int],
    half_tokens: float,
) -> Sequence[int]:
    """`snapshots.kv_used`."""
    computed = _counts(context_tokens)
    computed *= _floats(distinct_ratios)
    computed -= _ints(prefill_tokens)
    np.maximum(computed, 0.0, out=computed)
    decoding = _decoding(requests, prefilling)
    decoding *= half_tokens
    computed += decoding
    return array("q", computed.astype(np.int64).tobytes())


def times_s(snapshot: Snapshot, learned: Learned) -> tuple[Sequence[float], Sequence[float]]:
    """`columns.times_s`."""
    waits_s, works_s = _times_s(snapshot, learned)
    return _given(waits_s), _given(works_s)


def _times_s(snapshot: Snapshot, learned: Learned) -> tuple[_Floats, _Floats]:
    own, weights = learned.row_prices_s, weights_of(snapshot.weights)
    prices_s: Sequence[_Floats | float] = learned.prefill_prices_s
    if isinstance(own, ByKind):
        prices_s = of_rows(own.each, own.rows)
    elif own:
        prices_s = list(np.array(own, np.float64).T)
    _, token, pair, _, sequence, in_context = prices_s
    requests, pending = _ints(snapshot.requests), _ints(snapshot.prefill_tokens)
    behind = (pending | _ints(snapshot.prefilling)).nonzero()[0]
    per_token = _beside(snapshot, behind, sequence, in_context)
    per_token *= (requests | pending) > 0
    per_token += token / TOKENS
    waits_s = np.zeros(len(requests))
    if behind.size:
        prefilling, left = _ints(snapshot.prefilling)[behind], pending[behind]
        pairs = left * (_ahead(snapshot, behind) - left + left / 2) / np.maximum(1, prefilling)
        pairs = np.where(prefilling > 0, pairs, 0.0)
        ahead_s = left * per_token[behind] + pairs * (_at(pair, behind) / (TOKENS * TOKENS))
        waits_s[behind] = ahead_s / (weights.one if weights.each is None else weights.each[behind])
    return waits_s, _over_weights(_works_s(snapshot, prices_s, per_token), weights)


def _at(of_rows: _Floats | float, rows: _Rows | int) -> _Floats | float:
    return of_rows if isinstance(of_rows, float | int) else of_rows[rows]


def _ahead(snapshot: Snapshot, rows: _Rows) -> _Ints:
    """Prompt tokens ahead, of some rows, see `rows.backlog`; elsewhere nothing is."""
    requests, pending = _ints(snapshot.requests)[rows], _ints(snapshot.prefill_tokens)[rows]
    shared = _ints(snapshot.context_tokens)[rows] * _ints(snapshot.prefilling)[rows]
    ahead = np.maximum(pending, shared // np.maximum(1, requests))
    return np.where(requests > 0, ahead, pending)


def _read(snapshot: Snapshot, behind: _Rows) -> tuple[_Floats, _Floats]:
    """Context that decodes read, and how many they are, see `rows.backlog`.

    Args:
        snapshot: The rows.
        behind: Those with prefill ahead.
    """
    read = _counts(snapshot.context_tokens)
    if behind.size:
        read[behind] -= _ahead(snapshot, behind)
    np.maximum(read, 0.0, out=read)
    decoding = _decoding(snapshot.requests, snapshot.prefilling)
    read += decoding * (snapshot.output_tokens / 2)
    return read, decoding


def _beside(
    snapshot: Snapshot, behind: _Rows, sequence: _Floats | float, in_context: _Floats | float
) -> _Floats:
    """What decodes add to each token of prefill."""
    beside, decoding = _read(snapshot, behind)
    beside *= in_context
    beside /= TOKENS
    beside += sequence * decoding
    room = np.subtract(STEP_TOKENS, decoding, out=decoding)
    beside /= np.maximum(room, STEP_TOKENS // 8, out=room)
    return beside


def _works_s(snapshot: Snapshot, prices_s: Sequence[_Floats | float], per_token: _Floats) -> _Floats:
    """Own prefill, at no weight: as if nothing were cached, but where something is."""
    works_s = _work_s(prices_s, 0, max(BLANK_PROMPT, snapshot.prompt_tokens), per_token)
    cached = _ints(snapshot.cached_tokens)
    rows = cached.nonzero()[0]
    if rows.size <= _FEW_ROWS:
        for row in rows.tolist():
            has, of_row = snapshot.cached_tokens[row], [_at(each, row) for each in prices_s]
            works_s[row] = _work_s(
                of_row, has, max(BLANK_PROMPT, snapshot.prompt_tokens - has), per_token[row]
            )
    else:
        cached = cached[rows]
        uncached = np.maximum(BLANK_PROMPT, snapshot.prompt_tokens - cached)
        works_s[rows] = _work_s([_at(each, rows) for each in prices_s], cached, uncached, per_token[rows])
    return works_s


def _work_s(
    prices_s: Sequence[_Floats | float], cached: _Ints | int, uncached: _Ints | int, per_token: _Floats
) -> _Floats:
    """Of some rows, or of one."""
    base, _, pair, from_cache, _, _ = prices_s
    work_s = uncached * per_token
    work_s += base + cached * (from_cache / TOKENS)
    work_s += uncached * (cached + uncached / 2) * (pair / (TOKENS * TOKENS))
    return work_s


def rooms_s(snapshot: Snapshot, waits_s: Sequence[float]) -> Sequence[float]:
    """`columns.rooms_s`."""
    found = _rooms_s(snapshot, _floats(waits_s), turns_s(snapshot))
    return array("d", bytes(8 * len(waits_s))) if found is None else _given(found)


def _rooms_s(snapshot: Snapshot, waits_s: _Floats, turns_s: Sequence[float]) -> _Floats | None:
    """None if there is room everywhere."""
    found = None
    if snapshot.kv_tokens:
        rows = _maybe_short(snapshot)
        if rows.size:
            found = np.zeros(len(waits_s))
            found[rows] = _kv_s(snapshot, rows)
    if turns_s:
        turns = _floats(turns_s)
        rows = turns.nonzero()[0]
        excess = (_ints(snapshot.requests) - _ints(snapshot.max_num_seqs))[rows]
        found = np.zeros(len(waits_s)) if found is None else found
        found[rows] = np.maximum(np.maximum(found[rows], excess * turns[rows] - waits_s[rows]), 0.0)
    return found


def _maybe_short(snapshot: Snapshot) -> _Rows:
    """Rows whose KV cache may have too little room; others have enough."""
    kv = _ints(snapshot.kv_tokens)
    used = snapshot.kv_used
    if not used or type(used) is not array:  # as the engines say, of which some do not
        return kv.nonzero()[0]
    needed = _ints(used) + _ints(snapshot.prefill_tokens)
    needed += max(BLANK_PROMPT, snapshot.prompt_tokens)
    return ((needed > kv) & (kv > 0)).nonzero()[0]


def _kv_s(snapshot: Snapshot, rows: _Rows) -> _Floats:
    """`rows.kv_s` of some rows, whose cache's size is known."""
    pending, cached = _ints(snapshot.prefill_tokens)[rows], _ints(snapshot.cached_tokens)[rows]
    used = _said_or_counted(snapshot, rows)
    excess = used + (pending + np.maximum(BLANK_PROMPT, snapshot.prompt_tokens - cached))
    excess -= _ints(snapshot.kv_tokens)[rows]
    is_short = (excess > 0.0) & (used > 0.0)
    share = np.minimum(1.0, excess / np.where(is_short, used, 1.0))
    return np.where(is_short, share * snapshot.output_tokens * _floats(snapshot.steps_s)[rows], 0.0)


def _said_or_counted(snapshot: Snapshot, rows: _Rows) -> _Floats:
    """As the engines say, or where they do not, by the ledger, as `rows.kv_s` has it."""
    if snapshot.kv_used and type(snapshot.kv_used) is array:
        return _ints(snapshot.kv_used)[rows].astype(np.float64)
    pending = _ints(snapshot.prefill_tokens)
    behind = (pending | _ints(snapshot.prefilling)).nonzero()[0]
    counted = _read(snapshot, behind)[0]
    if behind.size:
        counted[behind] += _ahead(snapshot, behind)
    counted -= pending
    counted = counted[rows]
    if not snapshot.kv_used:
        return counted
    said = np.array(snapshot.kv_used, np.float64)[rows]  # None becomes "not a number"
    return np.where(np.isnan(said), counted, said)


def turns_s(snapshot: Snapshot) -> Sequence[float]:
    """`columns.turns_s`."""
    if not snapshot.max_num_seqs:
        return ()
    requests, limits = _ints(snapshot.requests), _ints(snapshot.max_num_seqs)
    is_full = requests > limits
    rows = np.logical_and(is_full, limits, out=is_full).nonzero()[0]
    if not rows.size:
        return ()
    found = np.zeros(len(requests))
    found[rows] = snapshot.output_tokens * _floats(snapshot.steps_s)[rows] / limits[rows]
    return _given(found) if found.any() else ()


def taken_ratios(snapshot: Snapshot) -> Sequence[float]:
    """`columns.taken_ratios`."""
    return _given(_taken_ratios(snapshot))


def _taken_ratios(snapshot: Snapshot) -> _Floats:
    limits = _counts(snapshot.max_num_seqs)
    ratios = _ints(snapshot.requests) / np.maximum(limits, 1.0)
    np.minimum(ratios, 1.0, out=ratios)
    ratios *= limits != 0
    return ratios


def completion_costs(snapshot: Snapshot, learned: Learned) -> Costs:
    """`least_completion.completion_costs`, but for those that wait."""
    endpoints, steps = len(snapshot.keys), _floats(snapshot.steps_s)
    followers_per_s, taken = learned.followers_per_s, None
    if snapshot.max_num_seqs:
        taken = _taken_ratios(snapshot)
        in_use = _sum(taken) / endpoints
        followers_per_s = max(followers_per_s, learned.rate_per_s / (1.0 - min(MOST_TAKEN, in_use)))
    waits, works = _times_s(snapshot, learned)
    turns = turns_s(snapshot)
    rooms = _rooms_s(snapshot, waits, turns)
    pace_s = _sum(steps) / endpoints
    price = price_at_pace(learned.decode_tokens, learned.tpot_limit_s, pace_s)
    stalled = _stalled(snapshot, pace_s)
    columns = waits, works, rooms, steps
    held_s, sunk = snapshot.held_s, snapshot.sunk_ratios
    places = _places_s(taken, snapshot.max_num_seqs, learned.place_s)
    return _costs(*columns, followers_per_s, price, held_s, turns, stalled, sunk, places)


def places_s(taken: Sequence[float], limits: Sequence[int], worth_s: float) -> Sequence[float]:
    """`places.places_s`."""
    found = _places_s(_floats(taken), limits, worth_s)
    return () if found is None else _given(found)


def _places_s(taken: _Floats | None, limits: Sequence[int], worth_s: float) -> _Floats | None:
    """None if they cost nothing, or if nobody knows how many there are."""
    if taken is None or worth_s < LEAST_S:
        return None
    chances, counts = taken.copy(), _ints(limits)
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
    found = _floats(costs.works_s) + _floats(costs.others_s)
    found += _floats(costs.stalls_s)
    own_s = float(found[row])
    found[row] = np.inf
    next_row = int(np.argmin(found))
    if cached_tokens[row] <= cached_tokens[next_row]:
        return 0.0
    return max(0.0, float(found[next_row]) - own_s)


def _stalled(snapshot: Snapshot, pace_s: float) -> _Floats | float:
    """As in `least_completion`; one number where it is the same for all rows."""
    decoding = int(_ints(snapshot.requests).sum()) - int(_ints(snapshot.prefilling).sum())
    if decoding <= 0 or snapshot.output_tokens <= 0.0:
        return 0.0
    weights, price = weights_of(snapshot.weights), price_at_pace(DECODE_TOKENS, TPOT_LIMIT_S, pace_s)
    each_s = decoding / weights.total * price / snapshot.output_tokens
    return each_s * (weights.one if weights.each is None else weights.each)


def cost_columns(
    waits_s: Sequence[float],
    works_s: Sequence[float],
    rooms_s: Sequence[float],
    steps_s: Sequence[float],
    followers_per_s: float,
    pace_price: float,
    held_s: float,
    turns_s: Sequence[float] = (),
    stalled: Sequence[float] = (),
    sunk_ratios: Sequence[float] = (),
    places_s: Sequence[float] = (),
) -> Costs:
    """`completion.cost_columns`."""
    columns = _floats(waits_s), _floats(works_s), _floats(rooms_s), _floats(steps_s)
    stalls = _floats(stalled) if stalled else 0.0
    places = _floats(places_s) if places_s else None
    return _costs(*columns, followers_per_s, pace_price, held_s, turns_s, stalls, sunk_ratios, places)


def _costs(
    waits: _Floats,
    works: _Floats,
    rooms: _Floats | None,
    steps: _Floats,
    followers_per_s: float,
    pace_price: float,
    held_s: float,
    turns_s: Sequence[float],
    stalled: _Floats | float,
    sunk_ratios: Sequence[float],
    places: _Floats | None,
) -> Costs:
    endpoints = len(waits)
    backlogs = waits if rooms is None else waits + rooms
    others = works / (2 * endpoints)
    others += _mean_backlog_s(backlogs, held_s)
    others *= followers_per_s * works
    stalls = stalled * works
    if sunk_ratios:
        charged = 1.0 - _floats(sunk_ratios)
        others *= charged
        stalls *= charged
    decodes = pace_price * steps
    totals = backlogs + works
    totals += others
    totals += stalls
    totals += decodes
    if places is not None:
        totals += places
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
    )


def _read_by_row(column: _Floats) -> Sequence[float]:
    """The array itself, each of whose numbers is read as one of Python's: most are of no further interest."""
    return cast("Sequence[float]", column.data)


def _mean_backlog_s(backlogs: _Floats, held_s: float) -> float:
    """`completion.mean_backlog_s`, of backlogs in any order."""
    endpoints = len(backlogs)
    half = min(endpoints, max(2, (endpoints + 1) // 2))
    if endpoints - np.count_nonzero(backlogs) >= half:  # the emptier half has none at all
        return held_s / endpoints
    return mean_backlog_s(_given(np.sort(backlogs)), held_s)


def negated(column: Sequence[float]) -> Sequence[float]:
    """Each number's negative."""
    return _given(-_floats(column))


def most_cached_first(scores: Sequence[float], cached_tokens: Sequence[int]) -> Sequence[float]:
    """`least_completion.most_cached_first`."""
    values = _floats(scores)
    best = float(np.max(values))
    is_best = values == best
    if np.count_nonzero(is_best) == 1:
        return scores
    cached = _ints(cached_tokens)
    most = int(np.max(cached[is_best]))
    if most == 0:
        return scores
    is_less = is_best & (cached < most)
    return _given(np.where(is_less, np.nextafter(best, -np.inf), values))
