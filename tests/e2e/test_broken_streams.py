"""A stream that its engine breaks off right behind a chunk: what of it the client gets, on the real Envoy."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

import pytest

from tests.e2e.event_streams import DONE, TOKEN
from tests.e2e.harness import Stack, chat, cluster, running_stack
from tests.e2e.raw_engine import posts

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

TIMES: Final = 150
APART_S: Final = 0.05
"""Much longer than Tokenway takes to let a chunk pass (0.3 to 1 ms), also on a busy machine."""

HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END: Final = b"0\r\n\r\n"

Break = Callable[[asyncio.StreamWriter], None]


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def reset(writer: asyncio.StreamWriter) -> None:
    """RST."""
    raw: socket.socket = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def close(writer: asyncio.StreamWriter) -> None:
    """FIN, without the end of the body."""
    writer.close()


class Engine:
    """Says the beginning of an answer, or all of it, and breaks off.

    Attributes:
        says: Its answer to the next requests.
        breaks: How.
        after_s: How long after what it says.
    """

    def __init__(self) -> None:
        self.says = b""
        self.breaks: Break = reset
        self.after_s = 0.0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        async for _ in posts(reader, writer):
            writer.write(self.says)
            with suppress(ConnectionError):
                await writer.drain()
            if self.after_s:
                await asyncio.sleep(self.after_s)
            self.breaks(writer)
            return
        writer.close()


@asynccontextmanager
async def _broken(*, first_chunk: bool) -> AsyncIterator[tuple[Stack, Engine]]:
    engine = Engine()
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    key = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    config = {"models": {"m": {"rules": [{"cluster": "c"}]}}, "signals": {"first_chunk": first_chunk}}
    try:
        async with running_stack([cluster("c", [key])], config) as stack:
            yield stack, engine
    finally:
        server.close()


async def _answer(port: int) -> bytes:
    """All that a client gets of one stream."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps(chat("m", "hi", stream=True)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
    fields = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(f"{head}{fields}".encode() + body)
    got = b""
    async with asyncio.timeout(30):
        with suppress(ConnectionError):
            while part := await reader.read(65_536):
                got += part
    writer.close()
    return got


async def _count(stack: Stack, wanted: bytes) -> Counter[bool]:
    """How often all that was said arrived."""
    return Counter([wanted in await _answer(stack.port) for _ in range(TIMES)])


WHOLE: Final = {True: TIMES}


@pytest.mark.parametrize("breaks", [reset, close])
async def test_without_the_first_chunk_all_that_came_arrives(breaks: Break) -> None:
    """Envoy alone delivers what it read before it saw the break."""
    async with _broken(first_chunk=False) as (stack, engine):
        engine.says, engine.breaks = HEAD + _chunk(TOKEN), breaks
        assert await _count(stack, TOKEN) == WHOLE


@pytest.mark.parametrize("breaks", [reset, close])
async def test_with_the_first_chunk_what_has_passed_arrives(breaks: Break) -> None:
    """A whole answer always; of a broken one, a chunk that had its time to pass (docs/adr/0002)."""
    async with _broken(first_chunk=True) as (stack, engine):
        engine.breaks = breaks
        engine.says = HEAD + _chunk(TOKEN) + _chunk(DONE) + END
        assert await _count(stack, DONE) == WHOLE
        engine.says, engine.after_s = HEAD + _chunk(TOKEN), APART_S
        assert await _count(stack, TOKEN) == WHOLE


async def test_a_chunk_that_is_lost_leaves_a_stream_that_is_seen_to_be_broken() -> None:
    """What the break overtakes is missing; no client takes the rest for an answer, nothing stays charged."""
    async with _broken(first_chunk=True) as (stack, engine):
        engine.says = HEAD + _chunk(TOKEN)
        for _ in range(TIMES):
            assert END not in await _answer(stack.port)
        await stack.settled()
        outcomes = [record["outcome"]["ended"] for record in await stack.last(20)]
        assert set(outcomes) <= {"upstream_reset"}
