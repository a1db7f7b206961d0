"""Requests as odd clients frame them: trailers, chunks, no body, slowly."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.e2e.conftest import Shared
from tests.e2e.harness import chat, check, exchange, send

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
BODY = json.dumps(chat("recorded", "hello")).encode()
NO_DECISION_S = 0.4
"""Less than ext_proc's message time-out: an answer within it was not Envoy's own fallback."""


def chunk(data: bytes) -> bytes:
    """One HTTP/1.1 chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


async def _decided(plain: Shared) -> None:
    """The engine got the body, and it was the gateway that sent it there."""
    (received,) = plain.recorder.received
    assert json.loads(received.body) == json.loads(BODY)
    assert "x-tokenway-owner" in received.headers


async def test_chunked_upload(plain: Shared) -> None:
    """A body in many chunks is one request."""
    pieces = [chunk(BODY[at : at + 7]) for at in range(0, len(BODY), 7)]
    reply = await exchange(plain.stack.port, CHUNKED, *pieces, b"0\r\n\r\n")
    assert reply.status == 200
    await _decided(plain)


async def test_trailers_after_the_body(plain: Shared) -> None:
    """A request that ends by trailers is decided by the gateway, at once."""
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    reply = await exchange(plain.stack.port, CHUNKED, chunk(BODY), b"0\r\nx-checksum: 1\r\n\r\n")
    assert reply.status == 200
    assert loop.time() - started_s < NO_DECISION_S
    await _decided(plain)


async def test_trailers_after_a_rewritten_body(plain: Shared) -> None:
    """A body that is rewritten and followed by trailers reaches the engine rewritten and whole."""
    body = json.dumps(chat("tuned", "hello")).encode()
    reply = await exchange(plain.stack.port, CHUNKED, chunk(body), b"0\r\nx-checksum: 1\r\n\r\n")
    assert reply.status == 200
    assert json.loads(plain.recorder.received[0].body) == json.loads(body) | {"model": "polite"}


async def test_trailers_without_a_body(plain: Shared) -> None:
    """A request of trailers alone is refused like an empty body."""
    reply = await exchange(plain.stack.port, CHUNKED, b"0\r\nx-checksum: 1\r\n\r\n")
    check(reply, 400, "invalid_json")


async def test_post_without_a_body(plain: Shared) -> None:
    """A POST that ends with its headers is refused."""
    check(await exchange(plain.stack.port, HEAD + b"content-length: 0\r\n\r\n"), 400, "invalid_json")
    check(await exchange(plain.stack.port, HEAD + b"\r\n"), 400, "invalid_json")


async def test_get_with_a_body(plain: Shared) -> None:
    """A GET on an inference path is 405 even with a body behind it."""
    head = HEAD.replace(b"POST", b"GET") + b"content-length: %d\r\n\r\n" % len(BODY)
    check(await exchange(plain.stack.port, head, BODY), 405, "method_not_allowed")
    assert plain.recorder.received == []


async def test_slow_upload(plain: Shared) -> None:
    """An upload that takes longer than ext_proc's message time-out is decided like any other."""
    head = HEAD + b"content-length: %d\r\n\r\n" % len(BODY)
    half = len(BODY) // 2
    reply = await exchange(plain.stack.port, head, BODY[:half], BODY[half:], pause_s=0.4)
    assert reply.status == 200
    await _decided(plain)


async def test_upload_abandoned(plain: Shared) -> None:
    """A client that leaves in the middle of its upload leaves nothing behind."""
    _, writer = await asyncio.open_connection("127.0.0.1", plain.stack.port)
    writer.write(HEAD + b"content-length: 1000\r\n\r\n" + BODY)
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()
    await writer.wait_closed()
    await plain.stack.settled()
    assert plain.recorder.received == []


REFUSED_BY_ENVOY = {
    "no_http": b"no http at all\r\n\r\n",
    "no_host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "two_lengths": HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
    "length_and_chunks": HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "bad_chunk": CHUNKED + b"zz\r\n",
    "huge_header": b"GET /v1/models HTTP/1.1\r\nhost: a\r\nx-huge: " + b"x" * 70_000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("request_bytes", REFUSED_BY_ENVOY.values(), ids=REFUSED_BY_ENVOY.keys())
async def test_refused_by_envoy(plain: Shared, request_bytes: bytes) -> None:
    """What is not valid HTTP is Envoy's to refuse, shaped like every other error."""
    reply = await exchange(plain.stack.port, request_bytes)
    check(reply, 431 if len(request_bytes) > 60_000 else 400, "invalid_request")


async def test_query_string(plain: Shared) -> None:
    """A query string does not hide an inference path."""
    reply = await send(plain.stack, "POST", "/v1/chat/completions?api-version=1", chat("recorded", "hello"))
    assert reply.status == 200
    assert plain.recorder.received[0].path == "/v1/chat/completions?api-version=1"
    assert "x-tokenway-owner" in plain.recorder.received[0].headers
