"""What the engine says is what the client gets, byte for byte, however many clients come and go."""

from __future__ import annotations

import asyncio
import random
import re
import time
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.e2e.conftest import Shared
from tests.e2e.harness import Stack, chat, eventually, key_of, sample, send
from tokenway.simulator.server.app import SimulatorServer

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

STREAMS = 200
CHUNKS = 200
ABORTED_RATIO = 0.25
DIRECT_AT_ONCE = 25


def _without_time(stream: bytes) -> bytes:
    """The one thing two runs of the same generation differ in is when they were made."""
    return re.sub(rb'"created":\d{10}', b'"created":0000000000', stream)


async def test_two_hundred_streams_byte_identical(plain: Shared) -> None:
    """Of 200 concurrent streams, a quarter aborted, the others arrive byte for byte as sent."""
    await _check_streams(plain.stack, plain.engines)


async def test_two_hundred_streams_over_two_workers(
    two_workers: Stack, engines: list[SimulatorServer]
) -> None:
    """The same through two workers, whose endings reach each other: nothing stays charged at either."""
    before = await _handovers(two_workers)
    await _check_streams(two_workers, engines)
    assert await _handovers(two_workers) > before


async def _handovers(stack: Stack) -> float:
    scrape = await stack.metrics()
    return sum(sample(scrape, f'tokenway_handovers_total{{worker="{n}"}}') or 0 for n in range(2))


async def _check_streams(stack: Stack, engines: list[SimulatorServer]) -> None:
    rng = random.Random(20261121)
    aborts_at = [rng.randrange(1, 20_000) if rng.random() < ABORTED_RATIO else None for _ in range(STREAMS)]
    bodies = [chat("sim", f"stream {number}", CHUNKS, stream=True) for number in range(STREAMS)]
    timeout = aiohttp.ClientTimeout(total=60)

    async def through(session: aiohttp.ClientSession, number: int) -> tuple[str, bytes] | None:
        url = f"{stack.url}/v1/chat/completions"
        async with session.post(url, json=bodies[number]) as reply:
            assert reply.status == 200
            received = b""
            async for part in reply.content.iter_any():
                received += part
                stop_at = aborts_at[number]
                if stop_at is not None and len(received) >= stop_at:
                    reply.close()
                    return None
            return reply.headers["x-request-id"], received

    async def direct(session: aiohttp.ClientSession, number: int, request_id: str) -> bytes:
        url = f"http://{key_of(engines[0])}/v1/chat/completions"
        async with session.post(url, json=bodies[number], headers={"x-request-id": request_id}) as reply:
            return await reply.read()

    started_s = time.monotonic()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        received = await asyncio.gather(*(through(session, number) for number in range(STREAMS)))
    assert time.monotonic() - started_s < 60
    whole = {number: got for number, got in enumerate(received) if got is not None}
    assert len(whole) == sum(at is None for at in aborts_at) > STREAMS / 2
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=DIRECT_AT_ONCE), timeout=timeout
    ) as session:
        expected = await asyncio.gather(
            *(direct(session, number, request_id) for number, (request_id, _) in whole.items())
        )
    for (number, (_, got)), want in zip(whole.items(), expected, strict=True):
        assert _without_time(got) == _without_time(want), f"stream {number}"
        assert want.count(b'"delta":{"content":') == CHUNKS
    await stack.settled()
    assert [engine.engine.num_running for engine in engines] == [0] * len(engines)


async def test_long_stream_outlives_the_message_timeout(plain: Shared) -> None:
    """A stream whose first token comes later than ext_proc's 0.5 s message time-out is whole."""
    for engine in plain.engines:
        engine.driver.pause()
    task = asyncio.create_task(
        send(plain.stack, "POST", "/v1/chat/completions", chat("sim", "slow start", 20, stream=True))
    )
    await asyncio.sleep(0.9)
    for engine in plain.engines:
        engine.driver.resume()
    reply = await task
    assert reply.status == 200
    assert reply.body.count(b'"delta":{"content":') == 20
    assert reply.body.endswith(b"data: [DONE]\n\n")


BEFORE_A_TOKEN = {
    "a ping": ("chat/completions", b'event: ping\ndata: {"type": "ping"}\n\n'),
    "data without anything": ("chat/completions", b"data:\n\n"),
    "a request repeated": (
        "responses",
        b'event: response.created\ndata: {"type":"response.created","response":'
        b'{"id":"resp_1","instructions":"Explain response.output_text.delta."}}\n\n',
    ),
}
"""What engines, and proxies before them, send while a request waits."""

AFTER_IT = {
    "chat/completions": (b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n', b"data: [DONE]\n\n"),
    "responses": (
        b'event: response.output_item.added\ndata: {"type":"response.output_item.added"}\n\n',
        b'event: response.completed\ndata: {"type":"response.completed","response":{"id":"resp_1"}}\n\n',
    ),
}
"""The first token and the end."""


@pytest.mark.parametrize("name", BEFORE_A_TOKEN)
async def test_the_first_token_is_what_comes_after_pings_and_beginnings(plain: Shared, name: str) -> None:
    """The time to the first token is not that of what came before it."""
    path, before = BEFORE_A_TOKEN[name]
    waits_s = 0.4

    async def behave(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(before)
        for part in AFTER_IT[path]:
            await asyncio.sleep(waits_s)
            await answer.write(part)
        return answer

    plain.recorder.behaviour = behave
    body = {"model": "recorded", "stream": True, "input": "x", "messages": [{"role": "user", "content": "x"}]}
    assert (await send(plain.stack, "POST", f"/v1/{path}", body)).status == 200

    async def read() -> Any:
        return (await plain.stack.last(1))[0]["outcome"]

    outcome = await eventually(read, lambda outcome: outcome is not None)
    assert outcome["ttft_s"] > waits_s / 2
