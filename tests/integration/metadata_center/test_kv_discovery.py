"""Where replicas publish cache events, asked of them; simulated ones are followed from there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import aiohttp
import pytest
from aiohttp import web

from metadata_center.addresses import Address
from metadata_center.kv_events.errors import DiscoveryError
from metadata_center.kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored
from metadata_center.kv_events.sequencing import SyncState
from metadata_center.kv_events.sources import MAX_ANSWER_BYTES, configured, discover
from tests.integration.metadata_center.publishing import ENGINE, Engine, engines, subscribed
from tests.waiting import until
from tokenway.simulator.engine.profile import PROFILES
from tokenway.simulator.server.app import SimulatorServer, running
from tokenway.simulator.server.settings import KvEventsConfig, ServerSettings

SETTINGS = ServerSettings(
    models=("tiny",),
    profile=replace(PROFILES["demo"], block_size=32, kv_tokens=256),
    time_scale=0.02,
    kv_events=KvEventsConfig("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", "kv@replica-1@tiny"),
)


def at(server: SimulatorServer) -> Address:
    """Where the replica is."""
    return Address("127.0.0.1", server.port)


async def complete(session: aiohttp.ClientSession, server: SimulatorServer, prompt: list[int]) -> None:
    """Have a replica compute a prompt."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1}
    async with session.post(f"{server.url}/v1/completions", json=body) as response:
        assert response.status == 200


async def test_a_simulated_replica_is_discovered_and_mirrored() -> None:
    """Discovery, replay, live events, evictions, a reset, and what was computed after it."""
    async with running(SETTINGS) as server, aiohttp.ClientSession() as session:
        (source,) = await discover(session, ENGINE, at(server))
        assert source.topic == "kv@replica-1@tiny"
        await complete(session, server, list(range(100, 200)))
        async with subscribed(source) as view:
            await until(lambda: view.subscriber.state(source) is SyncState.IN_SYNC and len(view.batches) == 1)
            await complete(session, server, list(range(1000, 1100)))
            await complete(session, server, list(range(2000, 2200)))
            async with session.post(f"{server.url}/reset_prefix_cache") as response:
                assert response.status == 200
            await complete(session, server, list(range(100, 170)))
            await until(
                lambda: any(isinstance(e, AllBlocksCleared) for _, b in view.batches for e in b.events)
            )
            events = [event for _, batch in view.batches for event in batch.events]
            assert any(isinstance(event, BlockRemoved) for event in events)
            last = events[-1]
            assert isinstance(last, BlockStored)
            assert last.token_ids() == list(range(100, 164))
            assert {batch.rank for _, batch in view.batches} == {0}


async def test_data_parallel_ranks_are_separate_sources() -> None:
    """Rank r publishes on the next ports; an operator may write that down instead of asking."""
    replicas = [Engine() for _ in range(2)]
    async with engines(*replicas):
        sources = [engine.source(rank=rank) for rank, engine in enumerate(replicas)]
        async with subscribed(*sources) as view:
            await replicas[1].publish()
            await until(view.has(sources[1], 0, 1))
            await until(view.has(sources[0], 0, 0))
    assert [
        s.events_address for s in configured(ENGINE, Address("127.0.0.1", 8000), "tcp://*:5557", ranks=2)
    ] == [
        "tcp://127.0.0.1:5557",
        "tcp://127.0.0.1:5558",
    ]


async def test_a_replica_without_events_has_no_sources() -> None:
    """Switched off, or too old to know the question."""
    async with aiohttp.ClientSession() as session:
        async with running(replace(SETTINGS, kv_events=None)) as server:
            assert await discover(session, ENGINE, at(server)) == []
        async with _answering(web.Response(status=404)) as address:
            assert await discover(session, ENGINE, address) == []


@pytest.mark.parametrize(
    "response",
    [
        web.Response(status=500),
        web.Response(status=302, headers={"Location": "http://127.0.0.1:1/"}),
        web.Response(body=b"not json"),
        web.Response(body=b" " * (MAX_ANSWER_BYTES + 1)),
        web.Response(body=b'{"0":{"endpoint":"tcp://10.1.2.3:5557"}}'),
    ],
    ids=["500", "redirect", "garbage", "large", "elsewhere"],
)
async def test_a_bad_answer_is_a_discovery_error(response: web.Response) -> None:
    """Whatever the engine says, and if it says nothing."""
    async with aiohttp.ClientSession() as session:
        async with _answering(response) as address:
            with pytest.raises(DiscoveryError):
                await discover(session, ENGINE, address)
        with pytest.raises(DiscoveryError):
            await discover(session, ENGINE, address)


async def test_an_engine_that_does_not_answer_is_a_discovery_error() -> None:
    """After the time-out."""
    async with aiohttp.ClientSession() as session, _answering(None) as address:
        with pytest.raises(DiscoveryError, match="timeout"):
            await discover(session, ENGINE, address, timeout_s=0.05)


@asynccontextmanager
async def _answering(response: web.Response | None) -> AsyncIterator[Address]:
    """A server that gives one answer, or none."""

    async def handle(request: web.Request) -> web.Response:
        if response is None:
            await asyncio.Event().wait()
        assert request.path == "/kv_event_sources"
        assert response is not None
        return response

    app = web.Application()
    app.router.add_get("/kv_event_sources", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield Address("127.0.0.1", runner.addresses[0][1])
    finally:
        await runner.cleanup()
