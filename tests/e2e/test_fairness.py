"""Fairness ids by header, on the real Envoy: whose turn it is while an endpoint is full."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

import pytest

from tests.e2e.harness import cluster
from tests.e2e.holding import all_free, answered, ask, fill, gated, held, served_by
from tests.e2e.picker import running_picker

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

FLOOD: Final = 6

TURN_TOKENS: Final = 40_000
"""A few seconds of prefill each: what a busy machine adds between two requests is a part of one turn."""

HOLDING: Final = {"enabled": True, "max_requests": 100, "max_s": 50.0}

HEADERS: Final = {
    "x-llm-d-inference-fairness-id": True,
    "x-gateway-inference-fairness-id": True,
    "x-id": False,
}
"""Whether each is one by which two ids take turns; the order of arrival is kept where none does."""


@dataclass(frozen=True, slots=True)
class _Listener:
    url: str


async def test_one_id_does_not_wait_for_the_whole_flood_of_another() -> None:
    """Prompts of one length: by their ids the late one goes among the early ones, without ids behind them."""
    async with AsyncExitStack() as stack:
        engines = {name: await stack.enter_async_context(gated()) for name in HEADERS}
        clusters = [cluster(name, [engine.key]) for name, engine in engines.items()]
        config = {"models": {name: served_by(name) for name in engines}, "holding": HOLDING}
        picker = await stack.enter_async_context(running_picker(clusters, config))
        listener = _Listener(picker.url())
        for name, engine in engines.items():
            asked = await fill(listener, name, engine)
            flood = [f"flood-{number}" for number in range(FLOOD)]
            for number, each in enumerate([*flood, "light"], 1):
                tenant = {name: each.partition("-")[0]}
                asked.append(ask(listener, name, each, TURN_TOKENS, tenant))
                await held(picker.tokenway, number)
            for count in range(2, FLOOD + 3):
                engine.let_go()
                await engine.has(count)
            engine.open()
            await answered(asked)
            order = engine.arrived[1:]
            assert [each for each in order if each != "light"] == flood
            assert (order.index("light") <= FLOOD / 2) is HEADERS[name], (name, order)
            assert not [
                received for received in engine.received if name in received.headers and HEADERS[name]
            ]
            lags = [
                record["hold"]["fairness_lag_s"]
                for record in await picker.tokenway.last(FLOOD + 2)
                if record["hold"] is not None
            ]
            assert (len([lag for lag in lags if lag > 0]) >= FLOOD / 2) is HEADERS[name], lags
            await all_free(picker.tokenway)
