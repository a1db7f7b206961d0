"""Answers as engines stream them, event by event, and requests for them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

from tests.e2e.harness import Behaviour

DONE = b"data: [DONE]\n\n"


def data(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def typed(kind: str, **fields: Any) -> bytes:
    """One event as the Messages and the Responses API send it."""
    return f"event: {kind}\n".encode() + data({"type": kind, **fields})


TOKEN = data({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "a"}}]})
STREAM = (TOKEN, TOKEN, data({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}), DONE)
MESSAGES = (
    typed("message_start", message={"usage": {"input_tokens": 9, "output_tokens": 0}}),
    typed("content_block_delta", index=0, delta={"type": "text_delta", "text": "a"}),
    typed("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 1}),
    typed("message_stop"),
)
PING = typed("ping")
RESPONSES = (
    typed("response.created", response={"id": "r", "error": None}),
    typed("response.output_text.delta", delta="a"),
    typed("response.completed", response={"usage": {"input_tokens": 9, "output_tokens": 1}}),
)


def by_cr(*parts: bytes) -> list[bytes]:
    """The same events, their lines ended by CR alone."""
    return [part.replace(b"\n", b"\r") for part in parts]


def events(*parts: bytes, after_s: float = 0.0) -> Behaviour:
    """Answers with these events."""

    async def behave(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(after_s)
        answer = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await answer.prepare(request)
        for part in parts:
            await answer.write(part)
        await answer.write_eof()
        return answer

    return behave


def conversation(number: int) -> dict[str, Any]:
    """A streamed request for Chat or Messages, unlike all others."""
    text = f"{number} " + "w " * 500
    return {"model": "m", "stream": True, "max_tokens": 9, "messages": [{"role": "user", "content": text}]}


def response(number: int) -> dict[str, Any]:
    """The same for Responses."""
    return {"model": "m", "stream": True, "input": f"{number} " + "w " * 500}
