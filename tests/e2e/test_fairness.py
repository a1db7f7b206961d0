"""Fairness ids by header, on the real Envoy: whose turn it is while an endpoint is full."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

import pytest

from extproc.observing.explain import verdict
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


async def test_one_that_comes_late_is_not_behind_what_waited_before_it() -> None:
    """The flood has waited for longer than its work takes when it comes, and goes on after it."""
    async with gated() as engine:
        config = {"models": {"late": served_by("late")}, "holding": HOLDING}
        async with running_picker([cluster("late", [engine.key])], config) as picker:
            listener = _Listener(picker.url())
            asked = await fill(listener, "late", engine)
            header, flood = next(iter(HEADERS)), [f"flood-{number}" for number in range(FLOOD)]
            for number, each in enumerate(flood, 1):
                asked.append(ask(listener, "late", each, headers={header: "flood"}))
                await held(picker.tokenway, number)
            await asyncio.sleep(FLOOD * 0.4 + 2.0)  # `ASKED_TOKENS` take 0.4 s
            asked.append(ask(listener, "late", "light", headers={header: "light"}))
            await held(picker.tokenway, FLOOD + 1)
            for count in range(2, FLOOD + 3):
                engine.let_go()
                await engine.has(count)
            engine.open()
            await answered(asked)
            order = engine.arrived[1:]
            assert [each for each in order if each != "light"] == flood
            assert order.index("light") <= 1, order
            records = [
                record for record in await picker.tokenway.last(FLOOD + 2) if record["hold"] is not None
            ]
            assert min(record["hold"]["fairness_lag_s"] for record in records) < -2.0
            assert {verdict(record) for record in records} == {"recomputed: same choice, same place in line"}
            await all_free(picker.tokenway)
