"""A gateway of several workers that stops under load: what runs ends and is counted, on the real Envoy."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest
from aiohttp import web

from tests.e2e.event_streams import STREAM
from tests.e2e.harness import Stack, chat, cluster, eventually, post, recording, running_stack

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

REQUESTS = 24


def ended(stack: Stack) -> list[dict[str, Any]]:
    """Lines of requests."""
    return [line for line in stack.gateway_log() if line["logger"] == "tokenway.request"]


async def test_the_ends_of_all_that_ran_are_logged() -> None:
    """Envoy tells any worker of them: each listens until none has a request, and hands over the others'."""
    turns = asyncio.Semaphore(0)

    async def behave(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(STREAM[0])
        await turns.acquire()
        for part in STREAM[1:]:
            await answer.write(part)
        return answer

    async with recording() as recorder:
        config = {"models": {"m": {"rules": [{"cluster": "c"}]}}, "server": {"drain_s": 60}}
        async with running_stack([cluster("c", [recorder.key])], config, workers=2) as stack:
            for number in range(8):  # so that Envoy has its streams of the access log
                assert (await post(stack, chat("m", f"{number}"))).status == 200
            await eventually(lambda: _count(stack), lambda count: count == 8)
            recorder.behaviour = behave
            asked = [
                asyncio.create_task(post(stack, chat("m", f"long {number}", stream=True)))
                for number in range(REQUESTS)
            ]
            await eventually(stack.endpoints, lambda view: view["in_flight"] == REQUESTS)
            stack.gateway.signal(signal.SIGTERM)
            for _ in asked:
                await asyncio.sleep(0.1)
                turns.release()
            assert {reply.status for reply in await asyncio.gather(*asked)} == {200}
            await eventually(lambda: _stopped(stack), lambda count: count == 2, 30)
            lines = ended(stack)
            assert len(lines) == len({line["request_id"] for line in lines}) == 8 + REQUESTS
            assert {line["outcome"] for line in lines} == {"completed"}
            assert {line["completion_tokens"] for line in lines[8:]} == {2}


async def _count(stack: Stack) -> int:
    return len(ended(stack))


async def _stopped(stack: Stack) -> int:
    return sum(line["event"] == "stopped" for line in stack.gateway_log())
