"""The longest cached prefix first, the least loaded among equals, as AIBrix has it."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from operator import truediv
from typing import Final

from extproc.choosing.policy import ByTerms
from extproc.choosing.terms import Terms
from extproc.predicting.sums import plain_sum
from extproc.values.balancing import LoadBalancing
from extproc.values.choices import Snapshot

_IMBALANCE_REQUESTS: Final = 8.0
"""Spread of in-flight requests beyond which the cache is ignored (AIBrix prefix-cache, code default)."""

_OVERLOAD_SIGMAS: Final = 1.0
"""A holder this far above the mean load is passed over (AIBrix prefix-cache, code default)."""

_ROUNDING: Final = 1e-9
"""Keeps rounding from lifting a row above a line it is on: of two rows the higher always is on it."""


class PrefixCache(ByTerms):
    """`prefix_cache`."""

    def terms(self, snapshot: Snapshot, settings: LoadBalancing) -> Terms:
        """`cache` and `requests`, those that the settings turn on."""
        return prefix_cache_terms(snapshot, settings)


def prefix_cache_terms(snapshot: Snapshot, settings: LoadBalancing) -> Terms:
    """The longest match first and, among equals, the least loaded; those terms that are turned on.

    `cache` is in blocks and counts only what distinguishes rows: blocks that every row holds say nothing.
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
    sigma = sqrt(plain_sum((row - mean) ** 2 for row in requests) / len(requests))
    return mean + _OVERLOAD_SIGMAS * sigma + _ROUNDING
