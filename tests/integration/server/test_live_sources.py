"""A worker with a control plane behind it: its start, its pages, a reload that names another service.

The control plane is the fake of `tests/fake_istiod.py`; a real one is in `tests/istio/`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from extproc.server.building import build_worker
from extproc.server.worker import Stage, Worker
from testbed.processes import free_port
from tests.fake_istiod import FakeIstiod
from tests.mesh import HOST, SERVICE

pytestmark = pytest.mark.asyncio

A, B = "127.0.0.11", "127.0.0.12"
QWEN = "outbound|9000||qwen.models.internal"


@pytest.fixture
async def istiod() -> AsyncIterator[FakeIstiod]:
    """A fake one with two services."""
    fake = FakeIstiod()
    await fake.start()
    fake.set(SERVICE, A)
    fake.set(QWEN, B)
    yield fake
    await fake.stop()


def write(folder: Path, port: int, *names: str, **discovery: Any) -> Path:
    """A configuration whose models are served by these clusters."""
    path = folder / "tokenway.yaml"
    document = {
        "version": 1,
        "server": {"run_dir": str(folder / "run"), "admin": {"port": 0}},
        "discovery": {"istio": {"address": f"127.0.0.1:{port}"}, **discovery},
        "models": {f"m{i}": {"rules": [{"cluster": name}]} for i, name in enumerate(names)},
    }
    new = path.with_suffix(".new")
    new.write_text(json.dumps(document))
    new.replace(path)
    return path


@asynccontextmanager
async def running(path: Path) -> AsyncIterator[Worker]:
    """A worker that serves."""
    worker = build_worker(path)
    try:
        await worker.start()
        assert worker.stage is Stage.SERVING
        yield worker
    finally:
        await worker.stop()


async def page(worker: Worker) -> dict[str, Any]:
    """`/endpoints`."""
    url = f"http://127.0.0.1:{worker.admin_port}/endpoints"
    async with aiohttp.ClientSession() as session, session.get(url) as reply:
        found: dict[str, Any] = await reply.json()
        return found


async def until(read: Callable[[], Awaitable[bool]]) -> None:
    """Wait for it."""
    async with asyncio.timeout(30):
        while not await read():  # noqa: ASYNC110 - a page announces nothing
            await asyncio.sleep(0.02)


def places(shown: dict[str, Any]) -> set[tuple[str, str, str]]:
    """Cluster, key and source of each row."""
    return {(row["cluster"], row["key"], row["source"]) for row in shown["endpoints"]}


async def test_a_worker_starts_with_what_its_control_plane_lists(istiod: FakeIstiod, tmp_path: Path) -> None:
    """No clusters file is needed, and no request comes before the first state; rules write `host:port`."""
    async with running(write(tmp_path, istiod.port, f"{HOST}:8000")) as worker:
        shown = await page(worker)
        assert places(shown) == {(SERVICE, f"{A}:8000", "istio")}
        assert shown["sources"] == {"istio": {"connected": True, "age_s": 0.0}}
        assert shown["clusters_not_listed"] == []


async def test_both_sources_feed_one_fleet(istiod: FakeIstiod, tmp_path: Path) -> None:
    """A clusters file that is named is read beside it; what both list at one address is one endpoint."""
    path = write(tmp_path, istiod.port, SERVICE, "files")
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "clusters_file": "clusters.json"}))
    clusters = [
        {"name": "files", "endpoints": [{"address": B, "port": 1}]},
        {"name": SERVICE, "endpoints": [{"address": A, "port": 8000}, {"address": B, "port": 8000}]},
    ]
    (tmp_path / "clusters.json").write_text(json.dumps({"clusters": clusters}))
    async with running(path) as worker:
        assert places(await page(worker)) == {
            ("files", f"{B}:1", "files"),
            (SERVICE, f"{A}:8000", "files"),
            (SERVICE, f"{B}:8000", "files"),
        }


async def test_a_reload_that_names_another_service_has_it_asked_for(
    istiod: FakeIstiod, tmp_path: Path
) -> None:
    """And one that no rule names any more goes; what stays does not flap."""
    path = write(tmp_path, istiod.port, SERVICE)
    async with running(path) as worker:
        write(tmp_path, istiod.port, SERVICE, QWEN)
        worker.reload()

        async def has_both() -> bool:
            found = places(await page(worker))
            assert (SERVICE, f"{A}:8000", "istio") in found
            return (QWEN, f"{B}:8000", "istio") in found

        await until(has_both)
        write(tmp_path, istiod.port, QWEN)
        worker.reload()

        async def has_one() -> bool:
            return places(await page(worker)) == {(QWEN, f"{B}:8000", "istio")}

        await until(has_one)


async def test_a_start_waits_no_longer_than_the_setting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It serves without, says so, and shows how old its knowledge is."""
    async with running(write(tmp_path, free_port(), SERVICE, wait_s=0.2)) as worker:
        shown = await page(worker)
        assert places(shown) == set()
        assert shown["clusters_not_listed"] == [SERVICE]
        assert not shown["sources"]["istio"]["connected"]
        assert shown["sources"]["istio"]["age_s"] >= 0.2
    assert "a source of endpoints says nothing yet: starting without it" in caplog.messages
