"""Clients that compress their requests: engines get plain bodies, bombs get refusals, others get served."""

from __future__ import annotations

import asyncio
import gzip
import json
import sys
import zlib
from collections.abc import Callable
from random import Random

import brotli  # type: ignore[import-untyped]
import pytest

from extproc.request.compression import ALWAYS_BYTES
from extproc.server.bodies.unpacking import INLINE_BYTES
from tests.e2e.conftest import Shared
from tests.e2e.harness import Reply, chat, check, check_for_any_api, exchange, post, send_until_heard

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

SMALL = json.dumps(chat("recorded", "Say hello."), indent=1).encode()
LARGE = json.dumps(chat("recorded", Random(1).randbytes(2_000_000).hex())).encode()
"""4 MB, which compress to more than what is decoded on the spot, but not as if nothing were in them."""

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "GZIP": gzip.compress,
    "deflate": zlib.compress,
    "zstd": zstd.compress,
    "br": lambda data: bytes(brotli.compress(data, quality=4)),
    "gzip, zstd": lambda data: zstd.compress(gzip.compress(data)),
    "identity": lambda data: data,
}


async def ask(plain: Shared, body: bytes, coding: str, path: str = "/v1/chat/completions") -> Reply:
    """One request whose body is said to be compressed so."""
    return await send_until_heard(plain.stack, "POST", path, body, {"content-encoding": coding})


@pytest.mark.parametrize("coding", PACKERS)
@pytest.mark.parametrize("body", [SMALL, LARGE], ids=["small", "large"])
async def test_the_engine_gets_the_plain_body(plain: Shared, coding: str, body: bytes) -> None:
    """Decoded byte for byte, with its own length, without the header; and decided like any other."""
    packed = PACKERS[coding](body)
    assert body is SMALL or len(packed) > INLINE_BYTES
    assert (await ask(plain, packed, coding)).status == 200
    (received,) = plain.recorder.received
    assert received.body == body
    assert received.headers["content-length"] == str(len(body))
    assert "content-encoding" not in received.headers
    record = await plain.stack.explain(received.headers["x-tokenway-request-id"])
    assert record["snapshot"]["keys"] == [plain.recorder.key]


@pytest.mark.parametrize("body", [SMALL, LARGE], ids=["small", "large"])
async def test_a_rewritten_body_wins(plain: Shared, body: bytes) -> None:
    """What is taken out or renamed in a body that came compressed is so at the engine."""
    fields = json.loads(body) | {"model": "tuned", "priority": -1}
    assert (await ask(plain, gzip.compress(json.dumps(fields).encode()), "gzip")).status == 200
    (received,) = plain.recorder.received
    assert json.loads(received.body) == json.loads(body) | {"model": "polite"}
    assert received.headers["content-length"] == str(len(received.body))
    assert "content-encoding" not in received.headers


async def test_codings_in_headers_of_their_own(plain: Shared) -> None:
    """Two lines of the header are one list."""
    packed = zstd.compress(gzip.compress(SMALL))
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        b"content-encoding: gzip\r\ncontent-encoding: zstd\r\ncontent-length: %d\r\n\r\n"
    )
    assert (await exchange(plain.stack.port, head % len(packed), packed)).status == 200
    assert plain.recorder.received[0].body == SMALL


@pytest.mark.parametrize("coding", ["compress", "gzip, snappy", "aws-chunked", "gzip, gzip, gzip"])
async def test_what_is_not_taken_is_named(plain: Shared, coding: str) -> None:
    """415 with `Accept-Encoding`, so that the client can do better."""
    reply = await ask(plain, SMALL, coding)
    error = check(reply, 415, "unsupported_encoding")
    assert reply.headers["accept-encoding"] == "gzip, deflate, zstd, br"
    assert "accepted" in error["message"]
    assert plain.recorder.received == []


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("coding", ["gzip, chunked", "gzip", "identity"])
async def test_compressed_on_the_way_is_refused_as_well(plain: Shared, path: str, coding: str) -> None:
    """A coding of the transfer, which Envoy does not take: no 5xx, after which clients ask again."""
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: {coding}\r\n\r\n".encode()
    packed = gzip.compress(SMALL)
    reply = await exchange(plain.stack.port, head, b"%x\r\n%b\r\n0\r\n\r\n" % (len(packed), packed))
    error = check_for_any_api(reply, 415, "unsupported_encoding")
    assert reply.headers["accept-encoding"] == "gzip, deflate, zstd, br"
    assert "accepted" in error["message"]
    assert plain.recorder.received == []


@pytest.mark.parametrize("body", [SMALL, gzip.compress(SMALL)[:-3], gzip.compress(LARGE)[:-3], b""])
async def test_damaged_bodies_are_refused(plain: Shared, body: bytes) -> None:
    """400 that says what is wrong with the coding, not with JSON; an empty body is an empty body."""
    reply = await ask(plain, body, "gzip")
    error = check(reply, 400, "invalid_request" if body else "invalid_json")
    assert ("gzip" in error["message"]) == bool(body)
    assert plain.recorder.received == []


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd", "br"])
async def test_bombs_are_refused_and_no_request_waits(plain: Shared, coding: str) -> None:
    """Bombs of 1 GB, one after another: 413 each, and others are decided meanwhile."""
    bomb = PACKERS[coding](bytes(64 << 20))
    if coding == "gzip":
        bomb *= 16
    replies = await asyncio.gather(
        *(ask(plain, bomb, coding) for _ in range(8)),
        *(post(plain.stack, chat("recorded", "hello")) for _ in range(8)),
    )
    for reply in replies[:8]:
        check(reply, 413, "body_too_large")
    assert [reply.status for reply in replies[8:]] == [200] * 8
    assert len(plain.recorder.received) == 8


async def test_a_large_body_is_decoded_beside_the_loop(plain: Shared) -> None:
    """28 MB, the largest there may be: decoded, decided, sent whole, with another request beside it."""
    body = json.dumps(chat("recorded", Random(2).randbytes(14_000_000).hex())).encode()
    packed = gzip.compress(body, 1)
    reply, other = await asyncio.gather(
        ask(plain, packed, "gzip"), post(plain.stack, chat("recorded", "hello"))
    )
    assert (reply.status, other.status) == (200, 200)
    assert {len(received.body) for received in plain.recorder.received} >= {len(body)}


async def test_the_smallest_bomb_makes_little(plain: Shared) -> None:
    """A few bytes may become a MiB and no more."""
    fits = json.dumps(chat("recorded", "a" * (ALWAYS_BYTES - 1000))).encode()
    assert (await ask(plain, zstd.compress(fits), "zstd")).status == 200
    over = json.dumps(chat("recorded", "a" * ALWAYS_BYTES)).encode()
    error = check(await ask(plain, zstd.compress(over), "zstd"), 413, "body_too_large")
    assert (
        "decompresse" in error["message"]
    )  # Tokenway's words, not Envoy's for what is too large as it comes
    said = (await ask(plain, zstd.compress(over), "zstd", "/v1/messages")).json["error"]
    assert (said["type"], said["message"]) == ("request_too_large", error["message"])
