"""Where requests go: to the cached prefix while that pays, evenly otherwise."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.e2e.conftest import REPLICAS, Shared
from tests.e2e.harness import (
    Stack,
    chat,
    cluster,
    eventually,
    key_of,
    post,
    recording,
    running_stack,
    sample,
)
from tokenway.simulator.server.app import SimulatorServer

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PREFIX = "All work and no play makes Jack a dull boy. " * 373  # 16 KB
TAIL = "All play and no work makes Jack a mere toy. " * 93  # 4 KB
BURST = 64
ASKED = 24


def _in_flight(engine: SimulatorServer) -> int:
    return engine.engine.num_running + engine.engine.num_waiting


def _pause(engines: list[SimulatorServer]) -> None:
    for engine in engines:
        engine.driver.pause()


def _resume(engines: list[SimulatorServer]) -> None:
    for engine in engines:
        engine.driver.resume()


async def test_prefix_stays_on_one_endpoint_until_that_is_busy(engines: list[SimulatorServer]) -> None:
    """20 requests with the same 16 KB prefix go to one endpoint; once it is held up, others take over.

    Under `inference_lb`, which weighs requests in flight against cached blocks.
    """
    models = {"sim": {"rules": [{"cluster": "sim"}], "load_balancing": {"algorithm": "inference_lb"}}}
    async with running_stack([cluster("sim", map(key_of, engines))], {"models": models}) as stack:
        await _stays_until_busy(stack, engines, PREFIX)
        await stack.settled()


async def test_prefix_stays_on_one_endpoint_until_its_work_waits(plain: Shared) -> None:
    """The same under `least_completion`, where work that has to be done anyway is what moves requests.

    With nothing but a cached prefix they would stay: each of them takes milliseconds there.
    """
    await _stays_until_busy(plain.stack, plain.engines, f"Once more: {PREFIX}", TAIL)


async def _stays_until_busy(
    stack: Stack, engines: list[SimulatorServer], prefix: str, tail: str = ""
) -> None:
    before = [len(engine.served) for engine in engines]
    for turn in range(20):
        assert (await post(stack, chat("sim", f"{prefix}{turn}"))).status == 200
        await stack.settled()
    answered = [len(engine.served) - count for engine, count in zip(engines, before, strict=True)]
    assert max(answered) >= 18
    assert sum(answered) == 20
    holder = engines[answered.index(max(answered))]
    assert holder.served[-1].cached_tokens > 0.9 * holder.served[-1].prompt_tokens

    others = [engine for engine in engines if engine is not holder]
    before = [len(engine.served) for engine in others]
    holder.driver.pause()
    try:
        tasks = [
            asyncio.create_task(post(stack, chat("sim", f"{prefix}more {turn}{tail}", stream=True)))
            for turn in range(ASKED)
        ]

        async def placed() -> int:
            moved = sum(len(engine.served) - count for engine, count in zip(others, before, strict=True))
            return _in_flight(holder) + moved

        await eventually(placed, lambda count: count == ASKED)
        assert 0 < _in_flight(holder) < ASKED
    finally:
        holder.driver.resume()
    assert {reply.status for reply in await asyncio.gather(*tasks)} == {200}


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_burst_spreads_evenly(plain: Shared, stream: bool) -> None:
    """64 simultaneous requests over 8 endpoints differ by at most one between any two."""
    await _burst(plain.stack, plain.engines, stream=stream)


async def test_burst_spreads_evenly_over_two_workers(
    two_workers: Stack, engines: list[SimulatorServer]
) -> None:
    """The same with two worker processes that share their counters: both decide, neither overbooks."""
    await _burst(two_workers, engines, stream=True)
    scrape = await two_workers.metrics()
    for worker in range(2):
        assert (sample(scrape, f'tokenway_decision_seconds_count{{worker="{worker}"}}') or 0) >= BURST / 4


async def _burst(stack: Stack, engines: list[SimulatorServer], *, stream: bool) -> None:
    _pause(engines)
    try:
        tasks = [
            asyncio.create_task(post(stack, chat("sim", f"burst {number:03}", stream=stream)))
            for number in range(BURST)
        ]

        async def at_engines() -> list[int]:
            return [_in_flight(engine) for engine in engines]

        placed = await eventually(at_engines, lambda counts: sum(counts) == BURST)
        assert max(placed) - min(placed) <= 1
        charged = [row["requests"] for row in (await stack.rows()).values() if row["cluster"] == "sim"]
        assert charged == placed == [BURST // REPLICAS] * REPLICAS
    finally:
        _resume(engines)
    assert {reply.status for reply in await asyncio.gather(*tasks)} == {200}
    await stack.settled()


async def test_models_in_turn_share_by_weight() -> None:
    """Two models over replicas of weights 1 and 4, asked for in turn: each by itself shares by weight."""
    model = {"rules": [{"cluster": "c"}], "load_balancing": {"algorithm": "round_robin"}}
    async with recording() as light, recording() as heavy:
        endpoints = [
            {"address": "127.0.0.1", "port": light.port, "weight": 1},
            {"address": "127.0.0.1", "port": heavy.port, "weight": 4},
        ]
        clusters = [{"name": "c", "endpoints": endpoints}]
        async with running_stack(clusters, {"models": {"a": model, "b": model}}) as stack:
            for _ in range(10):
                for name in "ab":
                    assert (await post(stack, chat(name, "hello"))).status == 200
        for name in "ab":
            asked = [
                sum(json.loads(got.body)["model"] == name for got in engine.received)
                for engine in (light, heavy)
            ]
            assert asked == [2, 8]
