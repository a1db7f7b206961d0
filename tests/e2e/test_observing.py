"""What an operator can see of live traffic: explain, metrics, and prefills released by prediction."""

from __future__ import annotations

import asyncio
import sys

import pytest
from aiohttp import web

from extproc.observing.metrics.configuration import HOST_NAME_RESOLVED
from extproc.observing.metrics.discovery import FAMILIES as DISCOVERY_FAMILIES
from extproc.observing.metrics.predictions import USAGE_UNKNOWN
from extproc.observing.metrics.process import LOOP_STALLS, STALL_CPU
from extproc.observing.metrics.sharing import FAMILIES as SHARING_FAMILIES
from extproc.observing.metrics.streams import ADS_NACKS, TRANSPORT_FAULTS
from extproc.observing.metrics.table import FAMILIES
from testbed.processes import REPOSITORY
from tests.e2e.conftest import Shared
from tests.e2e.harness import (
    DEBUG_HEADERS,
    DECISION_HEADER,
    Stack,
    answer_chat,
    chat,
    cluster,
    eventually,
    key_of,
    post,
    running_stack,
)
from tests.e2e.holding import FULL_TOKENS, ask, held, reconfigured, total
from tokenway.simulator.server.app import SimulatorServer

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

BEYOND_TRAFFIC = {
    ADS_NACKS,
    HOST_NAME_RESOLVED,
    USAGE_UNKNOWN,
    TRANSPORT_FAULTS,
    LOOP_STALLS,
    STALL_CPU,
    *SHARING_FAMILIES,
    *DISCOVERY_FAMILIES,
}
"""Families without a sample here: Envoy would have to refuse what we publish, or break HTTP/2, an answer
to hide its usage, names to be resolved, gateways to share, a control plane to list endpoints, or a turn of
the event loop to take long, which none need."""


async def _command(stack: Stack, *words: str) -> tuple[int, str]:
    """Exit code and output of `tokenway WORDS --admin URL`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tokenway.cli.main", *words, "--admin", stack.admin_url),
        cwd=REPOSITORY,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_explain_recomputes_the_decision(plain: Shared, stream: bool) -> None:
    """The id an operator's token brings back explains the decision, and it comes out the same again."""
    reply = await post(plain.stack, chat("sim", "why there?", stream=stream), DEBUG_HEADERS)
    await plain.stack.settled()
    code, page = await _command(plain.stack, "explain", reply.headers[DECISION_HEADER])
    assert code == 0
    assert "recomputed: same" in page
    assert all(key_of(engine) in page for engine in plain.engines)
    assert "why there?" not in page
    code, page = await _command(plain.stack, "explain", "--last", "1")
    assert (code, reply.headers[DECISION_HEADER] in page) == (0, True)


@pytest.mark.parametrize("token", [None, "", "wrong"])
async def test_no_id_without_the_token(plain: Shared, token: str | None) -> None:
    """Without the operator's token no decision id comes back, and no engine's address either."""
    headers = {} if token is None else {"x-tokenway-debug": token}
    reply = await post(plain.stack, chat("sim", "hello"), headers)
    assert reply.status == 200
    assert DECISION_HEADER not in reply.headers
    assert not any(key_of(engine) in value for value in reply.headers.values() for engine in plain.engines)


async def test_a_limit_that_is_none_is_counted(plain: Shared) -> None:
    """The request is served as without it; one that is a limit is not counted."""

    async def counted() -> float:
        scrape = await plain.stack.metrics()
        return total(scrape, "tokenway_headers_ignored_total", header="slo_ttft_ms", reason="malformed")

    before = await counted()
    for limit, more in (("soon", 1), ("60000", 1), ("0", 2)):
        assert (await post(plain.stack, chat("recorded", "hello"), {"x-slo-ttft-ms": limit})).status == 200
        assert plain.recorder.received[-1].headers["x-slo-ttft-ms"] == limit
        assert await counted() == before + more


async def test_unknown_id(plain: Shared) -> None:
    """Asking about a request that was never made fails and says so."""
    code, page = await _command(plain.stack, "explain", "11111111-1111-4111-8111-111111111111")
    assert code == 1
    assert "no decision of that id is remembered" in page


async def test_every_family_is_scraped(plain: Shared) -> None:
    """After traffic of every kind, a live scrape holds a sample of every family that traffic can produce."""
    usage = {"stream_options": {"include_usage": True}}
    for turn in range(2):
        text = "tell me everything " * 200
        assert (await post(plain.stack, chat("sim", text, 20, stream=True) | usage)).status == 200
        assert (await post(plain.stack, chat("sim", f"{turn}"))).status == 200
    assert (await post(plain.stack, b"{")).status == 400

    assert (await post(plain.stack, chat("dead", "hello"))).status == 503

    async def reset_first(request: web.Request) -> web.StreamResponse:
        if len(plain.recorder.received) + len(plain.decoy.received) == 1:
            assert request.transport is not None
            request.transport.abort()
        return await answer_chat(request)

    plain.recorder.behaviour = plain.decoy.behaviour = reset_first
    assert (await post(plain.stack, chat("pair", "hello"))).status == 200
    assert len(plain.recorder.received) == len(plain.decoy.received) == 1
    await _hold_one(plain)
    await plain.stack.settled()
    scrape = await plain.stack.metrics()
    sampled = {line.partition(" ")[0].partition("{")[0] for line in scrape.splitlines() if line[:1] != "#"}
    missing = {
        family.name
        for family in FAMILIES
        if family not in BEYOND_TRAFFIC and not {family.name, f"{family.name}_bucket"} & sampled
    }
    assert missing == set()
    declared = {line.split()[2] for line in scrape.splitlines() if line.startswith("# TYPE ")}
    assert {family.name.removesuffix("_total") for family in FAMILIES} <= {
        name.removesuffix("_total") for name in declared
    }


async def _hold_one(shared: Shared) -> None:
    """Have a request wait until an engine gives the first token of a long prompt."""
    released = asyncio.Event()

    async def answer_when_released(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        await released.wait()
        await answer.write(b"data: [DONE]\n\n")
        return answer

    async def received() -> int:
        return len(shared.recorder.received)

    shared.recorder.reset()
    shared.recorder.behaviour = answer_when_released
    await reconfigured(shared.stack, holding={"enabled": True, "max_s": 50.0})
    try:
        asked = [ask(shared.stack, "tuned", "long", FULL_TOKENS)]
        await eventually(received, bool)
        asked.append(ask(shared.stack, "tuned", "held"))
        await held(shared.stack, 1)
        released.set()
        assert [reply.status for reply in await asyncio.gather(*asked)] == [200, 200]
    finally:
        released.set()
        await reconfigured(shared.stack, holding={"enabled": False})


async def _prefill_tokens(stack: Stack) -> int:
    return sum(row["prefill_tokens"] for row in (await stack.rows()).values())


async def test_prefill_ends_with_the_first_token(plain: Shared) -> None:
    """By default a stream's prefill stays charged until its first token passes, however late that is."""
    for engine in plain.engines:
        engine.driver.pause()
    task = asyncio.create_task(post(plain.stack, chat("sim", "word " * 400, 200, stream=True)))
    try:
        charged = await eventually(lambda: _prefill_tokens(plain.stack), bool)
        await asyncio.sleep(1.5)
        assert await _prefill_tokens(plain.stack) == charged
    finally:
        for engine in plain.engines:
            engine.driver.resume()
    await eventually(lambda: _prefill_tokens(plain.stack), lambda tokens: tokens == 0)
    assert (await task).status == 200


async def test_without_first_chunks_prefill_ends_as_predicted(engines: list[SimulatorServer]) -> None:
    """With `first_chunk: false` a prefill is released when predicted to end; its request stays charged."""
    config = {"signals": {"first_chunk": False}}
    async with running_stack([cluster("sim", map(key_of, engines))], config) as stack:
        for engine in engines:
            engine.driver.pause()
        task = asyncio.create_task(post(stack, chat("sim", "word " * 400, 20, stream=True)))
        try:
            await eventually(lambda: _prefill_tokens(stack), bool)
            await eventually(lambda: _prefill_tokens(stack), lambda tokens: tokens == 0, 3)
            assert (await stack.endpoints())["in_flight"] == 1
            assert not task.done()
        finally:
            for engine in engines:
                engine.driver.resume()
        reply = await task
        assert reply.body.count(b'"delta":{"content":') == 20
        await stack.settled()
