"""The limits that a request sets on its own latency, by headers."""

from __future__ import annotations

from typing import Final

from extproc.choosing.completion import DECODE_TOKENS, TPOT_LIMIT_S
from extproc.values.limits import limit_ms

ASSUMED_TTFT_S: Final = 5.0
"""Limit on the time to the first token of a request that sets none: `DECODE_TOKENS` is made of the same."""

_MOST_DECODE_TOKENS: Final = 100_000.0


def limit_s_of(ttft_ms: str | None) -> float | None:
    """The request's own limit on the time to its first token, in seconds; None if it has none.

    What is not a decimal number of milliseconds over 0 sets no limit: no request is refused for it.
    """
    most_ms = limit_ms(ttft_ms)
    return None if most_ms is None else most_ms / 1000.0


def decode_limits_of(ttft_ms: str | None, tpot_ms: str | None) -> tuple[float, float]:
    """What a token of decoding counts at most, and the limit on TPOT in seconds.

    The request's own limit on TTFT over that on TPOT, and the latter, if it has both; else the defaults.
    """
    first_ms, each_ms = limit_ms(ttft_ms), limit_ms(tpot_ms)
    if first_ms is None or each_ms is None or not 0.0 < first_ms / each_ms <= _MOST_DECODE_TOKENS:
        return DECODE_TOKENS, TPOT_LIMIT_S
    return first_ms / each_ms, each_ms / 1000.0
