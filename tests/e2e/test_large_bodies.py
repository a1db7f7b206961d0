"""Large bodies through a real Envoy: read elsewhere, sanitised all the same, and without delay for others."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.e2e.conftest import Shared
from tests.e2e.harness import chat, send_until_heard

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PATH = "/v1/chat/completions"


async def test_a_large_body_is_sanitised_and_arrives_whole(plain: Shared) -> None:
    """Twelve megabytes of picture: the engine gets them, and no field that steers."""
    picture = "data:image/png;base64," + "A" * 12_000_000
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "what?"}]
    body = {
        "model": "recorded",
        "priority": -100,
        "messages": [{"role": "user", "content": content}],
    }
    reply = await send_until_heard(plain.stack, "POST", PATH, body)
    assert reply.status == 200
    (received,) = plain.recorder.received
    del body["priority"]
    assert json.loads(received.body) == body


async def test_costly_bodies_do_not_open_the_way_for_others(plain: Shared) -> None:
    """While bodies of millions of lists are read and refused, others' requests are sanitised as ever."""
    junk = (
        b'{"model":"recorded","messages":[{"role":"user","content":"a"}],"x":[' + b"[]," * 3_000_000 + b"1]}"
    )
    costly = [asyncio.ensure_future(send_until_heard(plain.stack, "POST", PATH, junk)) for _ in range(3)]
    others = [
        await send_until_heard(plain.stack, "POST", PATH, {**chat("recorded", "hello"), "priority": -1})
        for _ in range(10)
    ]
    refused = await asyncio.gather(*costly)
    assert {reply.status for reply in others} == {200}
    assert {reply.status for reply in refused} == {413}
    assert len(plain.recorder.received) == 10
    assert not any(b'"priority"' in one.body for one in plain.recorder.received)
