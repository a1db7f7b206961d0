"""Where a request goes: looked at, chosen and charged in one step; or it waits and is scheduled again.

Rules:
    1. `schedule` neither awaits nor yields: nothing comes between what it reads and what it charges. Where
       several workers share the counters, their lock is held over the same step.
    2. What fails or waits is charged nowhere. One that waits is in its pool's queue and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from extproc.choosing.deciding import SendNow, TurnDown, WaitForRoom, decide
from extproc.choosing.displacing import teach_recomputed
from extproc.choosing.holding import HoldQueue
from extproc.choosing.least_completion import saved_s
from extproc.choosing.limits import limit_s_of
from extproc.choosing.policies.registry import POLICIES
from extproc.choosing.replay import RecordingRng
from extproc.choosing.rows import expected_ttft_at_s, expected_ttft_s
from extproc.choosing.snapshots import Load, Prompt
from extproc.errors import Reason, RouterError
from extproc.routing.charging import charge, due_s, whole
from extproc.routing.claims import Claims, Queued
from extproc.routing.looking import Look, look, snapshot_of
from extproc.routing.parsing import ParsedRequest
from extproc.routing.pools import Pools
from extproc.routing.recording import Recording, Scheduled
from extproc.routing.rivals import Contender, Picked
from extproc.routing.rotations import Rotations
from extproc.routing.settings import RouterSettings
from extproc.routing.state import SchedulingState
from extproc.routing.table import Pool, RoutingTable
from extproc.values.choices import Choice, Rng, Snapshot
from extproc.values.headers import SLO_TPOT_HEADER, SLO_TTFT_HEADER
from extproc.values.placements import Placement
from metadata_center.errors import CapacityError
from metadata_center.sharing.messages import MAX_CANDIDATES, Candidate
from metadata_center.store import LoadStore
from metadata_center.types import EndpointKey


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
        by_rival: A rival had the last word: the rendezvous does not move it.
    """

    pool: Pool
    choice: Choice
    snapshot: Snapshot
    prompt_tokens: int
    cached_tokens: Sequence[int]
    charged: bool
    order: tuple[int, ...] = ()
    pinned: bool = False
    tried_once: bool = False
    by_rival: bool = False

    def __post_init__(self) -> None:
        self.order = self.order or self.choice.order

    @property
    def endpoint(self) -> EndpointKey:
        """The endpoint that serves."""
        return self.pool.keys[self.order[0]]

    def moved_to(self, endpoint: EndpointKey) -> Chosen:
        """The same with `endpoint` first."""
        first = self.pool.rows[endpoint]
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


class Scheduler:
    """Schedules requests on endpoints.

    Args:
        state: What it reads and charges.
        rng: Source of every random choice.
        clock: Monotonic seconds.
        wall_clock: Unix seconds, for records.
    """

    def __init__(
        self, state: SchedulingState, rng: Rng, clock: Callable[[], float], wall_clock: Callable[[], float]
    ) -> None:
        self.pools = Pools(state.health, state.lines)
        self._state = state
        self._rng = rng
        self._clock = clock
        self._rotations = Rotations()
        self._claims = Claims()
        self._recording = Recording(state, clock, wall_clock)
        self._turn = 0

    def schedule(
        self,
        parsed: ParsedRequest,
        table: RoutingTable,
        settings: RouterSettings,
        before: Queued | None = None,
        *,
        may_wait: bool = True,
    ) -> Chosen | Queued:
        """Choose and charge, or queue.

        Args:
            parsed: The request.
            table: Which endpoints there are.
            settings: In force now; without `hold` no request is queued.
            before: How it waited until now; it does so no more.
            may_wait: False schedules it now, wherever it is best.

        Raises:
            RouterError: No endpoint is available, none will be in time, or as many are in flight as may be.
        """
        state, rng = self._state, RecordingRng(self._rng)
        if before is not None:
            before.queue.forget(before.ticket)
        now_s = self._clock()
        state.running.advance(now_s)
        found = look(state, self.pools, parsed, table, settings, self._turn, now_s)
        self._turn += 1
        with state.load.lock():
            view = state.load.view(found.pool.slots)
            load = Load(view.requests, view.prefill_requests, view.prefill_tokens, view.context_tokens)
            now = self._decide(parsed, found, load, settings, before, rng, may_wait=may_wait)
            if isinstance(now, Queued):
                return now
            rule = parsed.route.load_balancing.rival
            picked = None if rule is None else self._ask_rival(rule, parsed, found, load)
            order = _order(now.choice, found, picked)
            ttft_s = _expected_ttft_s(parsed, now, order[0], settings)
            placement = _placement(parsed, found, order[0], ttft_s, settings)
            charged = _charged(state.load, placement, now_s, settings)
            if not load.prefilling[order[0]]:
                state.load.prefill_turned(placement.endpoint, now_s)
            if placement.endpoint in found.pool.on_trial:
                state.health.trial_began(placement.endpoint, found.served_model, now_s)
        if now.costs is not None:
            teach_recomputed(found.traffic, state.caches.seen, parsed.blocks, now.snapshot, order[0])
        scheduled = Scheduled(parsed, before, found, now, order, placement, charged, rng.draws, ttft_s)
        tried_once = self._recording.write(scheduled, settings.block_bytes)
        if picked is not None and charged:
            state.rivals.sent(parsed.request_id, picked)
        return Chosen(
            found.pool,
            now.choice,
            now.snapshot,
            found.estimate.prompt_tokens,
            found.estimate.cached_tokens,
            charged,
            order,
            found.home is not None,
            tried_once,
            picked is not None,
        )

    def _decide(
        self,
        parsed: ParsedRequest,
        found: Look,
        load: Load,
        settings: RouterSettings,
        before: Queued | None,
        rng: RecordingRng,
        *,
        may_wait: bool,
    ) -> SendNow | Queued:
        """Choose, or queue. Raises RouterError where no endpoint will have room in time."""
        route, now_s = parsed.route, found.now_s
        policy = POLICIES[route.load_balancing.algorithm]
        may_wait = may_wait and policy.may_wait and found.home is None and route.load_balancing.rival is None
        # No room elsewhere is of any use to one that has a home; queues are for whole pools.
        hold = settings.hold if may_wait and parsed.headers.within is None else None
        gives_way = may_wait and _gives_way(parsed)
        snapshot = snapshot_of(self._state, parsed, found, load, is_patient=hold is not None or gives_way)
        queue = claim = rotation = None
        if hold is not None or gives_way:
            # Without `hold` none waits: an empty queue says whether there is room.
            queue = HoldQueue() if hold is None else self.pools.queue(found.pool, hold)
            claim = self._claims.of(parsed, before, is_fair=hold is not None and hold.is_fair)
        if policy.takes_turns:
            rotation = self._rotations.of(parsed.request.model, route)
            snapshot = replace(snapshot, owed=rotation.turn(found.pool.keys, found.pool.weights))
        decided = decide(snapshot, route.load_balancing, rng, found.turn, now_s, queue, claim)
        if not isinstance(decided, SendNow):
            assert queue is not None, "no request waits without a queue"
            assert claim is not None, "no request waits without a name"
            if gives_way:
                queue.forget(claim.ticket)
                raise _low(route.model, settings)
            if isinstance(decided, WaitForRoom):
                return Queued(claim.ticket, queue, decided)
            raise _crowded(route.model, decided, 0.0 if before is None else now_s - parsed.received_s)
        first = decided.choice.order[0]
        if decided.costs is not None:
            more_s = saved_s(decided.costs, first, decided.snapshot.cached_tokens)
            found.traffic.placed(now_s, decided.costs.works_s[first], more_s)
        if rotation is not None:
            rotation.served(decided.snapshot.owed, first)
        return decided

    def _ask_rival(self, rule: str, parsed: ParsedRequest, found: Look, load: Load) -> Picked | None:
        """What the rule of another gateway says; its draws are no part of the decision that is recorded."""
        if found.home is not None:
            return None
        estimate, pool, headers = found.estimate, found.pool, parsed.headers.headers
        prompt = Prompt(estimate.prompt_tokens, estimate.cached_tokens, estimate.matched, estimate.num_units)
        limits = [limit_s_of(headers.get(name)) for name in (SLO_TTFT_HEADER, SLO_TPOT_HEADER)]
        return self._state.rivals.choose(
            rule,
            Contender(parsed.received_s, parsed.blocks, prompt, *limits),
            pool.keys,
            pool.weights,
            found.groups,
            load,
            self._rng,
            found.now_s,
        )


def _order(choice: Choice, found: Look, picked: Picked | None) -> tuple[int, ...]:
    """Rows in the order to try: the holder of what the request builds on comes first, and one other.

    So does what a rival picked, before the others.
    """
    if found.home is not None:
        home = found.pool.rows[found.home]
        return (home, *[other for other in choice.order if other != home][:1])
    if picked is None:
        return choice.order
    others = [other for other in choice.order if other != picked.row]
    return (picked.row, *others[: len(choice.order) - 1])


def _gives_way(parsed: ParsedRequest) -> bool:
    """Its priority is too low to wait for others, or to have them wait."""
    standing = parsed.headers.standing
    return standing is not None and standing.priority < 0


def _low(model: str, settings: RouterSettings) -> RouterError:
    """No endpoint has room for a request that gives way."""
    text = (
        f"All endpoints of model `{model}` are busy, and the priority of this request is too low "
        "to wait for them."
    )
    return RouterError(Reason.OVERLOADED, text, retry_after_s=settings.retry_after_s)


def _crowded(model: str, down: TurnDown, held_s: float) -> RouterError:
    """No endpoint will have room in time."""
    return RouterError(
        Reason.OVERLOADED,
        _why_turned_down(model, down),
        retry_after_s=down.retry_after_s,
        held_s=held_s,
    )


def _why_turned_down(model: str, down: TurnDown) -> str:
    """For the client, and for `tokenway explain`."""
    if down.foreseen_s <= down.most_s:
        return f"All endpoints of model `{model}` are busy, and too many requests wait for them already."
    return (
        f"All endpoints of model `{model}` are busy: the wait would be {down.foreseen_s:.1f} s, and "
        f"{max(0.0, down.most_s):.1f} s is the most for this request."
    )


def _is_seen(parsed: ParsedRequest, settings: RouterSettings) -> bool:
    """Whether its first token will be seen."""
    return parsed.request.stream and settings.first_chunk and parsed.headers.shows_answer


def _expected_ttft_s(parsed: ParsedRequest, now: SendNow, row: int, settings: RouterSettings) -> float | None:
    """What a row is expected to take, where that is needed now or known already; else None."""
    if now.costs is not None:
        return expected_ttft_at_s(now.snapshot, row, now.costs)
    return None if _is_seen(parsed, settings) else expected_ttft_s(now.snapshot, row)


def _charged(load: LoadStore, placement: Placement, now_s: float, settings: RouterSettings) -> bool:
    """As `charge`. Raises RouterError where there is no room: what is counted nowhere is sent nowhere."""
    try:
        return charge(load, placement, now_s)
    except CapacityError:
        text = "The gateway has as many requests in flight as it may have; try again."
        raise RouterError(Reason.OVERLOADED, text, retry_after_s=settings.retry_after_s) from None


def _placement(
    parsed: ParsedRequest, found: Look, row: int, ttft_s: float | None, settings: RouterSettings
) -> Placement:
    """What the endpoint of a row is charged; where no first token will be seen, `ttft_s` is expected."""
    is_seen = _is_seen(parsed, settings)
    prompt_tokens = found.estimate.prompt_tokens
    return whole(
        parsed.request_id,
        found.pool.keys[row],
        prompt_tokens - found.estimate.cached_tokens[row],
        prompt_tokens,
        None if is_seen or ttft_s is None else due_s(found.now_s, ttft_s),
    )
