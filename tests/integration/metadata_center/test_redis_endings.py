"""Requests that end in every way, over two gateways that share by a real Redis, while Redis and they fail.

`make test` has some hundreds; `make test-endings ENDINGS=10000` as many as are asked for.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

from testbed.redis_server import RedisServer, running
from tests.integration.metadata_center.ending_traffic import SHARE_LEASE_S, WAYS, Site, Traffic, traffic

REQUESTS: Final = int(os.environ.get("TOKENWAY_REDIS_ENDINGS", "400"))

FAULTS_BETWEEN: Final = 3
"""Faults from one moment at which all views are compared to the next."""


class Cable:
    """The way from one gateway to Redis, which can be cut alone."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._ends: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._is_cut = False
        self.url = ""

    async def lay(self) -> None:
        """Begin."""
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def take_up(self) -> None:
        """End."""
        assert self._server is not None
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Nothing goes through, and all that was under way is lost."""
        self._is_cut = True
        for end in self._ends:
            end.transport.abort()

    def mend(self) -> None:
        """New connections go through."""
        self._is_cut = False

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        with suppress(OSError):
            if not self._is_cut:
                their_reader, their_writer = await asyncio.open_connection("127.0.0.1", self._port)
                ends.append(their_writer)
                self._ends.update(ends)
                await asyncio.gather(_pump(reader, their_writer), _pump(their_reader, writer))
        for end in ends:
            self._ends.discard(end)
            end.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


class Faults:
    """What fails while requests run.

    Args:
        server: The real Redis.
        cables: Each gateway's way there.
        made: The gateways and their clients.
        rng: Decides what happens.
    """

    def __init__(self, server: RedisServer, cables: list[Cable], made: Traffic, rng: random.Random) -> None:
        self._server = server
        self._cables = cables
        self._traffic = made
        self._rng = rng

    async def stopped(self) -> None:
        """Redis hangs."""
        self._server.pause()
        await asyncio.sleep(self._rng.random())
        self._server.resume()

    async def killed(self) -> None:
        """Redis loses all that it has, and is away."""
        self._server.kill()
        await asyncio.sleep(0.6 * self._rng.random())
        await asyncio.to_thread(self._server.start)

    async def flushed(self) -> None:
        """Redis loses all that it has, under connections that stand."""
        await asyncio.to_thread(self._server.command, "FLUSHALL")

    async def disconnected(self) -> None:
        """All connections are cut by the server."""
        for kind in self._rng.sample(("pubsub", "normal"), self._rng.randint(1, 2)):
            await asyncio.to_thread(self._server.command, "CLIENT", "KILL", "TYPE", kind)

    async def cut_off(self) -> None:
        """One gateway, or both, cannot reach it; longer than a lease or not."""
        cut = self._rng.sample(self._cables, self._rng.randint(1, 2))
        for cable in cut:
            cable.cut()
        await asyncio.sleep(1.5 * SHARE_LEASE_S * self._rng.random())
        for cable in cut:
            cable.mend()

    async def gateway_killed(self) -> None:
        """A gateway is killed, and another life of it begins."""
        await self._traffic.replace(Site.die)

    async def gateway_restarted(self) -> None:
        """The same, in good order."""
        await self._traffic.replace(Site.leave)


@asynccontextmanager
async def cabled(server: RedisServer) -> AsyncIterator[list[Cable]]:
    """Two ways there."""
    async with AsyncExitStack() as stack:
        cables = [Cable(server.port) for _ in range(2)]
        for cable in cables:
            await cable.lay()
            stack.push_async_callback(cable.take_up)
        yield cables


@pytest.mark.timeout(60 + REQUESTS)
async def test_nothing_is_left_of_requests_that_end_in_every_way(tmp_path: Path) -> None:
    """Counts are never negative, agree at both whenever faults pause, and are zero in the end."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    with running(tmp_path) as server:
        async with cabled(server) as cables, traffic([cable.url for cable in cables], seed) as made:
            what = Faults(server, cables, made, rng)
            faults: list[Callable[[], Awaitable[None]]] = [
                *(what.stopped, what.killed, what.flushed, what.disconnected, what.cut_off),
                *(what.gateway_killed, what.gateway_restarted),
            ]
            happened = 0
            while made.begun < REQUESTS or happened < len(faults):
                if not happened % len(faults):
                    rng.shuffle(faults)
                await faults[happened % len(faults)]()
                happened += 1
                await asyncio.sleep(0.2 * rng.random())
                if not happened % FAULTS_BETWEEN:
                    await made.agreed()
        assert {*WAYS} <= made.ways.keys()
        print(f"{made.begun} requests, {happened} faults, {dict(made.ways)}")
