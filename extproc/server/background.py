"""Coroutines whose results come by callback: where what only asyncio can do meets what does not wait."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Any, TypeVar

from extproc.values.pending import Pending

T = TypeVar("T")


class Background:
    """Runs coroutines, as many as are begun: the caller bounds their number."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def begin(self, work: Coroutine[Any, Any, T]) -> Pending[T]:
        """Run it; cancelled with what is returned."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        pending: Pending[T] = Pending(task.cancel)
        task.add_done_callback(partial(self._done, pending))
        return pending

    def _done(self, pending: Pending[T], task: asyncio.Task[T]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            pending.cancel()
            return
        error = task.exception()
        if error is None:
            pending.give(task.result())
        elif isinstance(error, Exception):
            pending.fail(error)
