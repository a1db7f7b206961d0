"""What `least_completion` learns from this worker's own requests, per model and endpoint group.

Rules:
    1. One `Completion` per group, at most as many as the predictor keeps; the least recently used goes first.
    2. A decision takes values out of it (`Learned`), so its record stays what it was.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from extproc.choosing.completion import TPOT_LIMIT_S, TTFT_LIMIT_S, PrefillModel, Traffic
from extproc.choosing.least_completion import backlog, has_room
from extproc.types import Learned, Snapshot

MAX_GROUPS: Final = 1024
"""As many as the predictor keeps."""

FIRST_OUTPUT_TOKENS: Final = 200.0
"""Expected length of an answer before any was seen: public conversation traces have means of 200 to 350."""

_OUTPUT_GAIN: Final = 0.02
"""Share of the newest answer's length in the expected one: the last hundred count."""

SLO_TTFT_HEADER: Final = "x-slo-ttft-ms"
SLO_TPOT_HEADER: Final = "x-slo-tpot-ms"

_LEAST_LIMIT_S: Final = 1e-6
_MOST_LIMIT_S: Final = 86_400.0


class Completion:
    """One group."""

    __slots__ = ("output_tokens", "prefill", "traffic")

    def __init__(self) -> None:
        self.prefill = PrefillModel()
        self.traffic = Traffic()
        self.output_tokens = FIRST_OUTPUT_TOKENS

    def learned(self, now_s: float, endpoints: float, pace_price: float) -> Learned:
        """The values in force, for one decision.

        Args:
            now_s: The time.
            endpoints: How many take what this worker places, > 0.
            pace_price: See `pace_price_of`.
        """
        traffic = self.traffic
        return Learned(
            self.prefill.prices_s,
            traffic.followers_per_s(now_s, endpoints),
            pace_price,
            traffic.rate_per_s(now_s, endpoints),
        )

    def observe(
        self, snapshot: Snapshot, row: int, uncached_tokens: int, cached_tokens: int, ttft_s: float
    ) -> None:
        """A first token came `ttft_s` after its request was sent."""
        if not has_room(snapshot, row):
            return
        self.prefill.learn(backlog(snapshot, row), max(1, uncached_tokens), cached_tokens, ttft_s)

    def answered(self, output_tokens: int) -> None:
        """An answer had so many tokens."""
        self.output_tokens += _OUTPUT_GAIN * (output_tokens - self.output_tokens)


class Completions:
    """All groups."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[str, str], Completion] = OrderedDict()

    def __getitem__(self, group: tuple[str, str]) -> Completion:
        found = self._groups.get(group)
        if found is None:
            if len(self._groups) >= MAX_GROUPS:
                self._groups.popitem(last=False)
            found = self._groups[group] = Completion()
        else:
            self._groups.move_to_end(group)
        return found


def limit_s_of(limit_ms: str | None) -> float | None:
    """A limit that a request names in a header, in seconds; None if it names none between 1 us and a day."""
    if limit_ms is None:
        return None
    try:
        limit_s = float(limit_ms) / 1000.0
    except ValueError:
        return None
    return limit_s if _LEAST_LIMIT_S <= limit_s <= _MOST_LIMIT_S else None


def pace_price_of(ttft_limit_s: float | None, tpot_limit_s: float | None) -> float:
    """See `extproc.types.Learned`; a limit that the request does not name is the default."""
    return (ttft_limit_s or TTFT_LIMIT_S) / (tpot_limit_s or TPOT_LIMIT_S) ** 2
