"""What a client leaves half done, or never ends, is bounded: on the real Envoy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from tests.e2e.harness import (
    Recorder,
    Stack,
    answer_chat,
    chat,
    cluster,
    eventually,
    post,
    recording,
    running_stack,
    sample,
)
from tests.e2e.stopping import ENDS_S, HEAD, STALL_S, said_until_closed, stopping_soon

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

CHUNK = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
PLACES = 20
MODELS = {"m": {"rules": [{"cluster": "c"}]}}
EDGE: dict[str, Any] = {"headers_timeout_s": 1.0, "max_connections": PLACES}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine() -> AsyncIterator[Recorder]:
    """Behind everything here."""
    async with recording() as recorder:
        yield recorder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stack(engine: Recorder) -> AsyncIterator[Stack]:
    """A stack with tight bounds, but for idle connections."""
    config = {"models": MODELS, "edge": EDGE}
    async with running_stack([cluster("c", [engine.key])], config, adapt=stopping_soon) as running:
        yield running


@pytest.mark.parametrize("said", [b"", b"P"])
async def test_a_connection_that_says_nothing_ends(stack: Stack, said: bytes) -> None:
    """Not as an idle one does, which is one that had a request. One byte does not say what it speaks."""
    assert await said_until_closed(stack.port, said) == b""


@pytest.mark.parametrize("said", [b"POST /v1", b"PRI * HT"])
async def test_half_a_first_line_is_refused(stack: Stack, said: bytes) -> None:
    """As half headers are, and the connection ends."""
    answer = await said_until_closed(stack.port, said)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in answer


@pytest.mark.parametrize("said", [b"", HEAD, HEAD + b"content-length: 9\r\n\r\n{"])
async def test_clients_that_stop_leave_their_places_to_others(
    stack: Stack, engine: Recorder, said: bytes
) -> None:
    """All connections are taken by clients that stay and send no more: soon there is room again."""
    engine.reset()
    opened = [await asyncio.open_connection("127.0.0.1", stack.port) for _ in range(PLACES + 5)]
    for _, writer in opened:
        writer.write(said)

    async def status() -> int:
        try:
            return (await post(stack, chat("m", "hi"))).status
        except aiohttp.ClientError:
            return 0

    try:
        await eventually(status, lambda code: code == 200, ENDS_S)
    finally:
        for _, writer in opened:
            writer.close()


ASKED = b"GET /none HTTP/1.1\r\nhost: a\r\n\r\n"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
NO_SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
PING = b"\x00\x00\x08\x06\x00\x00\x00\x00\x00" + bytes(8)


@asynccontextmanager
async def _idlers(port: int, said: bytes, more: bytes, count: int) -> AsyncIterator[None]:
    """Clients that stay: each has said something whole and was answered, and says more that is no request."""

    async def idle() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            with suppress(ConnectionError):
                writer.write(said)
                await reader.read(65_536)
                answered.release()
                while True:
                    writer.write(more)
                    await writer.drain()
                    await asyncio.sleep(0.2)
        finally:
            writer.close()

    answered = asyncio.Semaphore(0)
    idlers = [asyncio.create_task(idle()) for _ in range(count)]
    try:
        async with asyncio.timeout(ENDS_S):
            for _ in range(count):
                await answered.acquire()
        yield
    finally:
        for each in idlers:
            each.cancel()
        await asyncio.gather(*idlers, return_exceptions=True)


@pytest.mark.parametrize(
    ("said", "more"),
    [(ASKED, b""), (PREFACE + NO_SETTINGS, b""), (PREFACE + NO_SETTINGS, PING)],
    ids=["http1", "http2", "pings"],
)
async def test_idle_clients_leave_their_places_to_others(
    stack: Stack, engine: Recorder, said: bytes, more: bytes
) -> None:
    """All connections but one are idle, and might be for minutes: they end soon, what runs does not."""
    engine.reset()
    asked, seen = asyncio.Event(), asyncio.Event()

    async def late(request: web.Request) -> web.StreamResponse:
        asked.set()
        await seen.wait()
        return await answer_chat(request)

    engine.behaviour = late
    running = asyncio.create_task(post(stack, chat("m", "hi")))
    await asked.wait()
    engine.behaviour = answer_chat
    async with _idlers(stack.port, said, more, PLACES - 1):

        async def status() -> int:
            try:
                return (await post(stack, chat("m", "hi"))).status
            except aiohttp.ClientError:
                return 0

        try:
            await eventually(status, lambda code: code == 200, ENDS_S)
        finally:
            seen.set()
        assert (await running).status == 200


async def test_few_idle_clients_stay(stack: Stack) -> None:
    """Where there is room nobody is hurried."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    try:
        for pause_s in (EDGE["headers_timeout_s"] * 3, 0):
            writer.write(ASKED)
            assert (await reader.read(65_536)).startswith(b"HTTP/1.1 404")
            await asyncio.sleep(pause_s)
    finally:
        writer.close()


@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/v1/messages"])
async def test_an_upload_that_stops_ends(stack: Stack, engine: Recorder, path: bytes) -> None:
    """In the words of a request that did not arrive in time, long before an upload as a whole is too slow."""
    engine.reset()
    head = HEAD.replace(b"/v1/chat/completions", path) + b"content-length: 1000\r\n\r\n{"
    heard = await said_until_closed(stack.port, head)
    assert heard.startswith(b"HTTP/1.1 408")
    assert b"The request did not arrive in time." in heard
    assert engine.received == []

    async def counted() -> float:
        return sample(await stack.metrics(), 'tokenway_rejections_total{reason="body_timeout"}') or 0

    await eventually(counted, bool)


async def test_an_engine_may_be_silent_for_longer(stack: Stack, engine: Recorder) -> None:
    """The bound is of requests that nobody has decided about yet."""

    async def late(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(STALL_S * 3)
        return await answer_chat(request)

    engine.behaviour = late
    assert (await post(stack, chat("m", "hi"))).status == 200


@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/none"])
async def test_a_body_that_never_ends_behind_an_early_answer_ends(stack: Stack, path: bytes) -> None:
    """HTTP/1.1: answered, and the connection ended whatever still comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    writer.write(HEAD.replace(b"/v1/chat/completions", path) + b"transfer-encoding: chunked\r\n\r\n")
    hearing = asyncio.create_task(_heard(reader))
    async with asyncio.timeout(ENDS_S):
        with suppress(ConnectionError):
            while True:
                writer.write(CHUNK)
                await writer.drain()
    writer.close()
    assert (await hearing)[:12] in (b"HTTP/1.1 413", b"HTTP/1.1 404")


async def _heard(reader: asyncio.StreamReader) -> bytes:
    heard = b""
    with suppress(ConnectionError):
        while part := await reader.read(65_536):
            heard += part
    return heard


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _field(name: bytes, value: bytes) -> bytes:
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


DATA, HEADERS, SETTINGS, WINDOW_UPDATE = 0, 1, 4, 8


class _Endless:
    """An HTTP/2 client whose one request has a body without end, whatever it is answered."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._window = 65_535
        self._more = asyncio.Event()
        self.sent = 0
        self.is_answered = False

    async def run(self) -> None:
        """Until Envoy ends the connection."""
        fields = ((b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/none"), (b":authority", b"a"))
        opening = _frame(SETTINGS, 0, 0) + _frame(HEADERS, 4, 1, b"".join(_field(*each) for each in fields))
        self._writer.write(PREFACE + opening)
        sending = asyncio.create_task(self._send())
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                while True:
                    await self._hear()
        finally:
            sending.cancel()

    async def _hear(self) -> None:
        head = await self._reader.readexactly(9)
        payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
        kind, stream = head[3], int.from_bytes(head[5:9], "big")
        if kind == HEADERS:
            self.is_answered = True
            self._more.set()
        if kind == WINDOW_UPDATE and stream == 0:
            self._window += int.from_bytes(payload, "big")
            self._more.set()

    async def _send(self) -> None:
        with suppress(ConnectionError):
            while True:
                while self._window < 16_384 or (self.sent and not self.is_answered):
                    self._more.clear()
                    await self._more.wait()
                self._writer.write(_frame(DATA, 0, 1, b"x" * 16_384))
                self._window -= 16_384
                self.sent += 16_384
                await self._writer.drain()


async def test_the_same_by_http2_ends_as_an_idle_connection_does(engine: Recorder) -> None:
    """Envoy reads what comes for a stream that is over and keeps nothing of it; the connection is idle."""
    config = {"models": MODELS, "edge": {"idle_timeout_s": 2.0}}
    async with running_stack([cluster("c", [engine.key])], config) as idle:
        reader, writer = await asyncio.open_connection("127.0.0.1", idle.port)
        client = _Endless(reader, writer)
        try:
            async with asyncio.timeout(ENDS_S):
                await client.run()
        finally:
            writer.close()
    assert client.is_answered
    assert client.sent > 65_536
