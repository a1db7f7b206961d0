"""What prices say, equal to what the models said at that moment that they are of."""

from __future__ import annotations

from bisect import bisect_right

from extproc.predicting import tpot
from extproc.predicting.priced_terms import CEILING_S
from extproc.values.prices import Prices


def priced_tpot_s(prices: Prices, batch: float, context_tokens: float) -> float:
    """Expected time per output token in seconds, with `batch` requests running and `context_tokens` of KV."""
    per_request, per_context, base = prices.tpot_prices_s[bisect_right(prices.tpot_thresholds, batch)]
    step_s = per_request * batch + per_context * (context_tokens / tpot.TOKENS) + base
    return max(tpot.FLOOR_S, min(CEILING_S, step_s))
