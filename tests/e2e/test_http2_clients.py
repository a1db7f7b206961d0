"""Clients that speak HTTP/2: their bodies may be as large, and a request that is none costs no other."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Self

import pytest
from aiohttp import web
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, StreamEnded, StreamReset

from tests.e2e.conftest import Shared
from tests.e2e.harness import chat, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

Headers = list[tuple[bytes, bytes]]

HEADERS: Headers = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":authority", b"a"),
    (b":path", b"/v1/chat/completions"),
    (b"content-type", b"application/json"),
]
BODY = json.dumps(chat("recorded", "hello")).encode()


class Client:
    """One connection.

    Attributes:
        status: Of each stream that was answered, by its number.
        ended: How each stream ended: `answered` or `reset`.

    Args:
        port: Of the gateway.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        config = H2Configuration(
            header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False
        )
        self._h2 = H2Connection(config)
        self.status: dict[int, bytes] = {}
        self.ended: dict[int, str] = {}

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._h2.initiate_connection()
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reading.cancel()
        await asyncio.wait([self._reading])
        self._writer.close()

    def ask(self, headers: Headers) -> int:
        """Send a request with `BODY`; the number of its stream."""
        number = self._h2.get_next_available_stream_id()
        self._h2.send_headers(number, headers)
        self._h2.send_data(number, BODY, end_stream=True)
        self._writer.write(self._h2.data_to_send())
        return number

    async def ask_at_length(self, headers: Headers, body: bytes) -> int:
        """The same with any body, as the windows allow; stops when it is answered."""
        number = self._h2.get_next_available_stream_id()
        self._h2.send_headers(number, headers)
        while body and number not in self.ended:
            size = min(self._h2.local_flow_control_window(number), self._h2.max_outbound_frame_size)
            if size:
                self._h2.send_data(number, body[:size], end_stream=len(body) <= size)
                body = body[size:]
                self._writer.write(self._h2.data_to_send())
            await asyncio.sleep(0)
        return number

    async def _read(self) -> None:
        while said := await self._reader.read(65_536):
            for event in self._h2.receive_data(said):
                self._take(event)
            self._writer.write(self._h2.data_to_send())

    def _take(self, event: object) -> None:
        if isinstance(event, ResponseReceived):
            self.status[event.stream_id] = dict(event.headers)[b":status"]
        elif isinstance(event, DataReceived):
            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, StreamEnded):
            self.ended[event.stream_id] = "answered"
        elif isinstance(event, StreamReset):
            self.ended[event.stream_id] = "reset"


MALFORMED: dict[str, Headers] = {
    "connection": [*HEADERS, (b"connection", b"keep-alive")],
    "te": [*HEADERS, (b"te", b"gzip")],
    "capitals": [*HEADERS, (b"X-Team", b"red")],
    "no-path": [each for each in HEADERS if each[0] != b":path"],
    "own-pseudo-header": [*HEADERS[:4], (b":tokenway-owner", b"me"), HEADERS[4]],
    "nul": [*HEADERS, (b"x-a", b"a\0b")],
    "line-ends": [*HEADERS, (b"x-a", b"a\r\nx-tokenway-owner: me")],
    "length": [*HEADERS, (b"content-length", b"3")],
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_request_costs_no_other(plain: Shared, name: str) -> None:
    """RFC 9113, 8.1.1: a stream error. A proxy in front has many clients' requests on one connection."""
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def wait(_: web.Request) -> web.StreamResponse:
        asked.set()
        await may_answer.wait()
        return web.json_response({"choices": [{"message": {"content": "well"}}]})

    plain.recorder.behaviour = wait
    async with Client(plain.stack.port) as client:

        async def ended() -> dict[int, Any]:
            return client.ended

        good = client.ask(HEADERS)
        async with asyncio.timeout(10):
            await asked.wait()
        bad = client.ask(MALFORMED[name])
        await eventually(ended, lambda ends: ends.get(bad) == "reset")
        may_answer.set()
        await eventually(ended, lambda ends: ends.get(good) == "answered")
        assert client.status == {good: b"200"}
        assert len(plain.recorder.received) == 1
        later = client.ask(HEADERS)
        await eventually(ended, lambda ends: ends.get(later) == "answered")
        assert client.status[later] == b"200"
    await plain.stack.settled()


@pytest.mark.parametrize("model", ["recorded", "tuned"])
@pytest.mark.parametrize("size", [65_000, 70_000, 3_000_000])
async def test_a_body_may_be_as_large_as_by_http_1(plain: Shared, size: int, model: str) -> None:
    """However small the window of its stream is."""
    async with Client(plain.stack.port) as client:

        async def ended() -> dict[int, str]:
            return client.ended

        number = await client.ask_at_length(HEADERS, json.dumps(chat(model, "x" * size)).encode())
        await eventually(ended, lambda ends: ends.get(number) == "answered")
        assert client.status[number] == b"200"
    (received,) = plain.recorder.received
    assert len(json.loads(received.body)["messages"][0]["content"]) == size


async def test_a_body_may_be_no_larger_than_by_http_1(plain: Shared) -> None:
    """Beyond `request.max_body_bytes` it is 413."""
    async with Client(plain.stack.port) as client:
        number = await client.ask_at_length(HEADERS, b" " * (34 << 20))
        assert client.status[number] == b"413"
    assert plain.recorder.received == []
