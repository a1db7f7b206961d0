"""What is to happen in virtual time, and when."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Agenda:
    """Events in the order of their time, equal times in the order of their making."""

    __slots__ = ("_heap", "_made")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._made = 0

    def at(self, time_s: float, happen: Callable[..., None], *args: object) -> None:
        """Call `happen(time_s, *args)` when it is time."""
        self._made += 1
        heappush(self._heap, (time_s, self._made, happen, args))

    @property
    def next_s(self) -> float:
        """When the next event is due.

        Raises:
            IndexError: There is none.
        """
        return self._heap[0][0]

    def next(self) -> float:
        """Let the next event happen; returns its time.

        Raises:
            IndexError: There is none.
        """
        now_s, _, happen, args = heappop(self._heap)
        happen(now_s, *args)
        return now_s
