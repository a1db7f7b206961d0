"""Requests as odd clients frame them: trailers, chunks, no body, slowly."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.e2e.conftest import Shared
from tests.e2e.harness import Received, chat, check, check_for_any_api, exchange, send

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
BODY = json.dumps(chat("recorded", "hello")).encode()
NO_DECISION_S = 0.4
"""Less than ext_proc's message time-out: an answer within it was not Envoy's own fallback."""


def chunk(data: bytes) -> bytes:
    """One HTTP/1.1 chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


async def _chosen(plain: Shared, received: Received) -> bool:
    """The gateway decided about what the engine received."""
    record = await plain.stack.explain(received.headers["x-tokenway-request-id"])
    return bool(record["snapshot"]["keys"] == [plain.recorder.key])


async def _decided(plain: Shared) -> None:
    """The engine got the body, and it was the gateway that sent it there."""
    (received,) = plain.recorder.received
    assert json.loads(received.body) == json.loads(BODY)
    assert await _chosen(plain, received)


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


REFUSED_UNREAD = {
    "no_http": b"no http at all\r\n\r\n",
    "two_lengths": HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
    "length_and_chunks": HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "bad_length": HEAD + b"content-length: x\r\n\r\n",
    "nul_in_header": HEAD + b"x-a: \0\r\n\r\n",
    "underscore": HEAD + b"x_a: 1\r\ncontent-length: 2\r\n\r\n{}",
    "many_headers": HEAD + b"".join(b"x-%d: 1\r\n" % number for number in range(120)) + b"\r\n",
    "other_scheme": HEAD.replace(b"POST ", b"POST ftp://a") + b"content-length: 2\r\n\r\n{}",
    "huge_header": b"GET /v1/models HTTP/1.1\r\nhost: a\r\nx-huge: " + b"x" * 70_000 + b"\r\n\r\n",
    "long_uri": b"GET /v1/models?" + b"x" * 70_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
}


@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/v1/messages"])
@pytest.mark.parametrize("name", REFUSED_UNREAD)
async def test_refused_by_envoy_before_it_knows_the_path(plain: Shared, name: str, path: bytes) -> None:
    """Whose client it is cannot be known: the answer is one that clients of both kinds of APIs parse."""
    reply = await exchange(plain.stack.port, REFUSED_UNREAD[name].replace(b"/v1/chat/completions", path))
    if name in ("huge_header", "many_headers", "long_uri"):
        assert "too large or too many" in check_for_any_api(reply, 431, "invalid_request")["message"]
    else:
        check_for_any_api(reply, 400, "invalid_request")


REFUSED_BY_ENVOY = {
    "no_host": HEAD.replace(b"host: a\r\n", b"") + b"content-length: 2\r\n\r\n{}",
    "bad_chunk": CHUNKED + b"zz\r\n",
    "fragment": HEAD.replace(b" HTTP", b"#x HTTP") + b"content-length: 2\r\n\r\n{}",
    "two_slashes": HEAD.replace(b" /", b" //").replace(b"host: a\r\n", b"") + b"content-length: 2\r\n\r\n{}",
    "nul_in_path": HEAD.replace(b" HTTP", b"/%00 HTTP") + b"content-length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("name", REFUSED_BY_ENVOY)
async def test_refused_by_envoy(plain: Shared, name: str) -> None:
    """What is not valid HTTP is Envoy's to refuse, shaped like every other error of its API."""
    check(await exchange(plain.stack.port, REFUSED_BY_ENVOY[name]), 400, "invalid_request")
    asked = REFUSED_BY_ENVOY[name].replace(b"/v1/chat/completions", b"/v1/messages")
    said = (await exchange(plain.stack.port, asked)).json
    assert (said["type"], said["error"].keys()) == ("error", {"type", "message"})
    assert said["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("expected", [b"200-ok", b"100-continue, 200-ok", b"x", b""])
async def test_what_else_a_client_expects_no_engine_hears(plain: Shared, expected: bytes) -> None:
    """Envoy itself says that the body may come; nobody here promises anything else."""
    head = HEAD + b"expect: %b\r\ncontent-length: %d\r\n\r\n" % (expected, len(BODY))
    assert (await exchange(plain.stack.port, head + BODY)).status == 200
    (received,) = plain.recorder.received
    assert "expect" not in received.headers


async def test_a_client_that_waits_for_100_continue_hears_it(plain: Shared) -> None:
    """And the engine is not asked for it again."""
    reader, writer = await asyncio.open_connection("127.0.0.1", plain.stack.port)
    writer.write(HEAD + b"expect: 100-Continue\r\ncontent-length: %d\r\n\r\n" % len(BODY))
    async with asyncio.timeout(20):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        writer.write(BODY)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    writer.close()
    (received,) = plain.recorder.received
    assert "expect" not in received.headers


async def test_query_string(plain: Shared) -> None:
    """A query string does not hide an inference path."""
    reply = await send(plain.stack, "POST", "/v1/chat/completions?api-version=1", chat("recorded", "hello"))
    assert reply.status == 200
    assert plain.recorder.received[0].path == "/v1/chat/completions?api-version=1"
    assert await _chosen(plain, plain.recorder.received[0])


async def raw(port: int, request: bytes) -> tuple[bytes, bytes]:
    """Head and the rest of what comes until the connection closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        head, _, rest = (await asyncio.wait_for(reader.read(), 20)).partition(b"\r\n\r\n")
    finally:
        writer.close()
    return head.lower(), rest


OLD_HEAD = b"POST /v1/chat/completions HTTP/1.0\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize("host", [b"", b"host: gw\r\n"])
async def test_http_1_0(plain: Shared, host: bytes) -> None:
    """A client of HTTP/1.0, with a host or without, is decided and answered, and its connection closed."""
    head, rest = await raw(
        plain.stack.port, OLD_HEAD + host + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
    )
    assert head.startswith(b"http/1.0 200 ")
    assert b"connection: close" in head
    assert json.loads(rest)["choices"]
    await _decided(plain)


async def test_http_1_0_keeps_its_connection_if_asked(plain: Shared) -> None:
    """`Connection: keep-alive` of HTTP/1.0, as nginx may send it: two requests on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", plain.stack.port)
    for _ in range(2):
        writer.write(OLD_HEAD + b"connection: keep-alive\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY)
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)).lower()
        assert head.startswith(b"http/1.0 200 ")
        (length,) = [line for line in head.split(b"\r\n") if line.startswith(b"content-length")]
        await reader.readexactly(int(length.split()[1]))
    writer.close()
    assert len(plain.recorder.received) == 2


async def test_http_1_0_streams(plain: Shared) -> None:
    """A stream comes without chunks, byte for byte, and ends with the connection."""
    body = json.dumps(chat("sim", "hello", 5, stream=True)).encode()
    head, rest = await raw(plain.stack.port, OLD_HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
    assert head.startswith(b"http/1.0 200 ")
    assert b"transfer-encoding" not in head
    assert rest.startswith(b"data: ")
    assert rest.endswith(b"data: [DONE]\n\n")


async def test_http_1_0_is_refused_in_shape(plain: Shared) -> None:
    """A refusal looks the same by HTTP/1.0."""
    body = b'{"model": "unknown", "messages": [{"role": "user", "content": "hi"}]}'
    head, rest = await raw(plain.stack.port, OLD_HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
    assert head.startswith(b"http/1.0 404 ")
    assert json.loads(rest)["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    "offer",
    [
        b"connection: Upgrade\r\nupgrade: TLS/1.2\r\n",
        b"connection: Upgrade\r\nupgrade: TLS/1.2, HTTP/1.1\r\n",
        b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n",
        b"connection: keep-alive, Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n",
        b"upgrade: anything/9\r\n",
        b"connection: Upgrade\r\n",
    ],
)
async def test_offers_to_upgrade_are_not_taken(plain: Shared, offer: bytes) -> None:
    """A request that offers another protocol is answered as without the offer, which goes no further."""
    reply = await exchange(plain.stack.port, HEAD + offer + b"content-length: %d\r\n\r\n" % len(BODY), BODY)
    assert reply.status == 200
    await _decided(plain)
    assert "upgrade" not in plain.recorder.received[0].headers
