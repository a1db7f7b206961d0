"""The endpoint picker as a process, by llm-d's flags, on a real API server: what it names, and how long."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from testbed.kubernetes import Cluster, inference_pool, pod
from testbed.processes import Subprocess, free_port
from tests.picking import pick

pytestmark = [pytest.mark.kubernetes, pytest.mark.asyncio(loop_scope="session")]

LABELS = {"app": "vllm"}
DEADLINE_S = 60.0
PROMISE_S = 1.0
"""From a change of a pod to the last request that is sent there."""

QUESTION = {"model": "base", "messages": [{"role": "user", "content": "hello"}]}


class Asking:
    """Asks a picker all the time.

    Attributes:
        answers: When each request began, its status (0 is none: it was placed), and where it went.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self.answers: list[tuple[float, int, str]] = []

    async def ask(self) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            status, endpoint = await pick(self._channel, QUESTION)
            self.answers.append((began_s, status, endpoint))
            await asyncio.sleep(0.005)

    async def since(self, change_s: float, seconds: float) -> set[tuple[int, str]]:
        """What came of requests that began `PROMISE_S` after a change, for so many seconds."""
        loop = asyncio.get_running_loop()
        until_s = change_s + PROMISE_S + seconds
        async with asyncio.timeout(DEADLINE_S):
            while not self.answers or self.answers[-1][0] < until_s:  # noqa: ASYNC110 - time has to pass
                await asyncio.sleep(0.02)
        assert loop.time() >= until_s
        return {answer[1:] for answer in self.answers if answer[0] >= change_s + PROMISE_S}


@asynccontextmanager
async def asking(cluster: Cluster, namespace: str, folder: Path) -> AsyncIterator[Asking]:
    """`tokenway serve` with the flags of a deployment of llm-d's, and somebody who asks."""
    port, health, metrics = (free_port() for _ in range(3))
    config = {
        "version": 1,
        "server": {"run_dir": str(folder / "run"), "admin": {"port": 0}, "drain_s": 1},
        "health": {"interval_s": 3600, "unhealthy_threshold": 1000},
    }
    (folder / "tokenway.yaml").write_text(json.dumps(config))
    process = await Subprocess.start(
        [
            *(sys.executable, "-m", "tokenway.cli.main", "serve", str(folder / "tokenway.yaml")),
            *("--pool-name", "llama", "--kubeconfig", str(cluster.kubeconfig())),
            *("--grpc-port", str(port), "--grpc-health-port", str(health), "--metrics-port", str(metrics)),
            "--secure-serving=false",
        ],
        folder / "tokenway.log",
        {"NAMESPACE": namespace},
    )
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await _is_serving(process, channel)
            one = Asking(channel)
            task = asyncio.create_task(one.ask())
            try:
                yield one
                assert not task.done(), task
            finally:
                task.cancel()
                await asyncio.wait([task])
    finally:
        await process.kill()


async def _is_serving(process: Subprocess, channel: grpc.aio.Channel) -> None:
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check", request_serializer=bytes, response_deserializer=bytes
    )
    async with asyncio.timeout(DEADLINE_S):
        while True:
            assert process.is_running, process.log.read_text()
            try:
                if await check(b"", wait_for_ready=True, timeout=5) == b"\x08\x01":
                    return
            except grpc.aio.AioRpcError:
                pass
            await asyncio.sleep(0.05)


async def ready_pods(cluster: Cluster, namespace: str, *numbers: int) -> None:
    """Pods that serve, each at an address of its own, where nobody is: nothing is sent."""
    for number in numbers:
        await cluster.apply(pod(f"p{number}", labels=LABELS, namespace=namespace))
        await cluster.make_ready(f"p{number}", ip=f"127.9.0.{number}", namespace=namespace)


async def test_what_becomes_of_pods_is_obeyed_within_a_second(
    cluster: Cluster, namespace: str, folder: Path
) -> None:
    """Not ready, terminating, deleted, a port removed: requests go to the others, and none is refused."""
    edit = inference_pool("llama", labels=LABELS, ports=[8000, 8001], namespace=namespace)
    await cluster.apply(edit)
    await ready_pods(cluster, namespace, 1, 2, 3)
    loop = asyncio.get_running_loop()
    every = {(0, f"127.9.0.{number}:{port}") for number in (1, 2, 3) for port in (8000, 8001)}

    def at(*numbers: int, ports: tuple[int, ...] = (8000, 8001)) -> set[tuple[int, str]]:
        return {(0, f"127.9.0.{number}:{port}") for number in numbers for port in ports}

    async with asking(cluster, namespace, folder) as one:
        assert await one.since(loop.time(), 1.0) == every
        await cluster.make_ready("p1", ip="127.9.0.1", ready=False, namespace=namespace)
        assert await one.since(loop.time(), 1.0) == at(2, 3)
        await cluster.make_ready("p1", ip="127.9.0.1", namespace=namespace)
        assert await one.since(loop.time(), 1.0) == every
        await cluster.delete_pod("p2", namespace=namespace)
        assert await one.since(loop.time(), 1.0) == at(1, 3)
        await cluster.delete_pod("p3", namespace=namespace, gone=True)
        assert await one.since(loop.time(), 1.0) == at(1)
        await cluster.merge(edit, {"spec": {"targetPorts": [{"number": 8001}]}})
        assert await one.since(loop.time(), 1.0) == at(1, ports=(8001,))
        assert {status for _, status, _ in one.answers} == {0}


async def test_nothing_is_refused_while_the_api_server_is_away(
    cluster: Cluster, namespace: str, folder: Path
) -> None:
    """Nor when it is back; and then what changes counts again."""
    await cluster.apply(inference_pool("llama", labels=LABELS, namespace=namespace))
    await ready_pods(cluster, namespace, 1, 2)
    loop = asyncio.get_running_loop()
    both = {(0, "127.9.0.1:8000"), (0, "127.9.0.2:8000")}
    async with asking(cluster, namespace, folder) as one:
        began_s = loop.time()
        await cluster.stop_apiserver()
        try:
            assert await one.since(loop.time(), 2.0) == both
        finally:
            await cluster.start_apiserver()
        assert await one.since(loop.time(), 2.0) == both
        assert {answer[1:] for answer in one.answers if answer[0] >= began_s} == both
        await cluster.make_ready("p1", ip="127.9.0.1", ready=False, namespace=namespace)
        async with asyncio.timeout(DEADLINE_S):  # the pause before it asks the server again is up to 15 s
            while await one.since(loop.time(), 0.2) != {(0, "127.9.0.2:8000")}:
                pass
        assert {status for _, status, _ in one.answers} == {0}
