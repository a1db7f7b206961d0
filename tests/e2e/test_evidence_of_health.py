"""What answers and probes say of engines, on the real Envoy: which fails fast, is slow, or is sent poison."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from tests.e2e.answer_cases import CASES, ERROR, breaks, whole
from tests.e2e.event_streams import (
    DONE,
    STREAM,
    conversation,
    data,
    events,
    response,
)
from tests.e2e.harness import (
    Recorder,
    Stack,
    answer_chat,
    chat,
    cluster,
    eventually,
    post,
    recording,
    running_stack,
    sample,
    send,
)

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

REQUESTS = 60
AT_A_TIME = 6
MODELS = {"models": {"m": {"rules": [{"cluster": "c"}]}}}


@asynccontextmanager
async def engines(
    count: int, config: dict[str, Any] | None = None
) -> AsyncIterator[tuple[Stack, list[Recorder]]]:
    """A gateway before so many recorders, all of one cluster."""
    async with AsyncExitStack() as exits:
        found = [await exits.enter_async_context(recording()) for _ in range(count)]
        keys = [engine.key for engine in found]
        yield await exits.enter_async_context(running_stack([cluster("c", keys)], config or MODELS)), found


async def many(stack: Stack, path: str, body: Callable[[int], dict[str, Any]]) -> None:
    """`REQUESTS` requests, `AT_A_TIME` at once."""
    turn = asyncio.Semaphore(AT_A_TIME)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(number: int) -> None:
            async with turn, session.post(stack.url + path, json=body(number)) as reply:
                await reply.read()

        await asyncio.gather(*map(ask, range(REQUESTS)))


@dataclass(frozen=True, slots=True)
class Pairs:
    """One gateway, and for each case a model of two replicas."""

    stack: Stack
    replicas: dict[str, tuple[Recorder, Recorder]]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pairs() -> AsyncIterator[Pairs]:
    """Of each pair the first fails at once, the second answers after 0.1 s."""
    async with AsyncExitStack() as exits:
        replicas, clusters = {}, []
        for name, case in CASES.items():
            broken = await exits.enter_async_context(recording())
            healthy = await exits.enter_async_context(recording())
            broken.behaviour, healthy.behaviour = case.bad, events(*case.good, after_s=0.1)
            replicas[name] = broken, healthy
            clusters.append(cluster(name, [broken.key, healthy.key]))
        models = {"models": {name: {"rules": [{"cluster": name}]} for name in CASES}}
        yield Pairs(await exits.enter_async_context(running_stack(clusters, models)), replicas)


@pytest.mark.parametrize("name", CASES)
async def test_a_replica_that_fails_fast_attracts_no_traffic(pairs: Pairs, name: str) -> None:
    """Of two replicas the one that answers nothing gets few requests, none of them counted as completed."""
    stack, case, (broken, healthy) = pairs.stack, CASES[name], pairs.replicas[name]
    body = response if case.path == "responses" else conversation
    await many(stack, f"/v1/{case.path}", lambda number: body(number) | {"model": name})
    await stack.settled()
    reached = len(broken.received)
    rows, scrape = await stack.rows(), await stack.metrics()
    assert 1 <= reached <= REQUESTS // 4
    assert rows[broken.key]["served_total"] == 0
    of_its_own = case.path in ("messages", "responses")
    assert rows[broken.key]["doubted_for"] == [f"{name} ({case.path})" if of_its_own else name]
    assert rows[healthy.key]["state"] == "healthy"
    assert rows[healthy.key]["served_total"] == REQUESTS - reached
    series = f'tokenway_endpoint_failures_total{{endpoint="{broken.key}",kind="{case.kind}"}}'
    assert sample(scrape, series) == reached
    assert sample(scrape, f'tokenway_endpoint_doubted{{cluster="{name}",endpoint="{broken.key}"}}') == 1


async def test_an_api_that_one_replica_lacks_takes_no_other_from_it() -> None:
    """It is not asked for that again, and answers half of the chats."""
    balanced = {"rules": [{"cluster": "c"}], "load_balancing": {"algorithm": "round_robin"}}
    async with engines(2, {"models": {"m": balanced}}) as (stack, (older, newer)):
        lacks = whole(404, {"detail": "Not Found"})

        async def answer(request: web.Request) -> web.StreamResponse:
            return await (lacks if request.path == "/v1/messages" else answer_chat)(request)

        older.behaviour = answer
        bodies = [conversation(number) | {"stream": False} for number in range(16)]
        statuses = []
        for body in bodies[:6]:
            statuses.append((await send(stack, "POST", "/v1/messages", body)).status)
            await stack.settled()  # the next choice knows how this one ended
        assert sorted(statuses) == [200] * 5 + [404]
        older.received.clear()
        newer.received.clear()
        for body in bodies[6:]:
            assert (await post(stack, body)).status == 200
        assert (len(older.received), len(newer.received)) == (5, 5)
        assert (await stack.rows())[older.key]["doubted_for"] == ["m (messages)"]


@pytest.mark.parametrize("status", [400, 404])
async def test_an_error_that_every_replica_gives_ejects_none(status: int) -> None:
    """What a client does wrong is passed to it as it is, and no replica pays for it."""
    async with engines(2) as (stack, replicas):
        for replica in replicas:
            replica.behaviour = whole(status, {"error": {"message": "no", "type": "x", "code": status}})
        await many(stack, "/v1/chat/completions", conversation)
        for replica in replicas:
            replica.behaviour = events(*STREAM)
        assert {(await post(stack, conversation(number))).status for number in range(9)} == {200}
        assert {row["state"] for row in (await stack.rows()).values()} == {"healthy"}


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_requests_that_break_connections_break_no_pool(count: int) -> None:
    """What breaks every engine's connection is tried twice, ejects none, and others are served."""

    async def engine(request: web.Request) -> web.StreamResponse:
        poisoned = b"POISON" in await request.read()
        return await (breaks if poisoned else events(*STREAM))(request)

    async with engines(count) as (stack, replicas):
        for replica in replicas:
            replica.behaviour = engine
        for number in range(8):
            poison = await post(stack, chat("m", f"POISON {number}"))
            assert poison.status == 503
            assert (await post(stack, chat("m", f"honest {number}"))).status == 200
        received = [b"POISON" in each.body for replica in replicas for each in replica.received]
        assert sum(received) == 2 * 8
        assert {row["state"] for row in (await stack.rows()).values()} == {"healthy"}


async def test_poison_sent_again_reaches_one_engine() -> None:
    """A client that repeats what broke two engines gets one more of them each time, and no fallback."""
    async with engines(3) as (stack, replicas):
        for replica in replicas:
            replica.behaviour = breaks
        for _ in range(4):
            await post(stack, chat("m", "POISON"))
            await stack.settled()
        assert sum(len(replica.received) for replica in replicas) == 2 + 3
        assert {row["state"] for row in (await stack.rows()).values()} == {"healthy"}


async def test_slow_probes_do_not_empty_the_pool() -> None:
    """Engines whose health check hangs while they answer requests stay: traffic is the stronger evidence."""

    class Busy(Recorder):
        async def _health(self, _: web.Request) -> web.Response:
            await asyncio.sleep(60)
            return web.Response()

    replicas = [Busy(), Busy()]
    async with AsyncExitStack() as exits:
        for replica in replicas:
            await replica.start()
            exits.push_async_callback(replica.stop)
        config = MODELS | {"health": {"interval_s": 0.2, "timeout_s": 0.2, "recovery_interval_s": 0.2}}
        keys = [replica.key for replica in replicas]
        stack = await exits.enter_async_context(running_stack([cluster("c", keys)], config))
        statuses = []
        for number in range(30):
            statuses.append(
                (await send(stack, "POST", "/v1/chat/completions", chat("m", str(number)))).status
            )
            await asyncio.sleep(0.1)
        assert set(statuses) == {200}


async def test_a_mended_replica_has_its_share_again() -> None:
    """Ejected for its answers, it is back after a good probe and a few requests on trial."""
    config = MODELS | {"health": {"interval_s": 0.5, "recovery_interval_s": 0.1, "ejection_s": 0.3}}
    async with engines(2, config) as (stack, (broken, healthy)):
        broken.behaviour, healthy.behaviour = events(data(ERROR), DONE), events(*STREAM, after_s=0.02)
        await many(stack, "/v1/chat/completions", conversation)
        broken.behaviour = healthy.behaviour
        readings = itertools.count(1)

        async def standing() -> tuple[str, list[str]]:
            # Prompts that none has cached: a trial is a choice like any other, and caches would draw all of
            # them to the replica that was never doubted.
            begin = next(readings) * REQUESTS
            await many(stack, "/v1/chat/completions", lambda number: conversation(begin + number))
            row = (await stack.rows())[broken.key]
            return row["state"], row["doubted_for"]

        # Each reading takes 60 requests, some six seconds.
        await eventually(standing, lambda found: found == ("healthy", []), 60)
