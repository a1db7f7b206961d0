"""Tokenway as the endpoint picker of an Envoy that is not ours; the real one, configured as Istio does."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Final

import aiohttp
import openai
import pytest
import pytest_asyncio
from aiohttp import web

from tests.e2e.harness import (
    FAST_HEALTH,
    Recorder,
    chat,
    cluster,
    eventually,
    exchange,
    key_of,
    recording,
    simulators,
)
from tests.e2e.picker import DESTINATION, PATH, Picked, running_picker
from tests.e2e.picker_answer_cases import health

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

NUM_ANSWERS: Final = int(os.environ.get("TOKENWAY_PICKER_ANSWERS", "300"))
NUM_ABORTS: Final = int(os.environ.get("TOKENWAY_PICKER_ABORTS", "400"))
"""`make test-picker` has ten times as many of each and more."""

MAX_BODY_BYTES = 4 << 20
MODELS = {"sim": {"rules": [{"cluster": "sim"}]}, "recorded": {"rules": [{"cluster": "recorded"}]}}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def picked() -> AsyncIterator[Picked]:
    """One stack for all but those tests that destroy theirs."""
    async with simulators(3, time_scale=0.02) as engines, recording() as recorder:
        clusters = [cluster("sim", map(key_of, engines)), cluster("recorded", [recorder.key])]
        config = {
            "models": MODELS,
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


def _mixed(rng: random.Random) -> tuple[str, list[bytes]]:
    """Any answer: its type, and the pieces it is written in."""
    kind = rng.choices(("json", "events", "10 MB", "5,000 events"), (75, 23, 1, 1))[0]
    if kind == "json":
        body = json.dumps({"choices": [{}], "text": rng.randbytes(rng.randrange(20_000)).hex()}).encode()
        size = rng.randrange(1, len(body) + 1)
        return "application/json", [body[at : at + size] for at in range(0, len(body), max(size, 500))] or [
            b""
        ]
    if kind == "10 MB":
        return "application/octet-stream", [rng.randbytes(10_000_000)]
    count = 5_000 if kind == "5,000 events" else rng.randrange(200)
    return "text/event-stream", [b"data: " + rng.randbytes(30).hex().encode() + b"\n\n" for _ in range(count)]


async def _answer_mixed(request: web.Request) -> web.StreamResponse:
    number = json.loads(await request.read())["messages"][0]["content"]
    kind, pieces = _mixed(random.Random(number))
    reply = web.StreamResponse(headers={"content-type": kind})
    await reply.prepare(request)
    for piece in pieces:
        await reply.write(piece)
    return reply


async def _answer_without_end(request: web.Request) -> web.StreamResponse:
    reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await reply.prepare(request)
    await reply.write(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n')
    await asyncio.Event().wait()
    return reply


async def test_mixed_answers_pass_byte_for_byte(picked: Picked) -> None:
    """JSON, streams, 10 MB and 5,000 events, eight at a time; each answer is made of its request's number."""
    picked.recorder.behaviour = _answer_mixed
    left = iter(range(NUM_ANSWERS))

    async def client() -> None:
        for number in left:
            reply = await picked.post(chat("recorded", str(number), stream=number % 2 == 0))
            assert reply.status == 200
            assert reply.body == b"".join(_mixed(random.Random(str(number)))[1]), number
            picked.recorder.received.clear()

    await asyncio.gather(*(client() for _ in range(8)))


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


@pytest.mark.parametrize("end", ["/", "%2F", "/?x=1"])
async def test_engines_are_asked_by_their_own_path(picked: Picked, end: str) -> None:
    """A slash at the end of a path, escaped or not, is not theirs."""
    reply = await picked.send("POST", PATH + end, json.dumps(chat("recorded", "x")).encode())
    assert reply.status == 200
    (received,) = picked.recorder.received
    assert received.path == PATH + "".join(end.partition("?")[1:])


async def test_the_header_alone_is_enough(picked: Picked) -> None:
    """For clusters of kind ORIGINAL_DST, which take one address."""
    only = key_of(picked.engines[0])
    for body in (chat("recorded", "x"), chat("sim", "x")):
        hint = only if body["model"] == "sim" else picked.recorder.key
        reply = await picked.post(body, listener="header", x_test_subset=hint)
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
    port = picked.picker.ports["metadata"]
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n".encode()
    reply = await exchange(port, head, b'{"model": ')
    assert (reply.status, reply.json["error"]["code"]) == (408, "body_timeout")


async def test_random_aborts_leave_nothing_charged(picked: Picked) -> None:
    """Clients that leave anywhere: before the end of their request, while it is decided, in the answer."""
    rng = random.Random(20261130)
    port = picked.picker.ports["metadata"]

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

    for begins in range(0, NUM_ABORTS, 40):
        numbers = range(begins, min(NUM_ABORTS, begins + 40))
        await asyncio.gather(*(ask(number, rng.random(), rng.random() < 0.7) for number in numbers))
    await picked.picker.tokenway.settled()
    assert (await picked.post(chat("sim", "after"))).status == 200


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
    """NOT_SERVING first, on both ports, but alive; requests are served meanwhile, running ones end whole."""
    async with simulators(1, time_scale=1.0) as engines:
        config = {"server": {"drain_s": 20}}
        async with running_picker([cluster("sim", map(key_of, engines))], config, leave_s=60.0) as picker:
            stack = Picked(picker, engines, Recorder())
            running = asyncio.create_task(stack.post(chat("sim", "long", 200, True)))
            await eventually(picker.tokenway.charged, bool)
            picker.tokenway.gateway.signal(signal.SIGTERM)

            async def readiness() -> bytes:
                return await health(stack, "readiness", picker.health_port)

            await eventually(readiness, lambda status: status == b"\x08\x02")
            assert await health(stack, "liveness", picker.health_port) == b"\x08\x01"
            assert await health(stack, "readiness") == b"\x08\x02"
            assert (await stack.post(chat("sim", "late", 2))).status == 200
            reply = await running
            assert (reply.status, reply.body.endswith(b"data: [DONE]\n\n")) == (200, True)


_LOOPBACK = {"tcp": "0100007F", "tcp6": "0000000000000000FFFF00000100007F"}
"""127.0.0.1, and the same as an IPv6 address, by which grpcio listens."""


def _listeners(port: int) -> int:
    """Sockets that listen at a port of loopback. Source: proc_net_tcp; state 0A is LISTEN."""
    return sum(
        (words := line.split())[1] == f"{address}:{port:04X}" and words[3] == "0A"
        for table, address in _LOOPBACK.items()
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    )


async def test_every_worker_picks() -> None:
    """At the same ports: the kernel gives each some of the connections, and all count their load together."""
    async with simulators(2, time_scale=0.02) as engines:
        clusters = [cluster("sim", map(key_of, engines))]
        async with running_picker(clusters, workers=3) as picker:
            stack = Picked(picker, engines, Recorder())
            assert [_listeners(port) for port in (picker.picker_port, picker.health_port)] == [3, 3]
            async with AsyncExitStack() as channels:
                for number in range(24):
                    stream = await channels.enter_async_context(stack.stream())
                    await stream.ask()
                    await stream.body(json.dumps(chat("sim", f"{number}")).encode(), end=True)
                    await stream.request_given_back()
                view = await picker.tokenway.endpoints()
                assert [row["requests"] for row in view["endpoints"]] == [12, 12]
            await picker.tokenway.settled()
            assert (await stack.post(chat("sim", "x", 2))).status == 200
            assert await health(stack, "readiness", picker.health_port) == b"\x08\x01"


LEFT: Final = {"none": False, "streamed": False, "none_logged": True, "streamed_logged": True}
"""Listeners whose answers are not wanted back, and whether their streams are left early."""


@pytest.mark.parametrize("listener", LEFT)
async def test_answers_that_are_not_wanted_back(listener: str) -> None:
    """Nothing of them is lost, whether the stream is left early or not; charges end with the request."""
    async with simulators(2, time_scale=0.02) as engines, recording() as recorder:
        clusters = [cluster("sim", map(key_of, engines)), cluster("recorded", [recorder.key])]
        config = {"models": MODELS, "default_cluster": "recorded"}
        async with running_picker(clusters, config, leave_early=LEFT[listener]) as picker:
            stack = Picked(picker, engines, recorder)
            spoofed = {"x-tokenway-request-id": "spoofed", "x-tokenway-owner": "spoofed"}
            assert (await stack.send("GET", "/info", listener=listener, headers=spoofed)).status == 200
            assert "spoofed" not in recorder.received.pop().headers.values()
            await _lossless(stack, listener)
            for stream in (False, True):
                reply = await stack.post(chat("sim", f"usage {stream}", 8, stream), listener=listener)
                assert reply.status == 200
                outcome = await stack.last_outcome()
                assert (outcome["status"], outcome["ended"]) == (200, "completed")
            recorder.behaviour = _answer_without_end
            url = picker.url(listener) + PATH
            async with (
                aiohttp.ClientSession() as session,
                session.post(url, json=chat("recorded", "long", 8, True)) as endless,
            ):
                assert await endless.content.readline()
                assert (await stack.post(chat("sim", "another"), listener=listener)).status == 200
                assert (await picker.tokenway.charged())["in_flight"] >= 1
            await picker.tokenway.settled()


async def _lossless(stack: Picked, listener: str) -> None:
    stack.recorder.behaviour = _answer_mixed
    left = iter(range(200))

    async def client() -> None:
        for number in left:
            request = chat("recorded", str(number), stream=number % 2 == 0)
            request["user"] = "x" * (300_000 if number % 5 == 0 else 0)
            reply = await stack.post(request, listener=listener)
            assert reply.status == 200
            assert reply.body == b"".join(_mixed(random.Random(str(number)))[1]), number
            stack.recorder.received.clear()

    await asyncio.gather(*(client() for _ in range(8)))
    await stack.picker.tokenway.settled()
