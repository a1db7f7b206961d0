"""llm-d "sticky until saturated": keep to endpoints that hold 80 % of the prompt unless they are 18 s behind.

Source: llm-d-router `pkg/epp/framework/plugins/scheduling/filter/prefixcacheaffinity/plugin.go` and
`scorer/tokenload/token_load.go` at ebab6879, together the guide's optimised baseline.

1. Sticky endpoints match at least `threshold` of the prompt's blocks. If there are any, only they stay,
   unless the best sticky TTFT exceeds the best other one by more than `max_penalty_ms`; TTFT is in-flight
   uncached tokens / `peak_tokens_per_s`, taken off at the first token.
2. Of what stays, the least in-flight tokens plus this request's own uncached ones, equal from 4,194,304 on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from extproc.choosing.rivals.ties import least
from extproc.choosing.stateful import FleetView, StatefulPolicy

_MOST_TOKENS: Final = 4_194_304
"""From here on the token scorer gives 0 (source: 128 requests of 32k)."""


def sticky_rows(
    view: FleetView, ttft_ms: Sequence[float], threshold: float, max_penalty_ms: float
) -> tuple[int, ...]:
    """Rule 1 for any estimate of TTFT: the rows that stay, never none.

    Args:
        view: The decision's.
        ttft_ms: Estimated time to first token per row.
        threshold: Share of the prompt's blocks that makes a row sticky, 0..1.
        max_penalty_ms: How far behind the best other row the best sticky one may be.
    """
    rows = tuple(range(len(view.keys)))
    needed = threshold * max(1, len(view.request.blocks))
    sticky = tuple(row for row in rows if view.matched_blocks[row] >= needed)
    others = [ttft_ms[row] for row in rows if row not in sticky]
    if not sticky or not others:
        return rows
    penalty_ms = min(ttft_ms[row] for row in sticky) - min(others)
    return rows if penalty_ms > max_penalty_ms else sticky


class LlmdSticky(StatefulPolicy):
    """Rule 1, then Rule 2, ties at random.

    Args:
        threshold: Source default.
        max_penalty_ms: Source default.
        peak_tokens_per_s: Source default, of a 32B model on two H100; operators are to measure theirs.
    """

    __slots__ = ("_max_penalty_ms", "_peak_tokens_per_s", "_threshold")

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

    def choose(self, view: FleetView) -> int:
        """One draw if tied."""
        ttft_ms = [tokens / self._peak_tokens_per_s * 1000.0 for tokens in view.prefill_tokens]
        among = sticky_rows(view, ttft_ms, self._threshold, self._max_penalty_ms)
        load = [
            min(pending + uncached, _MOST_TOKENS)
            for pending, uncached in zip(view.prefill_tokens, view.uncached_tokens(), strict=True)
        ]
        return least(load, view.rng, among)
