"""A decision that comes later, and the stream that waits for it; the same for every protocol."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from extproc.errors import RouterError
from extproc.values.pending import Pending
from extproc.values.placements import Decision

_log = logging.getLogger("tokenway.ext_proc")


class Waiter(Protocol):
    """A stream whose decision is pending. One of the three comes, once, unless the wait is cancelled."""

    def decided(self, decision: Decision) -> None:
        """It is there, and charged."""

    def refused(self, error: RouterError) -> None:
        """The request cannot be served."""

    def failed(self) -> None:
        """A bug, of the decision or of `decided` or `refused` themselves; it is logged."""


class Awaited:
    """A wait for a decision; who decided goes on whatever the waiter does.

    Args:
        pending: The decision.
        waiter: Is called, at once if the decision is there already.
    """

    __slots__ = ("_pending", "_waiter")

    def __init__(self, pending: Pending[Decision], waiter: Waiter) -> None:
        self._pending = pending
        self._waiter = waiter

    def begin(self) -> None:
        """Wait. Apart from the making, for the waiter may be called before this returns."""
        self._pending.then(self._decided, self._failed)

    def cancel(self) -> None:
        """Nothing is waited for any more: nothing is called, and nothing will be charged."""
        self._pending.cancel()

    def _decided(self, decision: Decision) -> None:
        self._guarded(lambda: self._waiter.decided(decision))

    def _failed(self, error: Exception) -> None:
        if isinstance(error, RouterError):
            self._guarded(lambda: self._waiter.refused(error))
        else:
            self._fault(error)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._fault(error)

    def _fault(self, error: Exception) -> None:
        _log.error("a decision failed", exc_info=error)
        self._waiter.failed()
