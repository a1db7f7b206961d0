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
from typing import Final

import numpy as np

from extproc.choosing.array_types import Floats, Ints, Rows, counts_of, floats_of, given, ints_of
from extproc.choosing.rows import BLANK_PROMPT
from extproc.choosing.weights import Weights, weights_of
from extproc.predicting.priced_terms import CEILING_S
from extproc.predicting.tpot import FLOOR_S
from extproc.predicting.tpot import TOKENS as TPOT_TOKENS
from extproc.predicting.ttft import STEP_TOKENS, TOKENS
from extproc.values.by_kind import ByKind
from extproc.values.choices import Learned, Snapshot

_FEW_ROWS: Final = 8
"""Up to so many one after the other is quicker."""


def _over_weights(column: Floats, weights: Weights) -> Floats:
    """In place."""
    if weights.each is not None:
        column /= weights.each
    elif weights.one != 1.0:
        column /= weights.one
    return column


def _decoding(requests: Sequence[int], prefilling: Sequence[int]) -> Floats:
    """Requests known to be prefilled, in an array of its own."""
    decoding = (ints_of(requests) - ints_of(prefilling)).astype(np.float64)
    return np.maximum(decoding, 0.0, out=decoding)


def of_rows(prices_s: Sequence[Sequence[float]], rows: Sequence[int]) -> Sequence[Floats]:
    """One column per price, of the prices of each kind and the kind of each row."""
    return list(np.array(prices_s, np.float64).T.take(ints_of(rows), axis=1))


def steps_s(
    prices_s: Sequence[Floats | float],
    weights: Sequence[float],
    requests: Sequence[int],
    prefilling: Sequence[int],
    context_tokens: Sequence[int],
    prompt_tokens: int,
    half_tokens: float,
) -> Sequence[float]:
    """`snapshots.steps_s` at prices of one segment, of all rows or of each."""
    per_request, per_context, base = prices_s
    read = counts_of(context_tokens)
    read += prompt_tokens
    decoding = _decoding(requests, prefilling)
    decoding *= half_tokens
    read += decoding
    read /= TPOT_TOKENS
    read *= per_context
    step_s = counts_of(requests)
    step_s += 1.0
    step_s *= per_request
    step_s += read
    step_s += base
    np.minimum(np.maximum(step_s, FLOOR_S, out=step_s), CEILING_S, out=step_s)
    return given(_over_weights(step_s, weights_of(weights)))


def kv_used(
    distinct_ratios: Sequence[float],
    requests: Sequence[int],
    prefilling: Sequence[int],
    prefill_tokens: Sequence[int],
    context_tokens: Sequence[int],
    half_tokens: float,
) -> Sequence[int]:
    """`snapshots.kv_used`."""
    computed = counts_of(context_tokens)
    computed *= floats_of(distinct_ratios)
    computed -= ints_of(prefill_tokens)
    np.maximum(computed, 0.0, out=computed)
    decoding = _decoding(requests, prefilling)
    decoding *= half_tokens
    computed += decoding
    return array("q", computed.astype(np.int64).tobytes())


def times_s(snapshot: Snapshot, learned: Learned) -> tuple[Sequence[float], Sequence[float]]:
    """`columns.times_s`."""
    waits_s, works_s = times_of(snapshot, learned)
    return given(waits_s), given(works_s)


def times_of(snapshot: Snapshot, learned: Learned) -> tuple[Floats, Floats]:
    """`times_s`, in arrays of numpy."""
    own, weights = learned.row_prices_s, weights_of(snapshot.weights)
    prices_s: Sequence[Floats | float] = learned.prefill_prices_s
    if isinstance(own, ByKind):
        prices_s = of_rows(own.each, own.rows)
    elif own:
        prices_s = list(np.array(own, np.float64).T)
    _, token, pair, _, sequence, in_context = prices_s
    requests, pending = ints_of(snapshot.requests), ints_of(snapshot.prefill_tokens)
    behind = (pending | ints_of(snapshot.prefilling)).nonzero()[0]
    per_token = _beside(snapshot, behind, sequence, in_context)
    per_token *= (requests | pending) > 0
    per_token += token / TOKENS
    waits_s = np.zeros(len(requests))
    if behind.size:
        prefilling, left = ints_of(snapshot.prefilling)[behind], pending[behind]
        pairs = left * (_ahead(snapshot, behind) - left + left / 2) / np.maximum(1, prefilling)
        pairs = np.where(prefilling > 0, pairs, 0.0)
        ahead_s = left * per_token[behind] + pairs * (_at(pair, behind) / (TOKENS * TOKENS))
        waits_s[behind] = ahead_s / (weights.one if weights.each is None else weights.each[behind])
    return waits_s, _over_weights(_works_s(snapshot, prices_s, per_token), weights)


def _at(of_rows: Floats | float, rows: Rows | int) -> Floats | float:
    return of_rows if isinstance(of_rows, float | int) else of_rows[rows]


def _ahead(snapshot: Snapshot, rows: Rows) -> Ints:
    """Prompt tokens ahead, of some rows, see `rows.backlog`; elsewhere nothing is."""
    requests, pending = ints_of(snapshot.requests)[rows], ints_of(snapshot.prefill_tokens)[rows]
    shared = ints_of(snapshot.context_tokens)[rows] * ints_of(snapshot.prefilling)[rows]
    ahead = np.maximum(pending, shared // np.maximum(1, requests))
    return np.where(requests > 0, ahead, pending)


def _read(snapshot: Snapshot, behind: Rows) -> tuple[Floats, Floats]:
    """Context that decodes read, and how many they are, see `rows.backlog`.

    Args:
        snapshot: The rows.
        behind: Those with prefill ahead.
    """
    read = counts_of(snapshot.context_tokens)
    if behind.size:
        read[behind] -= _ahead(snapshot, behind)
    np.maximum(read, 0.0, out=read)
    decoding = _decoding(snapshot.requests, snapshot.prefilling)
    read += decoding * (snapshot.output_tokens / 2)
    return read, decoding


def _beside(snapshot: Snapshot, behind: Rows, sequence: Floats | float, in_context: Floats | float) -> Floats:
    """What decodes add to each token of prefill."""
    beside, decoding = _read(snapshot, behind)
    beside *= in_context
    beside /= TOKENS
    beside += sequence * decoding
    room = np.subtract(STEP_TOKENS, decoding, out=decoding)
    beside /= np.maximum(room, STEP_TOKENS // 8, out=room)
    return beside


def _works_s(snapshot: Snapshot, prices_s: Sequence[Floats | float], per_token: Floats) -> Floats:
    """Own prefill, at no weight: as if nothing were cached, but where something is."""
    works_s = _work_s(prices_s, 0, max(BLANK_PROMPT, snapshot.prompt_tokens), per_token)
    cached = ints_of(snapshot.cached_tokens)
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
    prices_s: Sequence[Floats | float], cached: Ints | int, uncached: Ints | int, per_token: Floats
) -> Floats:
    """Of some rows, or of one."""
    base, _, pair, from_cache, _, _ = prices_s
    work_s = uncached * per_token
    work_s += base + cached * (from_cache / TOKENS)
    work_s += uncached * (cached + uncached / 2) * (pair / (TOKENS * TOKENS))
    return work_s


def rooms_s(snapshot: Snapshot, waits_s: Sequence[float]) -> Sequence[float]:
    """`columns.rooms_s`."""
    found = rooms_of(snapshot, floats_of(waits_s), turns_s(snapshot))
    return array("d", bytes(8 * len(waits_s))) if found is None else given(found)


def rooms_of(snapshot: Snapshot, waits_s: Floats, turns_s: Sequence[float]) -> Floats | None:
    """None if there is room everywhere."""
    found = None
    if snapshot.kv_tokens:
        rows = _maybe_short(snapshot)
        if rows.size:
            found = np.zeros(len(waits_s))
            found[rows] = _kv_s(snapshot, rows)
    if turns_s:
        turns = floats_of(turns_s)
        rows = turns.nonzero()[0]
        excess = (ints_of(snapshot.requests) - ints_of(snapshot.max_num_seqs))[rows]
        found = np.zeros(len(waits_s)) if found is None else found
        found[rows] = np.maximum(np.maximum(found[rows], excess * turns[rows] - waits_s[rows]), 0.0)
    return found


def _maybe_short(snapshot: Snapshot) -> Rows:
    """Rows whose KV cache may have too little room; others have enough."""
    kv = ints_of(snapshot.kv_tokens)
    used = snapshot.kv_used
    if not used or type(used) is not array:  # as the engines say, of which some do not
        return kv.nonzero()[0]
    needed = ints_of(used) + ints_of(snapshot.prefill_tokens)
    needed += max(BLANK_PROMPT, snapshot.prompt_tokens)
    return ((needed > kv) & (kv > 0)).nonzero()[0]


def _kv_s(snapshot: Snapshot, rows: Rows) -> Floats:
    """`rows.kv_s` of some rows, whose cache's size is known."""
    pending, cached = ints_of(snapshot.prefill_tokens)[rows], ints_of(snapshot.cached_tokens)[rows]
    used = _said_or_counted(snapshot, rows)
    excess = used + (pending + np.maximum(BLANK_PROMPT, snapshot.prompt_tokens - cached))
    excess -= ints_of(snapshot.kv_tokens)[rows]
    is_short = (excess > 0.0) & (used > 0.0)
    share = np.minimum(1.0, excess / np.where(is_short, used, 1.0))
    return np.where(is_short, share * snapshot.output_tokens * floats_of(snapshot.steps_s)[rows], 0.0)


def _said_or_counted(snapshot: Snapshot, rows: Rows) -> Floats:
    """As the engines say, or where they do not, by the ledger, as `rows.kv_s` has it."""
    if snapshot.kv_used and type(snapshot.kv_used) is array:
        return ints_of(snapshot.kv_used)[rows].astype(np.float64)
    pending = ints_of(snapshot.prefill_tokens)
    behind = (pending | ints_of(snapshot.prefilling)).nonzero()[0]
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
    requests, limits = ints_of(snapshot.requests), ints_of(snapshot.max_num_seqs)
    is_full = requests > limits
    rows = np.logical_and(is_full, limits, out=is_full).nonzero()[0]
    if not rows.size:
        return ()
    found = np.zeros(len(requests))
    found[rows] = snapshot.output_tokens * floats_of(snapshot.steps_s)[rows] / limits[rows]
    return given(found) if found.any() else ()


def taken_ratios(snapshot: Snapshot) -> Sequence[float]:
    """`columns.taken_ratios`."""
    return given(taken_of(snapshot))


def taken_of(snapshot: Snapshot) -> Floats:
    """`taken_ratios`, in an array of its own."""
    limits = counts_of(snapshot.max_num_seqs)
    ratios = ints_of(snapshot.requests) / np.maximum(limits, 1.0)
    np.minimum(ratios, 1.0, out=ratios)
    ratios *= limits != 0
    return ratios
