"""When the calls of a connection must have ended; most end before, and are forgotten lazily."""

from __future__ import annotations

from collections.abc import Collection
from heapq import heapify, heappop, heappush
from typing import Final

_SLACK: Final = 64
"""Entries of ended calls that are not worth a clean-up."""


class Deadlines:
    """Those of one connection."""

    __slots__ = ("_heap",)

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []

    @property
    def next_s(self) -> float | None:
        """When the next one is over, maybe of a call that has ended; None if there is none."""
        return self._heap[0][0] if self._heap else None

    def add(self, deadline_s: float, stream_id: int, open_ids: Collection[int]) -> None:
        """Note a call's deadline; `open_ids` are the calls that are open now."""
        heappush(self._heap, (deadline_s, stream_id))
        if len(self._heap) > 2 * len(open_ids) + _SLACK:
            self._heap = [entry for entry in self._heap if entry[1] in open_ids]
            heapify(self._heap)

    def due(self, now_s: float) -> list[int]:
        """Calls whose deadlines are over, which are forgotten here."""
        due = []
        while self._heap and self._heap[0][0] <= now_s:
            due.append(heappop(self._heap)[1])
        return due
