"""Every API of the engines through Envoy and the gateway, with the official client where it has one."""

from __future__ import annotations

import json

import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.e2e.conftest import Shared
from tests.e2e.harness import send

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "How are you?"}]


async def test_chat_whole(client: AsyncOpenAI) -> None:
    """A chat completion comes back whole, with the engine's usage."""
    answer = await client.chat.completions.create(model="sim", messages=MESSAGES, max_tokens=12)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


async def test_chat_streamed(client: AsyncOpenAI) -> None:
    """A streamed chat has one chunk per token and, if asked for, the usage at its end."""
    stream = await client.chat.completions.create(
        model="sim",
        messages=MESSAGES,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert len([text for text in texts if text]) == 12
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


async def test_streamed_and_whole_agree(client: AsyncOpenAI) -> None:
    """The same question has the same answer, streamed or not, by the model's alias too."""
    whole = await client.chat.completions.create(model="sim", messages=MESSAGES, max_tokens=20)
    stream = await client.chat.completions.create(
        model="simulated", messages=MESSAGES, max_tokens=20, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content


async def test_completions(client: AsyncOpenAI) -> None:
    """Text completions answer whole and streamed alike."""
    whole = await client.completions.create(model="sim", prompt="Once upon a time", max_tokens=9)
    stream = await client.completions.create(
        model="sim", prompt="Once upon a time", max_tokens=9, stream=True
    )
    assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 9


async def test_responses(client: AsyncOpenAI) -> None:
    """The Responses API answers whole and streamed alike, usage included."""
    whole = await client.responses.create(model="sim", input="How are you?", max_output_tokens=9)
    stream = await client.responses.create(
        model="sim", input="How are you?", max_output_tokens=9, stream=True
    )
    events = [event async for event in stream]
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == whole.output_text
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == whole.output_text
    assert whole.usage is not None
    assert whole.usage.output_tokens == 9


async def test_embeddings(client: AsyncOpenAI) -> None:
    """Each input has its embedding, and equal inputs have equal ones."""
    answer = await client.embeddings.create(model="sim", input=["one", "two", "one"])
    vectors = [item.embedding for item in answer.data]
    assert vectors[0] == vectors[2] != vectors[1]
    assert answer.usage.prompt_tokens > 0


async def test_messages(plain: Shared) -> None:
    """The Anthropic API answers whole and as a stream of named events."""
    body = {"model": "sim", "messages": MESSAGES, "max_tokens": 9}
    whole = await send(plain.stack, "POST", "/v1/messages", body)
    assert whole.status == 200
    streamed = await send(plain.stack, "POST", "/v1/messages", {**body, "stream": True})
    events = [
        json.loads(line.removeprefix(b"data: "))
        for line in streamed.body.splitlines()
        if line.startswith(b"data: ")
    ]
    text = "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta")
    assert text == whole.json["content"][0]["text"]
    assert whole.json["usage"]["output_tokens"] == 9
    assert events[-1] == {"type": "message_stop"}


async def test_models(client: AsyncOpenAI) -> None:
    """The gateway lists the models of all clusters and their aliases, and knows each by name."""
    listed = [model.id async for model in client.models.list()]
    assert listed == ["sim", "simulated", "recorded", "tuned", "steered", "pair", "dead"]
    assert (await client.models.retrieve("tuned")).id == "tuned"


async def test_engine_usage_is_learned(plain: Shared, client: AsyncOpenAI) -> None:
    """What the engine counted reaches the decision record of a streamed and of a whole answer."""
    await client.chat.completions.create(model="sim", messages=MESSAGES, max_tokens=7)
    stream = await client.chat.completions.create(
        model="sim", messages=MESSAGES, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    _ = [chunk async for chunk in stream]
    await plain.stack.settled()
    outcomes = [record["outcome"] for record in await plain.stack.last(2)]
    assert sorted(outcome["completion_tokens"] for outcome in outcomes) == [7, 8]
    assert all(outcome["prompt_tokens"] for outcome in outcomes)


async def test_lora_rule_rewrites_the_model(plain: Shared, client: AsyncOpenAI) -> None:
    """A rule with an adapter sends the adapter's name to the engine, in a body of the right length."""
    answer = await client.chat.completions.create(model="tuned", messages=MESSAGES)
    assert answer.choices[0].message.content == "well"
    (received,) = plain.recorder.received
    assert json.loads(received.body) == {"model": "polite", "messages": MESSAGES}
    assert received.headers["content-length"] == str(len(received.body))
