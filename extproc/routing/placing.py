"""Where a request goes: looked at, chosen and charged in one step; or it waits and is placed again.

Rules:
    1. `place` neither awaits nor yields: nothing comes between what it reads and what it charges. Where
       several workers share the counters, their lock is held over the same step.
    2. What fails or waits is charged nowhere. One that waits is in its pool's queue and nowhere else.
    3. A pool and its queue last until health or configuration changes; who waits in an old queue is placed
       again in the new one.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from extproc.choosing.deciding import Claim, Later, No, decide
from extproc.choosing.holding import HoldQueue
from extproc.choosing.limits import SLO_TPOT_HEADER, SLO_TTFT_HEADER, decode_tokens_of, limit_s_of
from extproc.choosing.policies.registry import POLICIES
from extproc.choosing.replay import RecordingRng
from extproc.choosing.rotation import Rotation
from extproc.choosing.rows import expected_ttft_s
from extproc.choosing.snapshots import Demand, Load, Prompt, completion_snapshot, plain_snapshot
from extproc.errors import Reason, RouterError
from extproc.predicting.traffic import Traffic
from extproc.request.rules import Route
from extproc.routing.asking import Asked
from extproc.routing.books import PlacingBooks
from extproc.routing.settings import HoldSettings, RouterSettings
from extproc.routing.table import Pool, RoutingTable
from extproc.values.choices import Choice, Rng, Snapshot
from extproc.values.decisions import DecisionRecord
from extproc.values.inflight import Inflight
from extproc.values.prices import Prices
from extproc.values.requests import GENERATING, InferenceRequest, Operation
from metadata_center.sharing.messages import MAX_CANDIDATES, Candidate
from metadata_center.types import Charge, EndpointKey, value

PREFILL_DUE_FACTOR = 1.2
"""A prefill without first-token signal is released after this many times its predicted TTFT (AIGW: 12/10)."""

PREFILL_DUE_FLOOR_S = 0.1
"""And not before this (AIGW: 100 ms)."""

MAX_POOLS = 1024
"""Compiled pools: one per route and, while endpoints are doubted, model and set of those on trial."""

_PoolKey = tuple[str, tuple[tuple[str, str], ...], str | None, frozenset[EndpointKey]]
"""Cluster, labels, the model that doubts are about, who is on trial."""


MAX_ROTATIONS = 4096
"""Round-robin turns kept, some 100 bytes and 8 for each endpoint: names times rules of a large configuration.
Of more, the one least recently used begins anew."""

_Stream = tuple[str, str | None, str | None, str, tuple[tuple[str, str], ...]]
"""The client's name for the model, the rule's name, its adapter, cluster and labels."""


def max_output_tokens(request: InferenceRequest) -> int | None:
    """Most tokens of all choices of its answer together, by its own words; None if it does not bound them."""
    most = request.max_tokens
    if most is None:
        return None
    choices = request.body.get("n")
    return most * choices if type(choices) is int and choices > 1 else most


def _health_model(model: str, operation: Operation) -> str:
    """What an endpoint may fail at while it serves all else.

    Engines offer generation or the other APIs, each by what the model is: clients who ask for one that an
    engine does not have say nothing of its model.
    """
    return model if operation in GENERATING else f"{model} ({operation})"


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
        pinned: The first of them alone has what the request builds on.
        tried_once: It failed at several endpoints before: only the first of `order` is to try.
    """

    pool: Pool
    choice: Choice
    snapshot: Snapshot
    prompt_tokens: int
    cached_tokens: list[int]
    charged: bool
    order: tuple[int, ...] = ()
    pinned: bool = False
    tried_once: bool = False

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
class Parked:
    """A request that waits.

    Attributes:
        ticket: Its name in the queue; older requests have lower ones.
        queue: Where it waits.
        later: What was decided.
    """

    ticket: int
    queue: HoldQueue
    later: Later


class Placer:
    """Places requests on endpoints.

    Args:
        books: What it reads and charges.
        rng: Source of every random choice.
        clock: Monotonic seconds.
        wall_clock: Unix seconds, for records.
    """

    def __init__(
        self, books: PlacingBooks, rng: Rng, clock: Callable[[], float], wall_clock: Callable[[], float]
    ) -> None:
        self._books = books
        self._rng = rng
        self._clock = clock
        self._wall_clock = wall_clock
        self._turn = 0
        self._rotations: OrderedDict[_Stream, Rotation] = OrderedDict()
        self._tickets = 0
        self._pools: dict[_PoolKey, Pool] = {}
        self._queues: dict[tuple[EndpointKey, ...], HoldQueue] = {}
        self._pools_of: tuple[RoutingTable, int] | None = None

    def place(
        self,
        asked: Asked,
        table: RoutingTable,
        settings: RouterSettings,
        before: Parked | None = None,
        *,
        may_wait: bool = True,
    ) -> Chosen | Parked:
        """Choose and charge, or park.

        Args:
            asked: The request.
            table: Which endpoints there are.
            settings: In force now; without `hold` nothing is parked.
            before: How it waited until now; it does so no more.
            may_wait: False places it now, wherever it is best.

        Raises:
            RouterError: No endpoint is available, or none will be in time.
        """
        books, rng = self._books, RecordingRng(self._rng)
        request, route, blocks = asked.request, asked.route, asked.blocks
        if before is not None:
            before.queue.forget(before.ticket)
        now_s = self._clock()
        books.running.advance(now_s)
        served_model = _health_model(route.upstream_model or request.model, request.operation)
        pool, home = self._pool_and_home(asked, table, served_model, now_s)
        may_wait = may_wait and home is None  # no room elsewhere is of any use to one that has a home
        if not pool.keys:
            raise RouterError(
                Reason.NO_HEALTHY_ENDPOINT,
                f"No endpoint of model `{route.model}` is available.",
                retry_after_s=settings.retry_after_s,
            )
        estimate = books.caches.estimate(
            request,
            route.model,
            route.lora,
            blocks,
            settings.block_bytes,
            asked.prompt_tokens,
            pool.keys,
        )
        prompt_tokens, cached = estimate.prompt_tokens, estimate.cached_tokens
        groups = pool.groups_of(route.group)
        prices = books.predictor.row_prices(route.model, groups)
        traffic = books.predictor.traffic((route.model, route.group))
        prompt = Prompt(prompt_tokens, cached, estimate.matched, estimate.num_units)
        turn = self._turn
        self._turn += 1

        with books.load.lock():
            view = books.load.view(pool.slots)
            load = Load(view.requests, view.prefill_requests, view.prefill_tokens, view.context_tokens)
            policy = POLICIES[route.load_balancing.algorithm]
            hold = settings.hold if may_wait and policy.may_wait else None
            snapshot = self._snapshot(asked, pool, load, prompt, prices, traffic, hold is not None, now_s)
            queue = claim = None
            if hold is not None:
                queue = self._queue(pool, hold)
                claim = self._claim(asked, limit_s_of(asked.headers.headers.get(SLO_TTFT_HEADER)), before)
            rotation = None
            if policy.takes_turns:
                rotation = self._rotation(request.model, route)
                snapshot = replace(snapshot, owed=rotation.turn(pool.keys, pool.weights))
            decided = decide(snapshot, route.load_balancing, rng, turn, now_s, queue, claim)
            if isinstance(decided, Later):
                assert queue is not None, "no request waits without a queue"
                assert claim is not None, "no request waits without a name"
                return Parked(claim.ticket, queue, decided)
            if isinstance(decided, No):
                raise RouterError(
                    Reason.OVERLOADED,
                    f"All endpoints of model `{route.model}` are busy, and more requests wait for them "
                    "than can be answered in time.",
                    retry_after_s=math.ceil(decided.retry_after_s),
                    held_s=0.0 if before is None else now_s - asked.received_s,
                )
            snapshot, choice = decided.snapshot, decided.choice
            if decided.costs is not None:
                traffic.placed(now_s, decided.costs.works_s[choice.order[0]])
            if rotation is not None:
                rotation.served(snapshot.owed, choice.order[0])
            order = choice.order
            if home is not None:
                order = (pool.rows[home], *[other for other in order if other != pool.rows[home]][:1])
            row = order[0]
            uncached = prompt_tokens - cached[row]
            due_s = None
            if not (request.stream and settings.first_chunk):
                ttft_s = expected_ttft_s(snapshot, row)
                due_s = now_s + max(PREFILL_DUE_FLOOR_S, PREFILL_DUE_FACTOR * ttft_s)
            charge = Charge(asked.request_id, pool.keys[row], uncached, prompt_tokens)
            charged = books.load.charge(charge, now_s, due_s)
            if not load.prefilling[row]:
                books.engines.prefill_begins(charge.endpoint, now_s)
            if charge.endpoint in pool.on_trial:
                books.health.trial_began(charge.endpoint, served_model, now_s)

        decided_s = self._clock()
        began_s = asked.received_s if before is None else now_s
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
            prompt_bytes=request.prompt_bytes,
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
            placed=home if order[0] != choice.order[0] else None,
            holder=home,
            filtered=pool.filtered,
            data_age_s=books.ages.of(now_s),
            decision_us=(decided_s - began_s) * 1e6,
            held_s=began_s - asked.received_s,
            held_for=None if before is None else before.later.reason,
        )
        books.records.add(record)
        tried_once = books.poison.is_poison(asked.fingerprint, now_s)
        if charged:  # else it ended before it was decided: nothing to follow
            inflight = Inflight(
                record,
                request.operation,
                charge.endpoint,
                blocks,
                route.group,
                groups,
                decided_s,
                max_output_tokens(request),
                served_model,
                asked.fingerprint,
                tried_once=tried_once,
                builds_on=asked.follows is not None and asked.follows != (None, None),
            )
            if asked.follows is not None:
                inflight.conversation = asked.follows.conversation
            books.running.begin(asked.request_id, inflight)
        scores = choice.scores
        books.recorder.observe_decision(
            route.model,
            route.load_balancing.algorithm,
            charge.endpoint,
            decided_s - began_s,
            None if scores is None else scores[row],
            estimate.matched[row] / estimate.num_units if estimate.num_units else 0.0,
            estimate.views[row],
        )
        return Chosen(
            pool, choice, snapshot, prompt_tokens, cached, charged, order, home is not None, tried_once
        )

    def _pool_and_home(
        self, asked: Asked, table: RoutingTable, served_model: str, now_s: float
    ) -> tuple[Pool, EndpointKey | None]:
        """The endpoints that may serve it, and which of them holds what it builds on, if that is known."""
        route = asked.route
        pool = self._pool(route, table, served_model, now_s)
        home = None if asked.follows is None else self._home(asked, table, now_s)
        if home is not None and home not in pool.rows:
            health = self._books.health
            pool = table.pool(
                route.cluster, route.subset, lambda key: None if key == home else health.reason(key)
            )
        return pool, home

    def _snapshot(
        self,
        asked: Asked,
        pool: Pool,
        load: Load,
        prompt: Prompt,
        prices: tuple[Prices, ...],
        traffic: Traffic,
        is_patient: bool,
        now_s: float,
    ) -> Snapshot:
        """What the route's policy needs to know; with what is under way where the request may wait."""
        books, route = self._books, asked.route
        if not POLICIES[route.load_balancing.algorithm].needs_engines:
            return plain_snapshot(pool.keys, pool.weights, load, prompt, prices, traffic.output_tokens)
        slo_ttft, slo_tpot = map(asked.headers.headers.get, (SLO_TTFT_HEADER, SLO_TPOT_HEADER))
        endpoints = len(pool.keys) / books.processes()
        return completion_snapshot(
            pool.keys,
            pool.weights,
            load,
            prompt,
            prices,
            books.engines.view(
                pool.keys, books.caches.running.distinct_ratio, load.prefilling if is_patient else (), now_s
            ),
            Demand(traffic, now_s, endpoints, decode_tokens_of(slo_ttft, slo_tpot)),
        )

    def _home(self, asked: Asked, table: RoutingTable, now_s: float) -> EndpointKey | None:
        """The endpoint that holds what the request builds on, if that is known and may serve it."""
        assert asked.follows is not None
        for key in asked.follows:
            home = None if key is None else self._books.homes.find(key, now_s)
            if home is not None and table.serves(asked.route.cluster, asked.route.subset, home):
                return home
        return None

    def _queue(self, pool: Pool, hold: HoldSettings) -> HoldQueue:
        """Where requests for these endpoints wait."""
        queue = self._queues.get(pool.keys)
        if queue is None:
            queue = self._queues[pool.keys] = HoldQueue(max_held=hold.max_requests, max_hold_s=hold.max_s)
        return queue

    def _claim(self, asked: Asked, limit_s: float | None, before: Parked | None) -> Claim:
        if before is not None:
            return Claim(before.ticket, asked.received_s, limit_s, before.later)
        self._tickets += 1
        return Claim(self._tickets, asked.received_s, limit_s)

    def _rotation(self, name: str, route: Route) -> Rotation:
        """The round-robin turns of one name by one rule: streams that alternate must not share them."""
        subset = tuple(route.subset.items()) if route.subset else ()
        stream = (name, route.route_name, route.lora, route.cluster, subset)
        rotation = self._rotations.get(stream)
        if rotation is None:
            if len(self._rotations) >= MAX_ROTATIONS:
                self._rotations.popitem(last=False)
            rotation = self._rotations[stream] = Rotation(len(self._rotations))
        else:
            self._rotations.move_to_end(stream)
        return rotation

    def pool(self, route: Route, table: RoutingTable) -> Pool:
        """The route's available endpoints, whatever they are doubted for."""
        return self._pool_of(route, table, None, frozenset())

    def _pool(self, route: Route, table: RoutingTable, served_model: str, now_s: float) -> Pool:
        """The route's available endpoints, compiled anew when health or configuration changed.

        Those doubted for the model are none of them while others are, but for whoever is due for a trial.
        """
        health = self._books.health
        doubted = health.doubted(served_model)
        if doubted:
            on_trial = frozenset(key for key in doubted if health.trial_due(key, served_model, now_s))
            pool = self._pool_of(route, table, served_model, on_trial)
            if pool.keys:
                return pool
        return self._pool_of(route, table, None, frozenset())

    def _pool_of(
        self, route: Route, table: RoutingTable, doubted_for: str | None, on_trial: frozenset[EndpointKey]
    ) -> Pool:
        health = self._books.health
        of = (table, health.generation)
        if of != self._pools_of:
            self._pools.clear()
            self._queues.clear()
            self._pools_of = of
        key = (route.cluster, tuple(route.subset.items()) if route.subset else (), doubted_for, on_trial)
        pool = self._pools.get(key)
        if pool is None:
            if len(self._pools) >= MAX_POOLS:
                self._pools.clear()

            def why_not(endpoint: EndpointKey) -> str | None:
                reason = health.reason(endpoint)
                if reason is None and doubted_for is not None and endpoint not in on_trial:
                    return health.doubt(endpoint, doubted_for)
                return reason

            pool = self._pools[key] = table.pool(route.cluster, route.subset, why_not, on_trial)
        return pool
