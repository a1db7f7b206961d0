"""Fairness between ids of requests that wait: none has more than its turn while others wait.

Start-time fair queueing, on foreseen work. Each id has a clock: when all endpoints together would have done
what it had wait until now. A request's place counts from its id's clock where that is later than its
arrival, so ids that have more work than there is time for get equal shares of what is done, and one that asks
for less than its share is not delayed by others.

Rules:
    1. A request's lag is fixed when it first waits, and never changes.
    2. Requests without an id are one id while others have work, and otherwise have no lag: where no request
       has an id the order is that of arrival and work alone, to the bit.
    3. What is sent at once, or refused, is on no clock. What leaves its wait is not taken back from it.
    4. At most `max_ids` clocks. A clock that time has overtaken says nothing and is dropped; ids beyond the
       bound are one id with those that have none.

Source: Goyal, Vin, Cheng, Start-time Fair Queueing (SIGCOMM 1996); time takes the place of virtual time.
"""

from __future__ import annotations

from math import inf


class FairShares:
    """Clocks of the ids whose requests wait in one queue.

    Args:
        max_ids: Most clocks, >= 1.
    """

    __slots__ = ("_clocks", "_earliest_s", "_latest_s", "_max_ids", "_others_s")

    def __init__(self, max_ids: int = 1024) -> None:
        if max_ids < 1:
            raise ValueError("max_ids must be positive")
        self._max_ids = max_ids
        self._clocks: dict[str, float] = {}
        self._earliest_s = inf
        self._latest_s = -inf
        self._others_s = -inf

    def __len__(self) -> int:
        """Clocks that are kept."""
        return len(self._clocks)

    def are_taking_turns(self, now_s: float) -> bool:
        """Whether any id has had more wait than there was time for until `now_s`, in monotonic seconds."""
        return self._latest_s > now_s

    def lag_s(self, fairness_id: str | None, arrived_s: float) -> float:
        """How much later than its arrival a request's place counts, >= 0.

        Args:
            fairness_id: Its id; None names none.
            arrived_s: When it came.
        """
        if fairness_id in self._clocks:
            return max(0.0, self._clocks[fairness_id] - arrived_s)
        if fairness_id is not None and self._has_room(arrived_s):
            return 0.0
        return max(0.0, self._others_s - arrived_s) if self._latest_s > arrived_s else 0.0

    def waits(self, fairness_id: str | None, arrived_s: float, lag_s: float, work_s: float) -> None:
        """A request begins to wait.

        Args:
            fairness_id: Its id; None names none.
            arrived_s: When it came.
            lag_s: What it was told.
            work_s: How long all endpoints together take for it.
        """
        clock_s = arrived_s + lag_s + work_s
        if fairness_id is not None and (fairness_id in self._clocks or self._has_room(arrived_s)):
            self._clocks[fairness_id] = clock_s
            self._earliest_s = min(self._earliest_s, clock_s)
            self._latest_s = max(self._latest_s, clock_s)
        elif self._latest_s > arrived_s:
            self._others_s = clock_s

    def _has_room(self, now_s: float) -> bool:
        """Room for one more, those dropped that time has overtaken."""
        if len(self._clocks) >= self._max_ids and self._earliest_s <= now_s:
            self._clocks = {name: clock_s for name, clock_s in self._clocks.items() if clock_s > now_s}
            self._earliest_s = min(self._clocks.values(), default=inf)
        return len(self._clocks) < self._max_ids
