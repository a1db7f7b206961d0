"""A whole worker whose endpoints come from Kubernetes: whom its endpoint picker names, and when no more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import yaml

from extproc.server.building import build_worker
from extproc.server.worker import Worker
from testbed.fake_kubernetes import FakeKubernetes
from testbed.processes import free_port
from tests.picking import asked, pick

PODS = "/api/v1/namespaces/models/pods"
POOLS = "/apis/inference.networking.k8s.io/v1/namespaces/models/inferencepools"
DEADLINE_S = 20.0


def pod(number: int, *, ready: bool = True, **metadata: Any) -> dict[str, Any]:
    """A pod of the pool; nobody listens there, and nothing is sent."""
    return {
        "metadata": {"name": f"p{number}", "uid": f"u{number}", "labels": {"app": "llama"}, **metadata},
        "status": {
            "phase": "Running",
            "podIP": f"127.1.0.{number}",
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


POOL = {
    "metadata": {"name": "llama"},
    "spec": {"selector": {"matchLabels": {"app": "llama"}}, "targetPorts": [{"number": 8000}]},
}


class Picker:
    """A worker, asked as a gateway asks it."""

    def __init__(self, worker: Worker, channel: grpc.aio.Channel) -> None:
        self.worker = worker
        self._channel = channel

    async def pick(self, model: str = "base", **request: Any) -> tuple[int, str]:
        """Whom a chat request would be sent to."""
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
        return await pick(self._channel, body, **request)

    async def is_serving(self) -> bool:
        """What its health says: a `HealthCheckResponse` of SERVING is 8, 1."""
        check = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check", request_serializer=bytes, response_deserializer=bytes
        )
        return bool(await check(b"") == b"\x08\x01")

    def asked(self) -> AbstractAsyncContextManager[tuple[int, str]]:
        """A chat request that runs until the block ends."""
        body = {"model": "base", "messages": [{"role": "user", "content": "hello"}]}
        return asked(self._channel, body)

    async def get(self, path: str) -> tuple[int, str]:
        """Whom a request without a body would be sent to."""
        return await pick(self._channel, None, path)

    async def endpoints(self) -> dict[str, Any]:
        """What `tokenway top` shows."""
        url = f"http://127.0.0.1:{self.worker.admin_port}/endpoints"
        async with aiohttp.ClientSession() as session, session.get(url) as reply:
            shown: dict[str, Any] = await reply.json()
            return shown

    async def explained(self) -> dict[str, Any]:
        """The record of the last decision."""
        url = f"http://127.0.0.1:{self.worker.admin_port}/explain?last=1"
        async with aiohttp.ClientSession() as session, session.get(url) as reply:
            shown: Any = await reply.json()
            return dict(shown["records"][0])

    async def until(self, condition: Callable[[dict[str, str]], bool]) -> dict[str, Any]:
        """Wait for states of endpoints, by the last number of their address; what is shown then."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                shown = await self.endpoints()
                states = {
                    row["key"].split("/")[0].split(":")[0].rpartition(".")[2]: row["state"]
                    for row in shown["endpoints"]
                }
                if condition(states):
                    return shown
                await asyncio.sleep(0.02)


@pytest.fixture
async def api() -> AsyncIterator[FakeKubernetes]:
    """A pool of two pods."""
    one = FakeKubernetes()
    await one.start()
    one.put(POOLS, POOL)
    one.put(PODS, pod(1))
    one.put(PODS, pod(2))
    try:
        yield one
    finally:
        await one.stop()


@asynccontextmanager
async def picking(api: FakeKubernetes, tmp_path: Path, wait_s: float = 10.0) -> AsyncIterator[Picker]:
    """A worker that is told of the pool and of nothing else."""
    kubeconfig = {
        "current-context": "x",
        "contexts": [{"name": "x", "context": {"cluster": "x", "namespace": "models"}}],
        "clusters": [{"name": "x", "cluster": {"server": api.url}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    port = free_port()
    config = {
        "version": 1,
        "server": {"run_dir": str(tmp_path / "run"), "admin": {"port": 0}, "drain_s": 1.0},
        "endpoint_picker": {"listen": [f"127.0.0.1:{port}"], "leave_s": 0},
        "discovery": {
            "kubernetes": {"kubeconfig": "kubeconfig", "pool": {"name": "llama"}},
            "wait_s": wait_s,
        },
        "health": {"interval_s": 3600, "unhealthy_threshold": 1000},
    }
    (tmp_path / "tokenway.yaml").write_text(json.dumps(config))
    worker = build_worker(tmp_path / "tokenway.yaml")
    await worker.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Picker(worker, channel)
    finally:
        await worker.stop()


@pytest.fixture
async def picker(api: FakeKubernetes, tmp_path: Path) -> AsyncIterator[Picker]:
    """One that knows its pool."""
    async with picking(api, tmp_path) as one:
        yield one


async def test_a_pool_is_all_that_has_to_be_said(picker: Picker) -> None:
    """Any model, and paths that are no inference, go to its pods; `top` shows where they come from."""
    assert {await picker.pick() for _ in range(8)} == {(0, "127.1.0.1:8000"), (0, "127.1.0.2:8000")}
    assert (await picker.pick("an-adapter"))[0] == 0
    assert (await picker.get("/v1/models"))[0] == 0
    assert (await picker.get("/version"))[0] == 0
    shown = await picker.endpoints()
    assert {row["source"] for row in shown["endpoints"]} == {"kubernetes"}
    assert {row["cluster"] for row in shown["endpoints"]} == {"llama"}
    assert shown["sources"]["kubernetes"]["age_s"] == 0.0


async def test_health_is_not_serving_before_the_pool_is_known(api: FakeKubernetes, tmp_path: Path) -> None:
    """A gateway that starts while the API server is away takes no requests yet; then it does."""
    await api.stop()
    async with picking(api, tmp_path, wait_s=0.2) as picker:
        assert not await picker.is_serving()
        await api.start()
        async with asyncio.timeout(DEADLINE_S):
            while not await picker.is_serving():  # noqa: ASYNC110 - a call
                await asyncio.sleep(0.05)
        assert (await picker.pick())[0] == 0


async def test_a_pod_that_is_not_ready_is_named_no_more(api: FakeKubernetes, picker: Picker) -> None:
    """From the moment that it is known; and again when it is ready."""
    api.put(PODS, pod(1, ready=False))
    await picker.until(lambda states: states["1"] == "not ready")
    assert {await picker.pick() for _ in range(8)} == {(0, "127.1.0.2:8000")}
    api.put(PODS, pod(1))
    await picker.until(lambda states: states["1"] == "healthy")
    async with picker.asked() as first:
        assert {first, await picker.pick()} == {(0, "127.1.0.1:8000"), (0, "127.1.0.2:8000")}


async def test_what_runs_at_a_pod_that_terminates_stays_counted(api: FakeKubernetes, picker: Picker) -> None:
    """It is named no more, its request goes on and is charged until it ends; then it is gone."""
    api.put(PODS, pod(2, ready=False))
    await picker.until(lambda states: states["2"] == "not ready")

    def charged(shown: dict[str, Any]) -> dict[str, int]:
        return {row["state"]: row["requests"] for row in shown["endpoints"]}

    async with picker.asked() as answer:
        assert answer == (0, "127.1.0.1:8000")
        api.put(PODS, pod(1, deletionTimestamp="2026-11-30T12:00:00Z"))
        api.put(PODS, pod(2))
        shown = await picker.until(lambda states: states == {"1": "draining", "2": "healthy"})
        assert charged(shown) == {"draining": 1, "healthy": 0}
        assert {await picker.pick() for _ in range(8)} == {(0, "127.1.0.2:8000")}
        assert charged(await picker.endpoints())["draining"] == 1
    async with asyncio.timeout(DEADLINE_S):
        while charged(await picker.endpoints())["draining"]:  # noqa: ASYNC110 - a page
            await asyncio.sleep(0.02)
    api.delete(PODS, "p1")
    await picker.until(lambda states: "1" not in states)


async def test_a_pool_without_pods_refuses_and_recovers(api: FakeKubernetes, picker: Picker) -> None:
    """503 while there is none; the pool deleted and made anew the same."""
    api.delete(PODS, "p1")
    api.delete(PODS, "p2")
    await picker.until(lambda states: not states)
    assert (await picker.pick())[0] == 503
    assert (await picker.get("/version"))[0] == 503
    api.put(PODS, pod(3))
    await picker.until(lambda states: "3" in states)
    assert await picker.pick() == (0, "127.1.0.3:8000")
    api.delete(POOLS, "llama")
    await picker.until(lambda states: not states)
    assert (await picker.pick())[0] == 503
    api.put(POOLS, POOL)
    await picker.until(lambda states: "3" in states)
    assert (await picker.pick())[0] == 0


async def test_the_api_server_is_away(api: FakeKubernetes, picker: Picker) -> None:
    """Requests go on; `top` shows the age of what is known."""
    await api.stop()
    async with asyncio.timeout(DEADLINE_S):
        while (await picker.endpoints())["sources"]["kubernetes"]["connected"]:  # noqa: ASYNC110 - a page
            await asyncio.sleep(0.02)
    assert {await picker.pick() for _ in range(8)} == {(0, "127.1.0.1:8000"), (0, "127.1.0.2:8000")}
    assert (await picker.endpoints())["sources"]["kubernetes"]["age_s"] > 0
    await api.start()
    api.put(PODS, pod(4))
    await picker.until(lambda states: "4" in states)


async def test_what_the_pool_says_of_requests(api: FakeKubernetes, picker: Picker) -> None:
    """A rewrite changes the model in the body and gives the name back; an objective has its priority."""
    group = "/apis/llm-d.ai/v1alpha2/namespaces/models"
    rule = {"matches": [{"model": {"value": "chat"}}], "targets": [{"modelRewrite": "chat-v2"}]}
    api.put(
        f"{group}/inferencemodelrewrites",
        {"metadata": {"name": "r"}, "spec": {"poolRef": {"name": "llama"}, "rules": [rule]}},
    )
    api.put(
        f"{group}/inferenceobjectives",
        {"metadata": {"name": "batch"}, "spec": {"poolRef": {"name": "llama"}, "priority": -3}},
    )

    async def last(model: str) -> dict[str, Any]:
        await picker.pick(model, headers={"x-llm-d-inference-objective": "batch"})
        return await picker.explained()

    def is_known(record: dict[str, Any]) -> bool:
        return (record["model"], record["standing"]["priority"]) == ("chat-v2", -3)

    async with asyncio.timeout(DEADLINE_S):
        while not is_known(await last("chat")):  # noqa: ASYNC110 - a page
            await asyncio.sleep(0.05)
    assert (await last("other"))["model"] == "other"
    api.delete(f"{group}/inferencemodelrewrites", "r")
    async with asyncio.timeout(DEADLINE_S):
        while (await last("chat"))["model"] != "chat":  # noqa: ASYNC110 - a page
            await asyncio.sleep(0.05)
