"""What a process is made of: parts that start one after the other and stop in the reverse order.

Rules:
    1. Parts start in their order, each when the one before has started.
    2. Whatever was begun is stopped, once, the last first: after a start that failed half-way or was broken
       off as well as after one that succeeded. The part that failed is stopped too: its `stop` takes away
       whatever there is of it.
    3. A part that fails to stop is logged, and does not keep the others from stopping.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

_log = logging.getLogger("tokenway.parts")

Step = Callable[[], Awaitable[None] | None]
"""Something to be done, at once or awaited."""


class StoppedWhileStarting(Exception):  # noqa: N818 - nothing went wrong
    """The start was broken off by a stop; all that was begun is stopped."""


def do_nothing() -> None:
    """A part that needs no start, or no stop."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part.

    Attributes:
        name: For logs.
        start: Begins it; what it raises ends the start of the whole.
        stop: Ends it. Must be harmless where `start` failed half-way.
    """

    name: str
    start: Step = do_nothing
    stop: Step = do_nothing


class Parts:
    """Parts in their order; they start once and stop once.

    Args:
        parts: In the order of their start.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts = tuple(parts)
        self._begun: list[Part] = []
        self._starting: asyncio.Task[None] | None = None
        self._is_stopped = False
        self._stopping = asyncio.Lock()

    async def start(self) -> None:
        """Start all.

        Raises:
            StoppedWhileStarting: `stop` came before the end of it, or before it.
            Exception: What a part raised, after all that was begun is stopped.
        """
        if self._is_stopped:
            raise StoppedWhileStarting
        self._starting = asyncio.create_task(self._start(), name="start")
        try:
            await self._starting
        except BaseException as error:
            await self._stop_begun()
            if self._is_stopped and isinstance(error, asyncio.CancelledError):
                raise StoppedWhileStarting from None
            raise

    async def stop(self) -> None:
        """Stop what was begun; breaks a start off that is under way. Idempotent."""
        self._is_stopped = True
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting])
        await self._stop_begun()

    async def _start(self) -> None:
        for part in self._parts:
            self._begun.append(part)
            await _done(part.start)

    async def _stop_begun(self) -> None:
        async with self._stopping:
            while self._begun:
                part = self._begun.pop()
                try:
                    await _done(part.stop)
                except Exception:
                    _log.exception("a part failed to stop", extra={"part": part.name})


async def _done(step: Step) -> None:
    result = step()
    if inspect.isawaitable(result):
        await result
