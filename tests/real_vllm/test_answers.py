"""Both gateways serve a real engine's API: chats and completions, streamed and whole, turn after turn."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
from redis.asyncio import Redis
from tokenizers import Tokenizer

from testbed.processes import REPOSITORY
from testbed.vllm.engine import SERVED_MODEL
from testbed.vllm.environment.install import MODEL
from tests.real_vllm.accuracy import foreseen
from tests.real_vllm.asking import Messages, ask, text
from tests.real_vllm.conftest import Deployment

pytestmark = [pytest.mark.real_vllm, pytest.mark.asyncio(loop_scope="session")]

TURNS = 5
TURN_TOKENS = 256
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("is_chat", [False, True], ids=["completion", "chat"])
@pytest.mark.parametrize("gateway", [0, 1])
async def test_requests_succeed(deployment: Deployment, gateway: int, is_chat: bool, stream: bool) -> None:
    """Text comes back and usage is the engine's own, from the client's point of view and the gateway's."""
    words = "Say something short, please."
    prompt = [{"role": "user", "content": words}] if is_chat else words
    answer = await ask(deployment.clients[gateway], prompt, model=SERVED_MODEL, stream=stream)
    assert answer.text
    assert answer.completion_tokens == 8
    tokens = len(Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(words).ids)
    assert tokens <= answer.prompt_tokens <= tokens + (16 if is_chat else 0)
    (record,) = await deployment.records([answer])
    assert record["outcome"]["prompt_tokens"] == answer.prompt_tokens
    assert record["outcome"]["cached_tokens"] == answer.cached_tokens
    assert (record["outcome"]["ttft_s"] is not None) == stream


async def test_chat_with_tools_succeeds(deployment: Deployment) -> None:
    """Tools reach the engine, which counts their text in the prompt."""
    messages = [{"role": "user", "content": "What is the weather?"}]
    plain = await ask(deployment.clients[0], messages, model=SERVED_MODEL)
    with_tools = await ask(
        deployment.clients[0], messages, model=SERVED_MODEL, tools=TOOLS, tool_choice="none"
    )
    assert with_tools.prompt_tokens > plain.prompt_tokens + 20


@pytest.mark.parametrize("through", ["one gateway", "both gateways"])
async def test_turns_find_the_conversation_cached(
    deployment: Deployment, report: Callable[[str, Any], None], through: str
) -> None:
    """Through one gateway each turn finds nearly all of the turn before it in the engine's cache."""
    rng = random.Random(f"turns {through}")
    clients = deployment.clients[:1] if through == "one gateway" else deployment.clients
    messages: Messages = []
    answers = []
    for turn in range(TURNS):
        messages = [*messages, {"role": "user", "content": text(rng, TURN_TOKENS)}]
        answer = await ask(clients[turn % len(clients)], messages, model=SERVED_MODEL, max_tokens=16)
        messages = [*messages, {"role": "assistant", "content": answer.text}]
        answers.append(answer)
        for gateway in deployment.gateways:
            await gateway.settled()
    before = [answer.prompt_tokens for answer in answers[:-1]]
    shares = [answer.cached_tokens / known for answer, known in zip(answers[1:], before, strict=True)]
    assert answers[0].cached_tokens == 0
    if through == "one gateway":
        assert min(shares) > 0.85
    rows = foreseen(await deployment.records(answers))
    report(
        f"turns through {through}",
        {
            "cached_share_of_previous_turn": [round(share, 3) for share in shares],
            "predicted_cached_tokens": [row.predicted_cached_tokens for row in rows],
            "cached_tokens": [row.cached_tokens for row in rows],
        },
    )


async def test_the_tokenizer_of_the_file_is_the_engines(deployment: Deployment) -> None:
    """The engine counts a text, line ends and other scripts included, exactly as tokenizer.json does."""
    words = text(random.Random(7), 500) + "  \n\n\té ü 日本語 don't 12345\r\n e\u0301"
    tokens = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(words).ids
    answer = await ask(deployment.clients[0], words, model=SERVED_MODEL, stream=False)
    assert answer.prompt_tokens == len(tokens)


async def test_the_report_has_a_row_per_request(deployment: Deployment) -> None:
    """The report of a running gateway lists a request just answered; its last line is JSON."""
    answer = await ask(deployment.clients[1], "For the report.", model=SERVED_MODEL)
    await deployment.gateways[1].settled()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.real_vllm.report", deployment.gateways[1].admin_url, "--last", "1"),
        cwd=REPOSITORY,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    _, row, last = output.decode().splitlines()
    assert row.split()[:3] == [answer.decision_id, SERVED_MODEL, str(answer.prompt_tokens)]
    assert json.loads(last)["cached_tokens"]["requests"] == 1


async def test_shared_redis_answers(deployment: Deployment) -> None:
    """The Redis that gateways may share is a real one: it keeps what one connection wrote for another."""
    url = deployment.redis.url
    async with Redis.from_url(url) as writer, Redis.from_url(url) as reader:
        await writer.set("key", "value", ex=60)
        assert await reader.get("key") == b"value"
