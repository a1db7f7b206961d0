"""Several replicas behind one Istio gateway, which spreads its questions and its reports over all of them.

The gateway's Envoy is configured by what is rendered for Istio; the replicas share one Redis.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from testbed.assembled import assembled
from testbed.processes import Subprocess
from testbed.redis_server import RedisServer, running
from tests.e2e.assembled_stack import cluster_of
from tests.e2e.harness import (
    Load,
    Stack,
    answers,
    cluster,
    envoy_binary,
    eventually,
    key_of,
    sample,
    simulators,
)
from tests.e2e.pair import all_settled, gateways_seen, shared
from tokenway.cli.render import rendered
from tokenway.simulator.server.app import SimulatorServer

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

CLIENTS = 8
LEASE_S = 600.0
"""No request ends by it within a test."""


@dataclass(frozen=True, slots=True)
class Replicas:
    """Two of them, and their gateway, where the first one's clients ask."""

    stacks: list[Stack]
    redis: RedisServer

    async def counted(self, metric: str, what: str = "") -> float:
        """Of both together, of samples whose labels have a text."""
        texts = [await stack.metrics() for stack in self.stacks]
        lines = [
            line
            for text in texts
            for line in text.splitlines()
            if line.startswith((f"{metric} ", f"{metric}{{")) and what in line
        ]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    async def are_settled(self) -> None:
        """Nothing is charged anywhere."""
        await all_settled(self.stacks, 20)


def _config(url: str, number: int, port: int, lease_s: float) -> dict[str, Any]:
    return {
        **shared(url, f"replica-{number}"),
        "istio_gateway": {"port": port},
        "server": {"drain_s": 20},
        "load": {"lease_s": lease_s},
        "models": {"sim": {"rules": [{"cluster": cluster_of("sim")}]}},
    }


@asynccontextmanager
async def running_replicas(
    engines: list[SimulatorServer], workers: int, lease_s: float = LEASE_S
) -> AsyncIterator[Replicas]:
    """Redis, two replicas that know each other, and an Envoy whose cluster of Tokenway has all workers."""
    async with AsyncExitStack() as exits:
        folder = Path(tempfile.mkdtemp(prefix="twi", dir="/tmp"))
        exits.callback(shutil.rmtree, folder, ignore_errors=True)
        redis = exits.enter_context(running(folder / "redis"))
        stacks = [Stack(folder / str(number), workers=workers) for number in (0, 1)]
        port = stacks[0].port
        for number, stack in enumerate(stacks):
            stack.run_dir.mkdir()
            stack.write_config(_config(redis.url, number, port, lease_s))
            stack.write_clusters(cluster(cluster_of("sim"), map(key_of, engines)))
            exits.push_async_callback(stack.stop)
        await asyncio.gather(*(stack.start_gateway() for stack in stacks))
        files = rendered(stacks[0].run_dir / "tokenway.yaml")
        document = assembled(
            [manifest for manifests in files.values() for manifest in manifests],
            port=port,
            admin_port=stacks[0].envoy_admin_port,
            endpoints={cluster_of("sim"): [("127.0.0.1", engine.port) for engine in engines]},
            sockets=[
                str(stack.run_dir / f"gw{worker}.sock") for stack in stacks for worker in range(workers)
            ],
        )
        (tokenway,) = [
            each
            for each in document["static_resources"]["clusters"]
            if "pipe" in json.dumps(each["load_assignment"])
        ]
        tokenway["lb_policy"] = "ROUND_ROBIN"
        path = folder / "envoy.json"
        path.write_text(json.dumps(document))
        words = ["--concurrency", "2", "--disable-hot-restart"]
        envoy = await Subprocess.start([str(envoy_binary()), "-c", str(path), *words], folder / "envoy.log")
        exits.push_async_callback(envoy.kill)
        await answers(envoy, f"http://127.0.0.1:{stacks[0].envoy_admin_port}/ready")
        for stack in stacks:
            await eventually(partial(gateways_seen, stack), lambda seen: seen == 2)
        yield Replicas(stacks, redis)


@pytest.mark.parametrize(("workers", "stream"), [(1, False), (2, True)])
async def test_each_request_ends_once_at_the_replica_that_decided(workers: int, *, stream: bool) -> None:
    """Though its end is reported to any of them: all is counted, learned and released as with one replica."""
    async with simulators(3, time_scale=0.1) as engines, running_replicas(engines, workers) as replicas:
        async with Load(replicas.stacks[0], "sim", clients=CLIENTS, stream=stream) as load:
            await load.more(200)
        assert load.failures == []
        await replicas.are_settled()
        # Envoy serves alone what is not answered in time. No request has two ends.
        assert load.answers // 2 < await replicas.counted("tokenway_requests_total") <= load.answers
        assert await replicas.counted("tokenway_handovers_total") > 0
        assert await replicas.counted("tokenway_access_log_unmatched_total") == 0
        assert await replicas.counted("tokenway_bus_dropped_total") == 0
        for stack in replicas.stacks:
            records = await stack.last(20)
            assert {record["outcome"]["ended"] for record in records} == {"completed"}
            learned = "ttft_s" if stream else "completion_tokens"
            assert all(record["outcome"][learned] for record in records)


async def test_one_that_stops_under_load_costs_no_request_and_no_ending() -> None:
    """What is reported to it as it stops is read to its end, and goes to the other, which decided."""
    async with simulators(3, time_scale=0.1) as engines, running_replicas(engines, 1) as replicas:
        first, second = replicas.stacks
        async with Load(first, "sim", clients=CLIENTS, stream=True) as load:
            for _ in range(3):
                await load.more(60)
                second.gateway.signal(signal.SIGTERM)
                assert await second.gateway.ended() == 0
                await load.more(60)
                await second.start_gateway()
            await load.more(60)
        assert load.failures == []
        await replicas.are_settled()


async def test_one_that_is_killed_costs_what_was_on_its_way_there() -> None:
    """Its clients get their answers; ends of its own requests are for nobody, counted, and kept for nobody.

    Ends that it was to pass on come with their lease.
    """
    async with simulators(3, time_scale=0.5) as engines, running_replicas(engines, 1, 10.0) as replicas:
        first, second = replicas.stacks

        async def in_flight() -> int:
            return sum((await second.charged()).values())

        async def dropped() -> float:
            return sample(await first.metrics(), "tokenway_bus_dropped_total") or 0.0

        async with Load(first, "sim", clients=CLIENTS, stream=True, max_tokens=100) as load:
            await load.more(16)
            await eventually(in_flight, bool)
            await second.gateway.kill()
            await load.more(16)
            await eventually(dropped, bool)
            await second.start_gateway()
            await load.more(16)
        assert load.failures == []
        await replicas.are_settled()
        assert await replicas.counted("tokenway_requests_total", "lease_expired") <= CLIENTS
        assert await dropped() <= CLIENTS


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_one_that_is_gone_under_load_costs_no_request(how: signal.Signals) -> None:
    """Killed, or silent: no answer passes through it, and the gateway asks the other or goes on by itself."""
    async with simulators(3, time_scale=0.1) as engines, running_replicas(engines, 1, 10.0) as replicas:
        first, second = replicas.stacks
        async with Load(first, "sim", clients=CLIENTS, stream=True) as load:
            await load.more(60)
            second.gateway.signal(how)
            await load.more(200)
            second.gateway.signal(signal.SIGCONT) if how is signal.SIGSTOP else None
            await load.more(60)
        assert load.failures == []
        # What it had decided is charged until the leases are over, its share of the load as well.
        await all_settled([first], 30)


async def test_redis_that_hangs_for_a_moment_costs_no_ending() -> None:
    """Requests go on; entries wait until it is back, and none counts twice."""
    async with simulators(3, time_scale=0.1) as engines, running_replicas(engines, 1) as replicas:
        async with Load(replicas.stacks[0], "sim", clients=CLIENTS, stream=True) as load:
            await load.more(60)
            replicas.redis.pause()
            await load.more(20)
            await asyncio.sleep(2)
            replicas.redis.resume()
            await load.more(60)
        assert load.failures == []
        await replicas.are_settled()
        # Envoy serves alone what is not answered in time. No request has two ends.
        assert load.answers // 2 < await replicas.counted("tokenway_requests_total") <= load.answers
        assert await replicas.counted("tokenway_bus_dropped_total") == 0
