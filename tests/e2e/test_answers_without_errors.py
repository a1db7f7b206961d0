"""Whole answers, however servers write their events, are no failures of the engine: on the real Envoy."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.answer_cases import NO_ERRORS, NO_ERRORS_IN_JSON, whole
from tests.e2e.conftest import Shared
from tests.e2e.event_streams import (
    MESSAGES,
    PING,
    conversation,
    data,
    events,
    response,
)
from tests.e2e.harness import eventually, send
from tests.e2e.small_api_bodies import BODIES

MESSAGE = [{"role": "user", "content": "hi"}]

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]


@pytest.mark.parametrize("name", NO_ERRORS)
async def test_what_looks_like_an_error_and_is_an_answer(plain: Shared, name: str) -> None:
    """Text that models write, errors of tools, an end without a last event: no failures of the engine."""
    path, parts = NO_ERRORS[name]
    plain.recorder.behaviour = events(*parts)
    body = response(0) if path == "responses" else conversation(0)
    await send(plain.stack, "POST", f"/v1/{path}", body | {"model": "recorded", "prompt": "hi"})

    async def read() -> Any:
        return (await plain.stack.last(1))[0]["outcome"]

    assert (await eventually(read, lambda outcome: outcome is not None))["ended"] == "completed"


@pytest.mark.parametrize("name", NO_ERRORS_IN_JSON)
async def test_whole_answers_that_look_like_an_error(plain: Shared, name: str) -> None:
    """The same, and the answers of the APIs that generate nothing."""
    path, answer = NO_ERRORS_IN_JSON[name]
    plain.recorder.behaviour = whole(200, answer)
    asked = BODIES.get(path) or {"input": "hi", "prompt": "hi", "messages": MESSAGE, "max_tokens": 9}
    await send(plain.stack, "POST", path, {"model": "recorded", **asked})

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
