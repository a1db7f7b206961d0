"""TLS to engines as it changes: certificates rotate, files break and are repaired, clear text and back."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from testbed.certificates import expired, issued
from testbed.processes import free_port
from tests.e2e.harness import (
    FAST_HEALTH,
    Stack,
    answer_chat,
    chat,
    cluster,
    eventually,
    post,
    running_stack,
    sample,
)

CONFIG_SUCCESS = 'tokenway_config_last_reload_successful{file="tokenway.yaml"}'
MODELS = {"m": {"rules": [{"cluster": "c"}]}}


class Engine:
    """An engine at one port, which may speak TLS and ask for certificates of clients.

    Attributes:
        served: Inference requests.
        probed: Requests to `/health`.
    """

    def __init__(self, pki: Path) -> None:
        self.port = free_port()
        self.served = 0
        self.probed = 0
        self._pki = pki
        self._runner: web.AppRunner | None = None

    async def serve(self, certificate: str | None, clients: str | None = None) -> None:
        """Serve by this certificate from now on, clear text without; `clients` signs those of clients."""
        await self.stop()
        context = None
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._pki / f"{certificate}.pem", self._pki / f"{certificate}.key")
            if clients is not None:
                context.load_verify_locations(self._pki / f"{clients}.pem")
                context.verify_mode = ssl.CERT_REQUIRED
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=context).start()

    async def stop(self) -> None:
        """Close."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/health":
            self.probed += 1
            return web.Response()
        if request.path != "/v1/chat/completions":
            return web.Response(status=404)
        self.served += 1
        return await answer_chat(request)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two CAs with an engine and a client each: `ca`, `engine`, `client`, and `ca2`, `engine2`, `client2`."""
    folder = tmp_path_factory.mktemp("pki")
    for number in ("", "2"):
        issued(folder, f"ca{number}")
        issued(folder, f"engine{number}", f"ca{number}", who="DNS:engine.test")
        issued(folder, f"client{number}", f"ca{number}", who="DNS:gateway.test")
    expired(folder, "late", "ca", who="DNS:engine.test")
    return folder


class Certificates:
    """The files that a configuration names, put in place in one step each."""

    def __init__(self, folder: Path, pki: Path) -> None:
        self._folder = folder
        self._pki = pki

    def put(self, name: str, source: str | bytes) -> None:
        """`name` has what `source` of the pki has, or these bytes."""
        content = source if isinstance(source, bytes) else (self._pki / source).read_bytes()
        (self._folder / "new").write_bytes(content)
        (self._folder / "new").replace(self._folder / name)

    def put_all(self, number: str = "") -> None:
        """Those of one CA."""
        self.put("ca.pem", f"ca{number}.pem")
        self.put("own.pem", f"client{number}.pem")
        self.put("own.key", f"client{number}.key")

    def remove(self, name: str) -> None:
        """It is gone."""
        (self._folder / name).unlink()

    def tls(self, **more: str) -> dict[str, Any]:
        """`engine_tls` by these files."""
        files = {"ca_file": "ca.pem", "cert_file": "own.pem", "key_file": "own.key"}
        named = {key: str(self._folder / name) for key, name in files.items()}
        return {"c": {**named, "server_name": "engine.test", **more}}


@pytest_asyncio.fixture(loop_scope="session")
async def engine(pki: Path) -> AsyncIterator[Engine]:
    """Not serving yet."""
    made = Engine(pki)
    yield made
    await made.stop()


@pytest.fixture
def files(tmp_path: Path, pki: Path) -> Certificates:
    """Those of the first CA."""
    made = Certificates(tmp_path, pki)
    made.put_all()
    return made


@asynccontextmanager
async def stack_of(engine: Engine, tls: dict[str, Any] | None, workers: int = 1) -> AsyncIterator[Stack]:
    """A gateway whose engine is reached so."""
    config = config_of(tls)
    places = [cluster("c", [f"127.0.0.1:{engine.port}"])]
    async with running_stack(places, config, workers=workers) as stack:
        yield stack


def config_of(tls: dict[str, Any] | None) -> dict[str, Any]:
    """The configuration with this `engine_tls`."""
    return {"models": MODELS, "health": FAST_HEALTH, "engine_tls": tls or {}}


async def status(stack: Stack) -> int:
    """Of one request."""
    answer = await post(stack, chat("m", "hi"))
    return int(answer.status)


async def answered(stack: Stack) -> None:
    """Wait until a request is answered."""
    await eventually(lambda: status(stack), lambda one: one == 200)


async def success(stack: Stack) -> float | None:
    """Of the last reload."""
    return sample(await stack.metrics(), CONFIG_SUCCESS)


def refusals(stack: Stack) -> list[str]:
    """Why configurations were refused, by the log."""
    return [one["problem"] for one in stack.gateway_log() if one["event"] == "configuration refused"]


@pytest.mark.parametrize("workers", [1, 2])
async def test_certificates_rotate_with_their_files(
    engine: Engine, files: Certificates, workers: int
) -> None:
    """CA, certificate and key are replaced and the engine knows only the new ones: no reload, no restart."""
    await engine.serve("engine", clients="ca")
    async with stack_of(engine, files.tls(), workers) as stack:
        await answered(stack)
        files.put_all("2")
        await engine.serve("engine2", clients="ca2")
        probed = engine.probed
        await answered(stack)

        async def is_probed() -> bool:
            return engine.probed > probed + 2

        await eventually(is_probed, bool)
        await stack.gateway.kill()
        assert await status(stack) == 200


DAMAGES: dict[str, Callable[[Certificates], None]] = {
    "no PEM": lambda files: files.put("ca.pem", b"none\n"),
    "empty": lambda files: files.put("ca.pem", b""),
    "gone": lambda files: files.remove("ca.pem"),
    "another key": lambda files: files.put("own.key", "client2.key"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
async def test_files_that_break_change_nothing(
    engine: Engine, files: Certificates, damage: Callable[[Certificates], None]
) -> None:
    """Requests and probes go on by those that were good, the log and a metric say so, until repaired."""
    await engine.serve("engine", clients="ca")
    async with stack_of(engine, files.tls()) as stack:
        await answered(stack)
        damage(files)
        await eventually(lambda: success(stack), lambda value: value == 0)
        assert await status(stack) == 200
        (problem,) = [
            one["problem"] for one in stack.gateway_log() if one["event"] == "configuration refused"
        ]
        assert "engine_tls.c." in problem
        rows = await stack.rows()
        assert all(row["state"] == "healthy" for row in rows.values())
        assert sample(await stack.metrics(), "tokenway_ads_nacks_total") in (0, None)
        files.put_all()
        await eventually(lambda: success(stack), lambda value: value == 1)
        assert await status(stack) == 200


async def test_from_clear_text_to_tls_and_back(engine: Engine, files: Certificates) -> None:
    """By reload alone; a CA that Envoy cannot read leaves clear text in force, and says so."""
    await engine.serve(None)
    async with stack_of(engine, None) as stack:
        await answered(stack)
        stack.write_config(config_of(files.tls(ca_file="/nowhere/ca.pem")))
        await eventually(lambda: success(stack), lambda value: value == 0)
        assert await status(stack) == 200
        (problem,) = refusals(stack)
        assert "Envoy refuses the cluster `c`" in problem
        assert "/nowhere/ca.pem" in problem
        assert sample(await stack.metrics(), "tokenway_ads_kept_clusters") == 0
        stack.write_config(config_of(files.tls()))
        await eventually(lambda: success(stack), lambda value: value == 1)
        await engine.serve("engine", clients="ca")
        await answered(stack)
        stack.write_config(config_of(None))
        await engine.serve(None)
        await answered(stack)


@pytest.mark.parametrize(
    ("certificate", "name", "words"),
    [
        ("engine2", "engine.test", "unable_to_get_local_issuer"),
        ("engine", "another.test", "SAN_matcher"),
        ("late", "engine.test", "certificate_has_expired"),
    ],
)
async def test_an_engine_that_shows_another_certificate_is_not_spoken_to(
    engine: Engine, files: Certificates, certificate: str, name: str, words: str
) -> None:
    """Of another CA, for another name, out of date: 503 for clients, and why in the log of the request."""
    await engine.serve(certificate)
    async with stack_of(engine, files.tls(server_name=name)) as stack:
        reply = await post(stack, chat("m", "hi"))
        assert reply.status == 503
        assert reply.headers["retry-after"] == "1"

        async def details() -> list[str]:
            return [one["details"] for one in stack.gateway_log() if one["event"] == "request ended"]

        (said,) = await eventually(details, bool)
        assert "CERTIFICATE_VERIFY_FAILED" in said
        assert words in said
        (row,) = (await stack.rows()).values()
        assert row["state"] == "ejected"
        assert engine.served == engine.probed == 0
