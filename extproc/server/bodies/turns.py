"""Whose work is done next in threads: the smallest first, with one room kept for small ones.

Rules:
    1. So many are at work as there are rooms, whatever became of who asked: a room is free again once its
       work is done.
    2. The smallest goes first, of equal ones the older. So who sends the largest cannot have others wait for
       them; how many may wait, and how long, is the caller's to bound.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Final, TypeVar

T = TypeVar("T")
"""What comes of the work."""


LEAST_SWEPT: Final = 64
"""Turns in line before those who left are looked for; then twice as many as wait, and so many more."""


class Turns:
    """Work of one event loop in threads.

    Args:
        rooms: Most bytes of what each of them takes; None takes all. At least one takes all.
        name: Of the threads.
    """

    def __init__(self, rooms: Sequence[int | None], name: str) -> None:
        self._rooms = tuple(rooms)
        self._is_busy = [False] * len(self._rooms)
        self._tickets = count()
        self._waiting: list[tuple[int, int, asyncio.Future[int]]] = []
        self._most = LEAST_SWEPT
        self._threads = ThreadPoolExecutor(len(self._rooms), name)

    async def work(self, num_bytes: int, work: Callable[[], T]) -> T:
        """Do it in a thread when its turn comes; whoever is cancelled before gives its turn away.

        Args:
            num_bytes: How much it is.
            work: Called in the thread; what it raises is raised here.
        """
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[int] = loop.create_future()
        if len(self._waiting) >= self._most:  # who left stays until it is met, which a large one may never be
            self._waiting = [waits for waits in self._waiting if not waits[2].done()]
            heapify(self._waiting)
            self._most = 2 * len(self._waiting) + LEAST_SWEPT
        heappush(self._waiting, (num_bytes, next(self._tickets), turn))
        self._assign()
        try:
            room = await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(turn.result())
            raise
        working = self._threads.submit(work)
        working.add_done_callback(lambda _: self._done(loop, room))
        # Shielded: a thread cannot be stopped, and its room is not free before it ends.
        return await asyncio.shield(asyncio.wrap_future(working))

    def __len__(self) -> int:
        """Turns in line, those who left and were not met yet included."""
        return len(self._waiting)

    def close(self) -> None:
        """Begin nothing more; what is being done is finished for no one."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _done(self, loop: asyncio.AbstractEventLoop, room: int) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._leave, room)

    def _leave(self, room: int) -> None:
        self._is_busy[room] = False
        self._assign()

    def _assign(self) -> None:
        """Give idle rooms to the smallest; the one that takes all comes last."""
        for room in sorted(range(len(self._rooms)), key=lambda each: self._rooms[each] is None):
            while self._waiting and self._waiting[0][2].done():  # it was cancelled
                heappop(self._waiting)
            most = self._rooms[room]
            if self._is_busy[room] or not self._waiting or (most is not None and self._waiting[0][0] > most):
                continue
            self._is_busy[room] = True
            heappop(self._waiting)[2].set_result(room)
