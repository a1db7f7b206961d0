"""How near predicted times to first token are, once the predictor has seen 200 requests."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import pytest

from testbed.vllm.engine import SERVED_MODEL
from tests.real_vllm.accuracy import cached_summary, foreseen, ttft_summary
from tests.real_vllm.asking import Answer, ask_all, hit_ratio, text
from tests.real_vllm.conftest import Deployment

pytestmark = [pytest.mark.real_vllm, pytest.mark.asyncio(loop_scope="session")]

LEARNED_FROM = 200
MEASURED = 16
PROMPT_TOKENS = 2048
BATCH = 6


async def test_time_to_first_token_is_foreseen(
    deployment: Deployment, report: Callable[[str, Any], None]
) -> None:
    """Misses, half hits and full hits are what they should be; how well each was foreseen is reported."""
    rng = random.Random("prediction")
    client = deployment.clients[:1]

    async def ask_in_turn(prompts: Sequence[str], at_once: int = 1) -> list[Answer]:
        return await ask_all(client, prompts, model=SERVED_MODEL, at_once=at_once)

    async def explained(answers: Sequence[Answer]) -> dict[str, Any]:
        rows = foreseen(await deployment.records(answers))
        return {
            **ttft_summary(rows),
            "client_median_ms": round(1e3 * median(answer.ttft_s or 0.0 for answer in answers), 1),
            "cached_error_tokens": cached_summary(rows)["mean_absolute_error_tokens"],
        }

    known: list[str] = []
    for _ in range(LEARNED_FROM):
        is_repeated = bool(known) and rng.random() < 0.4
        base = rng.choice(known[-6:]) if is_repeated else text(rng, rng.choice((128, 512, 1024, 2048, 3072)))
        known.append(base + text(rng, rng.choice((32, 128))) if is_repeated else base)
    await ask_in_turn(known[:-50], at_once=2)
    await ask_in_turn(known[-50:], at_once=4)

    misses = [text(rng, PROMPT_TOKENS) for _ in range(MEASURED)]
    halves = [text(rng, PROMPT_TOKENS // 2) for _ in range(MEASURED)]
    missed, half, full = [], [], []
    for prompt, start in zip(misses, halves, strict=True):
        missed += await ask_in_turn([prompt])
        full += await ask_in_turn([prompt])
        await ask_in_turn([start])
        half += await ask_in_turn([start + text(rng, PROMPT_TOKENS // 2)])
    batched = await ask_in_turn([text(rng, PROMPT_TOKENS // 2) for _ in range(4 * BATCH)], at_once=BATCH)
    report(
        f"TTFT after {LEARNED_FROM} requests",
        {
            "miss": await explained(missed),
            "half": await explained(half),
            "full": await explained(full),
            f"batch_of_{BATCH}": await explained(batched),
        },
    )
    assert hit_ratio(missed) == 0
    assert 0.4 < hit_ratio(half) < 0.6
    assert hit_ratio(full) > 0.95
