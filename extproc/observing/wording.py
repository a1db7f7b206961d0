"""Figures as JSON and a page have them."""

from __future__ import annotations

from math import isfinite


def finite(value: float) -> float | None:
    """The same, None where JSON lacks it."""
    return value if isfinite(value) else None


def in_ms(value_s: float | None) -> str:
    """A time for a person to read; "-" where it is unknown."""
    return "-" if value_s is None else f"{value_s * 1e3:.1f} ms"


def counted(number: int, noun: str) -> str:
    """A number and its noun, which gets an `s` beside others than 1."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
