"""The prices in force at one moment: enough to predict any candidate then or to explain it later.

Rules:
    1. Immutable: learning makes new prices, so a decision record may keep the ones it used.
    2. They are those of an endpoint of weight 1; one of weight w takes a w-th of the time.
"""

from __future__ import annotations

from dataclasses import dataclass


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
