"""Engines that die: before their first byte it costs no request anything, after it one stream each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.e2e.harness import (
    DEBUG_HEADERS,
    DEBUG_TOKEN_ENV,
    DECISION_HEADER,
    FAST_HEALTH,
    EngineProcess,
    Load,
    Stack,
    chat,
    cluster,
    eventually,
    post,
    running_stack,
    sample,
)

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

ENGINES = 3
STREAMS = 9


@dataclass(frozen=True, slots=True)
class Killable:
    """A gateway before engines in processes of their own, slow enough to be killed while they answer."""

    stack: Stack
    engines: list[EngineProcess]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def killable(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Killable]:
    """Three engine processes; a test that kills one starts it again."""
    logs: Path = tmp_path_factory.mktemp("engines")
    words = ("--model", "sim", "--profile", "llama8b-h100", "--time-scale", "2")
    engines = [EngineProcess(logs / f"{number}.log", *words) for number in range(ENGINES)]
    async with AsyncExitStack() as exits:
        for engine in engines:
            exits.push_async_callback(engine.kill)
        await asyncio.gather(*(engine.start() for engine in engines))
        config = {"health": FAST_HEALTH, "explain": {"debug_token_env": DEBUG_TOKEN_ENV}}
        clusters = [cluster("sim", [engine.key for engine in engines])]
        yield Killable(await exits.enter_async_context(running_stack(clusters, config)), engines)


async def _state(stack: Stack, engine: EngineProcess, wanted: str) -> None:
    async def read() -> str:
        state: str = (await stack.rows())[engine.key]["state"]
        return state

    await eventually(read, lambda state: state == wanted, 20)


async def _serves(stack: Stack, engine: EngineProcess, more_than: int) -> None:
    async def read() -> int:
        served: int = (await stack.rows())[engine.key]["served_total"]
        return served

    await eventually(read, lambda served: served > more_than, 20)


async def test_engine_killed_before_the_first_byte(killable: Killable) -> None:
    """SIGKILL under load fails no unanswered request; the engine is ejected and, restarted, served again."""
    stack, (victim, *_) = killable.stack, killable.engines
    async with Load(stack, "sim", clients=24, stream=False) as load:
        await load.more(48)
        await eventually(victim.state, lambda state: state["running"] > 0)
        await victim.kill()
        await _state(stack, victim, "ejected")
        await load.more(96)
        served = (await stack.rows())[victim.key]["served_total"]
        await victim.start()
        await _state(stack, victim, "healthy")
        await _serves(stack, victim, served)
    assert load.failures == []
    await stack.settled()


async def test_engine_killed_after_the_first_byte(killable: Killable) -> None:
    """SIGKILL breaks exactly the streams that engine had begun, visibly; the others end as they should."""
    stack, (victim, *_) = killable.stack, killable.engines
    url = f"{stack.url}/v1/chat/completions"
    begun: asyncio.Queue[str] = asyncio.Queue()

    async def stream(session: aiohttp.ClientSession, number: int) -> tuple[str, bool]:
        body = chat("sim", f"stream {number}", 100, stream=True)
        received, is_whole = b"", False
        async with session.post(url, json=body, headers=DEBUG_HEADERS) as reply:
            decision = reply.headers[DECISION_HEADER]
            try:
                async for part in reply.content.iter_any():
                    if not received:
                        begun.put_nowait(decision)
                    received += part
                is_whole = received.endswith(b"data: [DONE]\n\n")
            except aiohttp.ClientError:
                pass
        return decision, is_whole

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        tasks = [asyncio.create_task(stream(session, number)) for number in range(STREAMS)]
        for _ in range(STREAMS):
            await begun.get()
        on_victim = {served["request_id"] for served in (await victim.state())["served"][-STREAMS:]}
        await victim.kill()
        ends = dict(await asyncio.gather(*tasks))
    await stack.settled()
    broken = {decision for decision, is_whole in ends.items() if not is_whole}
    assert broken == on_victim & ends.keys()
    assert len(broken) == STREAMS // ENGINES
    for decision, is_whole in ends.items():
        outcome = (await stack.explain(decision))["outcome"]
        assert outcome["ended"] == ("completed" if is_whole else "upstream_reset")
        assert outcome["attempts"] == 1
    await _state(stack, victim, "ejected")
    await victim.start()
    await _state(stack, victim, "healthy")


async def test_refused_connection_ejects_at_once(killable: Killable) -> None:
    """One refused connection ejects an engine, before two probes could fail, and its request falls back."""
    stack, (_, victim, _) = killable.stack, killable.engines
    await victim.kill()
    replies = await asyncio.gather(*(post(stack, chat("sim", f"refused {n}")) for n in range(12)))
    assert {reply.status for reply in replies} == {200}
    await _state(stack, victim, "ejected")
    causes = [
        line["reason"]
        for line in stack.gateway_log()
        if line["event"] == "endpoint health changed" and line["endpoint"] == victim.key
    ]
    assert causes[0] == "connect_failure"
    fallbacks = sample(await stack.metrics(), 'tokenway_fallbacks_total{cluster="sim"}')
    assert fallbacks is not None
    assert fallbacks > 0
    await victim.start()
    await _state(stack, victim, "healthy")
    await stack.settled()
