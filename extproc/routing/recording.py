"""What is written down of a placed request: its record, its entry among the running ones, its figures."""

from __future__ import annotations

from collections.abc import Callable

from extproc.choosing.deciding import SendNow
from extproc.routing.asking import Asked
from extproc.routing.books import PlacingBooks
from extproc.routing.claims import Parked
from extproc.routing.looking import Look
from extproc.values.decisions import DecisionRecord
from extproc.values.inflight import Inflight
from extproc.values.placements import Placement
from extproc.values.requests import InferenceRequest
from metadata_center.types import value


def max_output_tokens(request: InferenceRequest) -> int | None:
    """Most tokens of all choices of its answer together, by its own words; None if it does not bound them."""
    most = request.max_tokens
    if most is None:
        return None
    choices = request.body.get("n")
    return most * choices if type(choices) is int and choices > 1 else most


@value
class Placed:
    """A request that was placed a moment ago.

    Attributes:
        asked: The request.
        before: How it waited until then, if it did.
        look: What was looked at.
        now: What was decided.
        order: Rows in the order that Envoy is to try.
        placement: Who serves it.
        charged: False if the request had ended before, or is charged already.
        draws: Random numbers that were drawn.
    """

    asked: Asked
    before: Parked | None
    look: Look
    now: SendNow
    order: tuple[int, ...]
    placement: Placement
    charged: bool
    draws: tuple[float, ...]


class Recording:
    """Writes down what one worker places.

    Args:
        books: Where.
        clock: Monotonic seconds.
        wall_clock: Unix seconds.
    """

    def __init__(
        self, books: PlacingBooks, clock: Callable[[], float], wall_clock: Callable[[], float]
    ) -> None:
        self._books = books
        self._clock = clock
        self._wall_clock = wall_clock

    def write(self, placed: Placed, block_bytes: int) -> bool:
        """Write it down; True if the request failed at several endpoints before.

        Args:
            placed: What was placed.
            block_bytes: Length of a block of its prompt.
        """
        books, asked, look = self._books, placed.asked, placed.look
        decided_s = self._clock()
        began_s = asked.received_s if placed.before is None else look.now_s
        record = self._record(placed, block_bytes, began_s, decided_s)
        books.records.add(record)
        tried_once = books.poison.is_poison(asked.fingerprint, look.now_s)
        if placed.charged:  # else there is nothing to follow
            books.running.begin(asked.request_id, self._inflight(placed, record, decided_s, tried_once))
        scores, row, estimate = placed.now.choice.scores, placed.order[0], look.estimate
        books.recorder.observe_decision(
            asked.route.model,
            asked.route.load_balancing.algorithm,
            placed.placement.endpoint,
            decided_s - began_s,
            None if scores is None else scores[row],
            estimate.matched[row] / estimate.num_units if estimate.num_units else 0.0,
            estimate.views[row],
        )
        return tried_once

    def _record(self, placed: Placed, block_bytes: int, began_s: float, decided_s: float) -> DecisionRecord:
        asked, before, look, order = placed.asked, placed.before, placed.look, placed.order
        request, route, estimate = asked.request, asked.route, look.estimate
        return DecisionRecord(
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
            prompt_tokens=estimate.prompt_tokens,
            num_blocks=estimate.num_units,
            block_bytes=block_bytes,
            snapshot=placed.now.snapshot,
            choice=placed.now.choice,
            draws=placed.draws,
            turn=look.turn,
            prices=look.prices,
            cached_tokens=estimate.cached_tokens,
            views=estimate.views,
            placed=None if order[0] == placed.now.choice.order[0] else placed.placement.endpoint,
            holder=look.home,
            filtered=look.pool.filtered,
            data_age_s=self._books.ages.of(look.now_s),
            decision_us=(decided_s - began_s) * 1e6,
            held_s=began_s - asked.received_s,
            held_for=None if before is None else before.later.reason,
        )

    @staticmethod
    def _inflight(placed: Placed, record: DecisionRecord, decided_s: float, tried_once: bool) -> Inflight:
        asked, look = placed.asked, placed.look
        inflight = Inflight(
            record,
            asked.request.operation,
            placed.placement.endpoint,
            asked.blocks,
            asked.route.group,
            look.groups,
            decided_s,
            max_output_tokens(asked.request),
            look.served_model,
            asked.fingerprint,
            tried_once=tried_once,
            builds_on=asked.follows is not None and asked.follows != (None, None),
        )
        if asked.follows is not None:
            inflight.conversation = asked.follows.conversation
        return inflight
