"""How much comes to a group of endpoints, and how long its answers are, from what was placed there lately."""

from __future__ import annotations

from math import exp
from typing import Final

from extproc.predicting.lengths import AnswerLength

MEMORY_S: Final = 30.0
"""Time constant of the traffic seen: several hundred requests at a full fleet's rate, and short beside the
minutes in which load changes."""

MOST_BUSY: Final = 0.9
"""Utilisation is not believed above this: the estimate's own error exceeds the idle share that it leaves."""

FEW_REQUESTS: Final = 20.0
"""Fewer than so many say little of what a place is worth: the others are taken to have saved nothing."""

CACHE_MEMORY_S: Final = 300.0
"""Time constant of what engines compute once more: what a cache holds changes in minutes."""

FEW_TOKENS: Final = 100_000.0
"""Fewer computed tokens than so many say little: none of those that are missing is taken to be for the second
time."""

FIRST_OUTPUT_TOKENS: Final = 200.0
"""Expected length of an answer before any was seen: public conversation traces have means of 200 to 350."""


class Traffic:
    """What one group of endpoints is asked for."""

    __slots__ = (
        "_at_s",
        "_computed_tokens",
        "_copied_tokens",
        "_evicted_tokens",
        "_lengths",
        "_requests",
        "_saved_s",
        "_work_s",
    )

    def __init__(self) -> None:
        self._lengths = AnswerLength(FIRST_OUTPUT_TOKENS)
        self._at_s: float | None = None
        self._requests = 0.0
        self._work_s = 0.0
        self._saved_s = 0.0
        self._computed_tokens = 0.0
        self._copied_tokens = 0.0
        self._evicted_tokens = 0.0

    @property
    def output_tokens(self) -> float:
        """Usual length of an answer."""
        return self._lengths.expected_tokens

    def answered(self, endpoint: str, output_tokens: int) -> None:
        """An answer of `endpoint` had so many tokens, > 0."""
        self._lengths.learn(endpoint, float(output_tokens))

    @property
    def place_s(self) -> float:
        """What the next best endpoint would have cost more, mean over what was placed."""
        return self._saved_s / max(FEW_REQUESTS, self._requests)

    @property
    def recomputed_ratio(self) -> float:
        """Of the prompt tokens that engines compute, those that one of them computed before, 0..1.

        Copies count for no more than what was evicted: while caches hold all of them, they displace nothing.
        """
        again = self._evicted_tokens + min(self._copied_tokens, self._evicted_tokens)
        return again / max(FEW_TOKENS, self._computed_tokens)

    def computed(self, tokens: int, evicted: int, copied: int) -> None:
        """Of the prompt of what was placed, so many tokens are computed.

        Args:
            tokens: Not cached where it went, >= 0.
            evicted: Of these, those that some engine computed before and none has any more.
            copied: Of these, those that another engine has.
        """
        self._computed_tokens += tokens
        self._evicted_tokens += evicted
        self._copied_tokens += copied

    def placed(self, now_s: float, work_s: float, saved_s: float) -> None:
        """A request was placed.

        Args:
            now_s: The time.
            work_s: Seconds of prefill that it is where it went.
            saved_s: What it would have cost more at the next best endpoint, >= 0.
        """
        self._forget(now_s)
        self._requests += 1.0
        self._work_s += work_s
        self._saved_s += saved_s

    def followers_per_s(self, now_s: float, endpoints: float) -> float:
        """Requests that come to one endpoint while a second of backlog per endpoint is worked off.

        Args:
            now_s: The time.
            endpoints: How many take what was placed here, > 0; with several gateways this one's share.
        """
        return self.paces_per_s(now_s, endpoints)[0]

    def paces_per_s(self, now_s: float, endpoints: float) -> tuple[float, float]:
        """`followers_per_s` and `rate_per_s`."""
        rate = self.rate_per_s(now_s, endpoints)
        busy = self._work_s / MEMORY_S / endpoints
        return rate / (1.0 - (busy if busy < MOST_BUSY else MOST_BUSY)), rate

    def rate_per_s(self, now_s: float, endpoints: float) -> float:
        """Requests that come to one endpoint; arguments as for `followers_per_s`."""
        self._forget(now_s)
        return self._requests / MEMORY_S / endpoints

    def _forget(self, now_s: float) -> None:
        if self._at_s is not None and now_s > self._at_s:
            kept = exp((self._at_s - now_s) / MEMORY_S)
            self._requests *= kept
            self._work_s *= kept
            self._saved_s *= kept
            kept = exp((self._at_s - now_s) / CACHE_MEMORY_S)
            self._computed_tokens *= kept
            self._evicted_tokens *= kept
            self._copied_tokens *= kept
        self._at_s = now_s
