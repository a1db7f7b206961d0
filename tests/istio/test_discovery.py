"""Endpoints from a real istiod: each kind of edit, broken files, and istiod killed, restarted and paused."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from testbed.control_planes.record import DEFAULT, HOST, endpoint, service_entry, subsets
from testbed.delta_client import ASSIGNMENTS, CLUSTERS, DeltaStream, delta_stream
from testbed.istiod import Istiod
from testbed.processes import eventually
from tests.e2e.harness import Load, Stack, chat, check, key_of, post, running_stack, sample, simulators
from tokenway.simulator.server.app import SimulatorServer

pytestmark = [pytest.mark.istio, pytest.mark.asyncio(loop_scope="session")]

BROKEN = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: [this is no\n"
MESH_NAME = f"outbound|8000|{{}}|{HOST}"
"""Of a subset's cluster."""

NOTICED_S = 60.0
"""A hung istiod is noticed after 30 s at most; the rest is room for a busy machine."""


def config(istiod: Istiod, **rule: Any) -> dict[str, Any]:
    """One model, served by a service of the mesh."""
    return {
        "version": 1,
        "discovery": {"istio": {"address": istiod.address, "namespace": "tokenway"}},
        "models": {"sim": {"rules": [{"cluster": f"{HOST}:8000", **rule}]}},
        "health": {"interval_s": 1},
    }


def at(engine: SimulatorServer, **fields: Any) -> dict[str, Any]:
    """An endpoint of a ServiceEntry."""
    made: dict[str, Any] = endpoint("127.0.0.1", engine.port, **fields)
    return made


def workload(engine: SimulatorServer, name: str, **labels: str) -> dict[str, Any]:
    """A WorkloadEntry of the service with a selector."""
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "WorkloadEntry",
        "metadata": {"name": name, "namespace": "tokenway"},
        "spec": {
            "address": "127.0.0.1",
            "ports": {"http": engine.port},
            "labels": {"app": "llama", **labels},
        },
    }


def selecting() -> dict[str, Any]:
    """A ServiceEntry whose endpoints are workloads."""
    entry: dict[str, Any] = service_entry()
    del entry["spec"]["endpoints"]
    entry["spec"]["workloadSelector"] = {"labels": {"app": "llama"}}
    return entry


@asynccontextmanager
async def meshed(istiod: Istiod, **rule: Any) -> AsyncIterator[Stack]:
    """A gateway that follows a running istiod, and its Envoy."""
    async with running_stack([], config(istiod, **rule)) as stack:
        yield stack


@asynccontextmanager
async def started(folder: Path, *documents: Mapping[str, Any]) -> AsyncIterator[Istiod]:
    """An istiod with these resources in one file."""
    istiod = Istiod(folder)
    if documents:
        istiod.write("models.yaml", *documents)
    try:
        await istiod.start()
        yield istiod
    finally:
        await istiod.kill()


class Pushes:
    """When istiod last pushed something, by a client of its own that does nothing else.

    Attributes:
        last_s: By the monotonic clock.
        lags_s: How long after the push that came before it each edit was shown.
    """

    def __init__(self) -> None:
        self.last_s = time.monotonic()
        self.lags_s: list[float] = []

    async def follow(self, stream: DeltaStream) -> None:
        """Until cancelled."""
        await stream.subscribe(CLUSTERS)
        await stream.subscribe(ASSIGNMENTS, [DEFAULT, *(MESH_NAME.format(each) for each in ("large", "all"))])
        while True:
            await stream.receive(timeout_s=None)
            self.last_s = time.monotonic()

    def shown(self) -> None:
        """An edit is shown now."""
        self.lags_s.append(time.monotonic() - self.last_s)


@asynccontextmanager
async def edits_in_time(istiod: Istiod) -> AsyncIterator[Pushes]:
    """Edits in this block must show within a second of istiod's push.

    The median counts: a machine may be busy once. What polls every five seconds, or falls behind, is late in
    most of them.
    """
    pushes = Pushes()
    async with delta_stream(istiod.address) as stream:
        following = asyncio.create_task(pushes.follow(stream))
        yield pushes
        assert not following.done(), following
        following.cancel()
        await asyncio.wait([following])
    print("shown after the push, s:", *(f"{lag_s:.3f}" for lag_s in pushes.lags_s))
    assert len(pushes.lags_s) >= 3
    assert statistics.median(pushes.lags_s) < 1.0, pushes.lags_s


async def shown(stack: Stack, what: Any, pushes: Pushes | None = None) -> None:
    """Wait until `/endpoints`, which `tokenway top` shows, has rows of which this is true; print how long."""
    began_s = time.monotonic()
    await eventually(stack.rows, what)
    print(f"shown after {time.monotonic() - began_s:.3f} s")
    if pushes is not None:
        pushes.shown()


def hosts(rows: Mapping[str, Any]) -> set[str]:
    """Addresses in the keys, whatever else is in them."""
    return {key.rpartition("@")[2] for key in rows}


async def reaches_envoy(stack: Stack, *engines: SimulatorServer) -> None:
    """Wait until Envoy has these endpoints of the service."""
    wanted = [f"{DEFAULT}::{key_of(engine)}::" for engine in engines]
    await eventually(stack.envoy_clusters, lambda text: all(one in text for one in wanted))


async def test_edits_of_a_service_entry_show(folder: Path) -> None:
    """A host that a rule named before it was there; endpoints that come and go; weights."""
    async with (
        simulators(2, time_scale=0.001) as (first, second),
        started(folder) as istiod,
        meshed(istiod) as stack,
        edits_in_time(istiod) as pushes,
    ):
        check(await post(stack, chat("sim", "hello")), 503, "cluster_not_listed")
        istiod.write("models.yaml", service_entry(at(first)))
        await shown(stack, lambda rows: hosts(rows) == {key_of(first)}, pushes)
        await reaches_envoy(stack, first)
        assert (await post(stack, chat("sim", "hello"))).status == 200
        istiod.write("models.yaml", service_entry(at(first), at(second)))
        await shown(stack, lambda rows: hosts(rows) == {key_of(first), key_of(second)}, pushes)
        istiod.write("models.yaml", service_entry(at(first, weight=7), at(second)))
        await shown(stack, lambda rows: sorted(row["weight"] for row in rows.values()) == [1, 7], pushes)
        (kept,) = [key for key in await stack.rows() if key.endswith(key_of(second))]
        istiod.write("models.yaml", service_entry(at(second)))
        await shown(stack, lambda rows: list(rows) == [kept], pushes)
        istiod.remove("models.yaml")
        await shown(stack, lambda rows: not rows, pushes)
        check(await post(stack, chat("sim", "hello")), 503, "cluster_not_listed")
        scrape = await stack.metrics()
        assert sample(scrape, 'tokenway_discovery_connected{source="istio"}') == 1
        assert sample(scrape, 'tokenway_discovery_age_seconds{source="istio"}') == 0
        assert sample(scrape, 'tokenway_discovery_rejects_total{source="istio"}') == 0
        assert (await stack.endpoints())["sources"] == {"istio": {"connected": True, "age_s": 0.0}}


async def test_subsets_and_labels_of_workloads_show(folder: Path) -> None:
    """A subset is a label; it follows the labels of workloads, whose identity stays; rules select by it."""
    rule = {"subset": {"subset": "large"}}
    async with simulators(2, time_scale=0.001) as (first, second):
        entries = workload(first, "one", size="large"), workload(second, "two", size="small")
        async with (
            started(folder, selecting(), *entries) as istiod,
            meshed(istiod, **rule) as stack,
            edits_in_time(istiod) as pushes,
        ):
            await shown(stack, lambda rows: hosts(rows) == {key_of(first), key_of(second)})
            keys = set(await stack.rows())
            istiod.write("rule.yaml", subsets(large={"size": "large"}, all={"app": "llama"}))

            def labelled(*of_each: str | None) -> Any:
                def look(rows: Mapping[str, Any]) -> bool:
                    found = {key.rpartition("@")[2]: row["labels"].get("subset") for key, row in rows.items()}
                    return [found.get(key_of(engine)) for engine in (first, second)] == list(of_each)

                return look

            await shown(stack, labelled("all,large", "all"), pushes)
            await reaches_envoy(stack, first, second)
            for _ in range(4):
                assert (await post(stack, chat("sim", "hello"))).status == 200
            await stack.settled()
            served = {key for key, row in (await stack.rows()).items() if row["served_total"]}
            assert {key.rpartition("@")[2] for key in served} == {key_of(first)}
            moved = workload(first, "one", size="small"), workload(second, "two", size="large", version="v2")
            istiod.write("models.yaml", selecting(), *moved)
            await shown(stack, labelled("all", "all,large"), pushes)
            heavy = workload(first, "one", size="small")
            heavy["spec"]["weight"] = 5
            istiod.write("models.yaml", selecting(), heavy, moved[1])
            await shown(stack, lambda rows: sorted(row["weight"] for row in rows.values()) == [1, 5], pushes)
            rows = await stack.rows()
            assert set(rows) == keys, "a label is no identity"
            assert "v2" in {row["labels"].get("version") for row in rows.values()}
            istiod.remove("rule.yaml")
            await shown(stack, labelled(None, None), pushes)


async def test_a_broken_file_changes_nothing(folder: Path) -> None:
    """Istiod says which; the next whole one is taken."""
    async with (
        simulators(2, time_scale=0.001) as (first, second),
        started(folder, service_entry(at(first))) as istiod,
        meshed(istiod) as stack,
    ):
        await shown(stack, lambda rows: hosts(rows) == {key_of(first)})
        logged = len(istiod.log.read_text())
        istiod.write("models.yaml", BROKEN)

        async def log() -> str:
            return istiod.log.read_text()[logged:]

        await eventually(log, lambda text: "models.yaml" in text)
        assert hosts(await stack.rows()) == {key_of(first)}
        istiod.write("models.yaml", service_entry(at(second)))
        await shown(stack, lambda rows: hosts(rows) == {key_of(second)})


async def test_istiod_killed_restarted_and_paused(folder: Path) -> None:
    """Requests go on, nothing flaps, what is cached stays known, the age says how old istiod's word is."""
    async with (
        simulators(3, time_scale=0.001) as engines,
        started(folder, service_entry(*map(at, engines[:2]))) as istiod,
        meshed(istiod) as stack,
    ):
        await reaches_envoy(stack, *engines[:2])

        async def age_s() -> float:
            return sample(await stack.metrics(), 'tokenway_discovery_age_seconds{source="istio"}') or 0.0

        async def updates() -> float | None:
            return sample(await stack.metrics(), 'tokenway_discovery_updates_total{source="istio"}')

        async with Load(stack, "sim", clients=4, stream=True) as load:
            await load.more(40)
            before, reports = await stack.rows(), await updates()
            await istiod.kill()
            await eventually(age_s, lambda age: age > 2, NOTICED_S)
            await load.more(40)
            await istiod.start()
            await eventually(age_s, lambda age: age == 0, NOTICED_S)
            await load.more(40)
            after = await stack.rows()
            assert after.keys() == before.keys()
            assert all(after[key]["cached_blocks"] >= before[key]["cached_blocks"] for key in before)
            assert await updates() == reports, "the same was listed again"
            istiod.pause()
            await eventually(age_s, lambda age: age > 2, NOTICED_S)
            await load.more(40)
            assert (await stack.rows()).keys() == before.keys()
            istiod.write("models.yaml", service_entry(*map(at, engines)))
            istiod.resume()
            await shown(stack, lambda rows: hosts(rows) == set(map(key_of, engines)))
            await eventually(age_s, lambda age: age == 0, NOTICED_S)
            await load.more(40)
        assert load.failures == []
        await stack.settled()


async def test_a_gateway_starts_without_istiod(folder: Path) -> None:
    """After a wait, with what the clusters file lists; what istiod lists comes when it comes."""
    istiod = Istiod(folder)
    async with simulators(1, time_scale=0.001) as (engine,):
        istiod.write("models.yaml", service_entry(at(engine)))
        settings = config(istiod)
        settings["discovery"]["wait_s"] = 0.5
        try:
            async with running_stack([], settings) as stack:
                assert not await stack.rows()
                await istiod.start()
                await shown(stack, lambda rows: hosts(rows) == {key_of(engine)})
                event = "a source of endpoints says nothing yet: starting without it"
                assert [line["source"] for line in stack.gateway_log() if line["event"] == event] == ["istio"]
        finally:
            await istiod.kill()
