"""What clients do: who waits for whose answer, who loses patience, who comes again.

Rules:
    1. A share of the clients leaves `abandon_after_s` after its request first came, unless it has seen a
       first token by then: who does is drawn once per request of the trace, the same under every policy.
    2. A client that is refused comes again after `Retry-After` in whole seconds, at most `retries` times,
       unless it has lost patience before. It is one request still: its time began when it first came.
    3. A turn waits for the end of the one before it, whether that was answered, refused or abandoned.
"""

from __future__ import annotations

from math import ceil
from typing import Final

from tokenway.simulator.replay.draws import Draws
from tokenway.simulator.replay.settings import RunSettings
from tokenway.simulator.replay.trace import Trace

RETRY_AFTER_S: Final = 1.0
"""Where a refusal names no time: what limits answer with, and the least that `Retry-After` can say."""


class Clients:
    """Those of one run.

    Args:
        trace: What they ask.
        settings: How patient they are.
        patience: Draws who is not.
    """

    def __init__(self, trace: Trace, settings: RunSettings, patience: Draws) -> None:
        self._after_s = settings.abandon_after_s
        self._retries = settings.retries
        share = settings.abandon_share
        self._leaves = [patience.random() < share for _ in trace.requests] if share else []
        self._followers: dict[int, list[int]] = {}
        for index, request in enumerate(trace.requests):
            if request.after is not None:
                self._followers.setdefault(request.after, []).append(index)

    def followers(self, index: int) -> list[int]:
        """Requests that come only after this one's end; told once."""
        return self._followers.pop(index, [])

    def leaves_s(self, index: int, came_s: float) -> float | None:
        """When the client of a request that came at `came_s` would leave; None if it never does."""
        return came_s + self._after_s if self._leaves and self._leaves[index] else None

    def again_s(self, tries: int, retry_after_s: float, now_s: float) -> float | None:
        """When a client comes again that was refused `tries` times, now for the last; None if it does not."""
        if tries > self._retries:
            return None
        return now_s + max(RETRY_AFTER_S, float(ceil(retry_after_s)))
