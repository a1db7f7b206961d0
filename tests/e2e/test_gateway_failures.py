"""A gateway that dies or hangs: Envoy carries on by itself, and the ledger is right again afterwards."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from testbed.processes import START_TIMEOUT_S
from tests.e2e.harness import (
    IS_ISTIO_PROFILE,
    LEASE_S,
    Load,
    Recorder,
    Stack,
    chat,
    cluster,
    eventually,
    is_alive,
    key_of,
    post,
    recording,
    running_stack,
    sample,
    send,
)
from tokenway.simulator.server.app import SimulatorServer

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

MESSAGE_TIMEOUT_S = 0.5
"""What envoy/bootstrap.yaml grants the gateway before it goes on without."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def other() -> AsyncIterator[Recorder]:
    """The engine of another model."""
    async with recording() as recorder:
        yield recorder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def alone(engines: list[SimulatorServer], other: Recorder) -> AsyncIterator[Stack]:
    """One worker of its own; a test that ends it starts it again."""
    clusters = [
        cluster("pool-a", map(key_of, engines), model="sim"),
        cluster("pool-b", [other.key], model="other"),
    ]
    async with running_stack(clusters) as stack:
        yield stack


async def test_worker_killed_under_load(two_workers: Stack) -> None:
    """A worker killed by SIGKILL under load loses no request, is restarted and leaves nothing charged.

    Access-log entries in its hands die with it: what they would have released of the other worker's
    requests, the lease releases.
    """
    async with Load(two_workers, "sim", clients=16, stream=True, max_tokens=40) as load:
        await load.more(40)
        victim = two_workers.gateway.children()[0]
        os.kill(victim, signal.SIGKILL)
        await load.more(80)

        async def children() -> list[int]:
            return two_workers.gateway.children()

        await eventually(children, lambda pids: len(pids) == 2 and victim not in pids, START_TIMEOUT_S)

        async def workers() -> int:
            number: int = (await two_workers.endpoints())["workers"]
            return number

        await eventually(workers, lambda number: number == 2, START_TIMEOUT_S)
        await load.more(80)
    assert load.failures == []
    await eventually(two_workers.charged, lambda charged: not charged, 3 * LEASE_S)


async def test_decisions_beside_a_worker_that_keeps_the_lock_are_counted(two_workers: Stack) -> None:
    """As if one were stopped within its decision: all are answered and counted, and few are told of."""
    (counters,) = two_workers.run_dir.rglob("load.counters")
    known = len(two_workers.gateway_log())

    async def unlocked() -> int:
        scrape = await two_workers.metrics()
        series = (f'tokenway_decisions_unlocked_total{{worker="{worker}"}}' for worker in (0, 1))
        return sum(int(sample(scrape, each) or 0) for each in series)

    before = await unlocked()
    with counters.open("rb") as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        for _ in range(20):
            assert (await post(two_workers, chat("sim", "beside"))).status == 200
    assert await unlocked() == before + 20
    told = [entry for entry in two_workers.gateway_log()[known:] if "does not go on" in entry["event"]]
    assert 1 <= len(told) <= 2
    assert (await post(two_workers, chat("sim", "after"))).status == 200
    assert await unlocked() == before + 20


async def test_supervisor_killed(engines: list[SimulatorServer]) -> None:
    """Workers whose supervisor was killed leave by themselves, and the next gateway finds no rival."""
    async with (
        running_stack([cluster("sim", map(key_of, engines))], workers=2) as stack,
        Load(stack, "sim", clients=8, stream=True) as load,
    ):
        await load.more(16)
        orphans = stack.gateway.children()
        stack.gateway.signal(signal.SIGKILL)

        async def alive() -> list[int]:
            return [pid for pid in orphans if is_alive(pid)]

        await eventually(alive, lambda pids: not pids)
        await load.more(16)
        await stack.start_gateway()
        await load.more(40)
        assert (await stack.endpoints())["workers"] == 2
    assert load.failures == []


async def test_gateway_killed(alone: Stack, other: Recorder) -> None:
    """Without a gateway Envoy serves every model by itself, without a worker, until a new one takes over."""
    async with Load(alone, "sim", clients=8, stream=True) as load:
        await load.more(16)
        await alone.gateway.kill()
        await load.more(40)
        other.reset()
        spoofed = {
            "x-gateway-destination-endpoint": "127.0.0.1:1",
            "x-tokenway-owner": "0.spoofed",
            "x-tokenway-model": "model:sim",
        }
        for _ in range(5):
            assert (await post(alone, chat("other", "hello"), spoofed)).status == 200
        assert len(other.received) == 5
        unknown = await post(alone, chat("unknown", "hello"))
        assert unknown.status == 404
        assert unknown.json["error"]["code"] == "model_not_found"
        assert (await send(alone, "GET", "/nowhere")).status == 404
        await alone.start_gateway()

        async def decisions() -> int:
            return len(await alone.last(1))

        await eventually(decisions, lambda count: count == 1, START_TIMEOUT_S)
        await load.more(40)
    assert load.failures == []
    await alone.settled()


async def test_gateway_stopped(alone: Stack) -> None:
    """A gateway that hangs (SIGSTOP) fails no request, and what it decides too late is not left charged."""
    async with Load(alone, "sim", clients=8, stream=True) as load:
        await load.more(16)
        alone.gateway.signal(signal.SIGSTOP)
        try:
            await load.more(24)
            started_s = time.monotonic()
            replies = await asyncio.gather(*(post(alone, chat("sim", f"held {n}")) for n in range(4)))
            took_s = time.monotonic() - started_s
        finally:
            alone.gateway.signal(signal.SIGCONT)
        await load.more(24)
    assert {reply.status for reply in replies} == {200}
    assert MESSAGE_TIMEOUT_S <= took_s < 3 * MESSAGE_TIMEOUT_S
    assert load.failures == []
    await alone.settled()
    assert (await post(alone, chat("sim", "after"))).status == 200
    await alone.settled()
    assert (await alone.last(1))[0]["outcome"]["ended"] == "completed"


async def test_gateway_terminated(alone: Stack) -> None:
    """SIGTERM under load ends the gateway at once and in order, and fails no request."""
    async with Load(alone, "sim", clients=8, stream=True) as load:
        await load.more(16)
        alone.gateway.signal(signal.SIGTERM)
        assert await alone.gateway.ended() == 0
        await load.more(24)
        await alone.start_gateway()
        await load.more(24)
    assert load.failures == []
    assert not [line for line in alone.gateway_log() if line["level"] == "ERROR"]
    await alone.settled()


@pytest.mark.skipif(IS_ISTIO_PROFILE, reason="a gateway's routes know all models themselves")
async def test_envoy_that_was_told_of_no_models(other: Recorder) -> None:
    """No model is unknown to an Envoy that Tokenway never told of them, nor while one has no cluster yet."""
    models = {"open": {"rules": [{"cluster": "c"}]}}
    run_dir = Path(tempfile.mkdtemp(prefix="tw", dir="/tmp"))
    stack = Stack(run_dir, workers=1)
    try:
        stack.write_config({"models": models})
        stack.write_clusters()
        await stack.start_envoy()
        await _later(stack)
        await stack.start_gateway()
        listed = _cluster_names(stack)
        assert "model:" not in await listed()
        await stack.gateway.kill()
        await _later(stack)
        stack.write_clusters(cluster("c", [other.key]))
        await stack.start_gateway()
        await eventually(listed, lambda names: {"model:open", "model:"} <= names)
        await stack.gateway.kill()
        assert (await post(stack, chat("open", "hi"))).status == 200
        unknown = await post(stack, chat("unknown", "hi"))
        assert (unknown.status, unknown.json["error"]["code"]) == (404, "model_not_found")
    finally:
        await stack.stop()
        shutil.rmtree(run_dir, ignore_errors=True)


async def _later(stack: Stack) -> None:
    for model in ("open", "unknown"):
        reply = await post(stack, chat(model, "hi"))
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert reply.json["error"]["code"] == "no_healthy_endpoint"
        messages = await send(stack, "POST", "/v1/messages", {**chat(model, "hi"), "max_tokens": 8})
        assert (messages.status, messages.headers["retry-after"]) == (503, "1")
        assert messages.json["error"]["type"] == "overloaded_error"


def _cluster_names(stack: Stack) -> Callable[[], Awaitable[set[str]]]:
    """Clusters that Envoy has, those without endpoints too."""

    async def names() -> set[str]:
        text = await stack.envoy_clusters()
        return {line.partition("::default_priority")[0] for line in text.splitlines()}

    return names
