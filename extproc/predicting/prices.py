"""The prices in force at one moment: enough to predict any candidate then or to explain it later.

Rules:
    1. Immutable: learning makes new prices, so a decision record may keep the ones it used.
    2. Equal to what `TtftModel.predict` and `SegmentedTpotModel.predict` said at that moment.
    3. They are those of an endpoint of weight 1; one of weight w takes a w-th of the time.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from extproc.predicting import tpot
from extproc.predicting.priced_terms import CEILING_S


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

    def tpot_s(self, batch: float, context_tokens: float) -> float:
        """Expected time per output token in seconds, with `batch` requests running."""
        per_request, per_context, base = self.tpot_prices_s[bisect_right(self.tpot_thresholds, batch)]
        step_s = per_request * batch + per_context * (context_tokens / tpot.TOKENS) + base
        return max(tpot.FLOOR_S, min(CEILING_S, step_s))
