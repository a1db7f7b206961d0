"""The decision: from a request's bytes to an endpoint, charged in the same step.

Rules:
    1. `decide` neither awaits nor yields: nothing comes between what it reads and what it charges. Where
       several workers share the counters, their lock is held over the same step.
    2. Time and randomness are given at construction; a decision's record holds every draw.
    3. What fails before the charge raises `RouterError` and leaves no trace in any counter.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hmac import compare_digest

from extproc.choosing.choose import choose
from extproc.choosing.least_completion import completion_costs
from extproc.choosing.replay import RecordingRng
from extproc.choosing.settings import Algorithm
from extproc.errors import Reason, RouterError
from extproc.observing.records import DecisionRecord
from extproc.protocol.machine import RequestHeaders
from extproc.protocol.wire import DEBUG_HEADER, REQUEST_ID_HEADER, Answers
from extproc.request.blocks import block_hashes, root
from extproc.request.parse import parse
from extproc.request.rules import Route
from extproc.request.sanitize import encode, force_usage, rewrite_model, sanitize
from extproc.routing.inflight import Inflight
from extproc.routing.learned import SLO_TPOT_HEADER, SLO_TTFT_HEADER, decode_tokens_of
from extproc.routing.state import State
from extproc.routing.table import Pool, RoutingTable
from extproc.types import Choice, InferenceRequest, Operation, Rng, Snapshot
from metadata_center.sharing.messages import MAX_CANDIDATES, Candidate
from metadata_center.types import Charge, EndpointKey, RequestId, value

PREFILL_DUE_FACTOR = 1.2
"""A prefill without first-token signal is released after this many times its predicted TTFT (AIGW: 12/10)."""

PREFILL_DUE_FLOOR_S = 0.1
"""And not before this (AIGW: 100 ms)."""

Reserve = Callable[[RequestId, Sequence[Candidate]], Awaitable[EndpointKey | None]]
"""Compare and set, see `metadata_center.sharing.sync.Sync.reserve`."""

MAX_ANSWERS = 4096
"""Serialised answers kept per pool: all orders of three out of sixteen endpoints; about 500 bytes each."""

_RQ_TIMEOUT = "x-envoy-upstream-rq-timeout-ms"
_TRY_TIMEOUT = "x-envoy-upstream-rq-per-try-timeout-ms"
_MAX_RETRIES = "x-envoy-max-retries"


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """What the configuration says about requests as such.

    Attributes:
        first_chunk: The first chunk of streams is seen; else prefill ends when it is predicted to.
        timeout_s: Bound on an answer that is not streamed.
        first_byte_timeout_s: Bound on the response headers of a stream, per attempt.
        block_bytes: Prompt bytes per cache block.
        usage_injection: Ask engines for usage on every stream.
        max_body_bytes: Larger bodies are refused.
        debug_token: Operators send it to learn the decision id; None switches that off.
        retry_after_s: For answers that no endpoint is available.
    """

    first_chunk: bool = True
    timeout_s: float = 600.0
    first_byte_timeout_s: float = 60.0
    block_bytes: int = 512
    usage_injection: bool = False
    max_body_bytes: int = 32 * 1024 * 1024
    debug_token: str | None = None
    retry_after_s: int = 1


@value
class Asked:
    """A request understood and not yet decided.

    Attributes:
        request_id: Whose.
        headers: As they came.
        request: Its body.
        route: Where it may go.
        new_body: The body to send instead of the client's, or None.
        blocks: Hashes of its prompt's blocks.
        prompt_tokens: Exact or estimated.
        decode_tokens: See `learned.decode_tokens_of`.
        received_s: Monotonic time when the body was there.
    """

    request_id: RequestId
    headers: RequestHeaders
    request: InferenceRequest
    route: Route
    new_body: bytes | None
    blocks: list[int]
    prompt_tokens: int
    decode_tokens: float
    received_s: float


@dataclass(slots=True)
class Chosen:
    """A choice that was made and charged, on its way to being answered.

    Attributes:
        pool: What it was made from.
        choice: As the policy made it.
        snapshot: What the policy looked at.
        prompt_tokens: Of the request.
        cached_tokens: Believed cached, one per row.
        charged: False if the request had ended before.
        order: Rows in the order that Envoy is to try.
    """

    pool: Pool
    choice: Choice
    snapshot: Snapshot
    prompt_tokens: int
    cached_tokens: list[int]
    charged: bool
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.order = self.order or self.choice.order

    @property
    def place(self) -> EndpointKey:
        """Who serves."""
        return self.pool.keys[self.order[0]]

    def moved_to(self, place: EndpointKey) -> Chosen:
        """The same with `place` first."""
        first = self.pool.rows[place]
        order = (first, *(row for row in self.order if row != first))[: len(self.order)]
        return replace(self, order=order)

    def candidates(self) -> list[Candidate]:
        """Rows that would do, best first, with what was believed of them."""
        scores, keys, requests = self.choice.scores, self.pool.keys, self.snapshot.requests
        rows = list(self.order)
        others = set(range(len(keys))).difference(rows)
        rows += sorted(others) if scores is None else sorted(others, key=scores.__getitem__, reverse=True)
        return [
            Candidate(
                keys[row], requests[row], self.prompt_tokens - self.cached_tokens[row], self.prompt_tokens
            )
            for row in rows[:MAX_CANDIDATES]
        ]


@value
class Decision:
    """A decision, ready to be answered.

    Attributes:
        stream: The client asked for a stream.
        late_marker: The API announces itself before its first token.
        to_body: The serialised answer to the request's body.
        for_trailers: Makes the answer for a request that had trailers and no body.
    """

    stream: bool
    late_marker: bool
    to_body: bytes
    for_trailers: Callable[[], bytes]

    def answer(self, *, to_trailers: bool) -> bytes:
        """The serialised answer."""
        return self.for_trailers() if to_trailers else self.to_body


class Router:
    """Decides.

    Args:
        state: Books of this worker.
        table: Compiled configuration; replaced by assignment.
        settings: Likewise.
        answers: Serialised answers of this worker.
        rng: Source of every random choice.
        clock: Monotonic seconds.
        wall_clock: Unix seconds, for records.
        reserve: Puts a charge to where all gateways meet; says where it is charged now, None if it is
            unconfirmed and stays. None decides here alone.
    """

    def __init__(
        self,
        state: State,
        table: RoutingTable,
        settings: RouterSettings,
        answers: Answers,
        rng: Rng,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        reserve: Reserve | None = None,
    ) -> None:
        self.table = table
        self.settings = settings
        self._state = state
        self._answers = answers
        self._rng = rng
        self._clock = clock
        self._wall_clock = wall_clock
        self._reserve = reserve
        self._turn = 0
        self._pools: dict[tuple[str, tuple[tuple[str, str], ...]], Pool] = {}
        self._pools_of: tuple[RoutingTable, int] | None = None

    def decide(self, headers: RequestHeaders, body: bytes) -> Decision | Awaitable[Decision]:
        """Understand, choose, charge.

        Raises:
            RouterError: The request cannot be served.
        """
        asked = self._understand(headers, body)
        chosen = self._choose_and_charge(asked)
        if self._reserve is None or not chosen.charged:
            return self._answered(asked, chosen)
        return self._reserved(asked, chosen)

    async def _reserved(self, asked: Asked, chosen: Chosen) -> Decision:
        """Have the choice confirmed, or moved, where all gateways' choices are put in one order."""
        assert self._reserve is not None
        place = await self._reserve(asked.request_id, chosen.candidates())
        if place is not None and place != chosen.place:
            self._state.placed(asked.request_id, place)
            chosen = chosen.moved_to(place)
        return self._answered(asked, chosen)

    def _understand(self, headers: RequestHeaders, body: bytes) -> Asked:
        """What the request alone says; depends on no endpoint's state, so it holds however long it waits."""
        state, settings, table = self._state, self.settings, self.table
        now_s = self._clock()
        if len(body) > settings.max_body_bytes:
            raise RouterError(
                Reason.BODY_TOO_LARGE,
                f"The request body is larger than {settings.max_body_bytes} bytes.",
                param="body",
            )
        request = parse(headers.path, body)
        route = table.rules.match(request.model, headers.headers, self._rng)
        new_body = self._new_body(request, route)
        blocks = block_hashes(
            request.prompt,
            root(route.model, route.lora, request.cache_salt),
            settings.block_bytes,
        )
        prompt_tokens = request.prompt_tokens
        if prompt_tokens is None:
            prompt_tokens = state.predictor.prompt_tokens(route.model, len(request.prompt))
        request_id = RequestId(headers.headers.get(REQUEST_ID_HEADER, ""))
        decode_tokens = decode_tokens_of(
            headers.headers.get(SLO_TTFT_HEADER), headers.headers.get(SLO_TPOT_HEADER)
        )
        return Asked(
            request_id, headers, request, route, new_body, blocks, prompt_tokens, decode_tokens, now_s
        )

    def _choose_and_charge(self, asked: Asked) -> Chosen:
        state, settings = self._state, self.settings
        request, route, blocks = asked.request, asked.route, asked.blocks
        now_s = self._clock()
        state.advance(now_s)
        pool = self._pool(route)
        if not pool.keys:
            raise RouterError(
                Reason.NO_HEALTHY_ENDPOINT,
                f"No endpoint of model `{route.model}` is available.",
                retry_after_s=settings.retry_after_s,
            )
        estimate = state.caches.estimate(
            request,
            route.model,
            route.lora,
            blocks,
            settings.block_bytes,
            asked.prompt_tokens,
            pool.keys,
        )
        prompt_tokens, cached = estimate.prompt_tokens, estimate.cached_tokens
        group = (route.model, route.group)
        prices = state.predictor.prices(group)
        completion = None
        if route.load_balancing.algorithm is Algorithm.LEAST_COMPLETION:
            completion = state.completions[group]
        rng = RecordingRng(self._rng)
        turn = self._turn
        self._turn += 1

        with state.load.lock():
            load = state.load.view(pool.slots)
            snapshot = Snapshot(
                keys=pool.keys,
                requests=load.requests,
                prefill_tokens=load.prefill_tokens,
                context_tokens=load.context_tokens,
                matched_blocks=estimate.matched,
                num_blocks=estimate.num_units,
                weights=pool.weights,
            )
            if completion is not None:
                learned = completion.learned(
                    now_s, len(pool.keys) / state.live_gateways(), asked.decode_tokens
                )
                steps_s = list(map(prices.tpot_s, load.requests, load.context_tokens))
                snapshot = replace(
                    snapshot,
                    prefilling=load.prefill_requests,
                    cached_tokens=cached,
                    steps_s=steps_s,
                    kv_tokens=[state.kv_tokens.get(key, 0) for key in pool.keys],
                    prompt_tokens=prompt_tokens,
                    output_tokens=completion.output_tokens,
                    learned=learned,
                )
            choice = choose(snapshot, route.load_balancing, rng, turn)
            row = choice.order[0]
            uncached = prompt_tokens - cached[row]
            due_s = None
            if not (request.stream and settings.first_chunk):
                ttft_s = prices.ttft_s(uncached, cached[row], load.prefill_tokens[row])
                due_s = now_s + max(PREFILL_DUE_FLOOR_S, PREFILL_DUE_FACTOR * ttft_s)
            charge = Charge(asked.request_id, pool.keys[row], uncached, prompt_tokens)
            charged = state.load.charge(charge, now_s, due_s)
        if completion is not None:
            completion.traffic.placed(now_s, completion_costs(snapshot)[row].work_s)

        decided_s = self._clock()
        record = DecisionRecord(
            request_id=asked.request_id,
            time_unix_s=self._wall_clock(),
            operation=request.operation,
            model=route.model,
            upstream_model=route.upstream_model,
            lora=route.lora,
            cluster=route.cluster,
            route_name=route.route_name,
            settings=route.load_balancing,
            stream=request.stream,
            prompt_bytes=len(request.prompt),
            prompt_tokens=prompt_tokens,
            num_blocks=estimate.num_units,
            block_bytes=settings.block_bytes,
            snapshot=snapshot,
            choice=choice,
            draws=rng.draws,
            turn=turn,
            prices=prices,
            cached_tokens=cached,
            views=estimate.views,
            filtered=pool.filtered,
            data_age_s=state.data_age_s(now_s),
            decision_us=(decided_s - asked.received_s) * 1e6,
        )
        state.records.add(record)
        if charged:  # else it ended before it was decided: nothing to follow
            state.begin(
                asked.request_id,
                Inflight(record, request.operation, charge.endpoint, blocks, group, decided_s),
            )
        scores = choice.scores
        state.metrics.observe_decision(
            route.model,
            route.load_balancing.algorithm,
            charge.endpoint,
            decided_s - asked.received_s,
            None if scores is None else scores[row],
            estimate.matched[row] / estimate.num_units if estimate.num_units else 0.0,
            estimate.views[row],
        )
        return Chosen(pool, choice, snapshot, prompt_tokens, cached, charged)

    def pass_to(self, cluster: str) -> bytes:
        """The answer that routes a request past us: Envoy's own policy over `cluster`."""
        return self._answers.decision("request_headers", (), cluster)

    def _pool(self, route: Route) -> Pool:
        """The route's available endpoints, compiled anew when health or configuration changed."""
        of = (self.table, self._state.health.generation)
        if of != self._pools_of:
            self._pools.clear()
            self._pools_of = of
        key = (route.cluster, tuple(route.subset.items()) if route.subset else ())
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = self.table.pool(route.cluster, route.subset, self._state.health.reason)
        return pool

    def _new_body(self, request: InferenceRequest, route: Route) -> bytes | None:
        """The body to send instead of the client's, or None if that one may go as it came."""
        body = request.body
        changed = bool(sanitize(body, self.table.allowed_fields))
        if route.upstream_model is not None:
            changed |= rewrite_model(body, route.upstream_model)
        if self.settings.usage_injection:
            changed |= force_usage(body, request.operation)
        return encode(body) if changed else None

    def _answered(self, asked: Asked, chosen: Chosen) -> Decision:
        request, route, headers = asked.request, asked.route, asked.headers
        pool, new_body = chosen.pool, asked.new_body
        key = (chosen.order, request.stream)
        answer = pool.answers.get(key)
        if answer is None:
            if len(pool.answers) >= MAX_ANSWERS:
                pool.answers.clear()
            answer = pool.answers[key] = self._answer("request_body", route, pool, key)
        if new_body is not None:
            answer += Answers.new_body(new_body)
        token = self.settings.debug_token
        if token is not None and compare_digest(
            headers.headers.get(DEBUG_HEADER, "").encode(), token.encode()
        ):
            answer += Answers.debug(headers.headers.get(REQUEST_ID_HEADER, ""))
        return Decision(
            request.stream,
            request.operation is Operation.RESPONSES,
            answer,
            partial(self._answer, "request_trailers", route, pool, key),
        )

    def _answer(self, field: str, route: Route, pool: Pool, key: tuple[tuple[int, ...], bool]) -> bytes:
        order, stream = key
        endpoints = tuple(pool.keys[row] for row in order)
        if len(endpoints) == 1:
            endpoints *= 2  # one more try at the only one: its connection may have been stale
        if stream:
            timeout = (_TRY_TIMEOUT, str(math.ceil(self.settings.first_byte_timeout_s * 1000)))
        else:
            timeout = (_RQ_TIMEOUT, str(math.ceil(self.settings.timeout_s * 1000)))
        retries = (_MAX_RETRIES, str(len(endpoints) - 1))
        return self._answers.decision(field, endpoints, route.cluster, (timeout, retries))
