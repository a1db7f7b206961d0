"""The decision: from a request's bytes to the answer that names its endpoints, at once or later.

Rules:
    1. A request is understood once (`asking`), placed (`placing`), and answered here. One that has to wait
       is placed again by the waiting room; the answer to it is a promise.
    2. Time and randomness are given at construction; a decision's record holds every draw.
    3. What fails before the charge raises `RouterError` and leaves no trace in any counter.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from hmac import compare_digest

from extproc.protocol.machine import RequestHeaders
from extproc.protocol.servicer import Deferred
from extproc.protocol.wire import DEBUG_HEADER, REQUEST_ID_HEADER, Answers
from extproc.request.rules import Route
from extproc.routing.asking import Asked, understand
from extproc.routing.placing import Chosen, Parked, Placer
from extproc.routing.settings import RouterSettings
from extproc.routing.state import State
from extproc.routing.table import Pool, RoutingTable
from extproc.routing.waiting import Loop, WaitingRoom
from extproc.types import Operation, Rng
from metadata_center.sharing.messages import Candidate
from metadata_center.types import EndpointKey, RequestId, value

Reserve = Callable[[RequestId, Sequence[Candidate]], Awaitable[EndpointKey | None]]
"""Compare and set, see `metadata_center.sharing.sync.Sync.reserve`."""

MAX_ANSWERS = 4096
"""Serialised answers kept per pool: all orders of three out of sixteen endpoints; about 500 bytes each."""

MAX_RETRIES = 1
"""One input may kill whatever engine reads it: what broke two is not given to a third. Envoy counts retries
of all causes together, so refused connections have no more."""

_RQ_TIMEOUT = "x-envoy-upstream-rq-timeout-ms"
_TRY_TIMEOUT = "x-envoy-upstream-rq-per-try-timeout-ms"
_MAX_RETRIES = "x-envoy-max-retries"


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
        settings: Likewise; they hold nobody where there is no `loop`.
        answers: Serialised answers of this worker.
        rng: Source of every random choice.
        clock: Monotonic seconds.
        wall_clock: Unix seconds, for records.
        reserve: Puts a charge to where all gateways meet; says where it is charged now, None if it is
            unconfirmed and stays. None decides here alone.
        loop: The running event loop, for requests that wait.
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
        loop: Callable[[], Loop] | None = None,
    ) -> None:
        self.table = table
        self.settings = settings
        self._state = state
        self._answers = answers
        self._rng = rng
        self._clock = clock
        self._reserve = reserve
        self._placer = Placer(state, rng, clock, wall_clock)
        self.waiting: WaitingRoom[Decision] | None = None
        if loop is not None:
            self.waiting = WaitingRoom(self._place, self._charged, state.metrics, loop, clock)

    def decide(self, headers: RequestHeaders, body: bytes) -> Decision | Awaitable[Decision] | Deferred:
        """Understand, choose, charge; or wait.

        Raises:
            RouterError: The request cannot be served.
        """
        asked = understand(
            headers, body, self.table, self.settings, self._state.predictor, self._rng, self._clock()
        )
        placed = self._place(asked, None)
        if isinstance(placed, Parked):
            assert self.waiting is not None, "nobody is parked without a room"
            return self.waiting.admit(asked, placed)
        return self._charged(asked, placed)

    def pass_to(self, cluster: str) -> bytes:
        """The answer that routes a request past us: Envoy's own policy over `cluster`."""
        return self._answers.decision("request_headers", (), cluster)

    def _place(self, asked: Asked, before: Parked | None) -> Chosen | Parked:
        may_wait = self.waiting is not None and self.waiting.takes(before)
        return self._placer.place(asked, self.table, self.settings, before, may_wait=may_wait)

    def _charged(self, asked: Asked, chosen: Chosen) -> Decision | Awaitable[Decision]:
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

    def _answered(self, asked: Asked, chosen: Chosen) -> Decision:
        request, route, headers = asked.request, asked.route, asked.headers
        pool, new_body = chosen.pool, asked.new_body
        order = chosen.order[:1] if chosen.tried_once else chosen.order
        key = (order, request.stream, chosen.tried_once)
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

    def _answer(self, field: str, route: Route, pool: Pool, key: tuple[tuple[int, ...], bool, bool]) -> bytes:
        order, stream, tried_once = key
        endpoints = tuple(pool.keys[row] for row in order)
        if len(endpoints) == 1 and not tried_once:
            endpoints *= 2  # one more try at the only one: its connection may have been stale
        if stream:
            timeout = (_TRY_TIMEOUT, str(math.ceil(self.settings.first_byte_timeout_s * 1000)))
        else:
            timeout = (_RQ_TIMEOUT, str(math.ceil(self.settings.timeout_s * 1000)))
        retries = (_MAX_RETRIES, str(min(MAX_RETRIES, len(endpoints) - 1)))
        return self._answers.decision(field, endpoints, route.cluster, (timeout, retries))
