"""Errors of the Messages API have Anthropic's shape, Envoy's and Tokenway's alike (fixture `plain`)."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from tests.e2e.conftest import Shared
from tests.e2e.harness import Reply, chat, exchange, post, send

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

MEGABYTE = 1_000_000


def check(reply: Reply, status: int, kind: str) -> str:
    """The message of an error that must be Anthropic-shaped."""
    assert (reply.status, reply.headers["content-type"]) == (status, "application/json"), reply
    body = reply.json
    assert body.keys() == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["error"].keys() == {"type", "message"}
    assert body["error"]["type"] == kind
    assert body["request_id"]
    message: str = body["error"]["message"]
    return message


def messages(model: str, **fields: Any) -> dict[str, Any]:
    """A body of the Messages API."""
    return {**chat(model, "hello"), **fields}


async def ask(
    plain: Shared, body: object, path: str = "/v1/messages", headers: dict[str, str] | None = None
) -> Reply:
    """POST as Anthropic's clients do."""
    return await send(plain.stack, "POST", path, body, {"anthropic-version": "2023-06-01", **(headers or {})})


REFUSED = {
    "unknown_model": (messages("nope"), 404, "not_found_error"),
    "unknown_model_streamed": (messages("nope", stream=True), 404, "not_found_error"),
    "bad_json": (b'{"model": "sim", ', 400, "invalid_request_error"),
    "empty": (b"", 400, "invalid_request_error"),
    "no_model": ({"messages": []}, 400, "invalid_request_error"),
    "no_messages": ({"model": "sim", "messages": []}, 400, "invalid_request_error"),
}


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages?beta=true", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(("body", "status", "kind"), REFUSED.values(), ids=REFUSED.keys())
async def test_what_tokenway_refuses(plain: Shared, path: str, body: object, status: int, kind: str) -> None:
    """A body that cannot be served: before the first byte, and so as plain JSON for streams too."""
    check(await ask(plain, body, path), status, kind)


async def test_the_request_id_names_its_record(plain: Shared) -> None:
    """What a client reports finds the decision's record."""
    request_id = (await ask(plain, messages("nope"))).json["request_id"]
    assert (await plain.stack.explain(request_id))["rejected"] == "model_not_found"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_wrong_method(plain: Shared, method: str) -> None:
    """The path takes POST only."""
    check(await send(plain.stack, method, "/v1/messages"), 405, "invalid_request_error")


@pytest.mark.parametrize("path", ["/v1/messages/batches", "/v1/messages/batches/msgbatch_1"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_unknown_path_below(plain: Shared, method: str, path: str) -> None:
    """What the Messages API has elsewhere and no engine has here."""
    check(await send(plain.stack, method, path, None if method == "GET" else {}), 404, "not_found_error")


async def test_no_engine_answers(plain: Shared) -> None:
    """A model whose engine is down: said by Envoy first and then by Tokenway, in one shape."""
    for _ in range(6):
        reply = await ask(plain, messages("dead"))
        check(reply, 503, "overloaded_error")
        assert reply.headers["retry-after"] == "1"
        await asyncio.sleep(0.1)
    assert (await plain.stack.last(1))[0]["rejected"] == "no_healthy_endpoint"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_engine_hangs(plain: Shared, stream: bool) -> None:
    """Envoy's own time-out."""

    async def hang(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        raise AssertionError

    plain.recorder.behaviour = hang
    check(await ask(plain, messages("recorded", stream=stream)), 504, "timeout_error")


async def test_too_large_body(plain: Shared) -> None:
    """Envoy's own limit."""
    body = json.dumps(messages("recorded", padding="x" * 34 * MEGABYTE)).encode()
    head = b"POST /v1/messages HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    reply = await exchange(plain.stack.port, head + b"content-length: %d\r\n\r\n" % len(body), body)
    check(reply, 413, "request_too_large")


async def test_engine_errors_pass_unchanged(plain: Shared) -> None:
    """An engine's own refusal is its own business, in whatever shape."""
    body = {"type": "error", "error": {"type": "invalid_request_error", "message": "the engine's own words"}}

    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=400)

    plain.recorder.behaviour = refuse
    reply = await ask(plain, messages("recorded"))
    assert (reply.status, reply.json) == (400, body)


async def test_other_apis_keep_their_shape(plain: Shared) -> None:
    """The version header of Anthropic's clients does not change another API's errors."""
    reply = await post(plain.stack, chat("nope", "hello"), {"anthropic-version": "2023-06-01"})
    assert reply.json.keys() == {"error"}
    assert (await send(plain.stack, "GET", "/v1/messagesque")).json.keys() == {"error"}
