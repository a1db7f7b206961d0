"""A gateway that stops under load: what runs ends and is counted, on the real Envoy."""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.e2e.event_streams import STREAM
from tests.e2e.harness import (
    Behaviour,
    Stack,
    answer_chat,
    chat,
    cluster,
    eventually,
    post,
    recording,
    running_stack,
)
from tests.e2e.picker import Picked, running_picker

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

REQUESTS = 24


def ended(stack: Stack) -> list[dict[str, Any]]:
    """Lines of requests."""
    return [line for line in stack.gateway_log() if line["logger"] == "tokenway.request"]


def ending_by(turns: asyncio.Semaphore) -> Behaviour:
    """Streams that each take a turn before they end; whole answers come at once."""

    async def behave(request: web.Request) -> web.StreamResponse:
        if not (await request.json())["stream"]:
            return await answer_chat(request)
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(STREAM[0])
        await turns.acquire()
        for part in STREAM[1:]:
            await answer.write(part)
        return answer

    return behave


async def test_the_ends_of_all_that_ran_are_logged() -> None:
    """Envoy tells any worker of them: each listens until none has a request, and hands over the others'."""
    turns = asyncio.Semaphore(0)
    async with recording() as recorder:
        config = {"models": {"m": {"rules": [{"cluster": "c"}]}}, "server": {"drain_s": 60}}
        async with running_stack([cluster("c", [recorder.key])], config, workers=2) as stack:
            for number in range(8):  # so that Envoy has its streams of the access log
                assert (await post(stack, chat("m", f"{number}"))).status == 200
            await eventually(lambda: _count(stack), lambda count: count == 8)
            recorder.behaviour = ending_by(turns)
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


@pytest.mark.parametrize("transport", ["native", "grpcio"])
@pytest.mark.parametrize("workers", [1, 2])
async def test_the_end_of_the_first_request_is_logged(workers: int, transport: str) -> None:
    """Envoy opens its access log with the first line, after the stop; it serves new requests."""
    turns = asyncio.Semaphore(0)
    async with recording() as recorder:
        recorder.behaviour = ending_by(turns)
        config = {
            "models": {"m": {"rules": [{"cluster": "c"}]}},
            "server": {"drain_s": 60, "transport": transport},
        }
        async with running_stack([cluster("c", [recorder.key])], config, workers=workers) as stack:
            asked = [
                asyncio.create_task(post(stack, chat("m", f"{number}", stream=True)))
                for number in range(2 * workers)
            ]
            await eventually(stack.endpoints, lambda view: view["in_flight"] == len(asked))
            stack.gateway.signal(signal.SIGTERM)
            await eventually(partial(_readiness, stack), lambda status: status == 503)
            assert (await post(stack, chat("m", "new"))).status == 200
            for _ in asked:
                turns.release()
            assert {reply.status for reply in await asyncio.gather(*asked)} == {200}
            await eventually(lambda: _stopped(stack), lambda count: count == workers, 30)
            lines = ended(stack)
            assert [line["outcome"] for line in lines] == ["completed"] * len(asked)
            assert {line["completion_tokens"] for line in lines} == {2}


WAITING_LONG = {"drain_s": 3_600, "transport": "native"}
"""grpcio does not tell who is connected: behind it all of the time is waited."""


@pytest.mark.parametrize("workers", [1, 2])
async def test_nothing_is_waited_for_when_envoy_is_gone(workers: int) -> None:
    """Nobody is left to tell how its requests ended, at any worker."""
    turns = asyncio.Semaphore(0)
    async with recording() as recorder:
        recorder.behaviour = ending_by(turns)
        config = {"models": {"m": {"rules": [{"cluster": "c"}]}}, "server": WAITING_LONG}
        async with running_stack([cluster("c", [recorder.key])], config, workers=workers) as stack:
            asked = asyncio.create_task(post(stack, chat("m", "hello", stream=True)))
            await eventually(stack.endpoints, lambda view: view["in_flight"] == 1)
            await stack.envoy.kill()
            with pytest.raises(aiohttp.ClientError):
                await asked
            assert (await stack.endpoints())["in_flight"] == 1, "as far as we know"
            stack.gateway.signal(signal.SIGTERM)
            await eventually(lambda: _stopped(stack), lambda count: count == workers, 30)
            turns.release()


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_picker_waits_for_nothing_when_its_gateway_is_gone(workers: int) -> None:
    """Nobody is connected to the picker of any worker: no end is told any more."""
    turns = asyncio.Semaphore(0)
    async with recording() as recorder:
        recorder.behaviour = ending_by(turns)
        config = {"models": {"m": {"rules": [{"cluster": "c"}]}}, "server": WAITING_LONG}
        clusters = [cluster("c", [recorder.key])]
        async with running_picker(clusters, config, workers=workers, leave_early=True, leave_s=0.1) as picker:
            picked, stack = Picked(picker, [], recorder), picker.tokenway
            asked = asyncio.create_task(
                picked.post(chat("m", "hello", stream=True), listener="streamed_logged")
            )
            await eventually(stack.endpoints, lambda view: view["in_flight"] == 1)
            assert picker.envoy is not None
            await picker.envoy.kill()
            with pytest.raises(aiohttp.ClientError):
                await asked
            stack.gateway.signal(signal.SIGTERM)
            await eventually(lambda: _stopped(stack), lambda count: count == workers, 30)
            turns.release()


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_picker_that_leaves_streams_early_hears_the_ends_of_all_that_ran(workers: int) -> None:
    """They come by the gateway's access log, which it opens with its first line, after the stop."""
    turns = asyncio.Semaphore(0)
    async with recording() as recorder:
        recorder.behaviour = ending_by(turns)
        config = {"models": {"m": {"rules": [{"cluster": "c"}]}}, "server": {"drain_s": 60}}
        clusters = [cluster("c", [recorder.key])]
        async with running_picker(clusters, config, workers=workers, leave_early=True, leave_s=0.1) as picker:
            picked, stack = Picked(picker, [], recorder), picker.tokenway
            asked = [
                asyncio.create_task(
                    picked.post(chat("m", f"{number}", stream=True), listener="streamed_logged")
                )
                for number in range(4)
            ]
            await eventually(stack.endpoints, lambda view: view["in_flight"] == len(asked))
            stack.gateway.signal(signal.SIGTERM)
            await eventually(partial(_readiness, stack), lambda status: status == 503)
            await asyncio.sleep(0.5)  # it takes no requests any more
            for _ in asked:
                turns.release()
            assert {reply.status for reply in await asyncio.gather(*asked)} == {200}
            await eventually(lambda: _stopped(stack), lambda count: count == workers, 30)
            assert [line["outcome"] for line in ended(stack)] == ["completed"] * len(asked)


async def _readiness(stack: Stack) -> int:
    async with aiohttp.ClientSession() as session, session.get(f"{stack.admin_url}/readyz") as reply:
        return reply.status


async def _count(stack: Stack) -> int:
    return len(ended(stack))


async def _stopped(stack: Stack) -> int:
    return sum(line["event"] == "stopped" for line in stack.gateway_log())
