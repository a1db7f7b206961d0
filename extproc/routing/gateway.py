"""What the ext_proc loop talks to: decisions, first tokens, refusals; and the state behind them."""

from __future__ import annotations

from collections.abc import Callable

from extproc.errors import RouterError
from extproc.observing.recorder import Recorder
from extproc.protocol.machine import Phase, StreamEnding
from extproc.request.responses import id_in, response_key
from extproc.routing.endings import Endings
from extproc.routing.first_tokens import FirstTokens
from extproc.routing.router import Router
from extproc.routing.stored_responses import StoredResponses
from extproc.routing.table import Retrieve
from extproc.values.control import Ignored
from extproc.values.deciding import Deciding
from extproc.values.decisions import DecisionRecord
from extproc.values.exchange import Body, LineVerdict, PassTo, RequestHeaders
from extproc.values.headers import REQUEST_ID_HEADER
from extproc.values.outcomes import Ended, Outcome
from extproc.values.placements import Decision
from metadata_center.types import RequestId

Decide = Callable[[RequestHeaders, Body], Deciding[Decision]]
"""Chooses and charges, now or later; see `protocol.servicer.Decider`."""


class Gateway:
    """One worker's answer to Envoy.

    Args:
        router: Decides.
        first_tokens: Called when one passes.
        stored: Gets the names that answers give themselves.
        endings: Gets refusals.
        recorder: Counts.
        decide: Decides about a body as it came; the router's own, unless bodies may be compressed.
        clock: Monotonic seconds.
        wall_clock: Unix seconds.
        report_ignored: Gets the control headers of a request that say nothing.
    """

    def __init__(
        self,
        router: Router,
        first_tokens: FirstTokens,
        stored: StoredResponses,
        endings: Endings,
        recorder: Recorder,
        decide: Decide,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        report_ignored: Callable[[tuple[Ignored, ...]], None],
    ) -> None:
        self.router = router
        self._first_tokens = first_tokens
        self._stored = stored
        self._endings = endings
        self._clock = clock
        self._wall_clock = wall_clock
        self._report_ignored = report_ignored
        self.decide: Decide = decide
        self.stream_ended: Callable[[Phase, StreamEnding], None] = recorder.stream_ended

    def judge(self, request: RequestHeaders) -> LineVerdict:
        """What the request line alone decides; called once for each request."""
        if request.ignored:
            self._report_ignored(request.ignored)
        verdict = self.router.table.judge(request)
        if isinstance(verdict, Retrieve):
            return self.router.retrieve(request, verdict.named)
        return verdict

    def judge_for_picker(self, request: RequestHeaders) -> LineVerdict:
        """The same for a proxy that can choose no endpoint by itself."""
        verdict = self.judge(request)
        return self.router.locate(verdict, request) if isinstance(verdict, PassTo) else verdict

    def first_token(self, request_id: str, *, late: bool) -> None:
        """The first token of this request's answer passes now; `late` if other bytes came before it."""
        self._first_tokens.take(RequestId(request_id), self._clock(), late=late)

    def answer_head(self, request_id: str, head: bytes) -> None:
        """The answer begins with these bytes: if it is a stored response, its id is in them."""
        response_id = id_in(head)
        if response_id is not None:
            self._stored.answer_named(RequestId(request_id), response_key(response_id), self._clock())

    def rejected(self, request: RequestHeaders | None, error: RouterError) -> None:
        """A request was refused: counted, recorded, logged."""
        request_id = RequestId("" if request is None else request.headers.get(REQUEST_ID_HEADER, ""))
        record = DecisionRecord(
            request_id=request_id,
            time_unix_s=self._wall_clock(),
            data_age_s={},
            model=error.model,
            rejected=error.reason,
            held_s=error.held_s,
            standing=None if request is None else request.standing,
        )
        outcome = Outcome(ended=Ended.REJECTED, duration_s=0.0, status=error.status, details=error.message)
        self._endings.refused(record, outcome, self._clock())
