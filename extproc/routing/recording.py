"""What is written down of a scheduled request: its record, its entry among the running ones, its figures."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from extproc.choosing.deciding import SendNow
from extproc.routing import keeping
from extproc.routing.claims import Queued
from extproc.routing.looking import Look
from extproc.routing.parsing import ParsedRequest
from extproc.routing.state import SchedulingState
from extproc.values.decisions import DecisionRecord
from extproc.values.inflight import Inflight
from extproc.values.placements import Placement
from extproc.values.requests import InferenceRequest, Operation
from metadata_center.types import value


def max_output_tokens(request: InferenceRequest) -> int | None:
    """Most tokens of all choices of its answer together, by its own words; None if it does not bound them."""
    most = request.max_tokens
    return None if most is None else most * request.choices


@value
class Scheduled:
    """A request that was scheduled a moment ago.

    Attributes:
        parsed: The request.
        before: How it waited until then, if it did.
        look: What was looked at.
        now: What was decided.
        order: Rows in the order that Envoy is to try.
        placement: Which endpoints serve it.
        charged: False if the request had ended before, or is charged already.
        draws: Random numbers that were drawn.
        ttft_s: Expected time to first token of the first of `order`; None if that is not known.
    """

    parsed: ParsedRequest
    before: Queued | None
    look: Look
    now: SendNow
    order: tuple[int, ...]
    placement: Placement
    charged: bool
    draws: tuple[float, ...]
    ttft_s: float | None


class Recording:
    """Writes down what one worker schedules.

    Args:
        state: Where.
        clock: Monotonic seconds.
        wall_clock: Unix seconds.
    """

    def __init__(
        self, state: SchedulingState, clock: Callable[[], float], wall_clock: Callable[[], float]
    ) -> None:
        self._state = state
        self._clock = clock
        self._wall_clock = wall_clock

    def write(self, scheduled: Scheduled, block_bytes: int) -> bool:
        """Write it down; True if the request failed at several endpoints before.

        Args:
            scheduled: What was scheduled.
            block_bytes: Length of a block of its prompt.
        """
        state, parsed, look = self._state, scheduled.parsed, scheduled.look
        decided_s = self._clock()
        began_s = parsed.received_s if scheduled.before is None else look.now_s
        record = self._record(scheduled, block_bytes, began_s, decided_s)
        state.records.add(record)
        tried_once = state.poison.is_poison(parsed.fingerprint, look.now_s)
        if scheduled.charged:  # else there is nothing to follow
            state.running.begin(parsed.request_id, self._inflight(scheduled, record, decided_s, tried_once))
        scores, row, estimate = scheduled.now.choice.scores, scheduled.order[0], look.estimate
        state.recorder.observe_decision(
            parsed.route.model,
            parsed.route.load_balancing.algorithm,
            scheduled.placement.endpoint,
            decided_s - began_s,
            None if scores is None else scores[row],
            estimate.matched[row] / estimate.num_units if estimate.num_units else 0.0,
            estimate.views[row],
        )
        return tried_once

    def _record(
        self, scheduled: Scheduled, block_bytes: int, began_s: float, decided_s: float
    ) -> DecisionRecord:
        parsed, before, look, order = scheduled.parsed, scheduled.before, scheduled.look, scheduled.order
        request, route, estimate = parsed.request, parsed.route, look.estimate
        snapshot, choice, views = scheduled.now.snapshot, scheduled.now.choice, estimate.views
        if len(views) >= keeping.WORTH_AN_ARRAY:
            snapshot, choice, views = keeping.kept(snapshot, choice, views)
        return DecisionRecord(
            request_id=parsed.request_id,
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
            prompt_tokens=estimate.prompt_tokens,
            num_blocks=estimate.num_units,
            block_bytes=block_bytes,
            snapshot=snapshot,
            choice=choice,
            draws=scheduled.draws,
            turn=look.turn,
            prices=look.prices,
            cached_tokens=snapshot.cached_tokens,
            views=views,
            placed=None if order[0] == scheduled.now.choice.order[0] else scheduled.placement.endpoint,
            holder=look.home,
            filtered=look.pool.filtered,
            data_age_s=self._state.ages.of(look.now_s),
            decision_us=(decided_s - began_s) * 1e6,
            held_s=began_s - parsed.received_s,
            hold=None if before is None else before.hold(parsed, scheduled.now.place),
            standing=parsed.headers.standing,
        )

    def _prefill_s(self, scheduled: Scheduled) -> float:
        """Of the prefills there this process sees the first tokens of its own alone."""
        costs = scheduled.now.costs
        return inf if costs is None else costs.works_s[scheduled.order[0]] * self._state.processes()

    def _inflight(
        self, scheduled: Scheduled, record: DecisionRecord, decided_s: float, tried_once: bool
    ) -> Inflight:
        parsed, look = scheduled.parsed, scheduled.look
        inflight = Inflight(
            record,
            parsed.request.operation,
            scheduled.placement.endpoint,
            parsed.blocks,
            parsed.route.group,
            look.groups,
            decided_s,
            max_output_tokens(parsed.request),
            look.served_model,
            parsed.fingerprint,
            None if scheduled.ttft_s is None else (scheduled.order[0], scheduled.ttft_s),
            prefill_s=self._prefill_s(scheduled),
            tried_once=tried_once,
            builds_on=parsed.follows is not None and parsed.follows != (None, None),
            choices=parsed.request.choices,
        )
        if parsed.follows is not None and parsed.request.operation is Operation.RESPONSES:
            inflight.conversation = parsed.follows.conversation
        return inflight
