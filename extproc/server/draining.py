"""How a worker lets go of its work: none is new, those that wait are scheduled, those that run end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from extproc.server.rpc_server import RpcServer

POLL_S = 0.05
"""Between looks at what still runs."""

LEAST_DRAIN_S = 0.5
"""For the answers to requests that waited here until the stop; as long as Envoy waits for any answer."""


class Closable(Protocol):
    """A service whose streams Envoy never ends by itself."""

    def close(self) -> None:
        """End its streams, now and from now on."""


class Waiting(Protocol):
    """Requests that wait for room."""

    def __len__(self) -> int:
        """How many."""

    def close(self) -> None:
        """Schedule every request now, and let none wait from now on."""


class Leaving(Protocol):
    """What says that it leaves, before it does."""

    async def drain(self, grace_s: float) -> None:
        """Returns when it has left, at the latest `grace_s` after it took the last request."""


class Draining:
    """The last work of a worker.

    Args:
        server: Takes calls.
        discovery: Envoy's subscriptions, ended at once: it reconnects elsewhere.
        waiting: Requests that wait, placed at once.
        access_log: Ended last: it brings the ends of what runs.
        is_busy: True while a request runs, or its end is not reported.
        drain_s: How long that may take.
        picking: Leaves at the same time, in its own way; None if there is none.
    """

    def __init__(
        self,
        server: RpcServer,
        discovery: Closable,
        waiting: Waiting,
        access_log: Closable,
        is_busy: Callable[[], bool],
        drain_s: Callable[[], float],
        picking: Leaving | None = None,
    ) -> None:
        self._server = server
        self._discovery = discovery
        self._waiting = waiting
        self._access_log = access_log
        self._is_busy = is_busy
        self._drain_s = drain_s
        self._picking = picking

    async def drain(self) -> None:
        """Returns when all of it is over, or had its time."""
        if self._picking is None:
            await self._drain()
        else:
            await asyncio.gather(self._picking.drain(self._drain_s()), self._drain())

    async def _drain(self) -> None:
        self._discovery.close()
        drain_s = max(self._drain_s(), LEAST_DRAIN_S if len(self._waiting) else 0.0)
        self._waiting.close()
        stopping = asyncio.create_task(self._server.drain(drain_s), name="drain")
        while not stopping.done() and self._is_busy():
            await asyncio.wait([stopping], timeout=POLL_S)
        self._access_log.close()
        await stopping
