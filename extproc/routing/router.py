"""The decision: from a request's bytes to the answer that names its endpoints, at once or later.

Rules:
    1. A request is understood once (`asking`), placed (`placing`), and answered here. One that has to wait
       is placed again by the waiting room; the answer to it is a promise.
    2. Time and randomness are given at construction; a decision's record holds every draw.
    3. What fails before the charge raises `RouterError` and leaves no trace in any counter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from hmac import compare_digest
from typing import Protocol

from extproc.errors import Reason, RouterError
from extproc.protocol.wire import Answers
from extproc.request.parse import is_form
from extproc.request.reading import BodyRead, ReadOrder
from extproc.request.responses import Named, response_key
from extproc.request.rules import Route
from extproc.request.structure import check_structure, is_heavy
from extproc.routing.asking import Asked, check_size, order_of, understand, understand_read
from extproc.routing.books import PlacingBooks
from extproc.routing.placing import Chosen, Parked, Placer
from extproc.routing.reading_budget import SMALL_BYTES, ReadingBudget
from extproc.routing.settings import RouterSettings
from extproc.routing.table import AnswerKey, Pool, RoutingTable
from extproc.routing.waiting import Loop, WaitingRoom
from extproc.values.choices import Rng
from extproc.values.deciding import Deciding, Later, Now, Refusal, settle
from extproc.values.exchange import LineVerdict, PassTo, RefuseAtOnce, RequestHeaders
from extproc.values.headers import DEBUG_HEADER, REQUEST_ID_HEADER
from extproc.values.pending import Pending
from extproc.values.requests import Operation
from metadata_center.sharing.messages import Candidate
from metadata_center.types import EndpointKey, RequestId, value

Reserve = Callable[[RequestId, Sequence[Candidate]], Pending[EndpointKey | None]]
"""Compare and set, see `metadata_center.sharing.sync.Sync.reserve`."""

MAX_ANSWERS = 4096
"""Serialised answers kept per pool: all orders of three out of sixteen endpoints; about 500 bytes each."""

MAX_PATIENCE_S = 60.0
"""`max_message_timeout` of envoy/bootstrap.yaml: Envoy ignores what asks for more."""
MAX_RETRIES = 1
"""One input may kill whatever engine reads it: what broke two is not given to a third. Envoy counts retries
of all causes together, so refused connections have no more."""

_RQ_TIMEOUT = "x-envoy-upstream-rq-timeout-ms"
_TRY_TIMEOUT = "x-envoy-upstream-rq-per-try-timeout-ms"
_MAX_RETRIES = "x-envoy-max-retries"

_RETRY_ON = "x-envoy-retry-on", "connect-failure,reset,refused-stream"
"""For what one endpoint alone can answer: it is tried twice, for its connection may have been stale. Another
is asked only where that one is gone, so that the client hears an engine's own 404; what the one says is never
overruled by one that does not know. The header, which clients cannot send, selects the route `pinned` of
envoy/bootstrap.yaml."""


class Readers(Protocol):
    """Who reads large bodies, so that others do not wait for them."""

    @property
    def patience_s(self) -> float:
        """What is to be read is read, or refused, after this long at the latest."""

    def read(self, order: ReadOrder, body: bytes) -> Pending[BodyRead]:
        """Have a body read; fails with RouterError if it is refused. Raises RouterError if too many wait."""


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
        books: What placing reads and charges.
        table: Compiled configuration; replaced by assignment.
        settings: Likewise; they hold nobody where there is no `loop`.
        answers: Serialised answers of this worker.
        rng: Source of every random choice.
        clock: Monotonic seconds.
        wall_clock: Unix seconds, for records.
        reserve: Puts a charge to where all gateways meet; says where it is charged now, None if it is
            unconfirmed and stays. None decides here alone.
        loop: The running event loop, for requests that wait.
        readers: Who reads large bodies; None reads them here and now.
        work_clock: Processor seconds of this thread; None counts no work, and reads elsewhere only what is
            large by itself.
    """

    def __init__(
        self,
        books: PlacingBooks,
        table: RoutingTable,
        settings: RouterSettings,
        answers: Answers,
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
        self._books = books
        self._answers = answers
        self._rng = rng
        self._clock = clock
        self._reserve = reserve
        self._readers = readers
        self._work_clock = work_clock
        self._budget = ReadingBudget()
        self._placer = Placer(books, rng, clock, wall_clock)
        self.waiting: WaitingRoom[Decision] | None = None
        if loop is not None:
            self.waiting = WaitingRoom(self._place, self._charged, books.recorder, loop, clock)

    def decide(self, headers: RequestHeaders, body: bytes) -> Deciding[Decision]:
        """Understand, choose, charge; or wait; or refuse."""
        try:
            check_size(body, self.settings)
            if self._work_clock is None or len(body) <= SMALL_BYTES:
                return self._decide(headers, body, may_read=True)
            budget, began_s = self._budget, self._clock()
            clock = self._work_clock if budget.is_watched(began_s) else self._clock
            work_s = clock()
            try:
                return self._decide(headers, body, may_read=not budget.is_spent(began_s))
            finally:
                budget.spend(clock() - work_s, self._clock())
        except RouterError as error:
            return Refusal(error)

    def _decide(self, headers: RequestHeaders, body: bytes, *, may_read: bool) -> Deciding[Decision]:
        if is_form(headers.path):
            body = bytes(body)  # a view, if it is large: see `wire.LargeBody`
        elif not may_read or is_heavy(body):
            if self._readers is not None:
                return self._read_elsewhere(self._readers, headers, body)
            body = bytes(body)
            check_structure(body)
        asked = understand(
            headers, body, self.table, self.settings, self._books.predictor, self._rng, self._clock()
        )
        return self._placed(asked, self._place(asked, None))

    def _placed(self, asked: Asked, placed: Chosen | Parked) -> Deciding[Decision]:
        if isinstance(placed, Parked):
            assert self.waiting is not None, "nobody is parked without a room"
            return self.waiting.admit(asked, placed)
        return self._charged(asked, placed)

    def pass_to(self, to: PassTo) -> bytes:
        """The answer that routes a request past us: uncharged, and nobody follows it."""
        return self._answers.decision("request_headers", to.endpoints, to.cluster, to.headers, booked=False)

    def retrieve(self, request: RequestHeaders, named: Named) -> LineVerdict:
        """Where a request about a stored response goes: to the endpoint that holds it, whatever its health.

        One that nobody knows goes to any endpoint, whose own 404 the client is to see; so does one whose
        endpoint this request may not use. Neither is charged: nothing is computed for it.
        """
        home = self._books.homes.find(response_key(named.response_id), self._clock())
        any_of: tuple[str, Pool] | None = None
        for route in self.table.rules.open_to(request.headers):
            pool = self._placer.pool(route, self.table)
            if home is not None and self.table.serves(route.cluster, route.subset, home):
                others = [key for key in pool.keys if key != home]
                return self._held(route.cluster, (home, *others[:1]), named)
            if any_of is None and pool.keys:
                any_of = route.cluster, pool
        if any_of is None:
            error = "No endpoint is available that could have this response."
            return RefuseAtOnce(
                RouterError(Reason.NO_HEALTHY_ENDPOINT, error, retry_after_s=self.settings.retry_after_s)
            )
        cluster, pool = any_of
        return self._held(cluster, (pool.keys[int(self._rng.random() * len(pool.keys))],), named)

    def _held(self, cluster: str, endpoints: tuple[EndpointKey, ...], named: Named) -> PassTo:
        endpoints = (endpoints[0], *endpoints)
        retries = (_MAX_RETRIES, str(len(endpoints) - 1))
        return PassTo(cluster, endpoints, (self._timeout(named.stream), retries, _RETRY_ON))

    def _read_elsewhere(self, readers: Readers, headers: RequestHeaders, body: bytes) -> Later[Decision]:
        """Decide about a body that is read elsewhere; cancelled, it reads or charges nothing more."""
        received_s, table, settings = self._clock(), self.table, self.settings
        patience_s = self._patience_s(readers)
        reading = readers.read(order_of(headers, table, settings), body)
        decision: Pending[Decision] = Pending(reading.cancel)

        def decide(read: BodyRead) -> None:
            try:
                asked = understand_read(
                    headers, read, table, settings, self._books.predictor, self._rng, received_s
                )
                hold = self.settings.hold
                left_s = received_s + patience_s - self._clock()
                may_wait = hold is not None and left_s > hold.max_s + 1.0
                settle(decision, self._placed(asked, self._place(asked, None, may_wait=may_wait)))
            except Exception as error:  # a refusal, or a bug of which the readers are to know nothing
                decision.fail(error)

        reading.then(decide, decision.fail)
        return Later(decision, patience_s)

    def _patience_s(self, readers: Readers) -> float:
        """How long Envoy has to wait for a body to be read, and then perhaps for room."""
        hold = self.settings.hold
        # One second for the way of the answer.
        wanted_s = readers.patience_s + 1.0 + (0.0 if hold is None else hold.max_s + 1.0)
        return min(wanted_s, MAX_PATIENCE_S)

    def _place(self, asked: Asked, before: Parked | None, *, may_wait: bool = True) -> Chosen | Parked:
        may_wait = may_wait and self.waiting is not None and self.waiting.takes(before)
        return self._placer.place(asked, self.table, self.settings, before, may_wait=may_wait)

    def _charged(self, asked: Asked, chosen: Chosen) -> Now[Decision] | Later[Decision]:
        if self._reserve is None or not chosen.charged or chosen.pinned:
            return Now(self._answered(asked, chosen))
        return self._reserved(self._reserve, asked, chosen)

    def _reserved(self, reserve: Reserve, asked: Asked, chosen: Chosen) -> Later[Decision]:
        """Have the choice confirmed, or moved, where all gateways' choices are put in one order."""
        placing = reserve(asked.request_id, chosen.candidates())
        decision: Pending[Decision] = Pending(placing.cancel)

        def answer(place: EndpointKey | None) -> None:
            confirmed = chosen
            try:
                if place is not None and place != chosen.place:
                    self._books.running.placed(asked.request_id, place)
                    confirmed = chosen.moved_to(place)
                made = self._answered(asked, confirmed)
            except Exception as error:  # a bug: this stream fails alone
                decision.fail(error)
            else:
                decision.give(made)

        placing.then(answer, decision.fail)
        return Later(decision)

    def _answered(self, asked: Asked, chosen: Chosen) -> Decision:
        request, route, headers = asked.request, asked.route, asked.headers
        pool, new_body = chosen.pool, asked.new_body
        order = chosen.order[:1] if chosen.tried_once else chosen.order
        key = (order, request.stream, chosen.pinned, chosen.tried_once)
        answer = pool.answers.get(key)
        if answer is None:
            if len(pool.answers) >= MAX_ANSWERS:
                pool.answers.clear()
            answer = pool.answers[key] = self._answer("request_body", route, pool, key)
        if new_body is not None:
            answer = b"".join((answer, *Answers.new_body(new_body)))
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

    def _answer(self, field: str, route: Route, pool: Pool, key: AnswerKey) -> bytes:
        order, stream, pinned, tried_once = key
        endpoints = tuple(pool.keys[row] for row in order)
        if (len(endpoints) == 1 or pinned) and not tried_once:
            endpoints = (endpoints[0], *endpoints)  # once more: its connection may have been stale
        most = len(endpoints) - 1
        headers = [self._timeout(stream), (_MAX_RETRIES, str(most if pinned else min(MAX_RETRIES, most)))]
        if pinned:
            headers.append(_RETRY_ON)
        return self._answers.decision(field, endpoints, route.cluster, tuple(headers))

    def _timeout(self, stream: bool) -> tuple[str, str]:
        if stream:
            return _TRY_TIMEOUT, str(math.ceil(self.settings.first_byte_timeout_s * 1000))
        return _RQ_TIMEOUT, str(math.ceil(self.settings.timeout_s * 1000))
