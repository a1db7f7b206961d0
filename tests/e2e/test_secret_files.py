"""Certificates of Envoy and Tokenway rotate while requests run: towards clients and between the two."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from testbed.certificates import issued, trusting
from testbed.processes import free_port, get
from tests.e2e.harness import Recorder, Stack, chat, cluster, eventually, recording, running_stack
from tokenway.cli.bootstrap import write_secret_files


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of everything: `ca`, `edge`, `envoy`, `gateway`, `client` of the first CA, `…2` of the second."""
    folder = tmp_path_factory.mktemp("pki")
    for number in ("", "2"):
        issued(folder, f"ca{number}")
        for name in ("edge", "envoy", "gateway", "client"):
            issued(folder, name + number, f"ca{number}", who=f"DNS:{name}.test")
    return folder


class Rotating:
    """The files that the configuration names."""

    def __init__(self, folder: Path, pki: Path) -> None:
        self.folder = folder
        self._pki = pki

    def put(self, name: str, source: str) -> None:
        """`name` has in one step what `source` of the pki has."""
        (self.folder / "new").write_bytes((self._pki / source).read_bytes())
        (self.folder / "new").replace(self.folder / name)

    def put_all(self, number: str = "") -> None:
        """Those of one CA."""
        for name in ("edge", "envoy", "gateway"):
            self.put(f"{name}.key", f"{name}{number}.key")
            self.put(f"{name}.pem", f"{name}{number}.pem")
        self.put("ca.pem", f"ca{number}.pem")

    def pair(self, name: str, **more: str) -> dict[str, str]:
        """Settings of a certificate; `more` names other files."""
        own = {"cert_file": f"{name}.pem", "key_file": f"{name}.key", **more}
        return {key: str(self.folder / file) for key, file in own.items()}


@asynccontextmanager
async def rotating_stack(engine: Recorder, files: Rotating) -> AsyncIterator[Stack]:
    """TLS on both sides of Envoy, mutual."""
    port = free_port()
    gateway = {"addresses": [f"127.0.0.1:{port}"], "server_name": "gateway.test"}
    config: dict[str, Any] = {
        "models": {"m": {"rules": [{"cluster": "c"}]}},
        "away": {"gone": "refuse", "late": "refuse"},
        "server": {
            "listen": [f"127.0.0.1:{port}"],
            "listen_tls": files.pair("gateway", client_ca_file="ca.pem"),
        },
        "edge": {
            "tls": files.pair("edge", client_ca_file="ca.pem"),
            "gateway": {**gateway, **files.pair("envoy", ca_file="ca.pem")},
        },
    }

    def by_files(text: str) -> str:
        document = yaml.safe_load(text)
        write_secret_files(document, files.folder / "sds")
        return str(yaml.safe_dump(document))

    async with running_stack([cluster("c", [engine.key])], config, adapt=by_files) as stack:
        yield stack


def client_of(pki: Path, number: str = "") -> ssl.SSLContext:
    """What a client of this CA shows and believes."""
    context = trusting(pki / f"ca{number}.pem")
    context.load_cert_chain(pki / f"client{number}.pem", pki / f"client{number}.key")
    return context


async def status(stack: Stack, context: ssl.SSLContext) -> int:
    """Of a request on a connection of its own; 0 if there is none."""
    url = f"https://127.0.0.1:{stack.port}/v1/chat/completions"
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, json=chat("m", "hi"), ssl=context, server_hostname="edge.test") as reply,
        ):
            return reply.status
    except (aiohttp.ClientError, ConnectionError):
        return 0


async def test_all_certificates_rotate(pki: Path, tmp_path: Path) -> None:
    """Of the edge, of its clients, of Envoy and of Tokenway: other CA and all; what runs goes on."""
    files = Rotating(tmp_path, pki)
    files.put_all()
    async with recording() as engine, rotating_stack(engine, files) as stack:
        first, second = client_of(pki), client_of(pki, "2")
        url = f"https://127.0.0.1:{stack.port}/v1"
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as opened:

            async def on_the_same_connection() -> int:
                ask = opened.post(
                    f"{url}/chat/completions", json=chat("m", "hi"), ssl=first, server_hostname="edge.test"
                )
                async with ask as reply:
                    await reply.read()
                    return reply.status

            assert await on_the_same_connection() == 200
            assert await status(stack, first) == 200
            assert await status(stack, second) == 0
            files.put_all("2")
            await eventually(lambda: status(stack, second), lambda one: one == 200)
            assert await status(stack, first) == 0
            assert await on_the_same_connection() == 200
        await stack.gateway.kill()
        await stack.start_gateway()  # Envoy connects anew, by its new certificate
        await eventually(lambda: status(stack, second), lambda one: one == 200)


async def test_half_a_pair_changes_nothing(pki: Path, tmp_path: Path) -> None:
    """Envoy goes on by what it had, and counts that it refused."""
    files = Rotating(tmp_path, pki)
    files.put_all()

    async def refused() -> int:
        page = await get(
            f"http://127.0.0.1:{stack.envoy_admin_port}/stats?filter=sds.edge.key_rotation_failed"
        )
        return int(page.decode().split(": ")[1])

    async with recording() as engine, rotating_stack(engine, files) as stack:
        files.put("edge.key", "edge2.key")
        await eventually(refused, bool)
        assert await status(stack, client_of(pki)) == 200
        files.put("edge.pem", "edge2.pem")
        files.put("ca.pem", "ca2.pem")
        await eventually(lambda: status(stack, client_of(pki, "2")), lambda one: one == 200)
