"""What a limit of a request on its own latency looks like."""

from __future__ import annotations

from math import inf


def limit_ms(text: str | None) -> float | None:
    """The milliseconds that a header says, finite and over 0; None if it says none, or is not there.

    `float` alone would take other scripts' digits, and `1_000`.
    """
    if text is None or not text.isascii() or "_" in text:
        return None
    try:
        said_ms = float(text)
    except ValueError:
        return None
    return said_ms if 0.0 < said_ms < inf else None
