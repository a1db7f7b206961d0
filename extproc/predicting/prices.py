"""The prices in force at one moment: enough to predict any candidate then or to explain it later.

Rules:
    1. Immutable: learning makes new prices, so a decision record may keep the ones it used.
    2. Equal to what `TtftModel.predict` and `SegmentedTpotModel.predict` said at that moment.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from extproc.predicting import tpot, ttft
from extproc.predicting.priced_terms import CEILING_S, priced


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices of one model on one endpoint group.

    Attributes:
        ttft_prices_s: As `TtftPrices`, in its order.
        tpot_prices_s: As `TpotPrices`, in its order, one tuple per segment of batch sizes.
        tpot_thresholds: Where segments begin.
    """

    ttft_prices_s: tuple[float, ...]
    tpot_prices_s: tuple[tuple[float, ...], ...]
    tpot_thresholds: tuple[int, ...]

    def ttft_s(self, uncached_tokens: int, cached_tokens: int, pending_tokens: int) -> float:
        """Expected time to first token in seconds."""
        return priced(
            self.ttft_prices_s, ttft.terms(uncached_tokens, cached_tokens, pending_tokens), ttft.FLOOR_S
        )

    def tpot_s(self, batch: int, context_tokens: int) -> float:
        """Expected time per output token in seconds, with `batch` requests running."""
        prices_s = self.tpot_prices_s[bisect_right(self.tpot_thresholds, batch)]
        return priced(prices_s, tpot.terms(batch, context_tokens), tpot.FLOOR_S)

    def tpots_s(self, batches: Sequence[int], contexts_tokens: Sequence[int]) -> list[float]:
        """`tpot_s` of many endpoints, without a call for each."""
        segments, thresholds = self.tpot_prices_s, self.tpot_thresholds
        found = []
        for batch, context_tokens in zip(batches, contexts_tokens, strict=True):
            per_request, per_context, base = segments[bisect_right(thresholds, batch)]
            step_s = per_request * batch + per_context * (context_tokens / tpot.TOKENS) + base
            found.append(max(tpot.FLOOR_S, min(CEILING_S, step_s)))
        return found
