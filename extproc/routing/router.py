"""The decision: from a request's bytes to the value that names its endpoints, at once or later.

Rules:
    1. A request is parsed once (`parsing`), scheduled (`scheduling`), and its plan is made here. One that has
       to wait is scheduled again by its queue; its decision is pending.
    2. Time and randomness are given at construction; a decision's record holds every draw.
    3. What fails before the charge is a `Refusal` and leaves no trace in any counter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from hmac import compare_digest
from typing import Final, Protocol

from extproc.errors import Reason, RouterError
from extproc.request.multipart import check_type
from extproc.request.parse import is_form, path_at_engines
from extproc.request.paths import without_slash
from extproc.request.reading import BodyRead, ReadOrder
from extproc.request.responses import Named, response_key
from extproc.request.structure import HEAVY_BYTES, check_structure, is_heavy
from extproc.routing.claims import Queued
from extproc.routing.parsing import ParsedRequest, check_size, order_of, parse_read, parse_request
from extproc.routing.reading_budget import MOST_S_PER_BYTE, SMALL_BYTES, TIMED_BYTES, ReadingBudget
from extproc.routing.scheduling import Chosen, Scheduler
from extproc.routing.settings import RouterSettings
from extproc.routing.state import SchedulingState
from extproc.routing.table import PlanKey, Pool, RoutingTable
from extproc.routing.waiting import Loop, RequestQueue
from extproc.values.choices import Rng
from extproc.values.deciding import Deciding, Later, Now, Refusal, settle
from extproc.values.exchange import Body, LineVerdict, PassTo, RefuseAtOnce, RequestHeaders
from extproc.values.headers import CONTENT_TYPE, DEBUG_HEADER
from extproc.values.pending import Pending
from extproc.values.placements import Decision, Plan
from metadata_center.sharing.messages import Candidate
from metadata_center.types import EndpointKey, RequestId

Reserve = Callable[[RequestId, Sequence[Candidate]], Pending[EndpointKey | None]]
"""Compare and set, see `metadata_center.sharing.sync.Sync.reserve`."""

MAX_PLANS = 1024
"""Plans kept per pool: all orders of three out of ten endpoints; rendered, about 1 KB each. Over many more
endpoints hardly one comes again."""

_ONE_TURN_BYTES: Final = 256 * 1024
"""Bodies up to this are understood and scheduled in one turn of the loop."""

MAX_PATIENCE_S = 60.0
"""`max_message_timeout` of envoy/bootstrap.yaml: Envoy ignores what asks for more."""
MAX_RETRIES = 1
"""One input may kill whatever engine reads it: what broke two is not given to a third. Envoy counts retries
of all causes together, so refused connections have no more."""


class Readers(Protocol):
    """What reads large bodies, so that others do not wait for them."""

    @property
    def patience_s(self) -> float:
        """What is to be read is read, or refused, after this long at the latest."""

    def read(self, order: ReadOrder, body: Body) -> Pending[BodyRead]:
        """Have a body read; fails with RouterError if it is refused. Raises RouterError if too many wait."""


class Router:
    """Decides.

    Args:
        state: What scheduling reads and charges.
        table: Compiled configuration; replaced by assignment.
        settings: Likewise; they hold no request where there is no `loop`.
        rng: Source of every random choice.
        clock: Monotonic seconds.
        wall_clock: Unix seconds, for records.
        reserve: Puts a charge to where all gateways meet; says where it is charged now, None if it is
            unconfirmed and stays. None decides here alone.
        loop: The running event loop, for requests that wait, and for large ones, which take two turns.
        readers: What reads large bodies; None reads them here and now.
        work_clock: Processor seconds of this thread; None counts no work, and reads elsewhere only what is
            large by itself.
    """

    def __init__(
        self,
        state: SchedulingState,
        table: RoutingTable,
        settings: RouterSettings,
        rng: Rng,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        reserve: Reserve | None = None,
        loop: Callable[[], Loop] | None = None,
        readers: Readers | None = None,
        work_clock: Callable[[], float] | None = None,
    ) -> None:
        self.table = table
        self.settings = settings
        self._state = state
        self._rng = rng
        self._clock = clock
        self._reserve = reserve
        self._readers = readers
        self._work_clock = work_clock
        self._budget = ReadingBudget()
        self._scheduler = Scheduler(state, rng, clock, wall_clock)
        self.waiting: RequestQueue[Decision] | None = None
        self._loop = loop
        if loop is not None:
            self.waiting = RequestQueue(
                self._schedule, self._charged, state.recorder, loop, clock, state.tell_line
            )

    def configure(self, table: RoutingTable, settings: RouterSettings) -> None:
        """Go by these from now on; requests that wait are scheduled by them."""
        self.table = table
        self.settings = settings

    def decide(self, headers: RequestHeaders, body: Body) -> Deciding[Decision]:
        """Understand, choose, charge; or wait; or refuse."""
        try:
            check_size(body, self.settings)
            if self._work_clock is None or len(body) <= SMALL_BYTES:
                return self._decide(headers, body, may_read=True)
            budget, began_s = self._budget, self._clock()
            is_timed = len(body) > TIMED_BYTES and budget.is_watched(began_s)
            work_s = self._work_clock() if is_timed else began_s
            try:
                return self._decide(headers, body, may_read=not budget.is_spent(began_s))
            finally:
                now_s = self._clock()
                took_s = (self._work_clock() if is_timed else now_s) - work_s
                budget.spend(min(took_s, len(body) * MOST_S_PER_BYTE), now_s)
        except RouterError as error:
            return Refusal(error.untraced())

    def _decide(self, headers: RequestHeaders, body: Body, *, may_read: bool) -> Deciding[Decision]:
        is_form_body = is_form(headers.path)
        if is_form_body:
            check_type(headers.headers.get(CONTENT_TYPE), body)
        if not may_read or (len(body) > HEAVY_BYTES if is_form_body else is_heavy(body)):
            if self._readers is not None:
                return self._read_elsewhere(self._readers, headers, body)
            if not is_form_body:
                check_structure(bytes(body))
        parsed = parse_request(
            headers, body, self.table, self.settings, self._state.predictor, self._rng, self._clock()
        )
        if self._loop is None or len(body) <= _ONE_TURN_BYTES:
            return self._scheduled(parsed, self._schedule(parsed, None))
        return self._scheduled_next(self._loop(), headers, body, parsed)

    def _scheduled_next(
        self, loop: Loop, headers: RequestHeaders, body: Body, parsed: ParsedRequest
    ) -> Later[Decision]:
        """Schedule in the next turn of the loop: to understand the body took long enough for one."""
        decision: Pending[Decision] = Pending()
        # No nested function: compiled, it is in a cycle with what it is nested in, and that has the body.
        loop.call_later(0.0, partial(self._schedule_now, headers, body, self.table, parsed, decision))
        hold = self.settings.hold
        return Later(decision, None if hold is None else min(hold.max_s + 1.0, MAX_PATIENCE_S))

    def _schedule_now(
        self,
        headers: RequestHeaders,
        body: Body,
        table: RoutingTable,
        parsed: ParsedRequest,
        decision: Pending[Decision],
    ) -> None:
        if decision.is_over:  # its client has left
            return
        try:
            if self.table is not table:  # the cluster of the rule that it was parsed by may be gone
                state, received_s = self._state, parsed.received_s
                parsed = parse_request(
                    headers, body, self.table, self.settings, state.predictor, self._rng, received_s
                )
            settle(decision, self._scheduled(parsed, self._schedule(parsed, None)))
        except Exception as error:  # a refusal, or a bug: this stream fails alone
            decision.fail(error)

    def _scheduled(self, parsed: ParsedRequest, scheduled: Chosen | Queued) -> Deciding[Decision]:
        if isinstance(scheduled, Queued):
            assert self.waiting is not None, "no request is queued without a queue"
            return self.waiting.admit(parsed, scheduled)
        return self._charged(parsed, scheduled)

    def retrieve(self, request: RequestHeaders, named: Named) -> LineVerdict:
        """Where a request about a stored response goes: to the endpoint that holds it, whatever its health.

        One that is not known goes to any endpoint, whose own 404 the client is to see; so does one whose
        endpoint this request may not use. Neither is charged: nothing is computed for it.
        """
        now_s = self._clock()
        home = self._state.homes.find(response_key(named.response_id), now_s)
        any_of: tuple[str, Pool] | None = None
        for route in self.table.rules.open_to(request.headers):
            pool = self._scheduler.pools.of_route(route, self.table, now_s)
            holder = None if home is None else self.table.member(route.cluster, route.subset, home)
            if holder is not None:
                others = [at for key, at in zip(pool.keys, pool.addresses, strict=True) if key != home]
                endpoints = (str(holder.address), *others[:1])
                return self._held(route.cluster, endpoints, named, request.path)
            if any_of is None and pool.keys:
                any_of = route.cluster, pool
        if any_of is None:
            error = "No endpoint is available that could have this response."
            return RefuseAtOnce(
                RouterError(Reason.NO_HEALTHY_ENDPOINT, error, retry_after_s=self.settings.retry_after_s)
            )
        cluster, pool = any_of
        endpoint = pool.addresses[int(self._rng.random() * len(pool.keys))]
        return self._held(cluster, (endpoint,), named, request.path)

    def locate(self, passes: PassTo, request: RequestHeaders) -> LineVerdict:
        """The same with endpoints named, for a proxy that can choose none by itself.

        Any available endpoint of the cluster will do, one alone; of those named before, what is left of them.
        """
        plan, within = passes.plan, request.within
        if plan.endpoints:
            left = [at for at in plan.endpoints if within is None or within.has(at)]
        else:
            reason = self._state.health.reason
            members = [each for each in self.table.clusters.get(plan.cluster, ()) if reason(each.key) is None]
            addresses = [str(each.address) for each in members]
            left = [at for at in addresses if within is None or within.has(at)]
            left = left and [left[int(self._rng.random() * len(left))]]
        if not left:
            retry_after_s = self.settings.retry_after_s
            error = "No endpoint is available that may be chosen for this path."
            return RefuseAtOnce(RouterError(Reason.NO_HEALTHY_ENDPOINT, error, retry_after_s=retry_after_s))
        return replace(passes, plan=replace(plan, endpoints=tuple(left), charged=False, rendered={}))

    def _held(self, cluster: str, endpoints: tuple[str, ...], named: Named, path: str) -> PassTo:
        tried = (endpoints[0], *endpoints)  # once more: its connection may have been stale
        plan = self._plan(cluster, tried, named.stream, len(endpoints), True, charged=False)
        return PassTo(plan, without_slash(path))

    def _read_elsewhere(self, readers: Readers, headers: RequestHeaders, body: Body) -> Later[Decision]:
        """Decide about a body that is read elsewhere; cancelled, it reads or charges nothing more."""
        received_s, table, settings = self._clock(), self.table, self.settings
        patience_s = self._patience_s(readers)
        order = order_of(headers, table, settings)
        reading = readers.read(order, body)
        decision: Pending[Decision] = Pending(reading.cancel)
        goes_on = partial(self._decide_read, headers, order, table, settings, received_s, patience_s)
        decide = partial(goes_on, decision)
        reading.then(decide, decision.fail)
        return Later(decision, patience_s)

    def _decide_read(
        self,
        headers: RequestHeaders,
        order: ReadOrder,
        table: RoutingTable,
        settings: RouterSettings,
        received_s: float,
        patience_s: float,
        decision: Pending[Decision],
        read: BodyRead,
    ) -> None:
        try:
            if order_of(headers, self.table, self.settings) == order:  # else it was read by other rules
                table, settings = self.table, self.settings
            parsed = parse_read(headers, read, table, settings, self._state.predictor, self._rng, received_s)
            hold = self.settings.hold
            left_s = received_s + patience_s - self._clock()
            may_wait = hold is not None and left_s > hold.max_s + 1.0
            settle(decision, self._scheduled(parsed, self._schedule(parsed, None, may_wait=may_wait)))
        except Exception as error:  # a refusal, or a bug of which the readers are to know nothing
            decision.fail(error)

    def _patience_s(self, readers: Readers) -> float:
        """How long Envoy has to wait for a body to be read, and then perhaps for room."""
        hold = self.settings.hold
        # One second for the way of the answer.
        wanted_s = readers.patience_s + 1.0 + (0.0 if hold is None else hold.max_s + 1.0)
        return min(wanted_s, MAX_PATIENCE_S)

    def _schedule(
        self, parsed: ParsedRequest, before: Queued | None, *, may_wait: bool = True
    ) -> Chosen | Queued:
        may_wait = may_wait and self.waiting is not None and self.waiting.takes(before)
        try:
            return self._scheduler.schedule(parsed, self.table, self.settings, before, may_wait=may_wait)
        except RouterError as error:
            error.model = parsed.route.model
            raise

    def _charged(self, parsed: ParsedRequest, chosen: Chosen) -> Now[Decision] | Later[Decision]:
        if self._reserve is None or not chosen.charged or chosen.pinned or chosen.by_rival:
            return Now(self._answered(parsed, chosen))
        return self._reserved(self._reserve, parsed, chosen)

    def _reserved(self, reserve: Reserve, parsed: ParsedRequest, chosen: Chosen) -> Later[Decision]:
        """Have the choice confirmed, or moved, where all gateways' choices are put in one order."""
        reservation = reserve(parsed.request_id, chosen.candidates())
        decision: Pending[Decision] = Pending(reservation.cancel)
        reservation.then(partial(self._answer_reserved, parsed, chosen, decision), decision.fail)
        return Later(decision)

    def _answer_reserved(
        self,
        parsed: ParsedRequest,
        chosen: Chosen,
        decision: Pending[Decision],
        endpoint: EndpointKey | None,
    ) -> None:
        confirmed = chosen
        try:
            if endpoint is not None and endpoint != chosen.endpoint:
                self._state.running.reassigned(parsed.request_id, endpoint)
                confirmed = chosen.moved_to(endpoint)
            made = self._answered(parsed, confirmed)
        except Exception as error:  # a bug: this stream fails alone
            decision.fail(error)
        else:
            decision.give(made)

    def _answered(self, parsed: ParsedRequest, chosen: Chosen) -> Decision:
        request, headers = parsed.request, parsed.headers
        order = chosen.order[:1] if chosen.tried_once else chosen.order
        key = (order, request.stream, chosen.pinned, chosen.tried_once)
        plans = chosen.pool.plans
        plan = plans.get(key)
        if plan is None:
            if len(plans) >= MAX_PLANS:
                plans.clear()
            plan = plans[key] = self._plan_of(parsed.route.cluster, chosen.pool, key)
        token = self.settings.debug_token
        shows_id = token is not None and compare_digest(
            headers.headers.get(DEBUG_HEADER, "").encode(), token.encode()
        )
        return Decision(
            parsed.request_id,
            request.operation,
            request.stream,
            plan,
            parsed.new_body,
            shows_id=shows_id,
            renamed=parsed.renamed,
            new_path=path_at_engines(headers.path),
        )

    def _plan_of(self, cluster: str, pool: Pool, key: PlanKey) -> Plan:
        order, stream, pinned, tried_once = key
        endpoints = tuple(pool.addresses[row] for row in order)
        if (len(endpoints) == 1 or pinned) and not tried_once:
            endpoints = (endpoints[0], *endpoints)  # once more: its connection may have been stale
        most = len(endpoints) - 1
        return self._plan(cluster, endpoints, stream, most if pinned else min(MAX_RETRIES, most), pinned)

    def _plan(
        self,
        cluster: str,
        endpoints: tuple[str, ...],
        stream: bool,
        retries: int,
        pinned: bool,
        *,
        charged: bool = True,
    ) -> Plan:
        settings = self.settings
        timeout_s, first_byte_s = (
            (None, settings.first_byte_timeout_s) if stream else (settings.timeout_s, None)
        )
        return Plan(cluster, endpoints, retries, timeout_s, first_byte_s, pinned, charged)
