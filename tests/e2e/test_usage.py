"""An engine's token usage reaches the outcome, in whatever form; answers reach clients byte for byte."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Sequence
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.e2e.conftest import Shared
from tests.e2e.harness import Behaviour, Reply, eventually, send
from tests.e2e.usage_cases import (
    BODIES,
    CHAT,
    DONE,
    LONG,
    REPORTED,
    STREAMS,
    UNKNOWN,
    USAGE,
    WHOLE,
    dumped,
    token,
)

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]


def answering(*parts: bytes, content_type: str, pause_s: float = 0.0, **headers: str) -> Behaviour:
    """An engine that writes these parts apart."""

    async def behave(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": content_type, **headers})
        await answer.prepare(request)
        for part in parts:
            await answer.write(part)
            await asyncio.sleep(pause_s)
        await answer.write_eof()
        return answer

    return behave


async def ask(plain: Shared, path: str = CHAT, *, stream: bool = False) -> Reply:
    """One request for the recorder's model."""
    return await send(plain.stack, "POST", path, {"model": "recorded", "stream": stream, **BODIES[path]})


async def reported(plain: Shared) -> tuple[int | None, int | None, int | None]:
    """Prompt, completion and cached tokens in the newest outcome."""

    async def read() -> Any:
        return (await plain.stack.last(1))[0]["outcome"]

    outcome = await eventually(read, lambda outcome: outcome is not None)
    return outcome["prompt_tokens"], outcome["completion_tokens"], outcome["cached_tokens"]


async def check(plain: Shared, path: str, parts: Sequence[bytes], *, stream: bool) -> tuple[Any, ...]:
    """The answer passes unchanged; what it reported."""
    content_type = "text/event-stream; charset=utf-8" if stream else "application/json"
    plain.recorder.behaviour = answering(*parts, content_type=content_type)
    reply = await ask(plain, path, stream=stream)
    assert (reply.status, reply.body) == (200, b"".join(parts))
    return await reported(plain)


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        "application/json;charset=UTF-8",
        "Application/JSON",
        "APPLICATION/JSON ; x=y",
        "application/problem+json",
        "application/vnd.engine.v1+json; charset=utf-8",
    ],
)
async def test_json_by_any_name(plain: Shared, content_type: str) -> None:
    """Parameters, letter case and structured suffixes make no difference."""
    plain.recorder.behaviour = answering(dumped({"choices": [{}], "usage": USAGE}), content_type=content_type)
    await ask(plain)
    assert await reported(plain) == REPORTED


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.parametrize("compact", [False, True])
async def test_whole_answers(plain: Shared, case: str, compact: bool) -> None:
    """The usage of the answer itself is found by structure, wherever it is, and nothing else is believed."""
    path, answer, expected = WHOLE[case]
    assert await check(plain, path, [dumped(answer, compact=compact)], stream=False) == expected


async def test_a_whole_answer_in_many_pieces(plain: Shared) -> None:
    """Pieces of any size, cut anywhere."""
    body = dumped({"choices": [{"message": {"content": LONG}}], "usage": USAGE})
    pieces = [body[:-300][at : at + 9000] for at in range(0, len(body) - 300, 9000)]
    pieces += [body[at : at + 1] for at in range(len(body) - 300, len(body))]
    assert await check(plain, CHAT, pieces, stream=False) == REPORTED


@pytest.mark.parametrize("case", STREAMS)
@pytest.mark.parametrize("step", [1_000_000, 1000, 7])
async def test_streams(plain: Shared, case: str, step: int) -> None:
    """Usage in an event, however the stream is cut into pieces; the stream passes byte for byte."""
    path, stream, expected = STREAMS[case]
    if step == 7:
        head, stream = stream[:-2000], stream[-2000:]
        pieces = [head] if head else []
    else:
        pieces = []
    pieces += [stream[at : at + step] for at in range(0, len(stream), step)]
    assert await check(plain, path, pieces, stream=True) == expected


async def test_a_client_that_leaves_early(plain: Shared) -> None:
    """What the engine had said by then is known, but for the last few events."""
    parts = [token(usage={**USAGE, "completion_tokens": i}) for i in range(1, 1000)]
    plain.recorder.behaviour = answering(*parts, content_type="text/event-stream", pause_s=0.01)
    body = {"model": "recorded", "stream": True, **BODIES[CHAT]}
    async with aiohttp.ClientSession() as session, session.post(plain.stack.url + CHAT, json=body) as reply:
        seen = b""
        while seen.count(b"\n\n") < 40:
            seen += await reply.content.readany()
    prompt, completion, cached = await reported(plain)
    assert (prompt, cached) == (100, 64)
    assert completion is not None
    assert 20 <= completion < 1000


async def test_an_answer_beyond_every_buffer(plain: Shared) -> None:
    """40 MiB pass whole, are not held back, and their usage is known: only their ends are looked at."""
    body = dumped({"data": ["x" * (40 << 20)], "usage": USAGE})
    plain.recorder.behaviour = answering(
        *(body[at : at + (1 << 20)] for at in range(0, len(body), 1 << 20)), content_type="application/json"
    )
    reply = await ask(plain, "/v1/embeddings")
    assert (reply.status, len(reply.body)) == (200, len(body))
    assert reply.body == body
    assert await reported(plain) == REPORTED


@pytest.mark.parametrize("coding", ["", "identity", "Identity"])
async def test_a_coding_that_is_none(plain: Shared, coding: str) -> None:
    """A header that names no compression hides nothing."""
    kind = {"content_type": "application/json", "content-encoding": coding}
    plain.recorder.behaviour = answering(dumped({"usage": USAGE}), **kind)  # type: ignore[arg-type]
    assert (await ask(plain)).status == 200
    assert await reported(plain) == REPORTED


@pytest.mark.parametrize(
    ("reason", "coding", "answer"),
    [
        ("encoded", "gzip", gzip.compress(dumped({"usage": USAGE}))),
        ("absent", "identity", dumped({"choices": [{}]})),
    ],
)
async def test_unknown_usage_is_counted(plain: Shared, reason: str, coding: str, answer: bytes) -> None:
    """A compressed answer, or one without usage, passes unharmed and shows in a metric with the reason."""
    name = f'tokenway_usage_unknown_total{{model="recorded",reason="{reason}"}}'

    async def count() -> float:
        lines = (await plain.stack.metrics()).splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)), 0.0)

    before = await count()
    kind = {"content_type": "application/json", "content-encoding": coding}
    plain.recorder.behaviour = answering(answer, **kind)  # type: ignore[arg-type]
    reply = await ask(plain)
    assert reply.status == 200
    assert await reported(plain) == UNKNOWN
    assert await count() == before + 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe2\x82", b"\xed\xa0\x80", b"\0", b"\x1f"])
async def test_bytes_that_are_no_text_cost_nobody_an_ending(plain: Shared, bad: bytes, stream: bool) -> None:
    """They are in one engine's usage; Envoy reports other requests' endings in the same message."""
    usage = dumped(USAGE | {"name": "@"}).replace(b"@", bad)
    body = b'{"choices":[{"delta":{"content":"a"}}],"usage":' + usage + b"}"
    sent = b"data: " + body + b"\n\n" + DONE if stream else body
    kind = "text/event-stream" if stream else "application/json"
    plain.recorder.behaviour = answering(sent, content_type=kind)
    others = [
        send(plain.stack, "POST", CHAT, {"model": "sim", "max_tokens": 3, **BODIES[CHAT]}) for _ in range(4)
    ]
    replies = await asyncio.gather(ask(plain, stream=stream), *others)
    assert [reply.status for reply in replies] == [200] * 5
    assert replies[0].body == sent
    await plain.stack.settled()
    endings = [record["outcome"]["ended"] for record in await plain.stack.last(5)]
    assert endings == ["completed"] * 5
