"""The istiod of the tests: it sends what files say, keeps its state over broken ones, and can be broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from testbed.control_planes.record import DEFAULT, FIRST, HOST, SECOND, SUBSET, service_entry, subsets
from testbed.delta_client import ASSIGNMENTS, CLUSTERS, DeltaStream, assignments, clusters, delta_stream
from testbed.istiod import Istiod, running_istiod
from testbed.processes import eventually

pytestmark = [pytest.mark.istio, pytest.mark.asyncio(loop_scope="session")]

BROKEN = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: [this is no\n"


async def until(stream: DeltaStream, cluster: str, endpoints: list[str]) -> None:
    """Read until a cluster's assignment has these endpoints, in any order."""
    seen: Any = None
    while seen != sorted(endpoints):
        seen = sorted(assignments(await stream.receive(ASSIGNMENTS)).get(cluster, ()))


async def test_a_service_entry_becomes_clusters_and_assignments(folder: Path) -> None:
    """One cluster for the host and one for each subset, whose endpoints come by EDS."""
    async with running_istiod(folder) as istiod, delta_stream(istiod.address) as stream:
        await stream.subscribe(CLUSTERS)
        await stream.receive(CLUSTERS)
        istiod.write("models.yaml", service_entry(FIRST, SECOND), subsets(large={"size": "large"}))
        await istiod.knows(HOST)
        sent: dict[str, Any] = {}
        while not {DEFAULT, SUBSET} <= sent.keys():
            sent |= clusters(await stream.receive(CLUSTERS))
        await stream.subscribe(ASSIGNMENTS, [DEFAULT, SUBSET])
        await until(stream, SUBSET, ["127.0.0.11:8001"])
        istiod.write("models.yaml", service_entry(SECOND))
        await until(stream, DEFAULT, ["127.0.0.12:8002"])
        istiod.remove("models.yaml")
        while DEFAULT not in (await stream.receive(CLUSTERS)).removed_resources:
            pass


async def test_a_broken_file_changes_nothing(folder: Path) -> None:
    """It is logged, and the next whole one is taken."""
    istiod = Istiod(folder)
    istiod.write("models.yaml", service_entry(FIRST))
    try:
        await istiod.start()
        async with delta_stream(istiod.address) as stream:
            await stream.subscribe(ASSIGNMENTS, [DEFAULT])
            await until(stream, DEFAULT, ["127.0.0.11:8001"])
            logged = len(istiod.log.read_text())
            istiod.write("models.yaml", BROKEN)

            async def log() -> str:
                return istiod.log.read_text()[logged:]

            await eventually(log, lambda text: "models.yaml" in text)
            async with delta_stream(istiod.address) as other:
                await other.subscribe(ASSIGNMENTS, [DEFAULT])
                await until(other, DEFAULT, ["127.0.0.11:8001"])
            istiod.write("models.yaml", service_entry(SECOND))
            await until(stream, DEFAULT, ["127.0.0.12:8002"])
    finally:
        await istiod.kill()


async def test_it_comes_back_where_it_was(folder: Path) -> None:
    """Killed and started again, at the same port, with what the files say."""
    istiod = Istiod(folder)
    istiod.write("models.yaml", service_entry(FIRST))
    try:
        await istiod.start()
        address = istiod.address
        await istiod.kill()
        await istiod.start()
        async with delta_stream(address) as stream:
            await stream.subscribe(ASSIGNMENTS, [DEFAULT])
            await until(stream, DEFAULT, ["127.0.0.11:8001"])
            istiod.pause()
            istiod.write("models.yaml", service_entry(SECOND))
            istiod.resume()
            await until(stream, DEFAULT, ["127.0.0.12:8002"])
    finally:
        await istiod.kill()
