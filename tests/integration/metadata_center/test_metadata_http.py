"""The metadata center over real HTTP: concurrency, transport bounds, the command, the documented examples."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from metadata_center.service import http_server
from metadata_center.service.calls import MAX_BODY_BYTES
from metadata_center.service.cluster_loads import Limits
from metadata_center.service.http_server import HttpServer
from metadata_center.sharing.http_messages import SHARES_PATH
from metadata_center.sharing.messages import Update, encode, member_id
from metadata_center.tokens import MALFORMED
from metadata_center.types import RequestId

pytestmark = pytest.mark.asyncio

DOCUMENT = Path(__file__).parents[3] / "docs" / "metadata-center.md"
DEADLINE_S = 10.0
STATS = "/v1/load/stats"


@pytest.fixture
async def server() -> AsyncIterator[HttpServer]:
    """A server on a port of its own."""
    server = HttpServer(Limits())
    await server.start("127.0.0.1", 0)
    yield server
    await server.stop()


@pytest.fixture
async def client(server: HttpServer) -> AsyncIterator[aiohttp.ClientSession]:
    """Up to 50 connections to the server."""
    async with aiohttp.ClientSession(
        f"http://127.0.0.1:{server.port}",
        connector=aiohttp.TCPConnector(limit=50),
        timeout=aiohttp.ClientTimeout(total=DEADLINE_S),
    ) as client:
        yield client


async def call(
    client: aiohttp.ClientSession, method: str, path: str, body: object = None, **kwargs: Any
) -> tuple[int, Any]:
    """Status and decoded body of one call."""
    data = body if body is None or isinstance(body, bytes | BytesIO) else orjson.dumps(body)
    async with client.request(method, path, data=data, **kwargs) as response:
        return response.status, orjson.loads(await response.read())


async def load(client: aiohttp.ClientSession, cluster: str) -> dict[str, tuple[int, int]]:
    """Queued requests and prompt length by address."""
    _, envelope = await call(client, "GET", STATS, params={"cluster": cluster})
    return {found["ip"]: (found["queued_req_num"], found["prompt_length"]) for found in envelope["data"]}


def adding(number: int, **changes: Any) -> dict[str, Any]:
    """The add of a numbered request, spread over four engines."""
    ip = f"10.0.0.{number % 4}:8000"
    return {"request_id": f"r{number}", "cluster": "c", "ip": ip, "prompt_length": number, **changes}


async def test_a_thousand_requests_over_fifty_connections_count_exactly(
    client: aiohttp.ClientSession,
) -> None:
    """Adds, each sent twice, then deletes in any order against late copies of the adds: exact, then zero."""
    numbers = range(1_000)
    answers = await asyncio.gather(
        *(call(client, "POST", STATS, adding(number)) for number in numbers for _ in range(2))
    )
    assert {status for status, _ in answers} == {200}
    assert await load(client, "c") == {
        f"10.0.0.{engine}:8000": (250, sum(range(engine, 1_000, 4))) for engine in range(4)
    }
    calls = [("DELETE", "/v1/load/prompt", {"request_id": f"r{number}"}) for number in numbers]
    calls += [("DELETE", STATS, {"request_id": f"r{number}"}) for number in numbers]
    calls += [("POST", STATS, adding(number)) for number in numbers]
    answers = await asyncio.gather(*(call(client, *one) for one in calls))
    assert {status for status, _ in answers} == {200}
    assert await load(client, "c") == {f"10.0.0.{engine}:8000": (0, 0) for engine in range(4)}


async def test_a_delete_may_overtake_its_add(client: aiohttp.ClientSession) -> None:
    """Fifty connections deliver both at once, in no order, and nothing is left over."""
    await asyncio.gather(
        *(call(client, *one) for number in range(200) for one in _pair(number)),
        call(client, "POST", STATS, adding(999)),
    )
    assert sum(requests for requests, _ in (await load(client, "c")).values()) == 1


def _pair(number: int) -> list[tuple[str, str, object]]:
    pair: list[tuple[str, str, object]] = [
        ("POST", STATS, adding(number)),
        ("DELETE", STATS, {"request_id": f"r{number}"}),
    ]
    return pair if number % 2 else pair[::-1]


async def test_a_body_over_the_limit_is_413(client: aiohttp.ClientSession) -> None:
    """With the envelope; the largest body is still read."""
    status, envelope = await call(client, "POST", STATS, BytesIO(b" " * (MAX_BODY_BYTES + 1)))
    assert (status, envelope["error"]["code"]) == (413, 41301400)
    body = orjson.dumps(adding(1))
    status, _ = await call(client, "POST", STATS, BytesIO(body.ljust(MAX_BODY_BYTES)))
    assert status == 200


async def test_a_body_that_does_not_decode_is_400(client: aiohttp.ClientSession) -> None:
    """One that is not in its content encoding is invalid input too."""
    headers = {"Content-Encoding": "gzip"}
    status, envelope = await call(client, "POST", STATS, b"not gzip", headers=headers)
    assert (status, envelope["error"]["code"]) == (400, 40001400)


@pytest.mark.parametrize(("name", "sent"), [("TraceId", "abc"), ("X-Trace-ID", "abc")])
async def test_the_callers_trace_id_is_echoed(client: aiohttp.ClientSession, name: str, sent: str) -> None:
    """In the header and the envelope, by either name."""
    async with client.get("/healthz", headers={name: sent}) as response:
        assert response.headers["X-Trace-ID"] == sent
        assert (await response.json())["trace_id"] == sent


@pytest.mark.parametrize("sent", ["", "a b", "x" * 200])
async def test_a_trace_id_that_will_not_do_is_replaced(client: aiohttp.ClientSession, sent: str) -> None:
    """AIGW sends an empty one."""
    async with client.get("/healthz", headers={"TraceId": sent}) as response:
        assert re.fullmatch("[0-9a-f]{32}", response.headers["X-Trace-ID"])


async def test_a_fault_of_ours_is_the_documented_500(
    server: HttpServer, client: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the traceback, the caller does not, and the server goes on."""
    broken, server.state.loads = server.state.loads, None  # type: ignore[assignment]
    status, envelope = await call(client, "POST", STATS, adding(1))
    server.state.loads = broken
    assert (status, envelope["error"]["code"]) == (500, 50001000)
    assert "NoneType" in caplog.text
    assert "NoneType" not in str(envelope)
    assert (await call(client, "POST", STATS, adding(1)))[0] == 200


async def test_the_document_lists_the_metrics(client: aiohttp.ClientSession) -> None:
    """All of them, each with its type and its labels."""
    assert (await call(client, "GET", "/healthz"))[0] == 200
    async with client.get("/metrics") as response:
        families = list(text_string_to_metric_families(await response.text()))
    labels = {
        family.name: {name for sample in family.samples for name in sample.labels} for family in families
    }
    suffix = {"counter": "_total", "gauge": ""}
    exposed = {
        (f"{each.name}{suffix[each.type]}", each.type, frozenset(labels[each.name])) for each in families
    }
    rows = re.findall(r"^\| `(tokenway_metadata_\w+)` \| (\w+) \|(.*?)\|", DOCUMENT.read_text(), re.MULTILINE)
    assert {(name, kind, frozenset(re.findall(r"`(\w+)`", named))) for name, kind, named in rows} == exposed


async def test_metrics_show_answers_and_contents(server: HttpServer, client: aiohttp.ClientSession) -> None:
    """Requests by method, path and status; what is in flight, known and cached."""
    await call(client, "POST", STATS, adding(1))
    await call(client, "POST", STATS, b"i")
    await call(client, "GET", "/made/up")
    await call(client, "POST", "/v1/cache/save", {"cluster": "c", "ip": "10.0.0.1", "prompt_hash": [1, 2]})
    await call(client, "POST", SHARES_PATH, encode(Update(member_id("gw", 0, "a"), 1, lease_s=60.0)))
    async with client.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    name = "tokenway_metadata_http_requests_total"
    for expected in (
        f'{name}{{method="POST",path="/v1/load/stats",status="200"}} 1.0',
        f'{name}{{method="POST",path="/v1/load/stats",status="400"}} 1.0',
        f'{name}{{method="other",path="other",status="404"}} 1.0',
        "tokenway_metadata_requests_in_flight 1.0",
        'tokenway_metadata_endpoints{kind="load"} 1.0',
        'tokenway_metadata_endpoints{kind="cache"} 1.0',
        "tokenway_metadata_cached_blocks 2.0",
        'tokenway_metadata_expired_total{kind="request"} 0.0',
        "tokenway_metadata_members 1.0",
        "tokenway_metadata_followers 0.0",
        "tokenway_metadata_followers_cut_off_total 0.0",
        "tokenway_metadata_shares_refused_total 0.0",
    ):
        assert expected in lines


async def test_stopping_lets_a_call_under_way_finish(server: HttpServer) -> None:
    """A request whose body is still arriving is answered; new connections are refused."""
    body = orjson.dumps(adding(1))
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = f"POST {STATS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body[:5])
    await writer.drain()
    async with aiohttp.ClientSession() as probe:  # its answer shows that the first head was read
        await probe.get(f"http://127.0.0.1:{server.port}/healthz")
    stopping = asyncio.create_task(server.stop())
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                _, late = await asyncio.open_connection("127.0.0.1", server.port)
            except ConnectionError:  # refused, or reset while it was still queued
                break
            late.close()
        writer.write(body[5:])
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        await stopping


async def test_what_is_due_expires_without_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server looks by itself, so that a call after a quiet hour does not find an hour's work."""
    monkeypatch.setattr(http_server, "_EXPIRE_INTERVAL_S", 0.01)
    server = HttpServer(Limits(request_expiry_s=0.05))
    await server.start("127.0.0.1", 0)
    server.state.loads.add(RequestId("r"), "c", "10.0.0.1", 1, time.monotonic())
    async with asyncio.timeout(DEADLINE_S):
        while server.state.loads.expired_requests == 0:  # noqa: ASYNC110 - expiry wakes no task
            await asyncio.sleep(0.01)
    await server.stop()


async def test_a_port_in_use_is_an_error(server: HttpServer) -> None:
    """The second server says so and leaves nothing open."""
    with pytest.raises(OSError, match="in use"):
        await HttpServer(Limits()).start("127.0.0.1", server.port)


class Command:
    """A running `tokenway metadata-center`, on a port of its own."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process = process
        self.url = url

    @classmethod
    async def start(cls, *options: str, **environment: str) -> Command:
        """Wait until it says where it listens."""
        process = await _spawn("--listen", "127.0.0.1:0", *options, **environment)
        assert process.stderr is not None
        async with asyncio.timeout(DEADLINE_S):
            line = orjson.loads(await process.stderr.readline())
        return cls(process, f"http://127.0.0.1:{line['port']}")

    async def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode


async def _spawn(*options: str, **environment: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tokenway.cli.main", "metadata-center", *options),
        env={**os.environ, **environment},
        stderr=asyncio.subprocess.PIPE,
    )


async def test_the_command_serves_with_a_token_until_a_signal() -> None:
    """The token comes from the environment; SIGTERM ends it with code 0, others do not."""
    command = await Command.start("--token-env", "MC_TOKEN", MC_TOKEN="secret\n")
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH):
        command.process.send_signal(number)
    async with aiohttp.ClientSession(command.url) as client:
        status, envelope = await call(client, "GET", STATS, params={"cluster": "c"})
        assert (status, envelope["error"]["code"]) == (401, 40101001)
        headers = {"Authorization": "Bearer secret"}
        assert (await call(client, "GET", STATS, params={"cluster": "c"}, headers=headers))[0] == 200
        assert (await call(client, "GET", "/healthz"))[0] == 200
    assert await command.stop() == 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--token-env", "MC_TOKEN_UNSET"], "environment variable MC_TOKEN_UNSET holds no token"),
        (["--token-env", "MC_TOKEN_BROKEN"], f"environment variable MC_TOKEN_BROKEN holds {MALFORMED}"),
    ],
)
async def test_the_command_refuses_what_it_cannot_use(options: list[str], complaint: str) -> None:
    """With exit code 1 and one line that names the setting."""
    process = await _spawn(*options, MC_TOKEN_BROKEN="s3cret\ns3cret")
    async with asyncio.timeout(DEADLINE_S):
        _, stderr = await process.communicate()
    assert process.returncode == 1
    assert stderr.decode().startswith(f"tokenway: {complaint}")


async def test_an_address_that_is_taken_is_named() -> None:
    """As it is written, not as Python writes it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = await _spawn("--listen", address)
        async with asyncio.timeout(DEADLINE_S):
            _, stderr = await process.communicate()
    assert (process.returncode, stderr.decode()) == (1, f"tokenway: {address}: Address already in use\n")


async def test_the_examples_of_the_document_do_what_it_says(server: HttpServer) -> None:
    """Each curl line prints what follows it; `...` stands for anything."""
    blocks = re.findall(r"```console\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    examples = [example for block in blocks for example in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    assert len(examples) >= 12
    for example in examples:
        command, _, expected = example.partition("\n")
        process = await asyncio.create_subprocess_shell(
            command.replace("localhost:8080", f"127.0.0.1:{server.port}"), stdout=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(DEADLINE_S):
            stdout, _ = await process.communicate()
        pattern = ".*?".join(re.escape(part) for part in expected.strip().split("..."))
        assert re.fullmatch(pattern, stdout.decode().strip(), re.DOTALL), (command, stdout)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
async def test_web_pages_change_and_read_nothing(
    client: aiohttp.ClientSession, headers: dict[str, str]
) -> None:
    """A form of a page can send `text/plain` to loopback without asking anybody: it is refused unread."""
    status, body = await call(
        client, "POST", STATS, adding(1), headers={"Content-Type": "text/plain", **headers}
    )
    assert (status, body["error"]["code"]) == (403, 40301400)
    assert (await call(client, "GET", "/metrics", headers=headers))[0] == 403
    assert (await call(client, "GET", STATS, params={"cluster": "c"}))[1]["data"] is None
