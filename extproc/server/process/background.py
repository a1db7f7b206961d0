"""Coroutines whose results come by callback: where what only asyncio can do meets what does not wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from extproc.values.pending import Pending

T = TypeVar("T")


class Background:
    """Runs coroutines, as many as are begun: the caller bounds their number."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def begin(self, work: Coroutine[Any, Any, T], ended: Callable[[], None] = lambda: None) -> Pending[T]:
        """Run it; cancelled with what is returned.

        Args:
            work: The coroutine.
            ended: Called once when it is over, also where it was cancelled before it began; before its result
                is given.
        """
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        pending: Pending[T] = Pending(task.cancel)
        task.add_done_callback(partial(self._done, pending, ended))
        return pending

    def _done(self, pending: Pending[T], ended: Callable[[], None], task: asyncio.Task[T]) -> None:
        self._tasks.discard(task)
        ended()
        if task.cancelled():
            pending.cancel()
            return
        error = task.exception()
        if error is None:
            pending.give(task.result())
        elif isinstance(error, Exception):
            pending.fail(error)
