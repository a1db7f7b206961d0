"""llm-d's affinity filter before its default scorers: sticky endpoints alone are scored, unless 18 s behind.

Source: llm-d-router `pkg/epp/framework/plugins/scheduling/filter/prefixcacheaffinity/plugin.go` (threshold
0.80, penalty 18,000 ms, 15,928 tokens/s, exploration 0) and `pkg/epp/config/loader/defaults.go` (queue 2, KV
2, prefix 3, picker of the highest score) at ebab6879.

`llmd_sticky` is the same filter before the token-load scorer. Which of both a release has by default was not
to be had: at that commit the default has no filter, the announcement of the filter is later. Both are here.
"""

from __future__ import annotations

from extproc.choosing.rivals.llmd_sticky import sticky_rows
from extproc.choosing.rivals.llmd_weights import LlmdWeights
from extproc.choosing.rivals.ties import least
from extproc.choosing.stateful import FleetView, StatefulPolicy


class LlmdAffinity(StatefulPolicy):
    """The highest weighted score among the rows that the filter leaves, ties at random.

    Args:
        threshold: Source default.
        max_penalty_ms: Source default.
        peak_tokens_per_s: Source default.
    """

    __slots__ = ("_max_penalty_ms", "_peak_tokens_per_s", "_scorers", "_threshold")

    def __init__(
        self,
        *,
        threshold: float = 0.80,
        max_penalty_ms: float = 18_000.0,
        peak_tokens_per_s: float = 15_928.0,
    ) -> None:
        self._threshold = threshold
        self._max_penalty_ms = max_penalty_ms
        self._peak_tokens_per_s = peak_tokens_per_s
        self._scorers = LlmdWeights()

    def choose(self, view: FleetView) -> int:
        """One draw if tied."""
        ttft_ms = [tokens / self._peak_tokens_per_s * 1000.0 for tokens in view.prefill_tokens]
        among = sticky_rows(view, ttft_ms, self._threshold, self._max_penalty_ms)
        return least([-score for score in self._scorers.scores(view)], view.rng, among)
