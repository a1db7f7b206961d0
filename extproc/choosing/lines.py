"""Requests that wait at other gateways and workers, as those said last: with them there is one order.

Rules:
    1. A line is what one other process said of those that wait there, first in line first. A newer line of
       the same process replaces it.
    2. A line counts for `LINE_S` from when it was heard. So a process that dies or says nothing more holds
       nobody up for longer; one that lies holds nobody up beyond the bound that each wait has anyway.
    3. Those that wait elsewhere for an endpoint, and go before a request, count as prefill ahead there, as
       those in its own queue do; the work of all of them is backlog of the pool that their endpoints are in.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Final

from extproc.predicting.sums import plain_sum
from metadata_center.types import EndpointKey, Waiter

LINE_S: Final = 0.25
"""A dozen rounds: while any waits its process says so in each of them, but for delays on a busy host."""

MAX_LINES: Final = 256
"""Other processes that are listened to: 64 gateways of 4 workers."""


class OtherLines:
    """What other processes said of those that wait there."""

    def __init__(self) -> None:
        self._lines: dict[str, tuple[float, tuple[Waiter, ...]]] = {}
        self._until_s = inf

    def __bool__(self) -> bool:
        """Whether any request waits elsewhere, as of the last `advance`."""
        return bool(self._lines)

    def hear(self, process: str, line: Sequence[Waiter], now_s: float) -> bool:
        """A process says who waits there: nobody, if the line is empty.

        Args:
            process: Its name, the same each time.
            line: First in line first, ranks on this process's clock.
            now_s: Monotonic seconds.

        Returns:
            Whether fewer wait there than before, so that others may have their turn.
        """
        self.advance(now_s)
        _, before = self._lines.pop(process, (0.0, ()))
        if line and len(self._lines) < MAX_LINES:
            self._lines[process] = (now_s + LINE_S, tuple(line))
        self._until_s = min((until_s for until_s, _ in self._lines.values()), default=inf)
        return len(line) < len(before)

    def advance(self, now_s: float) -> None:
        """Forget what is too old; O(1) if nothing is."""
        if now_s < self._until_s:
            return
        self._lines = {name: line for name, line in self._lines.items() if line[0] > now_s}
        self._until_s = min((until_s for until_s, _ in self._lines.values()), default=inf)

    def least_s(self, keys: Sequence[EndpointKey]) -> float:
        """Work that waits elsewhere, for one of `keys`, for time to prefill: seconds of one endpoint."""
        if not self._lines:
            return 0.0
        here = set(keys)
        return plain_sum(
            waiter.least_s for _, line in self._lines.values() for waiter in line if waiter.endpoint in here
        )

    def first(self, low: float, high: float) -> float:
        """The lowest rank of those that wait elsewhere, of ranks between these; inf if there is none."""
        return min(
            (waiter.rank for _, line in self._lines.values() for waiter in line if low < waiter.rank < high),
            default=inf,
        )

    def ahead_s(self, rank: float, keys: Sequence[EndpointKey]) -> list[float]:
        """Work per endpoint, shape (keys,), of those that wait elsewhere for it and go before `rank`."""
        ahead = dict.fromkeys(keys, 0.0)
        for _, line in self._lines.values():
            for waiter in line:
                if waiter.rank < rank and waiter.endpoint in ahead:
                    ahead[waiter.endpoint] += waiter.work_s
        return list(ahead.values())
