"""Tells other workers and gateways who waits here: when that changes, and again while it stays.

Rules:
    1. One that waits makes itself known within `TELL_S`; changes of that time are told together, and rarer
       where many wait, so that telling takes a small part of the time.
    2. While any waits the line is told every `POLL_S`, changed or not, so that nobody forgets it.
    3. That nobody waits any more is told once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import nsmallest
from typing import Final, Protocol

from extproc.choosing.holding import POLL_S
from metadata_center.sharing.lines import MAX_WAITERS
from metadata_center.types import EndpointKey, Waiter

TELL_S: Final = 0.001
"""The first line leaves at once, the next one so much later."""


class _Timer(Protocol):
    def cancel(self) -> None:
        """Not any more."""


class _Loop(Protocol):
    def call_later(self, delay: float, callback: Callable[[], object], /) -> _Timer:
        """Call in so many seconds."""


class LineTeller:
    """Tells a line.

    Args:
        waiting: Those that wait, in any order.
        tell: Takes the first of them.
        loop: The running event loop.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        waiting: Callable[[], Iterable[Waiter]],
        tell: Callable[[Sequence[Waiter]], None],
        loop: Callable[[], _Loop],
        clock: Callable[[], float],
    ) -> None:
        self._waiting = waiting
        self._tell = tell
        self._loop = loop
        self._clock = clock
        self._timer: _Timer | None = None
        self._due_s = 0.0
        self._next_s = 0.0
        self._again_s = 0.0
        self._told: list[tuple[EndpointKey, float]] = []

    def changed(self) -> None:
        """The line may be another one."""
        now_s = self._clock()
        self._tell_at(max(now_s, self._next_s), now_s)

    def now(self) -> None:
        """Tell it, unless all know it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now_s, waiting = self._clock(), list(self._waiting())
        line = nsmallest(MAX_WAITERS, waiting, key=lambda each: each.rank)
        places = [(each.endpoint, each.rank) for each in line]
        if places != self._told or (line and now_s >= self._again_s):
            self._told, self._again_s = places, now_s + POLL_S
            self._next_s = now_s + TELL_S * (1 + len(waiting) // MAX_WAITERS)
            self._tell(line)
        if line:
            self._tell_at(self._again_s, now_s)

    def _tell_at(self, due_s: float, now_s: float) -> None:
        if self._timer is not None:
            if self._due_s <= due_s:
                return
            self._timer.cancel()
        self._due_s = due_s
        self._timer = self._loop().call_later(due_s - now_s, self.now)
