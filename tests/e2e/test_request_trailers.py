"""Requests that end with trailers, through the real Envoy: what an engine reads of them, byte by byte.

Where the route retries, Envoy 1.40 keeps a copy of the body and sends it after the body when the picker
answers the trailers. That is so with any picker that gives the body back in chunks, as the protocol has it;
the first test shows it with one that does nothing else. When it fails Envoy has mended it, and
`PickerDialect.decision` needs no `is_envoy` any more.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.protocol import wire
from testbed.foreign_gateway import bootstrap
from testbed.processes import Subprocess, free_port, free_ports
from tests.e2e.harness import Reply, answers, chat, cluster, envoy_binary, exchange
from tests.e2e.picker import DESTINATION, PATH, running_picker

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

HEAD = (
    f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    "transfer-encoding: chunked\r\ntrailer: x-end\r\n\r\n"
).encode()
END = b"0\r\nx-end: 1\r\n\r\n"
LIMIT = 1 << 20
"""What Envoy buffers of a request by default."""


@dataclass(slots=True)
class Engine:
    """Keeps the chunked requests that it reads: their bodies, and the lines after the last chunk.

    Attributes:
        port: Where it listens.
        received: In their order.
    """

    port: int = 0
    received: list[tuple[bytes, list[str]]] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while (await reader.readuntil(b"\r\n\r\n")).startswith(b"POST"):
                body = b""
                while size := int(await reader.readline(), 16):
                    body += (await reader.readexactly(size + 2))[:size]
                lines = []
                while line := (await reader.readline()).strip():
                    lines.append(line.decode())
                self.received.append((body, lines))
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def engine() -> AsyncIterator[Engine]:
    """One that listens."""
    made = Engine()
    async with await asyncio.start_server(made.serve, "127.0.0.1", limit=1 << 24) as server:
        made.port = server.sockets[0].getsockname()[1]
        yield made


async def ask(port: int, body: bytes) -> Reply:
    """The body in two chunks, and a trailer."""
    parts = (body[: len(body) // 2], body[len(body) // 2 :])
    return await exchange(port, HEAD, *(b"%x\r\n%s\r\n" % (len(part), part) for part in parts), END)


class ByTheBook:
    """A picker that sends everything to one endpoint and gives all back as it came.

    Args:
        endpoint: Where to.
    """

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint

    async def process(self, messages: AsyncIterator[pb.ProcessingRequest], _: object) -> AsyncIterator[Any]:
        """One stream: headers, body and trailers of the request at its end, then whatever comes."""
        body = b""
        async for message in messages:
            kind = message.WhichOneof("request")
            if kind == "request_body":
                body += message.request_body.body
            elif kind == "request_trailers":
                yield self._headers()
                yield _chunk("request_body", body, end=False)
                yield pb.ProcessingResponse(request_trailers=pb.TrailersResponse())
            elif kind == "response_headers":
                yield pb.ProcessingResponse(response_headers=pb.HeadersResponse())
            elif kind == "response_body":
                chunk = message.response_body
                yield _chunk("response_body", chunk.body, end=chunk.end_of_stream)

    def _headers(self) -> pb.ProcessingResponse:
        answer = pb.ProcessingResponse()
        mutation = answer.request_headers.response.header_mutation
        mutation.set_headers.append(wire.set_header(DESTINATION, self._endpoint))
        answer.dynamic_metadata.update({"envoy.lb": {DESTINATION: self._endpoint}})
        return answer


def _chunk(kind: str, data: bytes, *, end: bool) -> pb.ProcessingResponse:
    streamed = pb.StreamedBodyResponse(body=data, end_of_stream=end)
    common = pb.CommonResponse(body_mutation=pb.BodyMutation(streamed_response=streamed))
    return pb.ProcessingResponse(**{kind: pb.BodyResponse(response=common)})


@asynccontextmanager
async def by_the_book(port: int) -> AsyncIterator[int]:
    """Such a picker for an engine's port: its own."""
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(
        ByTheBook(f"127.0.0.1:{port}").process,
        pb.ProcessingRequest.FromString,
        pb.ProcessingResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(wire.SERVICE, {"Process": handler}),)
    )
    own = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield own
    finally:
        await server.stop(0)


async def test_envoy_sends_such_a_body_twice_where_the_route_retries(tmp_path: Path) -> None:
    """Whoever picks; without retries once."""
    async with engine() as behind, by_the_book(behind.port) as picker_port:
        retried, unretried, admin = free_ports(3)
        listeners = {"metadata": retried, "unretried": unretried}
        text = bootstrap(listeners, admin, picker_port, free_port(), [behind.port], is_tls=False)
        (tmp_path / "envoy.json").write_text(text)
        envoy = await Subprocess.start(
            [
                *(str(envoy_binary()), "-c", str(tmp_path / "envoy.json")),
                *("--concurrency", "1", "--disable-hot-restart"),
            ],
            tmp_path / "envoy.log",
        )
        try:
            await answers(envoy, f"http://127.0.0.1:{admin}/ready")
            for port in (unretried, retried):
                assert (await ask(port, b"a body")).status == 200
        finally:
            await envoy.kill()
        assert behind.received == [(b"a body", ["x-end: 1"]), (b"a bodya body", ["x-end: 1"])]


@pytest.mark.parametrize("size", [200, 62_001, LIMIT, LIMIT + 1, 3_000_000])
async def test_tokenway_has_it_sent_once(size: int) -> None:
    """With its trailers, whether the route retries or not, and however large it is."""
    async with engine() as behind:
        models = {"models": {"m": {"rules": [{"cluster": "m"}]}}, "health": {"interval_s": 60}}
        async with running_picker([cluster("m", [f"127.0.0.1:{behind.port}"])], models) as picker:
            body = json.dumps(chat("m", "x")).encode()
            body += b" " * (size - len(body))
            for listener in ("unretried", "metadata", "header"):
                assert (await ask(picker.ports[listener], body)).status == 200
            assert [each == (body, ["x-end: 1"]) for each in behind.received] == [True] * 3
            await picker.tokenway.settled()


async def test_a_retry_sends_it_once_as_well() -> None:
    """The endpoint that is tried first is not there: the next one gets all of it."""
    async with engine() as behind:
        absent = f"127.0.0.1:{free_port()}"
        clusters = [cluster("m", [absent, f"127.0.0.1:{behind.port}"])]
        slow = {"health": {"interval_s": 60, "recovery_interval_s": 60}}
        models = {"models": {"m": {"rules": [{"cluster": "m"}]}}}
        async with running_picker(clusters, {**models, **slow}) as picker:
            for number in range(40):
                body = json.dumps(chat("m", f"{number}")).encode()
                assert (await ask(picker.ports["metadata"], body)).status == 200
                assert behind.received.pop() == (body, ["x-end: 1"])
                (record,) = await picker.tokenway.last(1)
                if record["snapshot"]["keys"][record["choice"]["order"][0]] == absent:
                    break
            else:
                pytest.fail("the one that is not there was never the first choice")
            assert behind.received == []
            await picker.tokenway.settled()


@pytest.mark.parametrize("listener", ["none_logged", "streamed_logged"])
async def test_a_stream_that_is_left_early_has_it_sent_once(listener: str) -> None:
    """Where the answer is not wanted back."""
    async with engine() as behind:
        models = {"models": {"m": {"rules": [{"cluster": "m"}]}}, "health": {"interval_s": 60}}
        clusters = [cluster("m", [f"127.0.0.1:{behind.port}"])]
        async with running_picker(clusters, models, leave_early=True) as picker:
            body = json.dumps(chat("m", "x")).encode()
            for _ in range(10):
                assert (await ask(picker.ports[listener], body)).status == 200
            assert behind.received == [(body, ["x-end: 1"])] * 10
            await picker.tokenway.settled()
