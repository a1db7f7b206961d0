"""Envoy as an edge: bounds of what clients may send and keep open, TLS on every side, CORS, request ids."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from extproc.config.schema import Config
from testbed.certificates import trusting
from testbed.processes import free_port, get
from tests.e2e.harness import (
    FAST_HEALTH,
    Recorder,
    Stack,
    answer_chat,
    chat,
    check,
    check_for_any_api,
    cluster,
    envoy_binary,
    eventually,
    exchange,
    post,
    recording,
    running_stack,
    sample,
    send,
)
from tokenway.cli.bootstrap import rendered

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

MODELS = {"m": {"rules": [{"cluster": "c"}]}}
UPLOAD_S = 1.0
ORIGIN = "https://chat.example.com"
EDGE: dict[str, Any] = {
    "headers_timeout_s": 1.0,
    "upload_timeout_s": UPLOAD_S,
    "max_connection_s": 1.0,
    "trusted_hops": 1,
    "keep_request_id": True,
    "max_connections": 20,
    "cors": {"origins": [ORIGIN]},
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine() -> AsyncIterator[Recorder]:
    """Behind everything here."""
    async with recording() as recorder:
        yield recorder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def edge(engine: Recorder) -> AsyncIterator[Stack]:
    """A stack with tight bounds."""
    async with running_stack([cluster("c", [engine.key])], {"models": MODELS, "edge": EDGE}) as stack:
        yield stack


@pytest.fixture(autouse=True)
def _clean(engine: Recorder) -> None:
    engine.reset()


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"


async def _closed_after(port: int, *parts: bytes, pause_s: float) -> tuple[float, bytes]:
    """Seconds until Envoy ends the connection on which parts are sent with pauses, and what it said."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started_s = time.monotonic()

    async def write() -> None:
        with suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause_s)

    writing = asyncio.create_task(write())
    said = b""
    async with asyncio.timeout(20):
        with suppress(ConnectionError):  # it goes on writing, so the end may be a reset
            while part := await reader.read(65_536):
                said += part
    writing.cancel()
    writer.close()
    return time.monotonic() - started_s, said


async def test_half_headers_end(edge: Stack) -> None:
    """A client that sends its headers byte by byte is cut off, however busy it keeps the line."""
    took_s, said = await _closed_after(edge.port, HEAD, *([b"x-a: b\r\n"] * 100), pause_s=0.2)
    assert took_s < 10
    assert b" 200 " not in said


async def test_headers_that_never_end_are_told_so_in_words_for_any_api(edge: Stack) -> None:
    """Envoy reads the path with the last of the headers; until then it cannot know whose client this is."""
    check_for_any_api(await exchange(edge.port, HEAD), 408, "request_timeout")


@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/v1/messages"])
async def test_a_slow_upload_ends(edge: Stack, engine: Recorder, path: bytes) -> None:
    """A body that trickles in is given up as a whole, not byte by byte, in the words of its API."""
    head = HEAD.replace(b"/v1/chat/completions", path) + b"content-length: 100000\r\n\r\n"
    took_s, said = await _closed_after(edge.port, head, *([b" " * 10] * 100), pause_s=0.1)
    assert UPLOAD_S * 0.9 <= took_s < 10
    assert said.startswith(b"HTTP/1.1 408")
    assert b"The request did not arrive in time." in said
    assert (b"request_timeout" in said) == (path != b"/v1/messages")
    assert engine.received == []

    async def counted() -> bool:
        scrape = await edge.metrics()
        series = 'tokenway_requests_total{model="other",outcome="rejected",status_class="4xx"}'
        refused = sample(scrape, 'tokenway_rejections_total{reason="body_timeout"}') or 0
        return 0 < refused <= (sample(scrape, series) or 0)

    await eventually(counted, bool)


async def test_a_long_wait_for_the_answer_is_no_slow_upload(edge: Stack, engine: Recorder) -> None:
    """The bound on uploads ends with the upload: an inference may take its time."""

    async def late(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(UPLOAD_S * 2.5)
        return await answer_chat(request)

    engine.behaviour = late
    assert (await post(edge, chat("m", "hi"))).status == 200


async def test_a_long_stream_outlives_its_connection(edge: Stack, engine: Recorder) -> None:
    """A connection that has reached its age is drained: what runs on it runs to its end."""

    async def long(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for number in range(15):
            await response.write(b'data: {"n": %d}\n\n' % number)
            await asyncio.sleep(0.2)
        await response.write(b"data: [DONE]\n\n")
        return response

    engine.behaviour = long
    reply = await post(edge, chat("m", "hi", stream=True))
    assert reply.status == 200
    assert reply.body.endswith(b"data: [DONE]\n\n")
    assert reply.body.count(b"data:") == 16


@pytest.mark.parametrize("name", ["x_data_parallel_rank", "X_Data-Parallel-Rank", "x_tokenway_owner", "a_b"])
async def test_underscores_are_refused(edge: Stack, engine: Recorder, name: str) -> None:
    """Some servers read `x_a` as `x-a`: no such name gets in."""
    assert (await post(edge, chat("m", "hi"), {name: "1"})).status == 400
    assert engine.received == []


async def test_headers_are_bounded(edge: Stack, engine: Recorder) -> None:
    """In number and in size."""
    assert (await post(edge, chat("m", "hi"), {f"x-{n}": "1" for n in range(120)})).status == 431
    assert (await post(edge, chat("m", "hi"), {"x-a": "1" * 70_000})).status == 431
    assert engine.received == []


async def test_headers_that_leave_no_room_for_ours(edge: Stack, engine: Recorder) -> None:
    """As many as Envoy takes: what it cannot add Tokenway's to is refused in the API's shape."""
    many = {f"x-{n}": "1" for n in range(92)}
    check(await post(edge, chat("m", "hi"), many), 431, "invalid_request")
    reply = await send(edge, "POST", "/v1/messages", chat("m", "hi"), many)
    assert (reply.status, reply.json["type"]) == (431, "error")
    assert reply.json["error"]["type"] == "invalid_request_error"
    assert engine.received == []
    await edge.settled()
    outcome = (await edge.last(1))[0]["outcome"]
    assert (outcome["ended"], outcome["status"]) == ("rejected", 431)


async def test_connections_are_bounded(edge: Stack) -> None:
    """One connection too many is closed at once; when others leave there is room again."""
    limit = EDGE["max_connections"]
    opened = [await asyncio.open_connection("127.0.0.1", edge.port) for _ in range(limit + 10)]
    ended = [asyncio.create_task(reader.read(1)) for reader, _ in opened]
    done, _ = await asyncio.wait(ended, timeout=0.5)
    assert len(done) >= 10
    for _, writer in opened:
        writer.close()

    async def status() -> int:
        try:
            return (await post(edge, chat("m", "hi"))).status
        except aiohttp.ClientError:
            return 0

    await eventually(status, lambda code: code == 200)
    await asyncio.gather(*ended, return_exceptions=True)


async def test_memory_is_bounded(engine: Recorder) -> None:
    """Uploads that together exceed the heap are refused or reset; all are served again after them."""
    config = {"models": MODELS, "edge": {"max_heap_bytes": 96 << 20}}
    async with running_stack([cluster("c", [engine.key])], config) as stack:
        head = HEAD + b"content-length: 30000000\r\n\r\n"
        opened = []
        for _ in range(12):
            reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
            writer.write(head + b"x" * 15_000_000)
            opened.append((reader, writer))

        async def pressed() -> bytes:
            return await get(f"http://127.0.0.1:{stack.envoy_admin_port}/stats?filter=overload.*active")

        active = "overload.envoy.overload_actions.reset_high_memory_stream.active"
        stops = "overload.envoy.overload_actions.stop_accepting_requests.active: 1"
        await eventually(pressed, lambda text: stops in text.decode() or f"{active}: 1" in text.decode(), 20)
        for _, writer in opened:
            writer.close()

        async def status() -> int:
            return (await post(stack, chat("m", "hi"))).status

        await eventually(status, lambda code: code == 200, 20)


async def test_http2_streams_are_bounded(edge: Stack) -> None:
    """Envoy announces 100 streams and small windows to HTTP/2 clients."""
    dump = json.loads(await get(f"http://127.0.0.1:{edge.envoy_admin_port}/config_dump"))
    assert '"max_concurrent_streams": 100' in json.dumps(dump)
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
    async with asyncio.timeout(10):
        size = int.from_bytes((await reader.readexactly(9))[:3], "big")
        settings = await reader.readexactly(size)
    writer.close()
    pairs = [settings[at : at + 6] for at in range(0, size, 6)]
    values = {int.from_bytes(pair[:2], "big"): int.from_bytes(pair[2:], "big") for pair in pairs}
    assert values[3] == 100  # SETTINGS_MAX_CONCURRENT_STREAMS


@pytest.mark.parametrize(
    "path", ["/quitquitquit", "/healthcheck/fail", "/logging?level=trace", "/drain_listeners", "/"]
)
async def test_envoys_admin_port_only_reads(edge: Stack, path: str) -> None:
    """A page in an operator's browser can post to loopback, and changes nothing."""
    url = f"http://127.0.0.1:{edge.envoy_admin_port}{path}"
    async with aiohttp.ClientSession() as session, session.post(url, headers={"origin": "http://e"}) as reply:
        assert reply.status == 403
    assert (await post(edge, chat("m", "hi"))).status == 200


async def test_the_client_address_of_a_trusted_proxy(edge: Stack, engine: Recorder) -> None:
    """With one trusted hop the last entry is the client's; more cannot be claimed."""
    assert (await post(edge, chat("m", "hi"), {"x-forwarded-for": "6.6.6.6, 7.7.7.7"})).status == 200
    (received,) = engine.received
    assert received.headers["x-envoy-external-address"] == "7.7.7.7"


async def test_a_clients_request_id_is_kept_where_asked(edge: Stack, engine: Recorder) -> None:
    """With `keep_request_id` engine and client see the client's own id; ours is beside it."""
    reply = await post(edge, chat("m", "hi"), {"x-request-id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1"
    (received,) = engine.received
    assert received.headers["x-request-id"] == "mine-1"
    assert received.headers["x-tokenway-request-id"] != "mine-1"


PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}


async def test_cors_preflight(edge: Stack, engine: Recorder) -> None:
    """A page of a listed origin may call, and gets the headers that say so; another is not."""
    reply = await send(edge, "OPTIONS", "/v1/chat/completions", None, {"origin": ORIGIN, **PREFLIGHT})
    assert reply.status == 200
    assert reply.headers["access-control-allow-origin"] == ORIGIN
    assert {"GET", "POST", "DELETE"} <= set(reply.headers["access-control-allow-methods"].split(", "))
    assert "authorization" in reply.headers["access-control-allow-headers"]
    other = await send(edge, "OPTIONS", "/v1/chat/completions", None, {"origin": f"{ORIGIN}.e", **PREFLIGHT})
    assert "access-control-allow-origin" not in other.headers
    assert engine.received == []


async def test_cors_of_answers_and_refusals(edge: Stack) -> None:
    """The page can read answers, and our refusals too."""
    answer = await post(edge, chat("m", "hi"), {"origin": ORIGIN})
    refusal = await post(edge, chat("unknown", "hi"), {"origin": ORIGIN})
    assert (answer.status, refusal.status) == (200, 404)
    for reply in (answer, refusal):
        assert reply.headers["access-control-allow-origin"] == ORIGIN
        assert "x-request-id" in reply.headers["access-control-expose-headers"]
    other = await post(edge, chat("m", "hi"), {"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


async def test_without_the_settings(engine: Recorder) -> None:
    """By default no preflight is answered, no forwarded address believed, and the request id is ours."""
    async with running_stack([cluster("c", [engine.key])], {"models": MODELS}) as stack:
        preflight = await send(
            stack, "OPTIONS", "/v1/chat/completions", None, {"origin": ORIGIN, **PREFLIGHT}
        )
        assert (preflight.status, "access-control-allow-origin" in preflight.headers) == (405, False)
        sent = {"x-request-id": "mine-1", "x-forwarded-for": "6.6.6.6", "x-envoy-external-address": "6.6.6.6"}
        reply = await post(stack, chat("m", "hi"), sent)
        assert reply.headers["x-request-id"] != "mine-1"
        (received,) = engine.received
        assert received.headers["x-envoy-external-address"] != "6.6.6.6"
        assert received.headers["x-request-id"] != "mine-1"


def _openssl(folder: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two CAs (ca, stranger) and certificates: server and client of ca, outsider of stranger."""
    folder = tmp_path_factory.mktemp("pki")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for authority in ("ca", "stranger"):
        _openssl(
            folder, "req", "-x509", *curve, "-keyout", f"{authority}.key", "-out", f"{authority}.pem",
            "-days", "2", "-subj", f"/CN={authority}",
        )  # fmt: skip
    for name, authority in (("server", "ca"), ("client", "ca"), ("outsider", "stranger")):
        (folder / "names").write_text(f"subjectAltName=DNS:{name}.test\n")
        _openssl(
            folder, "req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}"
        )
        _openssl(
            folder, "x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}.pem", "-CAkey",
            f"{authority}.key", "-CAcreateserial", "-out", f"{name}.pem", "-days", "2", "-extfile", "names",
        )  # fmt: skip
    return folder


def _files(pki: Path, name: str, **more: str) -> dict[str, str]:
    return {"cert_file": str(pki / f"{name}.pem"), "key_file": str(pki / f"{name}.key"), **more}


async def test_every_setting_at_once_is_a_bootstrap_that_envoy_takes(pki: Path, tmp_path: Path) -> None:
    """Envoy's own check of what `tokenway bootstrap` prints with all of `edge` and `away` given."""
    ca = str(pki / "ca.pem")
    gateway = {"addresses": ["[::1]:9"], **_files(pki, "client", ca_file=ca, server_name="server.test")}
    tls = _files(pki, "server", client_ca_file=ca)
    config = Config.model_validate(
        {
            "away": {"gone": "refuse", "late": "refuse", "after_s": 1.25},
            "edge": {
                **EDGE,
                "cors": {"origins": ["*"]},
                "tls": tls,
                "gateway": gateway,
                "admin_paths": ["/x"],
            },
            "request": {"allow_fields": ["priority"], "max_body_bytes": 4096},
        }
    )
    path = tmp_path / "envoy.yaml"
    path.write_text(rendered(config, "[::1]:1", 1))
    checking = await asyncio.create_subprocess_exec(
        envoy_binary(), "--mode", "validate", "-c", path, stderr=asyncio.subprocess.PIPE
    )
    _, said = await checking.communicate()
    assert checking.returncode == 0, said[-2000:].decode()


async def test_mutual_tls_between_envoy_and_tokenway(engine: Recorder, pki: Path) -> None:
    """Envoy reaches Tokenway by TCP with its certificate; no client gets there without one of the CA."""
    port = free_port()
    ca = str(pki / "ca.pem")
    config = {
        "models": MODELS,
        "away": {"gone": "refuse", "late": "refuse"},
        "server": {"listen": [f"0.0.0.0:{port}"], "listen_tls": _files(pki, "server", client_ca_file=ca)},
        "edge": {
            "gateway": {
                "addresses": [f"127.0.0.1:{port}"],
                **_files(pki, "client", ca_file=ca, server_name="server.test"),
            }
        },
    }
    async with running_stack([cluster("c", [engine.key])], config) as stack:
        assert (await post(stack, chat("m", "hi"))).status == 200

        async def ended() -> object:
            return ((await stack.last(1))[0]["outcome"] or {}).get("ended")

        await eventually(ended, lambda how: how == "completed")  # the access log comes by the same way

        async def refused(context: ssl.SSLContext | None) -> bool:
            try:
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", port, ssl=context, server_hostname="server.test" if context else None
                )
                try:
                    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
                    async with asyncio.timeout(10):
                        return await reader.read(1) == b""
                finally:
                    writer.close()
                    with suppress(OSError):
                        await writer.wait_closed()
            except (OSError, TimeoutError):
                return True

        for name, is_refused in ((None, True), ("", True), ("outsider", True), ("client", False)):
            context = None
            if name is not None:
                context = trusting(pki / "ca.pem")
                context.set_alpn_protocols(["h2"])
                if name:
                    context.load_cert_chain(pki / f"{name}.pem", pki / f"{name}.key")
            assert await refused(context) is is_refused, name


async def test_tls_for_clients(engine: Recorder, pki: Path) -> None:
    """Clients speak TLS; where a CA is named only those with a certificate of it."""
    ca = str(pki / "ca.pem")
    tls = _files(pki, "server", client_ca_file=ca)
    config = {"models": MODELS, "edge": {"tls": tls, "headers_timeout_s": 1.0}}
    async with running_stack([cluster("c", [engine.key])], config) as stack:
        url = f"https://127.0.0.1:{stack.port}/v1/chat/completions"

        async def status(name: str | None) -> int:
            context = trusting(pki / "ca.pem")
            if name is not None:
                context.load_cert_chain(pki / f"{name}.pem", pki / f"{name}.key")
            try:
                async with (
                    aiohttp.ClientSession() as session,
                    session.post(
                        url, json=chat("m", "hi"), ssl=context, server_hostname="server.test"
                    ) as reply,
                ):
                    return reply.status
            except aiohttp.ClientError:
                return 0

        assert await status("client") == 200
        assert await status(None) == 0
        assert await status("outsider") == 0
        hello = ssl.MemoryBIO()
        shaking = trusting(pki / "ca.pem").wrap_bio(ssl.MemoryBIO(), hello, server_hostname="server.test")
        with suppress(ssl.SSLWantReadError):
            shaking.do_handshake()
        said = hello.read()
        for part in (b"", said[: len(said) // 2], said):  # each would be open for `idle_timeout_s`
            await _closed_after(stack.port, part, pause_s=60)
        with pytest.raises((aiohttp.ClientError, AssertionError, asyncio.IncompleteReadError)):
            await exchange(stack.port, HEAD + b"content-length: 2\r\n\r\n{}")


async def test_tls_to_engines(pki: Path) -> None:
    """Envoy and the probes check the engine's certificate; an engine of another CA is not spoken to."""
    served: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        served.append(request.path)
        return web.Response(status=404) if request.path == "/metrics" else await answer_chat(request)

    async def start(name: str) -> tuple[web.AppRunner, str]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(pki / f"{name}.pem", pki / f"{name}.key")
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        return runner, f"127.0.0.1:{runner.addresses[0][1]}"

    good, bad = await start("server"), await start("outsider")
    try:
        config = {
            "models": {name: {"rules": [{"cluster": name}]} for name in ("good", "bad")},
            "engine_tls": {
                "good": {"ca_file": str(pki / "ca.pem"), "server_name": "server.test"},
                "bad": {"ca_file": str(pki / "ca.pem"), "server_name": "outsider.test"},
            },
            "health": FAST_HEALTH,
        }
        async with running_stack([cluster("good", [good[1]]), cluster("bad", [bad[1]])], config) as stack:

            async def probed() -> bool:
                return "/health" in served

            await eventually(probed, bool)
            assert (await post(stack, chat("good", "hi"))).status == 200
            assert (await post(stack, chat("bad", "hi"))).status == 503
            assert served.count("/v1/chat/completions") == 1
            await stack.gateway.kill()
            assert (await post(stack, chat("good", "hi"))).status == 200
            assert (await post(stack, chat("bad", "hi"))).status == 503
            assert served.count("/v1/chat/completions") == 2
    finally:
        for runner, _ in (good, bad):
            await runner.cleanup()
