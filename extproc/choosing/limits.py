"""The limits that a request sets on its own latency, by headers."""

from __future__ import annotations

from math import inf
from typing import Final

from extproc.choosing.completion import DECODE_TOKENS, TPOT_LIMIT_S

ASSUMED_TTFT_S: Final = 5.0
"""Limit on the time to the first token of a request that sets none: `DECODE_TOKENS` is made of the same."""

_MOST_DECODE_TOKENS: Final = 100_000.0


def limit_s_of(ttft_ms: str | None) -> float | None:
    """The request's own limit on the time to its first token, in seconds; None if it has none."""
    if ttft_ms is None:
        return None
    try:
        limit_ms = float(ttft_ms)
    except ValueError:
        return None
    return limit_ms / 1000.0 if 0.0 < limit_ms < inf else None


def decode_limits_of(ttft_ms: str | None, tpot_ms: str | None) -> tuple[float, float]:
    """What a token of decoding counts at most, and the limit on TPOT in seconds.

    The request's own limit on TTFT over that on TPOT, and the latter, if it has both; else the defaults.
    """
    usual = DECODE_TOKENS, TPOT_LIMIT_S
    if ttft_ms is None or tpot_ms is None:
        return usual
    try:
        limit_ms = float(tpot_ms)
        ratio = float(ttft_ms) / limit_ms
    except (ValueError, ZeroDivisionError):
        return usual
    return (ratio, limit_ms / 1000.0) if 0.0 < ratio <= _MOST_DECODE_TOKENS and limit_ms > 0.0 else usual
