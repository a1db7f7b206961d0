"""A worker as the product makes it, in this process: it starts, reloads and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from extproc.config.sections.listening import Transport
from extproc.errors import ConfigError
from extproc.server.building import build_worker
from extproc.server.envoys.cluster_encoder import encode_all_here
from extproc.server.listening.run_dir import socket_path
from extproc.server.parts import StoppedWhileStarting
from extproc.server.supervisor import Supervisor
from extproc.server.worker import Stage, Worker
from extproc.xds.cluster_kinds import ClusterKind

pytestmark = pytest.mark.asyncio


class Installation:
    """A folder with a configuration and the sockets.

    Args:
        folder: Where.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "tokenway.yaml"
        self.run_dir = folder / "run"
        (folder / "clusters.json").write_text(
            json.dumps({"clusters": [{"name": "c", "endpoints": [{"address": "127.0.0.1", "port": 1}]}]})
        )
        self.write()

    def write(self, **sections: Any) -> None:
        """Replace the configuration."""
        server = {"run_dir": str(self.run_dir), "admin": {"port": 0}, **sections.pop("server", {})}
        models = {"m": {"rules": [{"cluster": "c"}]}}
        self.path.write_text(json.dumps({"version": 1, "server": server, "models": models, **sections}))

    def worker(self) -> Worker:
        """One made from it."""
        return build_worker(self.path)

    @property
    def socket(self) -> Path:
        """Of its gRPC server."""
        return socket_path(self.run_dir, 0)


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    """One engine, which is away."""
    return Installation(tmp_path)


async def ask(worker: Worker, target: str) -> tuple[int, Any]:
    """Status and JSON of one page."""
    url = f"http://127.0.0.1:{worker.admin_port}{target}"
    async with aiohttp.ClientSession() as session, session.get(url) as reply:
        return reply.status, await reply.json()


async def test_it_serves_and_leaves_nothing_behind(installation: Installation) -> None:
    """The same folder serves a second one afterwards, and not two at once."""
    for _ in range(2):
        worker = installation.worker()
        await worker.start()
        assert await ask(worker, "/readyz") == (200, {"status": "ready"})
        _, endpoints = await ask(worker, "/endpoints")
        assert [row["key"] for row in endpoints["endpoints"]] == ["127.0.0.1:1"]
        assert installation.socket.is_socket()
        with pytest.raises(ConfigError, match="another gateway runs there"):
            await installation.worker().start()
        assert installation.socket.is_socket()
        await worker.stop()
        assert worker.stage is Stage.STOPPED
        assert not installation.socket.exists()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    assert not [task for task in tasks if not task.done()]


async def test_a_start_that_fails_leaves_nothing_behind(installation: Installation) -> None:
    """The admin port, the last part of all, is taken: sockets and lock are gone when that is said."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        installation.write(server={"admin": {"port": taken.getsockname()[1]}})
        with pytest.raises(OSError, match=r"Address already in use: .127\.0\.0\.1:"):
            await installation.worker().start()
        assert not installation.socket.exists()
    installation.write()
    worker = installation.worker()
    await worker.start()
    await worker.stop()


@pytest.mark.parametrize("transport", list(Transport))
async def test_a_place_that_cannot_be_listened_to(installation: Installation, transport: Transport) -> None:
    """Half of the server is there: its own socket goes again, and so do all parts before it."""
    installation.write(
        server={"transport": transport, "listen": [f"unix:{installation.run_dir}/none/x.sock"]}
    )
    with pytest.raises((OSError, RuntimeError)):
        await installation.worker().start()
    assert not installation.socket.exists()
    installation.write()
    worker = installation.worker()
    await worker.start()
    await worker.stop()


async def test_a_stop_while_it_starts(installation: Installation) -> None:
    """In its first turn, before anything listens."""
    worker = installation.worker()
    starting = asyncio.create_task(worker.start())
    await asyncio.sleep(0)
    await worker.stop()
    with pytest.raises(StoppedWhileStarting):
        await starting
    assert not installation.socket.exists()


async def test_a_reload_says_what_it_does_not_reach(
    installation: Installation, caplog: pytest.LogCaptureFixture
) -> None:
    """What is live is in force two turns of the loop later."""
    worker = installation.worker()
    await worker.start()
    installation.write(load={"lease_s": 77}, logging={"level": "error"})
    caplog.set_level(logging.WARNING, "tokenway.configuration")
    worker.reload()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    said = [record for record in caplog.records if record.msg == "changed settings are not in force yet"]
    assert [record.__dict__["settings"] for record in said] == [["load.lease_s"]]
    assert logging.getLogger("tokenway").level == logging.ERROR
    await worker.stop()


async def test_what_envoy_is_told_is_encoded_off_the_loop_before_a_configuration_is_in_force(
    installation: Installation,
) -> None:
    """A later reading that needs nothing encoded overtakes it, and stays in force."""
    asked: list[tuple[int, bool]] = []
    goes_on, logger = threading.Event(), logging.getLogger("tokenway")

    def encode(kinds: Iterable[ClusterKind]) -> dict[ClusterKind, bytes]:
        wanted = list(kinds)
        asked.append((len(wanted), threading.current_thread() is threading.main_thread()))
        if len(asked) > 1:
            goes_on.wait(10.0)
        return encode_all_here(wanted)

    worker = build_worker(installation.path, encode=encode)
    await worker.start()
    installation.write(away={"max_requests_per_endpoint": 7}, logging={"level": "error"})
    worker.reload()
    while len(asked) < 2:  # noqa: ASYNC110 - another thread asks
        await asyncio.sleep(0.01)
    assert asked == [(2, True), (1, False)], "at the start all, here; then what is new"
    assert logger.level != logging.ERROR
    installation.write(logging={"level": "warning"})
    worker.reload()
    while logger.level != logging.WARNING:  # noqa: ASYNC110 - readings have a least time between them
        await asyncio.sleep(0.01)
    goes_on.set()
    installation.write(away={"max_requests_per_endpoint": 7}, logging={"level": "debug"})
    while logger.level == logging.WARNING:
        await asyncio.sleep(0.01)
        worker.reload()
    assert logger.level == logging.DEBUG, "and never what the one overtaken says"
    await worker.stop()


@pytest.mark.parametrize("transport", list(Transport))
@pytest.mark.parametrize("workers", [1, 2])
async def test_an_address_that_is_taken_is_named(
    installation: Installation, transport: Transport, workers: int
) -> None:
    """Of several workers, too, before any is started: the one that it is for would die again and again."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        installation.write(server={"transport": transport, "listen": [address], "workers": workers})
        gateway = Supervisor(installation.path) if workers > 1 else installation.worker()
        with pytest.raises(OSError, match=address):
            await gateway.start()
        await gateway.stop()
    assert not installation.socket.exists()


async def test_a_supervisor_whose_port_is_taken_starts_no_worker(installation: Installation) -> None:
    """It says so, and its folder is free again."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        installation.write(server={"admin": {"port": taken.getsockname()[1]}, "workers": 2})
        with pytest.raises(OSError, match=r"Address already in use: .127\.0\.0\.1:"):
            await Supervisor(installation.path).start()
    assert not installation.socket.exists()
    installation.write()
    worker = installation.worker()
    await worker.start()
    await worker.stop()
