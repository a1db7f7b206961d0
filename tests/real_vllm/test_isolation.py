"""Adapters and salts share no cache: not in the engine, and not in what the gateway expects of it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from testbed.vllm.engine import BLOCK_TOKENS, SERVED_MODEL
from tests.real_vllm.asking import Answer, ask, text
from tests.real_vllm.conftest import Deployment

pytestmark = [pytest.mark.real_vllm, pytest.mark.asyncio(loop_scope="session")]

PROMPT_TOKENS = 640


async def _ask_and_explain(
    deployment: Deployment, prompt: str, model: str, **fields: Any
) -> tuple[Answer, list[int]]:
    """The answer through the first gateway, and the cached tokens it expected of each replica."""
    answer = await ask(deployment.clients[0], prompt, model=model, **fields)
    (record,) = await deployment.records([answer])
    return answer, record["cached_tokens"]


async def _warm_everywhere(deployment: Deployment, prompt: str) -> None:
    """Every replica has the prompt cached for the model itself, and the gateway has sent it there."""
    await ask(deployment.clients[0], prompt, model=SERVED_MODEL)
    for replica in deployment.replicas:
        await replica.post("/v1/completions", model=SERVED_MODEL, prompt=prompt, max_tokens=1)


@pytest.mark.parametrize("model", ["ad1", "ad2"])
async def test_an_adapter_does_not_use_the_models_cache(deployment: Deployment, model: str) -> None:
    """With the prompt cached everywhere for the model, an adapter starts from nothing, then finds its own."""
    prompt = text(random.Random(f"adapter {model}"), PROMPT_TOKENS)
    await _warm_everywhere(deployment, prompt)
    first, expected = await _ask_and_explain(deployment, prompt, model)
    assert (first.cached_tokens, max(expected)) == (0, 0)
    again, expected = await _ask_and_explain(deployment, prompt, model)
    assert again.cached_tokens == (again.prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert max(expected) > 0
    plain, _ = await _ask_and_explain(deployment, prompt, SERVED_MODEL)
    assert plain.cached_tokens == again.cached_tokens
    assert plain.text != again.text == first.text


async def test_a_salt_does_not_use_another_ones_cache(deployment: Deployment) -> None:
    """With the prompt cached everywhere without salt, a salt starts from nothing, then finds its own."""
    prompt = text(random.Random("salt"), PROMPT_TOKENS)
    await _warm_everywhere(deployment, prompt)
    for salt in ("tenant-a", "tenant-b"):
        first, expected = await _ask_and_explain(deployment, prompt, SERVED_MODEL, cache_salt=salt)
        assert (first.cached_tokens, max(expected)) == (0, 0)
        again, expected = await _ask_and_explain(deployment, prompt, SERVED_MODEL, cache_salt=salt)
        assert again.cached_tokens == (again.prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert max(expected) > 0
