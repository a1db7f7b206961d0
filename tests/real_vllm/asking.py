"""Requests through the official client, texts to ask with, and the load that shares prefixes."""

from __future__ import annotations

import asyncio
import random
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from openai import AsyncOpenAI
from tokenizers import Tokenizer

from testbed.vllm.environment.install import MODEL
from tests.e2e.harness import DEBUG_HEADERS, DECISION_HEADER

Messages = Sequence[Mapping[str, Any]]

SOURCE_FILES: Final = 40
"""Of the standard library, whose lines texts are made of: some 20,000 lines."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered request, as its client saw it.

    Attributes:
        decision_id: Under which its gateway holds the decision.
        text: What was generated.
        ttft_s: From asking to the first chunk with a choice; None if it was not streamed.
        prompt_tokens: As the engine counted.
        completion_tokens: As the engine counted.
        cached_tokens: Prompt tokens that the engine took from its prefix cache.
    """

    decision_id: str
    text: str
    ttft_s: float | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@cache
def _lines() -> tuple[list[str], list[int]]:
    """Lines and their lengths in tokens."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[-SOURCE_FILES:]
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines(keepends=True)]
    return lines, [len(encoding.ids) for encoding in tokenizer.encode_batch(lines)]


def text(rng: random.Random, num_tokens: int) -> str:
    """Random lines of source code, of `num_tokens` tokens or a line more, that no other text begins with."""
    lines, lengths = _lines()
    parts = [f"{rng.getrandbits(64):016x}\n"]
    count = len(parts[0])
    while count < num_tokens:
        index = rng.randrange(len(lines))
        parts.append(lines[index])
        count += lengths[index]
    return "".join(parts)


async def ask(
    client: AsyncOpenAI,
    prompt: str | Messages,
    *,
    model: str,
    max_tokens: int = 8,
    stream: bool = True,
    **fields: Any,
) -> Answer:
    """A completion of a text, or a chat of messages; always of exactly `max_tokens` tokens."""
    is_chat = not isinstance(prompt, str)
    body: dict[str, Any] = {
        "model": model,
        "messages" if is_chat else "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "extra_headers": DEBUG_HEADERS,
        "extra_body": {"ignore_eos": True, **fields},
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    resource: Any = client.chat.completions if is_chat else client.completions
    started_s = time.perf_counter()
    raw = await resource.with_raw_response.create(**body)
    parsed: Any = raw.parse()
    parts: list[str] = []
    ttft_s = usage = None
    if stream:
        async for chunk in parsed:
            if chunk.choices:
                ttft_s = time.perf_counter() - started_s if ttft_s is None else ttft_s
                choice = chunk.choices[0]
                parts.append((choice.delta.content if is_chat else choice.text) or "")
            usage = chunk.usage or usage
    else:
        choice = parsed.choices[0]
        parts.append(choice.message.content if is_chat else choice.text)
        usage = parsed.usage
    assert usage is not None, "the engine reported no usage"
    return Answer(
        decision_id=raw.headers[DECISION_HEADER],
        text="".join(parts),
        ttft_s=ttft_s,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.prompt_tokens_details.cached_tokens or 0,
    )


async def ask_all(
    clients: Sequence[AsyncOpenAI], prompts: Sequence[str], *, model: str, at_once: int, max_tokens: int = 8
) -> list[Answer]:
    """Complete every prompt, `at_once` at a time, by the clients in turn; answers in the order of prompts."""
    answers: dict[int, Answer] = {}
    waiting = iter(enumerate(prompts))

    async def work() -> None:
        for index, prompt in waiting:
            client = clients[index % len(clients)]
            answers[index] = await ask(client, prompt, model=model, max_tokens=max_tokens)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(work())
    return [answers[index] for index in range(len(prompts))]


def shared_prefix_prompts(
    rng: random.Random, *, groups: int, per_group: int, prefix_tokens: int, suffix_tokens: int
) -> list[str]:
    """Prompts of which `per_group` share each of `groups` prefixes, group by group."""
    prefixes = [text(rng, prefix_tokens) for _ in range(groups)]
    return [prefix + text(rng, suffix_tokens) for prefix in prefixes for _ in range(per_group)]


def hit_ratio(answers: Sequence[Answer]) -> float:
    """Share of all prompt tokens that came from engines' caches."""
    return sum(answer.cached_tokens for answer in answers) / sum(answer.prompt_tokens for answer in answers)


def mean_ttft_ms(answers: Sequence[Answer]) -> float:
    """Of streamed answers, as clients saw it."""
    return 1e3 * sum(answer.ttft_s or 0.0 for answer in answers) / len(answers)
