"""The limits that a request sets on its own latency, by headers."""

from __future__ import annotations

from math import inf
from typing import Final

from extproc.choosing.completion import DECODE_TOKENS

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


def decode_tokens_of(ttft_ms: str | None, tpot_ms: str | None) -> float:
    """What a token of decoding counts: the request's own limit on TTFT over that on TPOT, if it has both."""
    if ttft_ms is None or tpot_ms is None:
        return DECODE_TOKENS
    try:
        ratio = float(ttft_ms) / float(tpot_ms)
    except (ValueError, ZeroDivisionError):
        return DECODE_TOKENS
    return ratio if 0.0 < ratio <= _MOST_DECODE_TOKENS else DECODE_TOKENS
