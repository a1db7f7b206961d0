"""An engine that is killed under load and comes back: requests go on, and it serves again."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import openai
import pytest

from extproc.health.states import HealthState
from testbed.vllm.engine import SERVED_MODEL
from tests.e2e.harness import eventually
from tests.real_vllm.accuracy import cached_summary, equal_ratio, foreseen
from tests.real_vllm.asking import Answer, ask, ask_all, shared_prefix_prompts
from tests.real_vllm.conftest import Deployment, announcing

pytestmark = [pytest.mark.real_vllm, pytest.mark.asyncio(loop_scope="session")]

CLIENTS = 4
LEAST_EQUAL_AT_RESTARTED = 0.8
"""Of some 25 requests, four at once: prompts still being computed are counted by their bytes."""
EFFECTIVE_S = 40.0
"""For probes, requests and ejections on a busy machine; a second or two on an idle one."""


@pytest.mark.parametrize("index", [0, 1], ids=["tcp", "ipc"])
async def test_an_engine_restarts_under_load(
    deployment: Deployment, report: Callable[[str, Any], None], index: int
) -> None:
    """Only requests in flight at the killed engine may fail; after its restart it is asked again."""
    victim, survivor = deployment.replicas[index], deployment.replicas[1 - index]
    rng = random.Random(f"restart {index}")
    prompts = shared_prefix_prompts(rng, groups=4, per_group=10, prefix_tokens=512, suffix_tokens=64)
    rng.shuffle(prompts)
    await ask_all(deployment.clients, prompts, model=SERVED_MODEL, at_once=2)

    answers: list[Answer] = []
    failures: list[str] = []
    is_over = False

    async def client_loop(number: int) -> None:
        client = deployment.clients[number % 2]
        while not is_over:
            try:
                answers.append(await ask(client, rng.choice(prompts), model=SERVED_MODEL))
            except (openai.APIError, AssertionError) as error:
                failures.append(repr(error))

    async def answered() -> int:
        return len(answers)

    async def is_healthy() -> list[bool]:
        rows = [await gateway.rows() for gateway in deployment.gateways]
        return [row[victim.key]["state"] == HealthState.HEALTHY for row in rows]

    async with asyncio.TaskGroup() as group:
        try:
            for number in range(CLIENTS):
                group.create_task(client_loop(number))
            await eventually(answered, lambda count: count >= 10, EFFECTIVE_S)
            await victim.kill()
            await eventually(is_healthy, lambda healthy: not any(healthy), EFFECTIVE_S)
            failed_at_once = len(failures)
            known = len(answers)
            await eventually(answered, lambda count: count >= known + 20, EFFECTIVE_S)
        finally:
            is_over = True
    assert failed_at_once <= CLIENTS, failures
    assert len(failures) == failed_at_once, failures

    await victim.start()
    await eventually(is_healthy, all, EFFECTIVE_S)
    for gateway in deployment.gateways:
        await announcing(gateway)
    # What the survivor holds goes on going there; new texts go to the restarted one as well.
    new = shared_prefix_prompts(rng, groups=6, per_group=6, prefix_tokens=512, suffix_tokens=64)
    prompts = [*prompts[:10], *new]
    rng.shuffle(prompts)
    after = await ask_all(deployment.clients, prompts, model=SERVED_MODEL, at_once=CLIENTS)
    records = await deployment.records(after)
    served = Counter(record["outcome"]["endpoint"] for record in records)
    assert served.keys() == {victim.key, survivor.key}
    of_victim = [record for record in records if record["outcome"]["endpoint"] == victim.key]
    report(
        f"engine restarted ({victim.transport})",
        {
            "failed_at_the_kill": failed_at_once,
            "answers_around_the_kill": len(answers),
            "served_after_by_restarted": served[victim.key],
            "first_at_restarted": cached_summary(foreseen(of_victim[:8])),
            "all_after": cached_summary(foreseen(records)),
        },
    )
    assert equal_ratio(foreseen(of_victim)) >= LEAST_EQUAL_AT_RESTARTED
