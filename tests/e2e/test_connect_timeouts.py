"""Endpoints that do not take connections for a while, on the real Envoy: the last of them stays."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.e2e.harness import chat, cluster, post, recording, running_stack, sample

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

FEW_PROBES = {"interval_s": 60.0, "recovery_interval_s": 60.0}
"""None but the first: what is seen here is seen in traffic."""

FILLING = 3
"""Connections that nobody takes; a queue of none has room for one."""


class Door:
    """A TCP port before another one, which can be made to take no connection: a SYN is not answered.

    Args:
        upstream_port: Where connections lead.

    Attributes:
        port: Where to connect.
        key: `ip:port`.
    """

    def __init__(self, upstream_port: int) -> None:
        self._upstream_port = upstream_port
        self._listening = socket.socket()
        self._listening.setblocking(False)
        self._listening.bind(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.key = f"127.0.0.1:{self.port}"
        self._filling: list[socket.socket] = []
        self._taking: asyncio.Task[None] | None = None
        self._pumps: set[asyncio.Task[None]] = set()

    def shut(self) -> None:
        """From now on no connection is made."""
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None
        self._listening.listen(0)
        for _ in range(FILLING):
            one = socket.socket()
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                one.connect(("127.0.0.1", self.port))
            self._filling.append(one)

    def open(self) -> None:
        """Connections are made again."""
        for one in self._filling:
            one.close()
        self._filling.clear()
        self._listening.listen(128)
        self._taking = asyncio.create_task(self._take())

    async def close(self) -> None:
        """Nothing listens here any more."""
        tasks = [*self._pumps, *([] if self._taking is None else [self._taking])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for one in (*self._filling, self._listening):
            one.close()

    async def _take(self) -> None:
        while True:
            taken, _ = await asyncio.get_running_loop().sock_accept(self._listening)
            pump = asyncio.create_task(self._pump(taken))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, taken: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=taken)
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        try:
            await asyncio.gather(_copy(reader, to_writer), _copy(to_reader, writer))
        finally:
            writer.close()
            to_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while part := await reader.read(1 << 16):
            writer.write(part)
            await writer.drain()
        writer.write_eof()


@asynccontextmanager
async def shut_door(upstream_port: int) -> AsyncIterator[Door]:
    """One that takes no connection until it is opened."""
    door = Door(upstream_port)
    door.shut()
    try:
        yield door
    finally:
        await door.close()


def timed_out(metrics: str, endpoint: str) -> float:
    """Requests whose connection to the endpoint was not made in time."""
    series = f'tokenway_endpoint_failures_total{{endpoint="{endpoint}",kind="connect_timeout"}}'
    return sample(metrics, series) or 0.0


async def test_the_only_endpoint_is_not_given_up_for_connections_that_time_out() -> None:
    """While it takes none clients get 503; the first request after that is served, with no probe between."""
    async with (
        recording() as engine,
        shut_door(engine.port) as door,
        running_stack([cluster("sim", [door.key])], {"health": FEW_PROBES}) as stack,
    ):
        replies = await asyncio.gather(*(post(stack, chat("sim", f"shut {n}")) for n in range(6)))
        assert {reply.status for reply in replies} == {503}
        await stack.settled()
        assert timed_out(await stack.metrics(), door.key) == len(replies)
        assert (await stack.rows())[door.key]["state"] == "healthy"
        door.open()
        assert (await post(stack, chat("sim", "open"))).status == 200
        await stack.settled()


async def test_an_endpoint_that_takes_no_connection_is_left_out_while_others_do() -> None:
    """No request fails for it: what meets it is answered elsewhere, and it is doubted from the first on."""
    async with (
        recording() as well,
        recording() as engine,
        shut_door(engine.port) as door,
        running_stack([cluster("sim", [door.key, well.key])], {"health": FEW_PROBES}) as stack,
    ):
        replies = await asyncio.gather(*(post(stack, chat("sim", f"shut {n}")) for n in range(8)))
        assert {reply.status for reply in replies} == {200}
        await stack.settled()
        assert timed_out(await stack.metrics(), door.key) > 0
        row = (await stack.rows())[door.key]
        assert row["doubted_for"] == ["sim"] or row["state"] == "ejected"
        assert (await stack.rows())[well.key]["state"] == "healthy"
