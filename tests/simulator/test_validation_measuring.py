"""Measuring a live engine: against a small HTTP server that answers as vLLM does."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tokenway.simulator.validation.measured import MeasurementError
from tokenway.simulator.validation.measuring import MeasuredRequest, measure, mixed_load


async def _server(metrics: dict[str, Any] | None, seen: list[dict[str, Any]]) -> TestServer:
    async def complete(request: web.Request) -> web.Response:
        seen.append(await request.json())
        return web.json_response({"choices": [{"text": ""}], "metrics": metrics})

    async def gauges(_: web.Request) -> web.Response:
        return web.Response(text='vllm:num_requests_running{engine="0"} 3.0\n')

    app = web.Application()
    app.add_routes([web.post("/v1/completions", complete), web.get("/metrics", gauges)])
    server = TestServer(app)
    await server.start_server()
    return server


async def test_the_engine_says_how_long_it_generated_and_the_client_the_rest() -> None:
    """The last token comes with the answer, the first so much earlier as the engine generated."""
    seen: list[dict[str, Any]] = []
    server = await _server({"generation_time_ms": 40.0}, seen)
    try:
        load = [MeasuredRequest(0.0, list(range(70)), 5), MeasuredRequest(0.01, [9] * 20, 1)]
        run = await measure(str(server.make_url("")), "m", load, 32)
    finally:
        await server.close()
    first = run.timings[0]
    assert first.last_s - first.first_s == pytest.approx(0.04)
    assert first.tpot_s == pytest.approx(0.01)
    assert [len(each.keys) for each in run.loads] == [2, 0]
    assert sorted((body["max_tokens"], len(body["prompt"]), body["ignore_eos"]) for body in seen) == [
        (1, 20, True),
        (5, 70, True),
    ]


async def test_an_engine_that_reports_no_times_is_refused() -> None:
    """The error says how vLLM is to be started."""
    server = await _server(None, [])
    try:
        with pytest.raises(MeasurementError, match="enable-per-request-metrics"):
            await measure(str(server.make_url("")), "m", [MeasuredRequest(0.0, [1], 1)], 32)
    finally:
        await server.close()


def test_a_mixed_load_is_within_its_bounds_and_shares_prefixes() -> None:
    """Lengths and times as asked for; about half of the prompts begin with one of four prefixes."""
    load = mixed_load(
        Random(1),
        seconds=60.0,
        requests_per_s=5.0,
        prompt_tokens=(10, 200),
        output_tokens=(2, 20),
        vocabulary=(5, 50),
    )
    assert 200 < len(load) < 400
    assert [asked.at_s for asked in load] == sorted(asked.at_s for asked in load)
    assert load[-1].at_s < 60.0
    assert all(10 <= len(asked.prompt) <= 200 and 2 <= asked.output_tokens <= 20 for asked in load)
    assert {token for asked in load for token in asked.prompt} <= set(range(5, 51))
    begun = [tuple(asked.prompt[:100]) for asked in load]
    shared = [count for count in map(begun.count, set(begun)) if count > 1]
    assert len(shared) == 4
    assert 0.3 < sum(shared) / len(load) < 0.7
