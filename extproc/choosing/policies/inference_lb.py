"""AIGW's score: cache hits, requests and pending prefill, weighed; picked among the best few per cent."""

from __future__ import annotations

from math import ceil
from operator import truediv
from typing import Final

from extproc.choosing.policy import ByTerms, best
from extproc.choosing.terms import Terms, total
from extproc.values.balancing import LoadBalancing
from extproc.values.choices import Choice, Rng, Snapshot

_MIN_REQUEST_SPREAD: Final = 2.0
"""Smallest divisor of a request difference, so that 0 against 1 does not weigh in full (AIGW)."""

_REQUEST_STEP: Final = 5.0
"""The request term grows by its whole weight for each started 5 requests of spread (AIGW)."""

_MIN_PREFILL_TOKENS: Final = 1024.0
"""Smallest divisor of pending prefill, so that a short prompt alone does not weigh in full (AIGW)."""


class InferenceLb(ByTerms):
    """`inference_lb`."""

    def terms(self, snapshot: Snapshot, settings: LoadBalancing) -> Terms:
        """`cache`, `requests` and `prefill`, those that the settings turn on."""
        return inference_terms(snapshot, settings)

    def choose(self, snapshot: Snapshot, settings: LoadBalancing, rng: Rng, turn: int) -> Choice:  # noqa: ARG002
        """Uniform among `candidate_percent` of the endpoints, at least one."""
        rows = len(snapshot.keys)
        candidates = min(max(1, rows * settings.candidate_percent // 100), rows)
        return best(inference_scores(snapshot, settings), snapshot, settings, rng, candidates)


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
