"""What `columns`, `completion` and `snapshots` compute over rows, for many rows: the same values by numpy.

Rules:
    1. Equal to the loops to the last bit: the same operations in the same order, each in 64 bits. Sums are
       `plain_sum`, for numpy's own adds in another order.
    2. Arrays of numpy stay inside: lists or arrays of Python go in, and arrays of Python come out, whose
       bytes numpy reads again without a look at each number.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from extproc.choosing.completion import Costs, mean_backlog_s
from extproc.choosing.rows import BLANK_PROMPT
from extproc.predicting.priced_terms import CEILING_S
from extproc.predicting.tpot import FLOOR_S
from extproc.predicting.tpot import TOKENS as TPOT_TOKENS
from extproc.predicting.ttft import STEP_TOKENS, TOKENS
from extproc.values.choices import Learned, Snapshot

MANY_ROWS: Final = 64
"""From so many rows on arrays pay for being made."""

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]


def _ints(column: Sequence[int]) -> _Ints:
    return np.array(column, np.int64)


def _floats(column: Sequence[float]) -> _Floats:
    return np.array(column, np.float64)


def _weights(column: Sequence[float]) -> _Floats | float:
    """One number where all are the same, as most are."""
    first = column[0]
    return first if column.count(first) == len(column) else _floats(column)


def _given(column: _Floats) -> array[float]:
    return array("d", column.tobytes())


def steps_s(
    prices_s: Sequence[float],
    weights: Sequence[float],
    requests: Sequence[int],
    prefilling: Sequence[int],
    context_tokens: Sequence[int],
    prompt_tokens: int,
    half_tokens: float,
) -> Sequence[float]:
    """`snapshots.steps_s` at one set of prices of one segment."""
    per_request, per_context, base = prices_s
    running, prefills, context = _ints(requests), _ints(prefilling), _ints(context_tokens)
    read = (context + prompt_tokens) + np.maximum(0, running - prefills) * half_tokens
    step_s = per_request * (running + 1) + per_context * (read / TPOT_TOKENS) + base
    return _given(np.clip(step_s, FLOOR_S, CEILING_S) / _weights(weights))


def kv_used(
    distinct_ratios: Sequence[float],
    requests: Sequence[int],
    prefilling: Sequence[int],
    prefill_tokens: Sequence[int],
    context_tokens: Sequence[int],
    half_tokens: float,
) -> Sequence[int]:
    """`snapshots.kv_used`."""
    computed = np.maximum(0.0, _ints(context_tokens) * _floats(distinct_ratios) - _ints(prefill_tokens))
    decoding = np.maximum(0, _ints(requests) - _ints(prefilling))
    return array("q", (computed + decoding * half_tokens).astype(np.int64).tobytes())


def times_s(snapshot: Snapshot, learned: Learned) -> tuple[Sequence[float], Sequence[float]]:
    """`columns.times_s`."""
    own = learned.row_prices_s
    prices_s = np.array(own, np.float64).T if own else learned.prefill_prices_s
    base, token, pair, from_cache, sequence, in_context = prices_s
    requests, prefilling = _ints(snapshot.requests), _ints(snapshot.prefilling)
    pending, context = _ints(snapshot.prefill_tokens), _ints(snapshot.context_tokens)
    cached, weights = _ints(snapshot.cached_tokens), _weights(snapshot.weights)
    ahead, decoding, read = _backlogs(requests, prefilling, pending, context, snapshot.output_tokens)
    beside = sequence * decoding + in_context * read / TOKENS
    beside = beside / np.maximum(STEP_TOKENS // 8, STEP_TOKENS - decoding)
    is_busy = (requests > 0) | (pending > 0)
    per_pair = pair / (TOKENS * TOKENS)
    per_token: _Floats = token / TOKENS + np.where(is_busy, beside, 0.0)
    pairs = pending * (ahead - pending + pending / 2) / np.maximum(1, prefilling)
    pairs = np.where(prefilling > 0, pairs, 0.0)
    waits = np.where(is_busy, (pending * per_token + pairs * per_pair) / weights, 0.0)
    uncached = np.maximum(BLANK_PROMPT, snapshot.prompt_tokens - cached)
    pairs = uncached * (cached + uncached / 2)
    works = base + cached * (from_cache / TOKENS) + uncached * per_token + pairs * per_pair
    return _given(waits), _given(works / weights)


def _backlogs(
    requests: _Ints, prefilling: _Ints, pending: _Ints, context: _Ints, output_tokens: float
) -> tuple[_Ints, _Ints, _Floats]:
    """Prompt tokens ahead, requests that decode and the context that they read, see `rows.backlog`."""
    ahead = np.maximum(pending, context * prefilling // np.maximum(1, requests))
    ahead = np.where(requests > 0, ahead, pending)
    decoding = np.maximum(0, requests - prefilling)
    return ahead, decoding, np.maximum(0, context - ahead) + decoding * (output_tokens / 2)


def rooms_s(snapshot: Snapshot, waits_s: Sequence[float]) -> Sequence[float]:
    """`columns.rooms_s`."""
    found = np.zeros(len(waits_s))
    requests, steps = _ints(snapshot.requests), _floats(snapshot.steps_s)
    if any(snapshot.kv_tokens):
        kv, pending = _ints(snapshot.kv_tokens), _ints(snapshot.prefill_tokens)
        used = _said_or_counted(snapshot, requests, pending)
        uncached = np.maximum(BLANK_PROMPT, snapshot.prompt_tokens - _ints(snapshot.cached_tokens))
        excess = used + (pending + uncached) - kv
        is_short = (kv > 0) & (excess > 0.0) & (used > 0.0)
        share = np.minimum(1.0, excess / np.where(is_short, used, 1.0))
        found = np.where(is_short, share * snapshot.output_tokens * steps, found)
    turns = turns_s(snapshot)
    if turns:
        batches = (requests - _ints(snapshot.max_num_seqs)) * _floats(turns)
        found = np.maximum(np.maximum(found, batches - _floats(waits_s)), 0.0)
    return _given(found)


def turns_s(snapshot: Snapshot) -> Sequence[float]:
    """`columns.turns_s`."""
    if not any(snapshot.max_num_seqs):
        return ()
    requests, limits = _ints(snapshot.requests), _ints(snapshot.max_num_seqs)
    turns = snapshot.output_tokens * _floats(snapshot.steps_s) / np.maximum(1, limits)
    return _given(np.where((limits > 0) & (requests > limits), turns, 0.0))


def taken_ratios(snapshot: Snapshot) -> Sequence[float]:
    """`columns.taken_ratios`."""
    limits = _ints(snapshot.max_num_seqs)
    ratios = np.minimum(1.0, _ints(snapshot.requests) / np.maximum(1, limits))
    return _given(np.where(limits != 0, ratios, 0.0))


def _said_or_counted(snapshot: Snapshot, requests: _Ints, pending: _Ints) -> _Floats:
    """As the engines say, or where they do not, by the ledger, as `rows.kv_s` has it."""
    prefilling, context = _ints(snapshot.prefilling), _ints(snapshot.context_tokens)
    ahead, _, read = _backlogs(requests, prefilling, pending, context, snapshot.output_tokens)
    counted: _Floats = read + ahead - pending
    if not snapshot.kv_used:
        return counted
    said = np.array(snapshot.kv_used, np.float64)  # None becomes "not a number"
    return np.where(np.isnan(said), counted, said)


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
) -> Costs:
    """`completion.cost_columns`."""
    endpoints = len(waits_s)
    waits, works, rooms = _floats(waits_s), _floats(works_s), _floats(rooms_s)
    backlog_s = mean_backlog_s(_given(np.sort(waits + rooms)), held_s)
    others = followers_per_s * works * (backlog_s + works / (2 * endpoints))
    stalls = _floats(stalled) * works if stalled else np.zeros(endpoints)
    if sunk_ratios:
        charged = 1.0 - _floats(sunk_ratios)
        others, stalls = others * charged, stalls * charged
    decodes = pace_price * _floats(steps_s)
    totals = waits + rooms + works + others + stalls + decodes
    columns = _given(others), _given(stalls), _given(decodes)
    return Costs(waits_s, rooms_s, works_s, *columns, turns_s, _given(totals))


def floats(column: Sequence[float]) -> array[float]:
    """The same numbers in an array, which `plain_sum` adds up sooner."""
    return _given(_floats(column))


def scaled(column: Sequence[float], factor: float) -> Sequence[float]:
    """Each number times the factor."""
    return _given(factor * _floats(column))


def negated(column: Sequence[float]) -> Sequence[float]:
    """Each number's negative."""
    return _given(-_floats(column))


def most_cached_first(scores: Sequence[float], cached_tokens: Sequence[int]) -> Sequence[float]:
    """`least_completion.most_cached_first`."""
    values = _floats(scores)
    best = np.max(values)
    is_best = values == best
    if np.count_nonzero(is_best) == 1:
        return scores
    cached = _ints(cached_tokens)
    is_less = is_best & (cached < np.max(cached[is_best]))
    return _given(np.where(is_less, np.nextafter(best, -np.inf), values))
