"""How an answer's content type is written, or that it has none, hides nothing from the real Envoy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest
import pytest_asyncio

from tests.e2e.event_streams import MESSAGES, STREAM
from tests.e2e.harness import Stack, cluster, eventually, running_stack, send
from tests.e2e.raw_engine import posts

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

REPORTED: Final = (9, 2)


class Engine:
    """Says what it is told to say, head and all.

    Attributes:
        says: Its answer to the next requests.
    """

    def __init__(self) -> None:
        self.says = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        async for _ in posts(reader, writer):
            writer.write(self.says)
        writer.close()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def typed() -> AsyncIterator[tuple[Stack, Engine]]:
    """A gateway before it."""
    engine = Engine()
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    key = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        models = {"models": {"m": {"rules": [{"cluster": "c"}]}}}
        async with running_stack([cluster("c", [key])], models) as stack:
            yield stack, engine
    finally:
        server.close()


async def outcome_of(typed: tuple[Stack, Engine], kinds: str, body: bytes, *, stream: bool) -> dict[str, Any]:
    """What became of an answer with these content types, one a line."""
    stack, engine = typed
    lines = "".join(f"content-type: {kind}\r\n" for kind in kinds.split("\n")) if kinds != "none" else ""
    engine.says = f"HTTP/1.1 200 OK\r\n{lines}content-length: {len(body)}\r\n\r\n".encode() + body
    asked = {"model": "m", "stream": stream, "messages": [{"role": "user", "content": "hi"}]}
    reply = await send(stack, "POST", "/v1/chat/completions", asked)
    assert (reply.status, reply.body) == (200, body)

    async def read() -> Any:
        return (await stack.last(1))[0]["outcome"]

    outcome: dict[str, Any] = await eventually(read, lambda outcome: outcome is not None)
    return outcome


OBJECT: Final = b'{"choices": [{}], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}'
ERROR: Final = b'{"error": {"message": "gone", "code": 500}}'
OF_JSON: Final = [
    *("none", "", "application/json\napplication/json", "application/json, text/plain"),
    *("application/json;charset=utf-8", 'Application/JSON ; x="a,b"', "text/json", "application/x-ndjson"),
]


@pytest.mark.parametrize("kinds", OF_JSON)
async def test_json_is_looked_into(typed: tuple[Stack, Engine], kinds: str) -> None:
    """For usage and for errors."""
    outcome = await outcome_of(typed, kinds, OBJECT, stream=False)
    assert (outcome["prompt_tokens"], outcome["completion_tokens"]) == REPORTED
    assert outcome["ended"] == "completed"
    assert (await outcome_of(typed, kinds, b"\xef\xbb\xbf \n" + ERROR, stream=False))[
        "ended"
    ] == "upstream_error"


async def test_lines_of_json_are_looked_into(typed: tuple[Stack, Engine]) -> None:
    """Usage is in the last one, an error in any."""
    lines = b'{"choices": [{}]}\n' * 3
    outcome = await outcome_of(typed, "application/x-ndjson", lines + OBJECT + b"\n", stream=True)
    assert (outcome["prompt_tokens"], outcome["completion_tokens"]) == REPORTED
    for parts in (lines + ERROR, lines + ERROR + b"\n" + OBJECT):
        outcome = await outcome_of(typed, "application/x-ndjson", parts, stream=True)
        assert outcome["ended"] == "upstream_error"


OF_EVENTS: Final = [
    *("none", "", "text/event-stream\ntext/event-stream", "text/event-stream; charset=utf-8, text/plain"),
    *("text/event-stream;charset=utf-8", "Text/Event-Stream"),
]


@pytest.mark.parametrize("kinds", OF_EVENTS)
@pytest.mark.parametrize("before", [b"", b": x\n\n", b"id: 1\n", b"event: x\n", b"\xef\xbb\xbf\n"])
async def test_events_are_looked_into(typed: tuple[Stack, Engine], kinds: str, before: bytes) -> None:
    """Whatever they begin with."""
    outcome = await outcome_of(typed, kinds, before + b"".join(STREAM), stream=True)
    assert (outcome["prompt_tokens"], outcome["completion_tokens"]) == REPORTED
    assert outcome["ended"] == "completed"
    outcome = await outcome_of(typed, kinds, before + b"data: " + ERROR + b"\n\n", stream=True)
    assert outcome["ended"] == "upstream_error"


@pytest.mark.parametrize("body", [b"x" * 40_000, b"note: said", b"", b"\xff\xfe", b"<html>", b" \n"])
async def test_other_bytes_without_a_type_pass(typed: tuple[Stack, Engine], body: bytes) -> None:
    """Nothing is made of them."""
    outcome = await outcome_of(typed, "none", body, stream=False)
    assert (outcome["prompt_tokens"], outcome["status"]) == (None, 200)


async def test_messages_without_a_type(typed: tuple[Stack, Engine]) -> None:
    """Cut short they are cut short."""
    outcome = await outcome_of(typed, "none", b"".join(MESSAGES[:2]), stream=True)
    assert outcome["ended"] == "upstream_error"
