"""What is looked at before a request is scheduled: endpoints that may serve it, what is cached, its cost."""

from __future__ import annotations

from collections.abc import Sequence

from extproc.choosing.limits import decode_limits_of
from extproc.choosing.policies.registry import POLICIES
from extproc.choosing.snapshots import Demand, Load, Prompt, completion_snapshot, plain_snapshot
from extproc.choosing.sunk import crowded_ratios
from extproc.errors import Reason, RouterError
from extproc.predicting.traffic import Traffic
from extproc.routing.caches import Estimate
from extproc.routing.engines import under_way_s
from extproc.routing.parsing import ParsedRequest
from extproc.routing.pools import Pools, health_model
from extproc.routing.settings import RouterSettings
from extproc.routing.state import SchedulingState
from extproc.routing.table import Pool, RoutingTable
from extproc.values.choices import Snapshot
from extproc.values.headers import SLO_TPOT_HEADER, SLO_TTFT_HEADER
from extproc.values.prices import Prices
from metadata_center.types import EndpointKey, value


@value
class Look:
    """What was found; load is read later, in the step that charges.

    Attributes:
        pool: The endpoints that may serve it; not empty.
        home: The only endpoint that has what it builds on, if that is known; one of the pool.
        served_model: What endpoints may fail at with it.
        estimate: What is believed cached of it, one per row.
        groups: Endpoints that perform alike, see `Pool.groups_of`.
        prices: One per row, or one for all.
        traffic: Of requests of its kind.
        turn: A number of its own.
        now_s: When; monotonic seconds.
    """

    pool: Pool
    home: EndpointKey | None
    served_model: str
    estimate: Estimate
    groups: tuple[str, ...]
    prices: Sequence[Prices]
    traffic: Traffic
    turn: int
    now_s: float


def look(
    state: SchedulingState,
    pools: Pools,
    parsed: ParsedRequest,
    table: RoutingTable,
    settings: RouterSettings,
    turn: int,
    now_s: float,
) -> Look:
    """Look at all but the load.

    Raises:
        RouterError: No endpoint is available.
    """
    request, route = parsed.request, parsed.route
    served_model = health_model(route.upstream_model or request.model, request.operation)
    pool = pools.of_model(route, table, served_model, now_s)
    home = None if parsed.follows is None else _home(state, parsed, table, now_s)
    if home is not None and home not in pool.rows:
        pool = pools.with_home(route, table, home)
    if parsed.headers.within is not None:
        pool = pools.within(route, table, pool, parsed.headers.within)
        home = home if home in pool.rows else None
    if not pool.keys:
        table.expect(route.cluster, f"Model `{route.model}`", settings.retry_after_s)
        raise RouterError(
            Reason.NO_HEALTHY_ENDPOINT,
            f"No endpoint of model `{route.model}` is available.",
            retry_after_s=settings.retry_after_s,
        )
    estimate = state.caches.estimate(
        request,
        route.model,
        route.lora,
        parsed.blocks,
        settings.block_bytes,
        parsed.prompt_tokens,
        pool.keys,
    )
    groups = pool.groups_of(route.group)
    prices = state.predictor.row_prices(route.model, groups)
    traffic = state.predictor.traffic((route.model, route.group))
    return Look(pool, home, served_model, estimate, groups, prices, traffic, turn, now_s)


def snapshot_of(
    state: SchedulingState, parsed: ParsedRequest, found: Look, load: Load, *, is_patient: bool
) -> Snapshot:
    """What the route's policy needs to know; with what is under way where the request may wait."""
    pool, traffic, estimate = found.pool, found.traffic, found.estimate
    if not POLICIES[parsed.route.load_balancing.algorithm].needs_engines:
        prompt = Prompt(estimate.prompt_tokens, estimate.cached_tokens, estimate.matched, estimate.num_units)
        return plain_snapshot(pool.keys, pool.weights, load, prompt, found.prices, traffic.output_tokens)
    slo_ttft, slo_tpot = map(parsed.headers.headers.get, (SLO_TTFT_HEADER, SLO_TPOT_HEADER))
    processes, running = state.processes(), state.caches.running
    return completion_snapshot(
        pool.keys,
        pool.weights,
        load,
        Prompt(
            estimate.prompt_tokens,
            estimate.cached_tokens,
            estimate.matched,
            estimate.num_units,
            crowded_ratios(
                running,
                parsed.blocks,
                load.requests,
                processes,
                estimate.prompt_tokens,
                estimate.cached_tokens,
            ),
        ),
        found.prices,
        state.engines.view(
            pool.keys,
            running.distinct_ratios,
            under_way_s(state.load.prefill_since_s(pool.slots), load.prefilling, found.now_s)
            if is_patient
            else (),
        ),
        Demand(traffic, found.now_s, len(pool.keys) / processes, *decode_limits_of(slo_ttft, slo_tpot)),
    )


def _home(
    state: SchedulingState, parsed: ParsedRequest, table: RoutingTable, now_s: float
) -> EndpointKey | None:
    """The endpoint that holds what the request builds on, if that is known and may serve it."""
    assert parsed.follows is not None
    for key in parsed.follows:
        home = None if key is None else state.homes.find(key, now_s)
        if home is not None and table.member(parsed.route.cluster, parsed.route.subset, home):
            return home
    return None
