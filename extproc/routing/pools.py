"""Which endpoints may serve a request, compiled once for many, and where requests for them wait.

Rules:
    1. A pool and its queue last until health or configuration changes; a request in an old queue is scheduled
       again in the new one.
    2. A pool that lacks endpoints which cannot be counted just now is made anew every `RECOUNT_S`.
    3. Endpoints that are doubted for a model are in none of its pools while others are, but for those due for
       a trial.
"""

from __future__ import annotations

from typing import Final

from extproc.choosing.holding import HoldQueue
from extproc.choosing.lines import OtherLines
from extproc.health.tracker import HealthTracker
from extproc.request.rules import Route
from extproc.routing.settings import HoldSettings
from extproc.routing.table import Pool, RoutingTable
from extproc.values.requests import Operation
from extproc.values.subsets import Subset
from metadata_center.types import EndpointKey

MAX_POOLS: Final = 1024
"""Compiled pools: one per route and, while endpoints are doubted, model and set of those on trial."""

RECOUNT_S: Final = 0.1
"""Longest that an endpoint is left out for want of a slot after there is one. To make a pool of a hundred
endpoints in that state takes a millisecond, of a thousand ten."""

_PoolKey = tuple[str, tuple[tuple[str, str], ...], str | None, frozenset[EndpointKey]]
"""Cluster, labels, the model that doubts are about, which endpoint is on trial."""


_TOGETHER: Final = frozenset((Operation.CHAT, Operation.TEXT_COMPLETION))
"""Operations that no engine has one of."""


def health_model(model: str, operation: Operation) -> str:
    """What an endpoint may fail at while it serves all else.

    Engines have APIs by what the model is and by their age: clients that ask for one that an engine does not
    have say nothing of its model.
    """
    return model if operation in _TOGETHER else f"{model} ({operation})"


class Pools:
    """The pools of one worker.

    Args:
        health: Which endpoints may be chosen.
        lines: Who waits at other gateways and workers.
    """

    def __init__(self, health: HealthTracker, lines: OtherLines) -> None:
        self._health = health
        self._lines = lines
        self._pools: dict[_PoolKey, Pool] = {}
        self._recount_at_s: dict[_PoolKey, float] = {}  # of those that lack endpoints
        self._of_routes: dict[int, tuple[Route, Pool]] = {}
        self._queues: dict[tuple[EndpointKey, ...], HoldQueue] = {}
        self._of: tuple[RoutingTable, int] | None = None

    def of_route(self, route: Route, table: RoutingTable, now_s: float) -> Pool:
        """The route's available endpoints, whatever they are doubted for."""
        if self._of is None or self._of[0] is not table or self._of[1] != self._health.generation:
            return self._compiled(route, table, None, frozenset(), now_s)
        known = self._of_routes.get(id(route))
        if known is None:
            pool = self._compiled(route, table, None, frozenset(), now_s)
            if pool.is_counted:
                # The route is held, so that its id stays its own.
                self._of_routes[id(route)] = route, pool
            return pool
        return known[1]

    def of_model(self, route: Route, table: RoutingTable, served_model: str, now_s: float) -> Pool:
        """The route's available endpoints for a model as `health_model` names it."""
        health = self._health
        doubted = health.doubted(served_model)
        if doubted:
            on_trial = frozenset(key for key in doubted if health.trial_due(key, served_model, now_s))
            pool = self._compiled(route, table, served_model, on_trial, now_s)
            if pool.keys:
                return pool
        return self.of_route(route, table, now_s)

    def with_home(self, route: Route, table: RoutingTable, home: EndpointKey) -> Pool:
        """The same for a request that `home` alone can serve, whatever is thought of it."""
        health = self._health
        return table.pool(
            route.cluster, route.subset, lambda key: None if key == home else health.reason(key)
        )

    def within(self, route: Route, table: RoutingTable, pool: Pool, subset: Subset) -> Pool:
        """The part of a pool that a proxy leaves to be chosen from; made anew unless it is all of it."""
        left = {key for key, at in zip(pool.keys, pool.addresses, strict=True) if subset.has(at)}
        if len(left) == len(pool.keys):
            return pool
        reasons = dict(pool.filtered)
        return table.pool(
            route.cluster,
            route.subset,
            lambda key: None if key in left else reasons.get(key, "outside"),
            pool.on_trial,
        )

    def queue(self, pool: Pool, hold: HoldSettings) -> HoldQueue:
        """Where requests for these endpoints wait."""
        queue = self._queues.get(pool.keys)
        if queue is None:
            queue = self._queues[pool.keys] = HoldQueue(others=self._lines)
        queue.bound(hold.max_requests, hold.max_s, refuses=hold.refuses)
        return queue

    def _compiled(
        self,
        route: Route,
        table: RoutingTable,
        doubted_for: str | None,
        on_trial: frozenset[EndpointKey],
        now_s: float,
    ) -> Pool:
        health = self._health
        of = (table, health.generation)
        if of != self._of:
            self._forget(table)
            self._of = of
        key = (route.cluster, tuple(route.subset.items()) if route.subset else (), doubted_for, on_trial)
        pool = self._pools.get(key)
        if pool is None or now_s >= self._recount_at_s.get(key, now_s + 1.0):
            if len(self._pools) >= MAX_POOLS:
                self._pools.clear()
                self._recount_at_s.clear()
                self._of_routes.clear()

            def why_not(endpoint: EndpointKey) -> str | None:
                reason = health.reason(endpoint)
                if reason is None and doubted_for is not None and endpoint not in on_trial:
                    return health.doubt(endpoint, doubted_for)
                return reason

            pool = table.pool(route.cluster, route.subset, why_not, on_trial)
            self._pools[key] = pool
            if pool.is_counted:
                self._recount_at_s.pop(key, None)
            else:
                self._recount_at_s[key] = now_s + RECOUNT_S
        return pool

    def _forget(self, table: RoutingTable) -> None:
        """Forget the pools of another table, and those of clusters in which something changed."""
        self._of_routes.clear()
        if self._of is None or self._of[0] is not table:
            self._pools.clear()
            self._recount_at_s.clear()
        else:
            generation_of, since = self._health.generation_of, self._of[1]
            for key in [key for key in self._pools if generation_of(key[0]) > since]:
                del self._pools[key]
                self._recount_at_s.pop(key, None)
        live = {pool.keys for pool in self._pools.values()}
        self._queues = {keys: queue for keys, queue in self._queues.items() if keys in live}
