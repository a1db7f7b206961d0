"""Tokenway as the endpoint picker of an Envoy that is not ours; the real one, configured as Istio does."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import random
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
import openai
import pytest
import pytest_asyncio
from aiohttp import web

from tests.e2e.harness import (
    FAST_HEALTH,
    Recorder,
    Reply,
    chat,
    cluster,
    eventually,
    exchange,
    key_of,
    recording,
    simulators,
)
from tests.e2e.picker import PickerStack, running_picker
from tokenway.simulator.server.app import SimulatorServer

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PATH = "/v1/chat/completions"
DESTINATION = "x-gateway-destination-endpoint"
DROPPED = "x-llm-d-request-dropped-reason"
MAX_BODY_BYTES = 4 << 20
REWRITTEN = {
    "models": {
        "sim": {"rules": [{"cluster": "sim"}]},
        "recorded": {"rules": [{"cluster": "recorded"}]},
        "tuned": {"rules": [{"cluster": "recorded", "model": "base"}]},
    }
}


@dataclass(frozen=True, slots=True)
class Picked:
    """A picker and what is behind it.

    Attributes:
        picker: Serves `sim` (three simulators), `recorded` and `tuned` (the recorder, as `base`).
        engines: The simulators.
        recorder: Keeps what it is sent.
    """

    picker: PickerStack
    engines: list[SimulatorServer]
    recorder: Recorder

    async def post(self, body: Any, *, url: str = "", **headers: str) -> Reply:
        """One chat request."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.send("POST", PATH, data, url=url, headers=named)

    async def send(
        self, method: str, path: str, data: bytes | None = None, *, url: str = "", headers: Any = None
    ) -> Reply:
        """One request on a connection of its own."""
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(
                method,
                (url or self.picker.by_metadata) + path,
                data=None if data is None else io.BytesIO(data),
                headers=headers,
            ) as reply,
        ):
            received = {name.lower(): value for name, value in reply.headers.items()}
            return Reply(reply.status, received, await reply.read())

    async def last_outcome(self) -> dict[str, Any]:
        """Of the latest request that was decided."""
        (record,) = await eventually(
            lambda: self.picker.tokenway.last(1), lambda got: bool(got[0]["outcome"])
        )
        outcome: dict[str, Any] = record["outcome"]
        return outcome


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def picked() -> AsyncIterator[Picked]:
    """One stack for all but those tests that destroy theirs."""
    async with simulators(3, time_scale=0.02) as engines, recording() as recorder:
        clusters = [cluster("sim", map(key_of, engines)), cluster("recorded", [recorder.key])]
        config = {
            **REWRITTEN,
            "health": FAST_HEALTH,
            "default_cluster": "sim",
            "request": {"max_body_bytes": MAX_BODY_BYTES},
        }
        async with running_picker(clusters, config, upload_timeout_s=5.0) as picker:
            yield Picked(picker, engines, recorder)


@pytest_asyncio.fixture(autouse=True, loop_scope="session")
async def _settled(picked: Picked) -> AsyncIterator[None]:
    """Whatever a test did, nothing stays charged."""
    picked.recorder.reset()
    yield
    await picked.picker.tokenway.settled()


async def test_the_official_client(picked: Picked) -> None:
    """A whole answer and a stream; their usage is learned and their first token seen."""
    async with picked.picker.client() as client:
        messages: Any = [{"role": "user", "content": "hello"}]
        whole = await client.chat.completions.create(model="sim", messages=messages, max_tokens=4)
        assert whole.usage is not None
        outcome = await picked.last_outcome()
        assert outcome["ended"] == "completed"
        assert outcome["prompt_tokens"] == whole.usage.prompt_tokens
        assert outcome["completion_tokens"] == whole.usage.completion_tokens == 4
        stream = await client.chat.completions.create(
            model="sim", messages=messages, max_tokens=4, stream=True, stream_options={"include_usage": True}
        )
        text = "".join([part.choices[0].delta.content or "" async for part in stream if part.choices])
        assert text == whole.choices[0].message.content
        outcome = await picked.last_outcome()
        assert (outcome["completion_tokens"], outcome["ended"]) == (4, "completed")
        assert outcome["ttft_s"] is not None
        with pytest.raises(openai.NotFoundError, match="not served here"):
            await client.chat.completions.create(model="unknown", messages=messages)


def _large(request: web.Request) -> web.Response:
    return web.Response(body=random.Random(7).randbytes(10_000_000), content_type="application/json")


async def _events(request: web.Request) -> web.StreamResponse:
    reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await reply.prepare(request)
    for number in range(5_000):
        await reply.write(f'data: {{"choices":[{{"delta":{{"content":"{number}"}}}}]}}\n\n'.encode())
    await reply.write(b"data: [DONE]\n\n")
    return reply


EVENTS = (
    b"".join(
        f'data: {{"choices":[{{"delta":{{"content":"{number}"}}}}]}}\n\n'.encode() for number in range(5_000)
    )
    + b"data: [DONE]\n\n"
)

ANSWERS: dict[str, tuple[Any, bytes]] = {
    "json": (lambda _: web.json_response({"a": "b"}), b'{"a": "b"}'),
    "no JSON": (lambda _: web.Response(body=b"\x00{\xff"), b"\x00{\xff"),
    "empty": (lambda _: web.Response(), b""),
    "no content": (lambda _: web.Response(status=204), b""),
    "error": (lambda _: web.Response(status=500, body=b"broken"), b"broken"),
    "compressed": (
        lambda _: web.Response(body=gzip.compress(b"x" * 9, mtime=0), headers={"content-encoding": "gzip"}),
        gzip.compress(b"x" * 9, mtime=0),
    ),
    "10 MB": (_large, random.Random(7).randbytes(10_000_000)),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_answers_pass_byte_for_byte(picked: Picked, name: str) -> None:
    """Whole answers of any kind and size."""
    make, expected = ANSWERS[name]

    async def behaviour(request: web.Request) -> web.StreamResponse:
        reply: web.StreamResponse = make(request)
        return reply

    picked.recorder.behaviour = behaviour
    for _ in range(3):
        reply = await picked.post(chat("recorded", "x"))
        assert reply.body == expected


async def test_five_thousand_events_pass_byte_for_byte(picked: Picked) -> None:
    """However they are cut, at several clients at a time."""
    picked.recorder.behaviour = _events
    replies = await asyncio.gather(*(picked.post(chat("recorded", "x", stream=True)) for _ in range(4)))
    assert all(reply.body == EVENTS for reply in replies)


@pytest.mark.parametrize("size", [1, 61_999, 62_000, 62_001, 124_000, 1_200_000, 3_000_000])
async def test_requests_arrive_byte_for_byte(picked: Picked, size: int) -> None:
    """Whatever their size, with nothing that Envoy or Tokenway says to each other."""
    body = json.dumps(chat("recorded", "")).encode()
    body += b" " * (size - len(body))
    for _ in range(2):
        reply = await picked.post(body, authorization="Bearer k", x_session_token="t", x_own="1")
        assert reply.status == 200
        (received,) = picked.recorder.received
        assert received.body == body
        assert received.headers["authorization"] == "Bearer k"
        assert received.headers["x-own"] == "1"
        assert received.headers[DESTINATION] == picked.recorder.key
        assert not {name for name in received.headers if "tokenway" in name or name == "x-session-token"}
        picked.recorder.reset()


async def test_the_model_is_rewritten(picked: Picked) -> None:
    """As the rule says, with the length that the body then has."""
    assert (await picked.post(chat("tuned", "x"))).status == 200
    (received,) = picked.recorder.received
    assert json.loads(received.body)["model"] == "base"


async def test_a_request_that_ends_with_trailers(picked: Picked) -> None:
    """Goes to an engine, whole, and is answered."""
    body = json.dumps(chat("recorded", "x")).encode()
    half = len(body) // 2
    port = int(picked.picker.by_header.rpartition(":")[2])
    head = (
        f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        "transfer-encoding: chunked\r\ntrailer: x-end\r\n\r\n"
    ).encode()
    chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:half], body[half:])]
    reply = await exchange(port, head, *chunks, b"0\r\nx-end: 1\r\n\r\n", pause_s=0.05)
    assert (reply.status, picked.recorder.received[-1].body) == (200, body)


async def test_an_answer_that_ends_with_trailers(picked: Picked) -> None:
    """Arrives with them."""

    async def behaviour(request: web.Request) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        transport.write(
            b"HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\ntrailer: x-end\r\n\r\n"
            b"2\r\n{}\r\n0\r\nx-end: 7\r\n\r\n"
        )
        await asyncio.sleep(0.2)
        transport.close()
        return web.Response()

    picked.recorder.behaviour = behaviour
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", int(picked.picker.by_metadata.rpartition(":")[2])
    )
    body = json.dumps(chat("recorded", "x")).encode()
    writer.write(f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    try:
        async with asyncio.timeout(10):
            answer = await reader.readuntil(b"x-end: 7\r\n\r\n")
    finally:
        writer.close()
        await writer.wait_closed()
    assert b"\r\n\r\n2\r\n{}\r\n0\r\n" in answer


async def test_which_may_be_chosen(picked: Picked) -> None:
    """The hint restricts inference and what passes; an empty or foreign one leaves no endpoint: 503."""
    keys = [key_of(engine) for engine in picked.engines]
    for only in keys:
        for hint in (only, f" 10.0.0.9:80 ,{only}"):
            for _ in range(3):
                reply = await picked.post(chat("sim", "x"), x_test_subset=hint)
                assert (reply.status, (await picked.last_outcome())["endpoint"]) == (200, only)
            assert (await picked.send("GET", "/sim/state", headers={"x-test-subset": hint})).status == 200
    assert (await picked.post(chat("sim", "x"), x_test_subset="127.0.0.1")).status == 200
    for hint in ("10.0.0.9", "127.0.0.1:1", ","):
        for reply in (
            await picked.post(chat("sim", "x"), x_test_subset=hint),
            await picked.send("GET", "/sim/state", headers={"x-test-subset": hint}),
        ):
            assert (reply.status, reply.headers[DROPPED]) == (503, "rejected-no-endpoints")


async def test_clients_steer_nothing(picked: Picked) -> None:
    """A destination of a client's own is neither followed nor forwarded."""
    for url in (picked.picker.by_metadata, ""):
        reply = await picked.post(chat("recorded", "x"), url=url, x_gateway_destination_endpoint="10.6.6.6:1")
        assert reply.status == 200
        assert picked.recorder.received[-1].headers[DESTINATION] == picked.recorder.key


async def test_the_header_alone_is_enough(picked: Picked) -> None:
    """For clusters of kind ORIGINAL_DST, which take one address."""
    only = key_of(picked.engines[0])
    for body in (chat("recorded", "x"), chat("sim", "x")):
        hint = only if body["model"] == "sim" else picked.recorder.key
        reply = await picked.post(body, url=picked.picker.by_header, x_test_subset=hint)
        assert reply.status == 200


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"no healthy upstream", 400, "invalid_json"),
        (b"", 400, "invalid_json"),
        (b'{"messages": []}', 400, "missing_model"),
        (json.dumps(chat("unknown", "x")).encode(), 404, "model_not_found"),
        (json.dumps(chat("sim", "x" * MAX_BODY_BYTES)).encode(), 413, "body_too_large"),
    ],
)
async def test_refusals(picked: Picked, body: bytes, status: int, code: str) -> None:
    """Whole answers, and nothing went to an engine."""
    reply = await picked.post(body)
    assert (reply.status, reply.json["error"]["code"]) == (status, code)


async def test_a_request_that_never_ends(picked: Picked) -> None:
    """Is given up, and nothing of it is kept."""
    port = int(picked.picker.by_metadata.rpartition(":")[2])
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n".encode()
    reply = await exchange(port, head, b'{"model": ')
    assert (reply.status, reply.json["error"]["code"]) == (408, "body_timeout")


async def test_random_aborts_leave_nothing_charged(picked: Picked) -> None:
    """Clients that leave anywhere: before the end of their request, while it is decided, in the answer."""
    rng = random.Random(20261130)
    port = int(picked.picker.by_metadata.rpartition(":")[2])

    async def ask(number: int, leaves_at: float, stream: bool) -> None:
        body = json.dumps(chat("sim", f"abort {number} " + "x" * rng.randrange(100_000), 40, stream)).encode()
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        sent = head + body
        if leaves_at < 0.3:
            writer.write(sent[: int(len(sent) * leaves_at / 0.3)])
            await writer.drain()
        else:
            writer.write(sent)
            await writer.drain()
            if leaves_at > 0.5:
                await reader.read(int((leaves_at - 0.5) * 4_000) + 1)
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()

    for _ in range(10):
        await asyncio.gather(
            *(ask(number, rng.random(), rng.random() < 0.7) for number in range(40)), return_exceptions=False
        )
    await picked.picker.tokenway.settled()
    assert (await picked.post(chat("sim", "after"))).status == 200


async def _health(port: int, name: str) -> bytes:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        request = b"" if not name else b"\x0a" + bytes([len(name)]) + name.encode()
        answer: bytes = await check(request, timeout=5)
        return answer


NAMES = ("", "liveness", "readiness", "inference-extension", "envoy.service.ext_proc.v3.ExternalProcessor")


@pytest.mark.parametrize("name", NAMES)
async def test_health_by_every_name(picked: Picked, name: str) -> None:
    """SERVING."""
    assert await _health(picked.picker.picker_port, name) == b"\x08\x01"


async def test_the_endpoint_that_answers_is_charged() -> None:
    """The first choice refuses connections: the gateway takes the next and says so."""
    async with recording() as first, recording() as second:
        clusters = [cluster("recorded", [first.key, second.key])]
        slow = {"health": {"interval_s": 60, "recovery_interval_s": 60}}
        async with running_picker(clusters, slow) as picker:
            stack = Picked(picker, [], first)
            first_key = first.key
            await first.stop()
            for _ in range(40):
                assert (await stack.post(chat("recorded", "x"))).status == 200
                assert (await stack.last_outcome())["endpoint"] == second.key
                (record,) = await picker.tokenway.last(1)
                if record["snapshot"]["keys"][record["choice"]["order"][0]] == first_key:
                    break
            else:
                pytest.fail("the one that is gone was never the first choice")
            await picker.tokenway.settled()


async def test_leaving_is_said_before_it_is_done() -> None:
    """NOT_SERVING first, but alive; requests are served meanwhile and those under way end whole."""
    async with simulators(1, time_scale=1.0) as engines:
        config = {"server": {"drain_s": 20}}
        async with running_picker([cluster("sim", map(key_of, engines))], config, leave_s=60.0) as picker:
            stack = Picked(picker, engines, Recorder())
            running = asyncio.create_task(stack.post(chat("sim", "long", 200, True)))
            await eventually(picker.tokenway.charged, bool)
            picker.tokenway.gateway.signal(signal.SIGTERM)

            async def readiness() -> bytes:
                return await _health(picker.picker_port, "readiness")

            await eventually(readiness, lambda status: status == b"\x08\x02")
            assert await _health(picker.picker_port, "liveness") == b"\x08\x01"
            assert (await stack.post(chat("sim", "late", 2))).status == 200
            reply = await running
            assert (reply.status, reply.body.endswith(b"data: [DONE]\n\n")) == (200, True)
