"""Terms of a score: how much each row of a snapshot is worth to a policy, part by part.

Rules:
    1. Higher is better. A term has one value per row; a policy's score is the plain sum of its terms.
    2. Load counts relative to capacity: amounts are divided by the endpoint's weight first.
    3. Nothing here draws, rounds for display or depends on the order of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from operator import add, truediv
from typing import Final

from extproc.choosing.least_completion import completion_terms
from extproc.choosing.settings import Algorithm, LoadBalancing
from extproc.types import Snapshot

Terms = Mapping[str, list[float]]

_MIN_REQUEST_SPREAD: Final = 2.0
"""Smallest divisor of a request difference, so that 0 against 1 does not weigh in full (AIGW)."""

_REQUEST_STEP: Final = 5.0
"""The request term grows by its whole weight for each started 5 requests of spread (AIGW)."""

_MIN_PREFILL_TOKENS: Final = 1024.0
"""Smallest divisor of pending prefill, so that a short prompt alone does not weigh in full (AIGW)."""

_IMBALANCE_REQUESTS: Final = 8.0
"""Spread of in-flight requests beyond which the cache is ignored (AIBrix prefix-cache, code default)."""

_OVERLOAD_SIGMAS: Final = 1.0
"""A holder this far above the mean load is passed over (AIBrix prefix-cache, code default)."""

_ROUNDING: Final = 1e-9
"""Keeps rounding from lifting a row above a line it is on: of two rows the higher always is on it."""


def terms_of(snapshot: Snapshot, settings: LoadBalancing) -> Terms:
    """The terms of the algorithm in `settings`; empty for one that does not score, or has all terms off."""
    match settings.algorithm:
        case Algorithm.INFERENCE_LB:
            return inference_terms(snapshot, settings)
        case Algorithm.LEAST_COMPLETION:
            return completion_terms(snapshot)
        case Algorithm.PREFIX_CACHE:
            return prefix_cache_terms(snapshot, settings)
        case Algorithm.LEAST_REQUEST:
            return least_request_terms(snapshot)
        case _:
            return {}


def total(terms: Terms) -> list[float] | None:
    """The scores: terms added up in their order; None if there are none."""
    scores: list[float] | None = None
    for part in terms.values():
        scores = part if scores is None else list(map(add, scores, part))
    return scores


def inference_scores(snapshot: Snapshot, settings: LoadBalancing) -> list[float] | None:
    """`total(inference_terms(...))` to the last bit, in one pass over the rows for the usual settings."""
    if not (settings.cache_aware_enable and settings.load_aware_enable):
        return total(inference_terms(snapshot, settings))
    requests = list(map(truediv, snapshot.requests, snapshot.weights))
    prefill_tokens = list(map(truediv, snapshot.prefill_tokens, snapshot.weights))
    per_block, fewest, step, per_token = _inference_factors(snapshot, settings, requests, prefill_tokens)
    return [
        matched * per_block + (fewest - row) * step + tokens * per_token
        for matched, row, tokens in zip(snapshot.matched_blocks, requests, prefill_tokens, strict=True)
    ]


def inference_terms(snapshot: Snapshot, settings: LoadBalancing) -> Terms:
    """AIGW's terms: `cache`, `requests` and `prefill`, those that the settings turn on, in this order.

    `Wc*hit - Wr*ceil(D/5)*(r-min r)/D - Wp*p/P` with r = requests/weight, p = prefill_tokens/weight,
    D = max(2, max r - min r), P = max(1024, max p) and hit = matched_blocks/num_blocks (0 of 0 is 0).

    Source: AIGW `pkg/aigateway/loadbalancer/inferencelb/inference_lb.go` at 169bcb8; equal to it when
    every weight is 1.
    """
    requests = list(map(truediv, snapshot.requests, snapshot.weights))
    prefill_tokens = list(map(truediv, snapshot.prefill_tokens, snapshot.weights))
    per_block, fewest, step, per_token = _inference_factors(snapshot, settings, requests, prefill_tokens)
    terms: dict[str, list[float]] = {}
    if settings.cache_aware_enable:
        terms["cache"] = [matched * per_block for matched in snapshot.matched_blocks]
    if settings.load_aware_enable:
        terms["requests"] = [(fewest - row) * step for row in requests]
        terms["prefill"] = [row * per_token for row in prefill_tokens]
    return terms


def _inference_factors(
    snapshot: Snapshot, settings: LoadBalancing, requests: list[float], prefill_tokens: list[float]
) -> tuple[float, float, float, float]:
    """What a matched block is worth, the fewest requests, what each above them costs, and each token."""
    fewest = min(requests)
    spread = max(_MIN_REQUEST_SPREAD, max(requests) - fewest)
    return (
        settings.cache_ratio_weight / max(1, snapshot.num_blocks),
        fewest,
        settings.request_load_weight * ceil(spread / _REQUEST_STEP) / spread,
        -settings.prefill_load_weight / max(_MIN_PREFILL_TOKENS, max(prefill_tokens)),
    )


def least_request_terms(snapshot: Snapshot) -> Terms:
    """One term, `requests`: in-flight requests per weight, negated."""
    return {"requests": [-row for row in map(truediv, snapshot.requests, snapshot.weights)]}


def prefix_cache_terms(snapshot: Snapshot, settings: LoadBalancing) -> Terms:
    """The longest match first and, among equals, the least loaded; those terms that are turned on.

    `cache` is in blocks and counts only what tells rows apart: blocks that every row holds say nothing.
    It is zero for rows loaded above mean + sigma, and for all when the spread exceeds 8 requests, which
    leaves least-request. `requests` is load scaled into (-1, 0], so that it only ever breaks ties.

    Source: AIBrix `pkg/plugins/gateway/algorithms/prefix_cache.go` at e3e10f9.
    """
    terms: dict[str, list[float]] = {}
    if settings.cache_aware_enable:
        common = min(snapshot.matched_blocks)
        terms["cache"] = [float(matched - common) for matched in snapshot.matched_blocks]
    if settings.load_aware_enable:
        requests = list(map(truediv, snapshot.requests, snapshot.weights))
        most = max(requests)
        if settings.cache_aware_enable:
            limit = -1.0 if most - min(requests) > _IMBALANCE_REQUESTS else _overload_limit(requests)
            terms["cache"] = [
                cache if row <= limit else 0.0 for cache, row in zip(terms["cache"], requests, strict=True)
            ]
        scale = -1.0 / (1.0 + most)
        terms["requests"] = [row * scale for row in requests]
    return terms


def _overload_limit(requests: Sequence[float]) -> float:
    mean = sum(requests) / len(requests)
    sigma = sqrt(sum((row - mean) ** 2 for row in requests) / len(requests))
    return mean + _OVERLOAD_SIGMAS * sigma + _ROUNDING
