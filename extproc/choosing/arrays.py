"""What `columns`, `completion` and `snapshots` compute over rows, for many rows: the same values by numpy.

Rules:
    1. Equal to the loops to the last bit: the same operations in the same order, each in 64 bits. Sums are
       Python's own, over lists, for numpy adds in another order.
    2. Arrays of numpy stay inside: lists or arrays of Python go in, and lists come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

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


def _ints(*columns: Sequence[int]) -> _Ints:
    return np.array(columns, np.int64)


def steps_s(
    prices_s: Sequence[float],
    weights: Sequence[float],
    requests: Sequence[int],
    prefilling: Sequence[int],
    context_tokens: Sequence[int],
    prompt_tokens: int,
    half_tokens: float,
) -> list[float]:
    """`snapshots.steps_s` at one set of prices of one segment."""
    per_request, per_context, base = prices_s
    running, prefills, context = _ints(requests, prefilling, context_tokens)
    read = (context + prompt_tokens) + np.maximum(0, running - prefills) * half_tokens
    step_s = per_request * (running + 1) + per_context * (read / TPOT_TOKENS) + base
    found: list[float] = (np.clip(step_s, FLOOR_S, CEILING_S) / np.array(weights, np.float64)).tolist()
    return found


def times_s(snapshot: Snapshot, learned: Learned) -> tuple[list[float], list[float]]:
    """`columns.times_s`."""
    own = learned.row_prices_s
    prices_s = np.array(own, np.float64).T if own else learned.prefill_prices_s
    base, token, pair, from_cache, sequence, in_context = prices_s
    requests, prefilling, pending, context = _ints(  # not beside a list: then it would read each number
        snapshot.requests, snapshot.prefilling, snapshot.prefill_tokens, snapshot.context_tokens
    )
    cached: _Ints = np.array(snapshot.cached_tokens, np.int64)
    weights = np.array(snapshot.weights, np.float64)
    ahead = np.maximum(pending, context * prefilling // np.maximum(1, requests))
    ahead = np.where(requests > 0, ahead, pending)
    decoding = np.maximum(0, requests - prefilling)
    read = np.maximum(0, context - ahead) + decoding * (snapshot.output_tokens / 2)
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
    return waits.tolist(), (works / weights).tolist()
