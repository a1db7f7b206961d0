"""Lets a virtual-time engine run in real time and hands its tokens to the answers that wait for them.

Rules:
    1. One task steps the engine; submitting, aborting and delivering happen between its awaits.
    2. A step's effects reach clients, metrics and subscribers when its duration has passed, not before.
    3. Sleeping late is caught up with, up to a bound, so that throughput follows the profile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tokenway.simulator.engine.engine import Engine, EngineRequest, Rejection, StepResult
from tokenway.simulator.engine.keys import block_keys
from tokenway.simulator.engine.prefix_cache import CacheEvent
from tokenway.simulator.server.metrics import EngineMetrics
from tokenway.simulator.server.settings import BlockSource
from tokenway.simulator.server.text import Output, TokenArray

# More lag than this is forgotten: after a stall of the host, replaying it as a burst would help no test.
MAX_LAG_S = 0.05


class Publisher(Protocol):
    """Takes the cache events of a step."""

    def publish(self, events: tuple[CacheEvent, ...], ts: float) -> None:
        """Send one batch; `ts` is Unix time in seconds."""
        ...


@dataclass(slots=True)
class Served:
    """What `/sim/state` says about one request.

    Attributes:
        id: The engine's id.
        request_id: `X-Tokenway-Request-Id` of the request, or None.
        path: HTTP path.
        model: Model asked for.
        prompt_tokens: Length of the prompt.
        cached_tokens: Prompt tokens found in the cache.
        output_tokens: Tokens sent so far.
        finish_reason: `stop`, `length`, `abort`, or None while it lives.
    """

    id: str
    request_id: str | None
    path: str
    model: str
    prompt_tokens: int
    cached_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None


@dataclass(slots=True, eq=False)
class Generation:
    """One request's life on the server; the driver writes what has a default.

    Attributes:
        served: Its public record.
        prompt: Token ids, shape (n,).
        output: What it will say.
        cache_salt: Cache namespace, or None.
        session_id: For cache events, or None.
        on_token: Called with each piece and, at the end, the finish reason; None to wait for `done` only.
        done: Resolved after the last token.
    """

    served: Served
    prompt: TokenArray
    output: Output
    done: asyncio.Future[None]
    cache_salt: str | None = None
    session_id: str | None = None
    on_token: Callable[[bytes, str | None], None] | None = None
    arrived_s: float = field(default=0.0, init=False)
    admitted_s: float = field(default=0.0, init=False)
    first_s: float = field(default=0.0, init=False)
    last_s: float = field(default=0.0, init=False)

    @property
    def text(self) -> str:
        """What it has said so far."""
        return b"".join(self.output.words[: self.served.output_tokens]).decode()


class EngineDriver:
    """Owns the engine, its clock and the generations in flight."""

    def __init__(
        self, engine: Engine, metrics: EngineMetrics, time_scale: float, publisher: Publisher | None
    ) -> None:
        self.engine = engine
        self.slowdown = 1.0
        self._metrics = metrics
        self._time_scale = time_scale
        self._publisher = publisher
        self._live: dict[str, Generation] = {}
        self._wake = asyncio.Event()
        self._origin_s = time.monotonic()
        self._is_paused = False
        self._task: asyncio.Task[None] | None = None

    @property
    def is_paused(self) -> bool:
        """True while no step is started."""
        return self._is_paused

    @property
    def is_dead(self) -> bool:
        """True if stepping has ended, by `stop` or by an error."""
        return self._task is None or self._task.done()

    def start(self) -> None:
        """Begin stepping; needs a running event loop."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End stepping and all generations.

        Raises:
            Exception: Whatever ended stepping before.
        """
        self.abort_all()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def submit(self, generation: Generation) -> Rejection | None:
        """Queue a generation, or say which limit refused it."""
        tokens = np.concatenate((generation.prompt, generation.output.token_ids))
        source = BlockSource(tokens, generation.cache_salt, generation.session_id)
        request = EngineRequest(
            generation.served.id,
            len(generation.prompt),
            len(generation.output.words),
            block_keys(tokens, self.engine.profile.block_size, generation.cache_salt or ""),
            source,
        )
        rejection = self.engine.submit(request, self._now_s())
        if rejection is not None:
            self._metrics.rejections[rejection] += 1
            return rejection
        generation.arrived_s = time.monotonic()
        self._live[request.request_id] = generation
        self._wake.set()
        return None

    def abort(self, generation: Generation) -> None:
        """End a generation whose client is gone; its blocks are free at once. Harmless if it has ended."""
        if self._live.pop(generation.served.id, None) is not None:
            self.engine.abort(generation.served.id)
            generation.served.finish_reason = "abort"
            self._metrics.end_step()

    def abort_all(self) -> None:
        """End every generation with the finish reason `abort`, and inform its client."""
        for generation in list(self._live.values()):
            self.abort(generation)
            self._metrics.successes["abort"] += 1
            if generation.on_token is not None:
                generation.on_token(b"", "abort")
            _resolve(generation)

    def pause(self) -> None:
        """Start no further step."""
        self._is_paused = True

    def resume(self) -> None:
        """Go on stepping."""
        self._is_paused = False
        self._wake.set()

    def _now_s(self) -> float:
        return (time.monotonic() - self._origin_s) / self._time_scale

    async def _run(self) -> None:
        while True:
            due_s = None if self._is_paused else self.engine.next_step_due()
            if due_s is None:
                self._wake.clear()
                await self._wake.wait()
            elif due_s > self._now_s():
                await self._sleep_until(due_s)
            else:
                start_s = max(due_s, self._now_s() - MAX_LAG_S / self._time_scale)
                step = self.engine.step(start_s, self.slowdown)
                await self._sleep_until(step.end_s)
                self._deliver(step)

    async def _sleep_until(self, virtual_s: float) -> None:
        await asyncio.sleep(max(0.0, (virtual_s - self._now_s()) * self._time_scale))

    def _deliver(self, step: StepResult) -> None:
        now_s = time.monotonic()
        metrics, live = self._metrics, self._live
        if self._publisher is not None and step.events:
            self._publisher.publish(step.events, time.time())
        metrics.preemptions += len(step.preempted)
        metrics.generation_tokens += len(step.tokens)
        metrics.iteration_tokens.observe(step.scheduled_tokens)
        metrics.end_step()
        started_s = now_s - step.duration_s * self._time_scale
        for admission in step.admitted:
            generation = live.get(admission.request_id)
            if generation is not None:
                generation.admitted_s = max(generation.arrived_s, started_s)
                generation.served.cached_tokens = admission.cached_tokens
                metrics.prefix_queries_tokens += generation.served.prompt_tokens
                metrics.prefix_hits_tokens += admission.cached_tokens
        for request_id in step.first_tokens:
            generation = live.get(request_id)
            if generation is not None:
                generation.first_s = now_s
                metrics.ttft.observe(now_s - generation.arrived_s)
                metrics.prompt_tokens += generation.served.prompt_tokens
                metrics.prompt_tokens_cached += generation.served.cached_tokens
        for request_id in step.tokens:
            generation = live.get(request_id)
            if generation is not None:
                self._deliver_token(generation, now_s)

    def _deliver_token(self, generation: Generation, now_s: float) -> None:
        served, output = generation.served, generation.output
        position = served.output_tokens
        served.output_tokens += 1
        if position:
            self._metrics.inter_token.observe(now_s - generation.last_s)
        generation.last_s = now_s
        is_last = served.output_tokens == len(output.words)
        if is_last:
            served.finish_reason = "stop" if output.stops else "length"
            del self._live[served.id]
            self._observe_end(generation)
        if generation.on_token is not None:
            generation.on_token(output.words[position], served.finish_reason)
        if is_last:
            _resolve(generation)

    def _observe_end(self, generation: Generation) -> None:
        metrics, served = self._metrics, generation.served
        decode_s = generation.last_s - generation.first_s
        metrics.successes[served.finish_reason or "abort"] += 1
        metrics.e2e.observe(generation.last_s - generation.arrived_s)
        metrics.queue_time.observe(generation.admitted_s - generation.arrived_s)
        metrics.prefill_time.observe(generation.first_s - generation.admitted_s)
        metrics.decode_time.observe(decode_s)
        metrics.inference_time.observe(generation.last_s - generation.admitted_s)
        metrics.request_prompt_tokens.observe(served.prompt_tokens)
        metrics.request_generation_tokens.observe(served.output_tokens)
        metrics.request_computed_tokens.observe(served.prompt_tokens - served.cached_tokens)
        if served.output_tokens > 1:
            metrics.per_output_token.observe(decode_s / (served.output_tokens - 1))


def _resolve(generation: Generation) -> None:
    # A client that has just gone away has cancelled the future, and its handler has not run yet.
    if not generation.done.done():
        generation.done.set_result(None)
