"""Every refusal, Envoy's or Tokenway's, looks like OpenAI's and leaves nothing charged (fixture `plain`)."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from tests.e2e.conftest import TIMEOUT_S, Shared
from tests.e2e.harness import chat, check, check_for_any_api, eventually, exchange, post, sample, send

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

MEGABYTE = 1_000_000


BAD_BODIES = {
    "cut_short": (b'{"model": "sim", "messages": [', 400, "invalid_json"),
    "no_json": (b"hello", 400, "invalid_json"),
    "zero_bytes": (b"", 400, "invalid_json"),
    "malformed_utf8": (b'{"model": "sim\xff"}', 400, "invalid_json"),
    "nested_100000_deep": (b'{"model": "sim", "messages": ' + b"[" * 100_000, 400, "invalid_json"),
    "nested_300_deep": (
        b'{"model": "sim", "messages": [{"role": "user", "content": ' + b"[" * 300 + b"]" * 300 + b"}]}",
        400,
        "invalid_request",
    ),
    "no_object": (b"[1, 2]", 400, "invalid_request"),
    "infinite_number": (b'{"model": "sim", "seed": NaN}', 400, "invalid_json"),
    "no_model": (b'{"messages": [{"role": "user", "content": "hi"}]}', 400, "missing_model"),
    "model_null": (b'{"model": null}', 400, "missing_model"),
    "model_number": (b'{"model": 7}', 400, "missing_model"),
    "unknown_model": (b'{"model": "nope", "messages": [{}]}', 404, "model_not_found"),
    "no_messages": (b'{"model": "sim"}', 400, "empty_messages"),
    "empty_messages": (b'{"model": "sim", "messages": []}', 400, "empty_messages"),
    "messages_text": (b'{"model": "sim", "messages": "hi"}', 400, "invalid_request"),
    "stream_text": (b'{"model": "sim", "stream": "yes", "messages": [{}]}', 400, "invalid_request"),
}


@pytest.mark.parametrize(("body", "status", "code"), BAD_BODIES.values(), ids=BAD_BODIES.keys())
async def test_bad_body(plain: Shared, body: bytes, status: int, code: str) -> None:
    """A body that cannot be understood is refused with its own code and reaches no engine."""
    before = [len(engine.served) for engine in plain.engines]
    check(await post(plain.stack, body), status, code)
    assert [len(engine.served) for engine in plain.engines] == before


async def test_bad_json_names_the_place(plain: Shared) -> None:
    """The message about broken JSON says where, and never quotes the prompt."""
    body = b'{"model": "sim", "secret prompt": oops}'
    error = check(await post(plain.stack, body), 400, "invalid_json")
    assert error["param"] == "body"
    assert f"line 1 column {body.index(b'oops') + 1}" in error["message"]
    assert "secret" not in json.dumps(error)


async def test_official_client_understands(client: AsyncOpenAI) -> None:
    """The official client raises its own exceptions with code and parameter."""
    with pytest.raises(NotFoundError) as not_found:
        await client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "hi"}])
    assert (not_found.value.code, not_found.value.param) == ("model_not_found", "model")
    with pytest.raises(BadRequestError) as bad:
        await client.chat.completions.create(model="sim", messages=[])
    assert bad.value.code == "empty_messages"


async def test_duplicate_keys_last_wins(plain: Shared) -> None:
    """Of duplicate keys the last counts, as at the engine, which gets the bytes as they came."""
    body = b'{"model": "nope", "model": "recorded", "messages": [{"role": "user", "content": "hi"}]}'
    assert (await post(plain.stack, body)).status == 200
    assert plain.recorder.received[0].body == body


@pytest.mark.parametrize("padding", [0, 3 * MEGABYTE])
@pytest.mark.parametrize(
    ("model", "priority"), [("recorded", b""), ("recorded", b'"priority": 1, '), ("tuned", b"")]
)
async def test_huge_numbers_pass(plain: Shared, model: str, priority: bytes, padding: int) -> None:
    """Numbers no machine word holds are the engine's business and reach it as they came, rewritten or not."""
    body = (
        b'{"model": "%b", %b"seed": 123456789012345678901234567890, "max_tokens": 1e300, "user": "%b", '
        b'"messages": [{"role": "user", "content": "[-123456789012345678901234567890]"}]}'
    ) % (model.encode(), priority, b"x" * padding)
    assert (await post(plain.stack, body)).status == 200
    (received,) = plain.recorder.received
    sent = json.loads(body) | {"model": "polite" if model == "tuned" else "recorded"}
    sent.pop("priority", None)
    assert json.loads(received.body) == sent
    assert type(json.loads(received.body)["seed"]) is int
    if model == "recorded" and not priority:
        assert received.body == body


@pytest.mark.parametrize("model", ["recorded", "tuned"])
async def test_ten_megabytes_pass(plain: Shared, model: str) -> None:
    """A 10 MB body arrives whole, rewritten or not, with the right length."""
    sent = chat(model, "x" * 10 * MEGABYTE)
    assert (await post(plain.stack, sent)).status == 200
    (received,) = plain.recorder.received
    assert json.loads(received.body) == sent | {"model": "polite" if model == "tuned" else "recorded"}
    assert received.headers["content-length"] == str(len(received.body))


async def test_forty_megabytes_of_answer_pass(plain: Shared) -> None:
    """A whole answer larger than Envoy's buffers reaches the client intact."""
    text = "x" * 40 * MEGABYTE

    async def flood(_: web.Request) -> web.StreamResponse:
        return web.json_response({"text": text})

    plain.recorder.behaviour = flood
    reply = await post(plain.stack, chat("recorded", "hello"))
    assert (reply.status, reply.json == {"text": text}) == (200, True)


async def test_too_large_body(plain: Shared) -> None:
    """A body above 32 MiB is refused by Envoy with our error."""
    body = json.dumps(chat("recorded", "x" * 34 * MEGABYTE)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    series = 'tokenway_rejections_total{reason="body_too_large"}'
    before = sample(await plain.stack.metrics(), series) or 0
    reply = await exchange(plain.stack.port, head + b"content-length: %d\r\n\r\n" % len(body), body)
    check(reply, 413, "body_too_large")
    assert plain.recorder.received == []

    async def counted() -> float:
        return sample(await plain.stack.metrics(), series) or 0

    await eventually(counted, lambda count: count == before + 1)


async def test_no_engine_answers(plain: Shared) -> None:
    """A model whose engine is down is 503 with Retry-After, while Envoy finds out and once we know."""

    async def refused_by() -> str | None:
        reply = await post(plain.stack, chat("dead", "hello"))
        check(reply, 503, "no_healthy_endpoint")
        assert reply.headers["retry-after"] == "1"
        rejected: str | None = (await plain.stack.last(1))[0]["rejected"]
        return rejected

    await eventually(refused_by, lambda rejected: rejected == "no_healthy_endpoint")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_engine_hangs(plain: Shared, stream: bool) -> None:
    """An engine that never answers is given up after the configured time: 504, and the engine sees it."""
    gone: list[float] = []
    loop = asyncio.get_running_loop()

    async def hang(_: web.Request) -> web.StreamResponse:
        try:
            await asyncio.sleep(60)
        finally:
            gone.append(loop.time())
        raise AssertionError

    plain.recorder.behaviour = hang
    started_s = loop.time()
    reply = await post(plain.stack, chat("recorded", "hello", stream=stream))
    took_s = loop.time() - started_s
    check(reply, 504, "timeout")
    assert TIMEOUT_S - 0.1 < took_s < TIMEOUT_S + 1.0
    await asyncio.sleep(0.2)
    assert len(gone) == len(plain.recorder.received) == (2 if stream else 1)
    await plain.stack.settled()
    assert (await plain.stack.last(1))[0]["outcome"]["ended"] == "timeout"


@pytest.mark.parametrize("status", [400, 401, 404, 422, 500, 501])
async def test_engine_errors_pass_unchanged(plain: Shared, status: int) -> None:
    """An engine's own refusal reaches the client as it is, tried once."""
    body = {"error": {"message": "the engine's own words", "type": "x", "param": None, "code": status}}

    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status, headers={"x-engine": "yes"})

    plain.recorder.behaviour = refuse
    reply = await post(plain.stack, chat("recorded", "hello"))
    assert (reply.status, reply.json) == (status, body)
    assert reply.headers["x-engine"] == "yes"
    assert len(plain.recorder.received) == 1


@pytest.mark.parametrize("status", [429, 502, 503])
async def test_lasting_overload_passes_unchanged(plain: Shared, status: int) -> None:
    """An engine that stays overloaded is tried again, then its own last words reach the client."""
    body = {"error": {"message": "busy", "type": "x", "param": None, "code": status}}

    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status)

    plain.recorder.behaviour = refuse
    reply = await post(plain.stack, chat("recorded", "hello"))
    assert (reply.status, reply.json) == (status, body)
    assert len(plain.recorder.received) == 2


SWITCHES = {
    "bare": b"\r\n",
    "named": b"connection: upgrade\r\nupgrade: websocket\r\n\r\n",
    "typed": b"content-type: text/event-stream\r\nupgrade: h2c\r\n\r\ndata: [DONE]\r\n\r\n",
}


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ["chat/completions", "responses", "messages"])
async def test_an_engine_that_switches_protocols(plain: Shared, path: str, stream: bool, name: str) -> None:
    """It was asked for none, whatever the client offers: that is no answer, and a failure of the engine."""
    rest = SWITCHES[name]

    async def switch(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(b"HTTP/1.1 101 Switching Protocols\r\n" + rest)
        request.transport.close()
        return web.Response()

    async def failures() -> float:
        series = f'tokenway_endpoint_failures_total{{endpoint="{plain.recorder.key}",kind="server_error"}}'
        return sample(await plain.stack.metrics(), series) or 0.0

    plain.recorder.behaviour = switch
    before = await failures()
    body = {**chat("recorded", f"{path} {stream} {name}", stream=stream), "input": "hi"}
    reply = await send(
        plain.stack, "POST", f"/v1/{path}", body, {"upgrade": "websocket", "connection": "upgrade"}
    )
    check_for_any_api(reply, 502, "no_healthy_endpoint")
    assert reply.headers["retry-after"] == "1"
    assert "upgrade" not in reply.headers
    await plain.stack.settled()
    assert (await plain.stack.last(1))[0]["outcome"]["ended"] == "upstream_error"
    assert await failures() == before + 1


NO_STATUSES = {
    "600": (b"600", b"content-type: application/json\r\ncontent-length: 2\r\n\r\n{}"),
    "999": (b"999", b"content-type: text/html\r\ncontent-length: 2\r\n\r\n{}"),
    "four_digits": (b"1000", b"content-length: 2\r\n\r\n{}"),
    "no_body": (b"600", b"content-length: 0\r\n\r\n"),
    "two_chunks": (b"700", b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n2\r\n{}\r\n0\r\n\r\n"),
    "compressed": (b"600", b"content-encoding: gzip\r\ncontent-length: 2\r\n\r\n{}"),
    "stream": (b"600", b"content-type: text/event-stream\r\nconnection: close\r\n\r\ndata: [DONE]\r\n\r\n"),
    "empty_chunks": (b"600", b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    "a_megabyte": (b"600", b"content-length: 1000000\r\n\r\n" + b" " * 1_000_000),
}


@pytest.mark.parametrize("name", NO_STATUSES)
@pytest.mark.parametrize("path", ["chat/completions", "messages"])
async def test_an_engine_whose_status_is_none(plain: Shared, path: str, name: str) -> None:
    """Clients read three digits, and take 600 and more for no error: 502, and a failure of the engine."""
    status, rest = NO_STATUSES[name]

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(b"HTTP/1.1 " + status + b" What\r\n" + rest)
        request.transport.close()
        return web.Response()

    series = f'tokenway_endpoint_failures_total{{endpoint="{plain.recorder.key}",kind="server_error"}}'
    before = sample(await plain.stack.metrics(), series) or 0.0
    plain.recorder.behaviour = answer
    reply = await send(plain.stack, "POST", f"/v1/{path}", chat("recorded", f"{path} {name}"))
    check_for_any_api(reply, 502, "no_healthy_endpoint")
    assert reply.headers["retry-after"] == "1"
    await plain.stack.settled()
    outcome = (await plain.stack.last(1))[0]["outcome"]
    assert (outcome["ended"], outcome["status"]) == ("upstream_error", 502)
    assert sample(await plain.stack.metrics(), series) == before + 1


@pytest.mark.parametrize("kind", ["application/grpc", "application/grpc+proto", "application/grpc+json"])
@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/chat/completions", "nope"),
        ("/v1/chat/completions", "dead"),
        ("/v1/messages", "nope"),
        ("/v1/models", "nope"),
        ("/nowhere", "sim"),
    ],
)
async def test_what_calls_itself_grpc_is_refused_as_json(
    plain: Shared, path: str, model: str, kind: str
) -> None:
    """Envoy by itself makes 200 of each refusal, without a body: to a client of JSON, an answer."""
    reply = await send(plain.stack, "POST", path, chat(model, "hello"), {"content-type": kind})
    error = check_for_any_api(reply, 415, "invalid_request")
    assert "application/json" in error["message"]
    assert not [name for name in reply.headers if name.startswith("grpc") or name == "retry-after"]


async def test_what_calls_itself_grpc_and_is_served_is_the_engines_to_judge(plain: Shared) -> None:
    """As any other content type is."""
    for kind in ("application/grpc", "text/plain"):
        reply = await send(
            plain.stack, "POST", "/v1/chat/completions", chat("recorded", "hello"), {"content-type": kind}
        )
        assert (reply.status, reply.json["object"]) == (200, "chat.completion")
    assert [each.headers["content-type"] for each in plain.recorder.received] == [
        "application/grpc",
        "text/plain",
    ]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_wrong_method(plain: Shared, method: str) -> None:
    """An inference path takes POST only, and the answer says so as HTTP does (RFC 9110, 15.5.6)."""
    reply = await send(plain.stack, method, "/v1/chat/completions")
    check(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/v1/models", "GET, HEAD"),
        ("/v1/messages", "POST"),
        ("/v1/audio/transcriptions", "POST"),
        ("/v1/responses/resp_1", "GET, DELETE"),
        ("/v1/responses/resp_1/cancel", "POST"),
    ],
)
async def test_every_wrong_method_is_told_the_right_ones(plain: Shared, path: str, allow: str) -> None:
    """Whatever the API."""
    reply = await send(plain.stack, "PATCH", path)
    assert (reply.status, reply.headers["allow"]) == (405, allow)


@pytest.mark.parametrize("path", ["/", "/v2/chat/completions", "/v1/nothing", "/metrics", "/sim/state"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_unknown_path(plain: Shared, method: str, path: str) -> None:
    """Nothing is served elsewhere, least of all the engines' own pages."""
    body = None if method == "GET" else chat("sim", "hello")
    check(await send(plain.stack, method, path, body), 404, "unknown_path")


async def test_the_models_are_read_alone(plain: Shared) -> None:
    """HEAD says what GET does, without its body; nothing is posted there."""
    reply = await send(plain.stack, "HEAD", "/v1/models")
    assert (reply.status, reply.body) == (200, b"")
    check(await send(plain.stack, "POST", "/v1/models", {}), 405, "method_not_allowed")


async def test_unknown_model_by_name(plain: Shared) -> None:
    """A model that no endpoint serves is 404 when asked about."""
    check(await send(plain.stack, "GET", "/v1/models/nope"), 404, "model_not_found")
