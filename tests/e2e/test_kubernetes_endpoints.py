"""Tokenway's own Envoy before pods that Kubernetes lists: several workers, and a fake of the API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import pytest_asyncio
import yaml

from testbed.fake_kubernetes import FakeKubernetes
from tests.e2e.harness import Load, Stack, chat, eventually, key_of, post, running_stack, simulators
from tokenway.simulator.server.app import SimulatorServer

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PODS = "/api/v1/namespaces/models/pods"
POOLS = "/apis/inference.networking.k8s.io/v1/namespaces/models/inferencepools"
CLUSTERS = ("llama", "model:*")
"""That of the pool, and the one by which Envoy serves any model alone."""

FLAGS = {"healthy": "healthy", "not ready": "/failed_eds_health", "draining": "/eds_status_draining"}
"""How Envoy shows what it was told of an endpoint."""


@dataclass(frozen=True, slots=True)
class Site:
    """A gateway, the fake that it asks, and the engines that are its pods: one address, a port each."""

    stack: Stack
    api: FakeKubernetes
    engines: list[SimulatorServer]

    def put(self, number: int, *, ready: bool = True, terminating: bool = False) -> None:
        """The pod of an engine."""
        metadata: dict[str, Any] = {
            "name": f"p{number}",
            "namespace": "models",
            "uid": f"u{number}",
            "labels": {"app": "sim"},
            "annotations": {"llm-d.ai/active-ports": str(self.engines[number].port)},
        }
        if terminating:
            metadata["deletionTimestamp"] = "2026-11-30T12:00:00Z"
        conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
        status = {"phase": "Running", "podIP": "127.0.0.1", "conditions": conditions}
        self.api.put(PODS, {"metadata": metadata, "status": status})

    async def states(self, *wanted: str) -> None:
        """Wait until the pods are this to every worker, and Envoy has been told so."""

        async def read() -> list[str]:
            rows = (await self.stack.endpoints())["endpoints"]
            by_port = {row["key"].split("/")[0].rpartition(":")[2]: row["state"] for row in rows}
            return [by_port.get(str(engine.port), "gone") for engine in self.engines]

        await eventually(read, lambda found: found == list(wanted))
        known = zip(self.engines, wanted, strict=True)
        flags = {key_of(engine): FLAGS[state] for engine, state in known if state != "gone"}
        for cluster in CLUSTERS:
            await eventually(partial(self.stack.envoy_health, cluster), lambda found: found == flags)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """Two workers and three pods of a pool, and not a word of models."""
    api = FakeKubernetes()
    await api.start()
    try:
        async with simulators(3, time_scale=1.0) as engines:
            ports = [{"number": engine.port} for engine in engines]
            spec = {"selector": {"matchLabels": {"app": "sim"}}, "targetPorts": ports}
            api.put(POOLS, {"metadata": {"name": "llama"}, "spec": spec})
            async with running_stack([], _config(api, tmp_path_factory), workers=2) as stack:
                yield Site(stack, api, engines)
    finally:
        await api.stop()


def _config(api: FakeKubernetes, folders: pytest.TempPathFactory) -> dict[str, Any]:
    kubeconfig = {
        "current-context": "x",
        "contexts": [{"name": "x", "context": {"cluster": "x", "namespace": "models"}}],
        "clusters": [{"name": "x", "cluster": {"server": api.url}}],
    }
    path = folders.mktemp("kube") / "config"
    path.write_text(yaml.safe_dump(kubeconfig))
    return {"discovery": {"kubernetes": {"kubeconfig": str(path), "pool": {"name": "llama"}}}}


async def test_pods_come_and_go_under_load(site: Site) -> None:
    """Not ready, terminating, gone, back: no request fails, and none is left charged."""
    for number in range(3):
        site.put(number)
    await site.states("healthy", "healthy", "healthy")
    async with Load(site.stack, "sim", clients=6, stream=True) as load:
        await load.more(20)
        site.put(0, ready=False)
        await site.states("not ready", "healthy", "healthy")
        await load.more(20)
        site.put(1, terminating=True)
        await site.states("not ready", "draining", "healthy")
        site.put(0)
        await load.more(20)
        site.api.delete(PODS, "p1")
        await site.states("healthy", "gone", "healthy")
        await load.more(20)
        site.put(1)
        await site.states("healthy", "healthy", "healthy")
        await load.more(20)
    assert load.failures == []
    await site.stack.settled()


async def test_the_api_is_away_under_load(site: Site) -> None:
    """And comes back: nothing is noticed."""
    for number in range(3):
        site.put(number)
    await site.states("healthy", "healthy", "healthy")
    async with Load(site.stack, "sim", clients=4, stream=False) as load:
        await site.api.stop()
        await load.more(30)
        await site.api.start()
        await load.more(30)
        await asyncio.wait_for(site.api.watched(2), 60)
    assert load.failures == []
    await site.states("healthy", "healthy", "healthy")


async def test_any_model_is_served_while_tokenway_is_away(site: Site) -> None:
    """A pool without a word of models: Envoy balances over its pods alone."""
    for number in range(3):
        site.put(number)
    await site.states("healthy", "healthy", "healthy")
    site.put(0, ready=False)
    await site.states("not ready", "healthy", "healthy")
    before = [len(engine.served) for engine in site.engines]
    await site.stack.gateway.kill()
    statuses = {(await post(site.stack, chat("sim", f"{turn}: hello"))).status for turn in range(20)}
    assert statuses == {200}
    first, second, third = (
        len(engine.served) - count for engine, count in zip(site.engines, before, strict=True)
    )
    assert first == 0
    assert second > 0
    assert third > 0
