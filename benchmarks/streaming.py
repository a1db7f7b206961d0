"""Clients of streamed completions: an open loop of requests, what each of them saw, and what that comes to.

Rules:
    1. Times count from when a request was due, not from when this process came round to sending it.
    2. An answer is whole if its status is 200, its stream ended with [DONE], and prompt and answer had as
       many tokens as asked for. Any other is a refusal (429) or an error, and has no latency.
    3. No request waits for ever: one without a whole answer `PATIENCE_S` after it was due is an error.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Final

import aiohttp
import numpy as np
import orjson

PATIENCE_S: Final = 180.0
"""Some ten times the longest queue that is of interest here."""

_REFUSED: Final = 429
_OK: Final = 200


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request of an open loop.

    Attributes:
        due_s: When it is sent, from the start.
        body: JSON, streamed with usage.
        prompt_tokens: What the engine must count.
        output_tokens: What it must answer.
    """

    due_s: float
    body: bytes
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class StreamedAnswer:
    """What became of one request.

    Attributes:
        due_s: When it was sent, from the start.
        late_s: How much later this process came round to it.
        error: What kept it from being whole; None if it is.
        is_refused: The gateway answered 429.
        ttft_s: Until its first token; of whole answers, like all that follows.
        tpot_s: Per token after the first.
        prompt_tokens: By the engine's usage.
        cached_tokens: By the engine's usage.
    """

    due_s: float
    late_s: float
    error: str | None = None
    is_refused: bool = False
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Reading:
    """One stream of server-sent events, line by line.

    Attributes:
        first_s: When the first token came; None before.
        last_s: When the latest came.
        tokens: How many came.
        prompt_tokens: By the usage; 0 before it came.
        cached_tokens: Likewise.
        is_done: [DONE] came.
    """

    __slots__ = ("cached_tokens", "first_s", "is_done", "last_s", "prompt_tokens", "tokens")

    def __init__(self) -> None:
        self.first_s: float | None = None
        self.last_s = 0.0
        self.tokens = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.is_done = False

    def line(self, line: bytes, now_s: float) -> None:
        """Take one line that came at `now_s`.

        Raises:
            ValueError: It is an event that is no JSON object.
        """
        if not line.startswith(b"data: "):
            return
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            self.is_done = True
            return
        event = orjson.loads(data)
        if not isinstance(event, dict):
            raise ValueError("an event is an object")
        for choice in event.get("choices") or ():
            if choice.get("text"):
                self.first_s = now_s if self.first_s is None else self.first_s
                self.last_s = now_s
                self.tokens += 1
        usage = event.get("usage")
        if usage:
            self.prompt_tokens = usage["prompt_tokens"]
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    def answer(self, asked: ScheduledRequest, began_s: float, late_s: float) -> StreamedAnswer:
        """What it comes to, once the stream has ended.

        Args:
            asked: The request.
            began_s: When the open loop began, by the clock of the lines' times.
            late_s: How late it was sent.
        """
        if not self.is_done or self.first_s is None:
            return StreamedAnswer(asked.due_s, late_s, "the stream broke off")
        wanted, got = (asked.prompt_tokens, asked.output_tokens), (self.prompt_tokens, self.tokens)
        if wanted != got:
            return StreamedAnswer(asked.due_s, late_s, f"{got} tokens of prompt and answer, not {wanted}")
        return StreamedAnswer(
            asked.due_s,
            late_s,
            ttft_s=self.first_s - began_s - asked.due_s,
            tpot_s=(self.last_s - self.first_s) / max(1, self.tokens - 1),
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
        )


async def open_loop(
    urls: Sequence[str], requests: Sequence[ScheduledRequest], began_s: float
) -> list[StreamedAnswer]:
    """Send every request when it is due, whatever became of those before; the answers in the same order.

    Args:
        urls: Of completions APIs; requests take turns.
        requests: With their times.
        began_s: `time.monotonic()` of the start.
    """
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(
        timeout=timeout,
        connector=aiohttp.TCPConnector(limit=0),
        headers={"content-type": "application/json"},
    ) as session:
        asked = zip(requests, cycle(urls), strict=False)
        return list(await asyncio.gather(*(_ask(session, url, each, began_s) for each, url in asked)))


async def _ask(
    session: aiohttp.ClientSession, url: str, asked: ScheduledRequest, began_s: float
) -> StreamedAnswer:
    await asyncio.sleep(began_s + asked.due_s - time.monotonic())
    late_s = time.monotonic() - began_s - asked.due_s
    reading = Reading()
    try:
        async with session.post(url, data=asked.body) as reply:
            if reply.status != _OK:
                text = (await reply.read())[:200]
                return StreamedAnswer(
                    asked.due_s, late_s, f"{reply.status} {text!r}", is_refused=reply.status == _REFUSED
                )
            async for line in reply.content:
                reading.line(line, time.monotonic())
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
        return StreamedAnswer(asked.due_s, late_s, repr(error))
    return reading.answer(asked, began_s, late_s)


@dataclass(frozen=True, slots=True)
class Figures:
    """What a run comes to; latencies in seconds, None if nothing was answered.

    Attributes:
        requests: Those that count.
        errors: Of them, without a whole answer and not refused.
        refused: Of them, with 429.
        ttft_mean_s: Time to first token.
        ttft_p50_s: Its median.
        ttft_p90_s: Its 90th percentile.
        ttft_p99_s: Its 99th percentile.
        tpot_mean_s: Time per output token after the first.
        cached_ratio: Prompt tokens found in the engine's cache, of all of the whole answers.
        late_max_s: How late the client was at worst in sending.
    """

    requests: int
    errors: int
    refused: int
    ttft_mean_s: float | None
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    tpot_mean_s: float | None
    cached_ratio: float
    late_max_s: float


def figures(answers: Sequence[StreamedAnswer], warmup_s: float) -> Figures:
    """The figures of all answers whose requests were due after the warm-up."""
    counted = [answer for answer in answers if answer.due_s >= warmup_s]
    whole = [answer for answer in counted if answer.error is None]
    ttft_s = [answer.ttft_s for answer in whole]
    refused = sum(answer.is_refused for answer in counted)
    return Figures(
        requests=len(counted),
        errors=len(counted) - len(whole) - refused,
        refused=refused,
        ttft_mean_s=_mean(ttft_s),
        ttft_p50_s=_percentile(ttft_s, 50),
        ttft_p90_s=_percentile(ttft_s, 90),
        ttft_p99_s=_percentile(ttft_s, 99),
        tpot_mean_s=_mean([answer.tpot_s for answer in whole]),
        cached_ratio=sum(answer.cached_tokens for answer in whole)
        / max(1, sum(answer.prompt_tokens for answer in whole)),
        late_max_s=max((answer.late_s for answer in counted), default=0.0),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None
