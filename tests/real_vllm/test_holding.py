"""Requests that wait here for room at real engines."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from testbed.vllm.engine import SERVED_MODEL
from tests.e2e.harness import sample
from tests.e2e.holding import reconfigured
from tests.real_vllm.asking import ask_all, mean_ttft_ms, text
from tests.real_vllm.conftest import Deployment

pytestmark = [pytest.mark.real_vllm, pytest.mark.asyncio(loop_scope="session")]

ASKED = 16
PROMPT_TOKENS = 3_000
"""More than one step of each engine's, so that a few of them fill both engines."""


@pytest_asyncio.fixture(loop_scope="session")
async def holding(deployment: Deployment) -> AsyncIterator[Deployment]:
    """Both gateways hold."""
    for gateway in deployment.gateways:
        await reconfigured(gateway, holding={"enabled": True})
    yield deployment
    for gateway in deployment.gateways:
        await reconfigured(gateway, holding={"enabled": False})


async def test_a_burst_is_held_and_answered(holding: Deployment, report: Callable[[str, Any], None]) -> None:
    """Some of a burst wait at both gateways; all are answered, and no request is held afterwards."""
    rng = random.Random("burst")
    prompts = [text(rng, PROMPT_TOKENS) for _ in range(ASKED)]
    answers = await ask_all(holding.clients, prompts, model=SERVED_MODEL, at_once=ASKED)
    records = await holding.records(answers)
    held = [record for record in records if record["hold"] is not None]
    report(
        "burst, held",
        {
            "requests": ASKED,
            "held": len(held),
            "longest_s": round(max((record["held_s"] for record in held), default=0.0), 2),
            "ttft_mean_ms": round(mean_ttft_ms(answers), 1),
        },
    )
    assert 0 < len(held) < ASKED
    assert all(record["rejected"] is None for record in records)
    for gateway in holding.gateways:
        scrape = await gateway.metrics()
        for reason in ("prefill", "kv_cache", "max_num_seqs"):
            assert sample(scrape, f'tokenway_held_requests{{reason="{reason}"}}') == 0
