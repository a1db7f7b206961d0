"""One decision: the request goes now, waits, or is refused. Gateway and replayer decide by this alone.

Rules:
    1. Pure: equal facts, queue and draws give the equal decision. The queue is the only thing that changes.
    2. A decision is one of three values: `SendNow` with the choice, `WaitForRoom` with what it waits for,
       `TurnDown`.
    3. No wait is prolonged: its end was announced to the caller when it began. A request that
       could wait longer by then, because bounds or costs have changed, goes now.
    4. Requests that wait already are in mind: their least work is backlog of all endpoints, and the work of
       those that go before is prefill ahead at the endpoint that each of them waits for. That holds for those
       that wait at other gateways and workers as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import add

from extproc.choosing.choose import choose
from extproc.choosing.completion import Costs
from extproc.choosing.holding import HoldQueue, Place, TurnAway, Wait
from extproc.choosing.least_completion import completion_costs
from extproc.choosing.limits import ASSUMED_TTFT_S
from extproc.choosing.policies.least_completion import choose_least
from extproc.choosing.policies.registry import POLICIES
from extproc.choosing.rows import open_until_s, row_open_until_s
from extproc.values.balancing import LoadBalancing
from extproc.values.choices import Choice, Rng, Snapshot
from extproc.values.decisions import HoldReason
from metadata_center.types import EndpointKey, Waiter, value


@value
class Claim:
    """What a request brings to its decision beside the snapshot.

    Attributes:
        ticket: Its name in the queue; older requests have lower ones.
        arrived_s: When it came.
        limit_s: Its own limit on the time to its first token, from its arrival; None if it has none.
        before: How it waited until now; None if it did not.
        priority: Of those that wait, the higher one goes first.
        fairness_id: Of those that wait, each id has its turn; None names none.
    """

    ticket: int
    arrived_s: float
    limit_s: float | None = None
    before: WaitForRoom | None = None
    priority: int = 0
    fairness_id: str | None = None


@value
class SendNow:
    """It goes.

    Attributes:
        choice: The order of endpoints.
        snapshot: What the choice was made from, those that wait included.
        costs: Of each endpoint; None where another policy than `least_completion` chose.
        place: Where it stood in the order; None if no request waited, itself included, or it was no longer
            asked who waits.
    """

    choice: Choice
    snapshot: Snapshot
    costs: Costs | None = None
    place: Place | None = None


@value
class WaitForRoom:
    """It waits in the queue.

    Attributes:
        wait: Until when, in which order, and for which endpoint.
        reason: What that endpoint is short of.
        latest_s: When the wait ends, as announced when it began.
        endpoint: The one it waits for.
        elsewhere_s: The most work of others, waiting at other gateways and workers for the endpoint that it
            waited for then, that it let go first.
    """

    wait: Wait
    reason: HoldReason
    latest_s: float
    endpoint: EndpointKey
    elsewhere_s: float = 0.0

    def waiter(self) -> Waiter:
        """The same for others."""
        return Waiter(self.endpoint, self.wait.rank, self.wait.work_s, self.wait.least_s)


@value
class TurnDown:
    """It is refused.

    Attributes:
        retry_after_s: When it should find a place to wait, and wait no longer than it may; >= 0.
        foreseen_s: How long it would wait altogether, from its arrival.
        most_s: How long it may; more than `foreseen_s` where too many wait already.
    """

    retry_after_s: float
    foreseen_s: float
    most_s: float


Decision = SendNow | WaitForRoom | TurnDown


def decide(
    snapshot: Snapshot,
    settings: LoadBalancing,
    rng: Rng,
    turn: int,
    now_s: float,
    queue: HoldQueue | None = None,
    claim: Claim | None = None,
) -> Decision:
    """Decide on one request.

    Args:
        snapshot: At least one row.
        settings: Algorithm and number of fallbacks.
        rng: See `choose` for the draws.
        turn: See `choose`.
        now_s: The time.
        queue: Where it may wait; None if it may not, or if its policy never waits.
        claim: Whose decision it is; needed with a queue.

    Raises:
        ValueError: The snapshot is empty, or has a queue without a claim.
    """
    if not POLICIES[settings.algorithm].may_wait:
        return SendNow(choose(snapshot, settings, rng, turn), snapshot)
    if queue is None:
        costs = completion_costs(snapshot)
        return SendNow(
            choose_least(costs, settings, rng, snapshot.weights, snapshot.cached_tokens), snapshot, costs
        )
    if claim is None:
        raise ValueError("no request waits without a name")
    return _now_or_later(snapshot, settings, rng, now_s, queue, claim)


def _now_or_later(
    snapshot: Snapshot, settings: LoadBalancing, rng: Rng, now_s: float, queue: HoldQueue, claim: Claim
) -> Decision:
    before, ticket = None if claim.before is None else claim.before.wait, claim.ticket
    place, elsewhere_s = None, None
    queue.forget(ticket)
    queue.others.advance(now_s)
    if len(queue) or queue.others or before is not None:
        snapshot, costs, place, elsewhere_s = _behind_others(snapshot, now_s, queue, claim)
    else:
        costs = completion_costs(snapshot)
    choice = choose_least(costs, settings, rng, snapshot.weights, snapshot.cached_tokens)
    row = choice.order[0]
    wait_s = costs.waits_s[row]
    if costs.rooms_s[row] == 0.0 and (wait_s == 0.0 or wait_s <= row_open_until_s(snapshot, row)):
        _sent(queue, claim)  # as the queue would say, which asks for every row
        return SendNow(choice, snapshot, costs, place)
    opens_s = open_until_s(snapshot)
    verdict = queue.decide(
        ticket,
        claim.arrived_s,
        now_s,
        costs,
        opens_s,
        row,
        claim.limit_s,
        place,
        before,
        claim.priority,
        claim.fairness_id,
    )
    if isinstance(verdict, Wait):
        latest_s = verdict.until_s if claim.before is None else claim.before.latest_s
        if now_s < latest_s:
            wait = replace(verdict, until_s=min(verdict.until_s, latest_s))
            most_s = max(
                0.0 if elsewhere_s is None else elsewhere_s[row],
                0.0 if claim.before is None else claim.before.elsewhere_s,
            )
            return WaitForRoom(wait, _short_of(costs, row), latest_s, snapshot.keys[row], most_s)
        queue.forget(ticket)
    elif isinstance(verdict, TurnAway):
        return TurnDown(verdict.retry_after_s, verdict.foreseen_s, verdict.most_s)
    _sent(queue, claim)
    return SendNow(choice, snapshot, costs, place)


def _sent(queue: HoldQueue, claim: Claim) -> None:
    """It goes; if it waited, that was its turn."""
    if claim.before is not None:
        queue.sent(claim.arrived_s, claim.before.wait, claim.priority)


def _behind_others(
    snapshot: Snapshot, now_s: float, queue: HoldQueue, claim: Claim
) -> tuple[Snapshot, Costs, Place, Sequence[float] | None]:
    """Its place, and what it costs behind those that wait and go before it.

    Returns:
        Snapshot and costs with those that wait, the place, and how much of what is ahead waits elsewhere, per
        endpoint; None if nobody does.
    """
    others, before = queue.others, None if claim.before is None else claim.before.wait
    waits_elsewhere_s = others.least_s(snapshot.keys)
    snapshot = replace(snapshot, held_s=queue.least_s + waits_elsewhere_s)
    costs = completion_costs(snapshot)
    place = queue.place(
        claim.arrived_s,
        now_s,
        costs,
        ASSUMED_TTFT_S if claim.limit_s is None else claim.limit_s,
        before,
        claim.priority,
        claim.fairness_id,
        waits_elsewhere_s,
    )
    ahead_s, elsewhere_s = queue.ahead_s(claim.ticket, place.rank, len(snapshot.keys)), None
    if others:
        elsewhere_s = others.ahead_s(place.rank, snapshot.keys)
        ahead_s = list(map(add, ahead_s, elsewhere_s))
    snapshot = replace(snapshot, ahead_s=ahead_s)
    costs = costs.behind(ahead_s)  # as `completion_costs` has them of that snapshot
    return snapshot, costs, place, elsewhere_s


def _short_of(costs: Costs, row: int) -> HoldReason:
    """What an endpoint that is full is short of."""
    if costs[row].room_s == 0.0:
        return HoldReason.PREFILL
    return HoldReason.MAX_NUM_SEQS if costs[row].turn_s > 0.0 else HoldReason.KV_CACHE
