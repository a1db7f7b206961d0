"""What has to happen while nothing happens: time releases, and a worker does not outlive its supervisor."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

_log = logging.getLogger("tokenway.worker")

TICK_S = 1.0
"""Leases and predicted prefills are released at every decision; without traffic, this often."""


class Housekeeping:
    """Ticks.

    Args:
        advance: Releases what time has released.
        clock: Monotonic seconds.
        supervisor: Process id of the supervisor; None where there is none.
        trim: Gives memory back, if it is time.
    """

    def __init__(
        self,
        advance: Callable[[float], None],
        clock: Callable[[], float],
        supervisor: int | None,
        trim: Callable[[float], None],
    ) -> None:
        self._advance = advance
        self._clock = clock
        self._supervisor = supervisor
        self._trim = trim
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._tick(), name="tick")

    async def stop(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now_s = self._clock()
            self._advance(now_s)
            self._trim(now_s)
            if self._supervisor is not None and os.getppid() != self._supervisor:
                # At once and without clean-up: the sockets may be a successor's by now.
                _log.error("supervisor is gone")
                os._exit(1)
