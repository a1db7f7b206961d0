"""Whole answers, however servers write their events, are no failures of the engine: on the real Envoy."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.conftest import Shared
from tests.e2e.event_streams import (
    DONE,
    MESSAGES,
    PING,
    RESPONSES,
    STREAM,
    TOKEN,
    by_cr,
    conversation,
    data,
    events,
    response,
    typed,
)
from tests.e2e.harness import eventually, send

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

NO_ERRORS = {
    "said": (
        "chat/completions",
        (TOKEN.replace(b'"a"', rb'"\n\nevent: error\ndata: {\"error\": {\"type\": \"x\"}}"'), DONE),
    ),
    "said-at-length": (
        "chat/completions",
        (TOKEN.replace(b'"a"', rb'"data: {\"error\": {\"' + b"a" * 40_000 + b'"'), TOKEN, DONE),
    ),
    "argument-at-length": (
        "messages",
        (
            MESSAGES[0],
            typed(
                "content_block_start",
                content_block={"type": "tool_use", "input": {"error": {"type": "a" * 40_000}}},
            ),
            *MESSAGES[2:],
        ),
    ),
    "null": (
        "chat/completions",
        (data({"error": None, "choices": [{"index": 0, "delta": {"content": "a"}}]}), TOKEN, DONE),
    ),
    "empty-text": (
        "chat/completions",
        (data({"error": "", "choices": [{"index": 0, "delta": {"content": "a"}}]}), TOKEN, DONE),
    ),
    "empty-object": (
        "chat/completions",
        (TOKEN, data({"choices": [{"index": 0, "delta": {"content": "a"}}], "error": {}}), DONE),
    ),
    "argument": (
        "messages",
        (
            MESSAGES[0],
            typed("content_block_start", content_block={"type": "tool_use", "input": {"error": "x"}}),
            *MESSAGES[2:],
        ),
    ),
    "no-stop-event": ("messages", MESSAGES[:3]),
    "pinged-to-the-end": ("messages", (*MESSAGES, PING)),
    "pinged-without-a-name": ("messages", (*MESSAGES[:3], data({"type": "ping"}), PING)),
    "speaks-of-pings": (
        "messages",
        (
            MESSAGES[0],
            typed("content_block_delta", delta={"text": '{"type": "ping"}\nevent: ping\ndata: '}),
            *MESSAGES[2:],
        ),
    ),
    "a-tool-failed": (
        "responses",
        (
            RESPONSES[0],
            typed("response.output_item.done", item={"type": "mcp_call", "error": "no such file"}),
            RESPONSES[2],
        ),
    ),
    "by-cr": ("messages", tuple(by_cr(*MESSAGES))),
    "by-cr-without-names": ("chat/completions", tuple(by_cr(TOKEN, TOKEN, *STREAM[2:]))),
    "by-cr-in-pieces": ("messages", tuple(bytes([byte]) for byte in b"".join(by_cr(*MESSAGES)))),
    "by-crlf-in-pieces": (
        "messages",
        tuple(bytes([byte]) for byte in b"".join(MESSAGES).replace(b"\n", b"\r\n")),
    ),
    "two-spaces": ("chat/completions", tuple(part.replace(b"data: ", b"data:  ") for part in STREAM)),
    "no-spaces": ("chat/completions", tuple(part.replace(b"data: ", b"data:") for part in (TOKEN, DONE))),
    "mark-of-utf-8": ("messages", (b"\xef\xbb\xbf", *MESSAGES)),
    "last-line-alone": ("messages", (*MESSAGES[:3], MESSAGES[3].rstrip())),
    **{
        f"done-as-{said.decode().strip()}": ("chat/completions", (TOKEN, TOKEN, said))
        for said in (b"data:[done]\n\n", b"data: DONE\n\n", b'data: "[DONE]"\r\n\r\n', b"data: [DONE]")
    },
    "finished": (
        "chat/completions",
        (TOKEN, TOKEN.replace(b'"index"', b'"finish_reason": "stop", "index"')),
    ),
}


@pytest.mark.parametrize("name", NO_ERRORS)
async def test_what_looks_like_an_error_and_is_an_answer(plain: Shared, name: str) -> None:
    """Text that models write, errors of tools, an end without a last event: no failures of the engine."""
    path, parts = NO_ERRORS[name]
    plain.recorder.behaviour = events(*parts)
    body = response(0) if path == "responses" else conversation(0)
    await send(plain.stack, "POST", f"/v1/{path}", body | {"model": "recorded"})

    async def read() -> Any:
        return (await plain.stack.last(1))[0]["outcome"]

    assert (await eventually(read, lambda outcome: outcome is not None))["ended"] == "completed"


@pytest.mark.parametrize(
    "parts", [(PING, PING), (*MESSAGES[:2], PING), (*MESSAGES[:2], data({"type": "ping"}))]
)
async def test_a_ping_is_no_end(plain: Shared, parts: tuple[bytes, ...]) -> None:
    """Nor an answer: what is missing before it is missing."""
    plain.recorder.behaviour = events(*parts)
    await send(plain.stack, "POST", "/v1/messages", conversation(0) | {"model": "recorded"})

    async def read() -> Any:
        return (await plain.stack.last(1))[0]["outcome"]

    assert (await eventually(read, lambda outcome: outcome is not None))["ended"] == "upstream_error"
