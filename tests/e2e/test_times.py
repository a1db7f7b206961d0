"""Times and counts of answers that begin with something else, after another try, or several at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from tests.e2e.event_streams import DONE, MESSAGES, RESPONSES, TOKEN, data, typed
from tests.e2e.harness import (
    Behaviour,
    Recorder,
    Stack,
    cluster,
    eventually,
    recording,
    running_stack,
    sample,
    send,
)

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

WAIT_S = 1.0
"""For the first token, or for the first try to be given up."""

TOKENS = 5
USAGE = data({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": TOKENS}})
BEGUN = MESSAGES[0] + typed("content_block_start", index=0, content_block={"type": "text", "text": ""})
DELTA = typed("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": TOKENS})
COMPLETED = typed("response.completed", response={"usage": {"input_tokens": 9, "output_tokens": TOKENS}})


def waits(first: bytes, *parts: bytes) -> Behaviour:
    """Says something that is no token, computes, and then answers."""

    async def behave(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(first)
        await asyncio.sleep(WAIT_S)
        for part in parts:
            await answer.write(part)
            await asyncio.sleep(0.01)
        return answer

    return behave


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def timed() -> AsyncIterator[tuple[Stack, Recorder]]:
    """Models at one engine, so that each has series of its own."""
    async with recording() as recorder:
        clusters = [
            cluster(name, [recorder.key])
            for name in ("commented", "announced", "begun", "retried", "several")
        ]
        models = {each["name"]: {"rules": [{"cluster": each["name"]}]} for each in clusters}
        config = {"models": models, "signals": {"first_byte_timeout_s": WAIT_S}}
        async with running_stack(clusters, config) as stack:
            yield stack, recorder
            await stack.settled()


async def outcome_of(stack: Stack) -> dict[str, Any]:
    """The latest record, with its outcome."""

    async def read() -> dict[str, Any]:
        return (await stack.last(1))[0]

    return await eventually(read, lambda record: record["outcome"] is not None)


async def times_of(stack: Stack, model: str, operation: str) -> tuple[float, float]:
    """Sums of the times to a first token and per output token."""
    scrape, found = await stack.metrics(), []
    for name in ("time_to_first_token", "time_per_output_token"):
        labels = f'{{gen_ai_operation_name="{operation}",gen_ai_request_model="{model}"}}'
        value = sample(scrape, f"gen_ai_server_{name}_seconds_sum{labels}")
        assert value is not None
        found.append(value)
    return found[0], found[1]


@pytest.mark.parametrize(
    ("model", "path", "operation", "behaviour"),
    [
        (
            "commented",
            "/v1/chat/completions",
            "chat",
            waits(b": keep-alive\n\n", *[TOKEN] * TOKENS, USAGE, DONE),
        ),
        ("announced", "/v1/responses", "responses", waits(RESPONSES[0], *[RESPONSES[1]] * TOKENS, COMPLETED)),
        ("begun", "/v1/messages", "messages", waits(BEGUN, *[MESSAGES[1]] * TOKENS, DELTA, MESSAGES[3])),
    ],
)
async def test_what_comes_before_a_token_is_no_pace(
    timed: tuple[Stack, Recorder], model: str, path: str, operation: str, behaviour: Behaviour
) -> None:
    """Neither shown nor learned: the tokens came in what is left of the answer's time after the wait."""
    stack, recorder = timed
    recorder.behaviour = behaviour
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    if operation == "responses":
        asked = {"input": "hi"}
    assert (await send(stack, "POST", path, {"model": model, "stream": True, **asked})).status == 200
    record = await outcome_of(stack)
    ttft_s, tpot_s = await times_of(stack, model, operation)
    most_s = record["outcome"]["duration_s"] - ttft_s
    assert ttft_s >= WAIT_S
    assert 0 < tpot_s * (TOKENS - 1) <= most_s + 1e-6
    bias_s = sample(
        await stack.metrics(),
        f'tokenway_prediction_bias_seconds{{group="{model}",model="{model}",target="tpot"}}',
    )
    assert bias_s is not None
    learned_s = record["predicted_tpot_s"][0] - bias_s
    assert 0 < learned_s * (TOKENS - 1) <= most_s + 1e-3


async def test_a_try_that_failed_is_part_of_the_wait(timed: tuple[Stack, Recorder]) -> None:
    """Clients waited for it; it is no part of the time between tokens."""
    stack, recorder = timed
    tries = 0

    async def behave(request: web.Request) -> web.StreamResponse:
        nonlocal tries
        tries += 1
        if tries == 1:
            await asyncio.sleep(60)
        return await waits(TOKEN, *[TOKEN] * (TOKENS - 1), USAGE, DONE)(request)

    recorder.behaviour = behave
    body = {"model": "retried", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    assert (await send(stack, "POST", "/v1/chat/completions", body)).status == 200
    outcome = (await outcome_of(stack))["outcome"]
    ttft_s, tpot_s = await times_of(stack, "retried", "chat")
    assert outcome["attempts"] == 2
    assert ttft_s >= WAIT_S > outcome["ttft_s"]
    assert WAIT_S <= tpot_s * (TOKENS - 1) <= outcome["duration_s"] - WAIT_S


@pytest.mark.parametrize(
    "asked",
    [{"prompt": ["a", "b", "c"]}, {"prompt": "a", "n": 3}, {"prompt": "a" * 3_000_000, "n": 3}],
    ids=["prompts", "n", "large"],
)
async def test_tokens_of_several_answers_are_all_counted(
    timed: tuple[Stack, Recorder], asked: dict[str, Any]
) -> None:
    """`max_tokens` bounds each of them."""
    stack, recorder = timed

    async def behave(_: web.Request) -> web.StreamResponse:
        return web.json_response({"choices": [{}], "usage": {"prompt_tokens": 9, "completion_tokens": 60}})

    recorder.behaviour = behave
    body = {"model": "several", "max_tokens": 20, **asked}
    assert (await send(stack, "POST", "/v1/completions", body)).status == 200
    assert (await outcome_of(stack))["outcome"]["completion_tokens"] == 60
