"""Pauses between attempts at something that fails, for whoever connects, lists or follows."""

from __future__ import annotations

from typing import Final, Protocol

_MOST_DOUBLINGS: Final = 32


class Rng(Protocol):
    """Where jitter comes from; `random.Random` satisfies it."""

    def random(self) -> float:
        """Of [0, 1)."""


class Backoff:
    """Pauses that double with each failure in a row up to a bound, each shortened by up to half at random.

    The jitter only shortens, so the bound holds; many who lost the same peer do not return at once.

    Args:
        rng: Source of the jitter; one draw for each pause.
        first_s: The first pause, in seconds before jitter.
        most_s: The longest.
        steady_s: An attempt that stood for so long was no failed one: the pauses begin anew.
    """

    def __init__(self, rng: Rng, *, first_s: float, most_s: float, steady_s: float) -> None:
        self._rng = rng
        self._first_s = first_s
        self._most_s = most_s
        self._steady_s = steady_s
        self._failures = 0

    def after(self, stood_s: float) -> float:
        """The pause after an attempt, in seconds.

        Args:
            stood_s: For how long what was attempted stood; 0 if it never did.
        """
        if stood_s >= self._steady_s:
            self._failures = 0
        pause_s = min(self._most_s, self._first_s * 2.0**self._failures)
        self._failures = min(self._failures + 1, _MOST_DOUBLINGS)
        return pause_s * (1.0 - 0.5 * self._rng.random())

    def reset(self) -> None:
        """What was attempted is well: the next pause is the first again."""
        self._failures = 0
