"""How a worker lets go of its work: none is new, those that wait are scheduled, those that run end.

Rules:
    1. It takes no new requests from the beginning.
    2. It can be reached until the end of each request that runs is reported, or its time is over: a thread of
       Envoy that has reported nothing yet calls only then. Not where it is known that no Envoy is there, at
       any worker.
    3. Where replicas of the same Envoy hear the ends for it (`has_peers`), it cannot be reached from the
       beginning, so that Envoy goes to them at once; what it is told by calls that are open it hears still.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

POLL_S = 0.05
"""Between looks at what still runs."""

LEAST_DRAIN_S = 0.5
"""For the answers to requests that waited here until the stop; as long as Envoy waits for any answer."""


READ_ON_S = 1.0
"""For what Envoy logged before it knew that its stream is ended; it is heard of that within a round trip."""


class Serving(Protocol):
    """The gRPC server; `rpc_server.RpcServer`."""

    async def drain(self, grace_s: float) -> None:
        """Take no new calls; returns when none runs any more, or ends those that do after `grace_s`."""


class Closable(Protocol):
    """A service whose streams Envoy never ends by itself."""

    def close(self) -> None:
        """End its streams, now and from now on."""


NOTICED_S = 2.0
"""Envoy knows by then that nothing listens here: it looks each second, for half a second at most. Until then
a log stream that ends here may be opened here anew, and what Envoy writes to it comes to nothing."""


class Reading(Closable, Protocol):
    """One whose streams may have more on its way to us when they are ended."""

    def stop_reading(self) -> None:
        """End those that Envoy has not ended meanwhile."""


class Waiting(Protocol):
    """Requests that wait for room."""

    def __len__(self) -> int:
        """How many."""

    def close(self) -> None:
        """Schedule every request now, and let none wait from now on."""


class Leaving(Protocol):
    """What says that it leaves, before it does."""

    async def leave(self, grace_s: float) -> None:
        """Returns when no end of a request is told there any more.

        At the latest `grace_s` after it took the last request.
        """

    async def finish(self) -> None:
        """Returns when no call is open; at the latest when the time given to `leave` is over."""


class Draining:
    """The last work of a worker.

    Args:
        server: Takes calls.
        discovery: Envoy's subscriptions, ended at once: it reconnects elsewhere.
        requests: New ones are refused at once: Envoy asks another worker.
        waiting: Requests that wait, placed at once.
        access_log: Ended last, and read on for `READ_ON_S`: it brings the ends of what runs.
        is_busy: True while a request runs at any worker, or its end is not reported.
        is_reached: False if nobody is connected to any worker; True also where that is not known.
        drain_s: How long that may take.
        picking: Leaves at the same time, in its own way; None if there is none. Access logs may come there.
        has_peers: Other replicas serve the same Envoy, which goes on to log: `NOTICED_S` holds.
    """

    def __init__(
        self,
        server: Serving,
        discovery: Closable,
        requests: Closable,
        waiting: Waiting,
        access_log: Reading,
        is_busy: Callable[[], bool],
        is_reached: Callable[[], bool],
        drain_s: Callable[[], float],
        picking: Leaving | None = None,
        *,
        has_peers: bool = False,
    ) -> None:
        self._server = server
        self._discovery = discovery
        self._requests = requests
        self._waiting = waiting
        self._access_log = access_log
        self._is_busy = is_busy
        self._is_reached = is_reached
        self._drain_s = drain_s
        self._picking = picking
        self._noticed_s = NOTICED_S if has_peers else 0.0
        self._has_peers = has_peers

    async def drain(self) -> None:
        """Returns when all of it is over, or had its time."""
        picking = self._picking
        leaving = None if picking is None else asyncio.create_task(picking.leave(self._drain_s()))
        self._discovery.close()
        drain_s = max(self._drain_s(), LEAST_DRAIN_S if len(self._waiting) else 0.0)
        self._waiting.close()
        now_s, most_s = time.monotonic(), max(drain_s, self._noticed_s)
        noticed_s, last_s = now_s + self._noticed_s, now_s + most_s
        if not self._has_peers:
            self._requests.close()
            await self._reported(last_s)
        stopping = [asyncio.create_task(self._server.drain(max(0.0, last_s - time.monotonic())))]
        while self._is_busy() or time.monotonic() < noticed_s:
            # Without a call that runs nothing is heard any more, unless others are told and tell us.
            is_told = self._has_peers or self._is_reached()
            if time.monotonic() >= last_s or (stopping[0].done() and not is_told):
                break
            await asyncio.sleep(POLL_S)
        if picking is not None and leaving is not None:
            await leaving
            stopping.append(asyncio.create_task(picking.finish()))
        self._access_log.close()
        await asyncio.wait(stopping, timeout=READ_ON_S)
        self._access_log.stop_reading()
        await asyncio.gather(*stopping)

    async def _reported(self, last_s: float) -> None:
        """Rule 2."""
        while self._is_busy() and time.monotonic() < last_s:
            if not self._is_reached():
                return
            await asyncio.sleep(POLL_S)
