"""Fairness between ids of requests that wait: none has more than its turn while others wait.

Start-time fair queueing, on foreseen work. Each id has a clock: when all endpoints together would have done
what it had wait until now, were it alone. Places count from the id's clock, or from *virtual time* where that
is later. Virtual time is that of the latest clock reading that was served: while many ids wait each gets a
part of what is done, so it goes slower than time, and one that asks for less than its share is not behind
what others had wait before it. While nobody waits it is time.

Rules:
    1. A request's lag is fixed when it first waits, and never changes. Below 0 it goes sooner than one that
       came with it would by arrival and work alone: ids that had more wait made virtual time late.
    2. Requests without an id are one id while others have work, and otherwise have no lag: where no request
       has an id the order is that of arrival and work alone, to the bit.
    3. What is sent at once, or refused, is on no clock. What leaves its wait is not taken back from it.
    4. Virtual time is each priority's own: of two the higher one goes first, whatever the other is owed.
    5. At most `max_ids` clocks. One that all virtual times have overtaken says nothing and is dropped; ids
       beyond the bound are one id with those that have none.

Source: Goyal, Vin, Cheng, Start-time Fair Queueing (SIGCOMM 1996).
"""

from __future__ import annotations

from math import inf


class FairShares:
    """Clocks of the ids whose requests wait in one queue.

    Args:
        max_ids: Most clocks, >= 1.
    """

    __slots__ = ("_clocks", "_earliest_s", "_latest_s", "_max_ids", "_others_s", "_reached_s")

    def __init__(self, max_ids: int = 1024) -> None:
        if max_ids < 1:
            raise ValueError("max_ids must be positive")
        self._max_ids = max_ids
        self._clocks: dict[str, float] = {}
        self._earliest_s = inf
        self._latest_s = -inf
        self._others_s = -inf
        self._reached_s: dict[int, float] = {}

    def __len__(self) -> int:
        """Clocks that are kept."""
        return len(self._clocks)

    def are_taking_turns(self, now_s: float, priority: int = 0) -> bool:
        """Whether any id has had more wait than it was its turn for until `now_s`, in monotonic seconds."""
        return self._latest_s > self._virtual_s(now_s, priority)

    def lag_s(self, fairness_id: str | None, arrived_s: float, priority: int = 0) -> float:
        """How much later than its arrival a request's place counts; below 0, how much sooner.

        Args:
            fairness_id: Its id; None names none.
            arrived_s: When it came.
            priority: Its own.
        """
        virtual_s = self._virtual_s(arrived_s, priority)
        if fairness_id in self._clocks:
            return max(self._clocks[fairness_id], virtual_s) - arrived_s
        if fairness_id is not None and self._has_room(arrived_s):
            return virtual_s - arrived_s
        return max(self._others_s, virtual_s) - arrived_s if self._latest_s > virtual_s else 0.0

    def waits(
        self, fairness_id: str | None, arrived_s: float, lag_s: float, work_s: float, priority: int = 0
    ) -> None:
        """A request begins to wait.

        Args:
            fairness_id: Its id; None names none.
            arrived_s: When it came.
            lag_s: What it was told.
            work_s: How long all endpoints together take for it.
            priority: Its own.
        """
        clock_s = arrived_s + lag_s + work_s
        self._reached_s.setdefault(priority, arrived_s)
        if fairness_id is not None and (fairness_id in self._clocks or self._has_room(arrived_s)):
            self._clocks[fairness_id] = clock_s
            self._earliest_s = min(self._earliest_s, clock_s)
            self._latest_s = max(self._latest_s, clock_s)
        else:
            self._others_s = clock_s

    def sent(self, arrived_s: float, lag_s: float, priority: int = 0) -> None:
        """A request that waited is sent: virtual time is what its place counted from, if that is later.

        Args:
            arrived_s: When it came.
            lag_s: What it was told.
            priority: Its own.
        """
        place_s = arrived_s + lag_s
        self._reached_s[priority] = max(self._reached_s.get(priority, place_s), place_s)

    def rest(self, priority: int, since_s: float) -> None:
        """None of this priority waits here: its virtual time is time, but no later than `since_s`."""
        self._reached_s.pop(priority, None)
        if since_s < inf:
            self._reached_s[priority] = since_s

    def _virtual_s(self, now_s: float, priority: int) -> float:
        return min(now_s, self._reached_s.get(priority, now_s))

    def _has_room(self, now_s: float) -> bool:
        """Room for one more, those dropped that all virtual times have overtaken."""
        if len(self._clocks) < self._max_ids:
            return True
        earliest_s = min((now_s, *self._reached_s.values()))
        if self._earliest_s <= earliest_s:
            self._clocks = {name: clock_s for name, clock_s in self._clocks.items() if clock_s > earliest_s}
            self._earliest_s = min(self._clocks.values(), default=inf)
        return len(self._clocks) < self._max_ids
