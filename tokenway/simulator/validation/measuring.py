"""A short run against a live vLLM, with all that a fit needs.

Rules:
    1. Open loop: a request is sent when its time has come, whatever became of those before.
    2. Answers are not streamed: on a slow machine the chunks of many streams come late and together, and say
       more about the HTTP server than about the engine. The time from the first token to the last is the
       engine's own (`--enable-per-request-metrics`); all the rest of the client's wait counts as TTFT.
    3. Prompts are token ids, so that block keys are exact; answers have exactly the length asked for.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import numpy as np
import orjson

from tokenway.simulator.engine.keys import block_keys
from tokenway.simulator.validation.measured import MeasurementError, Run, measured_run

_TIMEOUT_S: Final = 300.0
"""For one answer: above any wait that a minute of twice the load an engine can take builds up."""

_GAUGE: Final = re.compile(
    r"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{[^}]*\} (\S+)$", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class MeasuredRequest:
    """A request to send.

    Attributes:
        at_s: Since the run began.
        prompt: Token ids.
        output_tokens: To generate.
    """

    at_s: float
    prompt: list[int]
    output_tokens: int


def mixed_load(
    rng: random.Random,
    *,
    seconds: float,
    requests_per_s: float,
    prompt_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    vocabulary: tuple[int, int],
) -> list[MeasuredRequest]:
    """Poisson arrivals of random prompts; half of them begin with one of four shared prefixes.

    Args:
        rng: Source of all randomness.
        seconds: Nothing arrives later.
        requests_per_s: On average.
        prompt_tokens: Shortest and longest; logarithms are uniform. A shared prefix is half of the longest.
        output_tokens: Likewise.
        vocabulary: Token ids to use, first and last.
    """

    def length(bounds: tuple[int, int]) -> int:
        low, high = bounds
        return round(low * math.exp(rng.random() * math.log(high / low)))

    def ids(count: int) -> list[int]:
        return [rng.randint(*vocabulary) for _ in range(count)]

    prefixes = [ids(prompt_tokens[1] // 2) for _ in range(4)]
    asked: list[MeasuredRequest] = []
    at_s = rng.expovariate(requests_per_s)
    while at_s < seconds:
        begun = rng.choice(prefixes) if rng.random() < 0.5 else []
        prompt = (begun + ids(prompt_tokens[1]))[: max(length(prompt_tokens), len(begun) + prompt_tokens[0])]
        asked.append(MeasuredRequest(at_s, prompt, length(output_tokens)))
        at_s += rng.expovariate(requests_per_s)
    return asked


async def measure(url: str, model: str, load: Sequence[MeasuredRequest], block_size: int) -> Run:
    """Send `load` to an engine and note when it answers; vLLM's gauges once a second.

    Args:
        url: Of the engine, without `/v1`.
        model: As the engine calls it.
        load: In the order of time; not empty.
        block_size: Tokens per KV block, for the keys of prompts.

    Raises:
        aiohttp.ClientError: A request failed.
        TimeoutError: An answer took too long.
        MeasurementError: There is no request, or the engine reports no times.
    """
    begun_s = time.monotonic()
    gauges: list[dict[str, str]] = []
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(
        url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
    ) as session:

        async def send(asked: MeasuredRequest) -> dict[str, Any]:
            await asyncio.sleep(begun_s + asked.at_s - time.monotonic())
            return await _timed(session, model, asked)

        watching = asyncio.create_task(_watch(session, begun_s + load[0].at_s, gauges))
        sending = [asyncio.create_task(send(asked)) for asked in load]
        try:
            rows = await asyncio.gather(*sending)
        finally:
            for task in (watching, *sending):
                task.cancel()
            await asyncio.gather(watching, *sending, return_exceptions=True)
    keys = {
        index: tuple(block_keys(np.array(asked.prompt, dtype=np.uint32), block_size))
        for index, asked in enumerate(load)
    }
    return measured_run(rows, gauges, keys)


async def _timed(session: aiohttp.ClientSession, model: str, asked: MeasuredRequest) -> dict[str, Any]:
    body = {
        "model": model,
        "prompt": asked.prompt,
        "max_tokens": asked.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    sent_s = time.monotonic()
    async with session.post("/v1/completions", json=body, raise_for_status=True) as answer:
        reported = orjson.loads(await answer.read()).get("metrics")
    received_s = time.monotonic()
    if not reported:
        raise MeasurementError("no metrics in the answer: start vLLM with --enable-per-request-metrics")
    return {
        "input_toks": len(asked.prompt),
        "output_toks": asked.output_tokens,
        "arrival_time": sent_s,
        "queued_ts": sent_s,
        "first_token_ts": received_s - (reported.get("generation_time_ms") or 0.0) / 1000.0,
        "last_token_ts": received_s,
    }


async def _watch(session: aiohttp.ClientSession, begun_s: float, gauges: list[dict[str, str]]) -> None:
    while True:
        await asyncio.sleep(begun_s + len(gauges) + 1.0 - time.monotonic())
        async with session.get("/metrics") as answer:
            values = dict(_GAUGE.findall(await answer.text()))
        gauges.append(
            {
                "t": str(time.monotonic() - begun_s),
                "running": values.get("num_requests_running", "0"),
                "waiting": values.get("num_requests_waiting", "0"),
                "kv_cache_pct": str(100.0 * float(values.get("kv_cache_usage_perc", "0"))),
            }
        )
