"""Late binding: requests wait at the gateway while the endpoints that suit them are full.

Rules:
    1. An endpoint is full while the prefill ahead there is more than `OPEN_STEPS` engine steps, or its KV
       cache has no room, or it runs `max_num_seqs` sequences (`extproc.choosing.max_num_seqs`). It never runs
       dry for being full, so what waits here loses nothing.
    2. Order is by arrival plus work, the work counted `SHORT_FIRST` times more for each second of work that
       waits per endpoint, and more again by the square of how often it is the mean (`LONG_LAST`): short work
       goes first, the more so the longer all wait, and the few longest wait for the many. No request is
       overtaken by one that comes later than its own work, so counted, takes. None falls back when work
       turns out longer than it was thought, or more waits: so the first sees none ahead. A request waits for
       the endpoint that suits it best; those ahead that wait for the same one count as prefill there, or as
       the ends of sequences that they wait for where those are longer, so a queue for one makes others the
       better. Work of those that wait for a sequence to end is no backlog of prefill elsewhere. Of two
       priorities the higher one goes first, however long the other has waited. Of fairness ids that have more
       to do than there is time for each has its turn (`extproc.choosing.fairness`); while they take turns
       work counts once.
    3. While more waits than all endpoints do within the limit on TTFT, a request that can keep its limit
       nowhere any more goes behind those that can: its place is later by the limit, once, and by no less than
       that of one that says none: a limit that nobody can keep is no way to the front.
    4. No request waits longer than `REGRET` times the time to first token that was foreseen when it came,
       had it been sent at once, `REGRET_S`, and `STRETCH` times its work as it was then. Then it goes as the
       immediate rule sends it.
    5. At most `max_held` requests wait, each `max_hold_s` at most, or while its own limit can be kept, but
       until its turn as foreseen when it came: clients say limits, and none goes first for what it says. One
       whose time is up goes as the immediate rule sends it, and so does the first in line from nine tenths of
       `max_held` on: were those sent that come, they would overtake all that wait. Where refusing is wanted,
       one too many is refused instead, and at once one that what is ahead of it leaves no time.
    6. Wake-ups are the caller's: ask again when a prefill or a request ends anywhere, and at `until_s`.
    7. A request that was sent, refused or forgotten is in no other's way.
    8. Those that wait at other gateways and workers are in the same order (`extproc.choosing.lines`), but for
       what is not heard yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, Generic, Protocol, TypeVar

from extproc.choosing.completion import Cost, Costs
from extproc.choosing.fairness import FairShares
from extproc.choosing.limits import ASSUMED_TTFT_S
from extproc.choosing.lines import OtherLines
from extproc.values.decisions import WorkCount
from metadata_center.types import value

OPEN_STEPS: Final = 2.0
"""One step that runs and one that is ready when it ends: what is sent on the news of an end comes in time."""

SHORT_FIRST: Final = 3.0
"""Per second. The more, the sooner most have their first token past the knee, and the later the longest
prompts have theirs; where little waits the order is worth nothing (docs/adr/0034)."""

LONG_LAST: Final = 0.05
"""Work of ten times the mean counts six times as often. A hundredth of the prompts is much of the work, and
what these wait longer all others wait less (docs/adr/0034)."""

MEAN_OF: Final = 200
"""Requests whose work the mean is of, the latest the most: some seconds of them where much waits."""

_MOST_TIMES: Final = 100.0
"""Beyond it the order is that of work alone, as good as; and priorities stay apart, see `_BAND_S`."""

REGRET: Final = 2.0
"""Predictions of a queue's length are off by less than this, so it ends few waits that would have paid."""

REGRET_S: Final = 1.0
"""Short waits are mostly chance: twice nothing is nothing."""

STRETCH: Final = 40.0
"""Who has much to do may wait long for those with little: 0.1 s of work four seconds, a second of it 40. Half
and twice of it are as good; without it `LONG_LAST` is worth little (docs/adr/0034)."""

POLL_S: Final = 0.02
"""Other workers and gateways free room without a word to us, and so does time: all that wait are asked for
this often. The news of other gateways are about this old, and an engine step is no shorter."""

SPARE: Final = 10
"""The last tenth of places is for those that come until the first in line are asked for, every `POLL_S`."""

_BAND_S: Final = 1e6
"""Between the ranks of two priorities: longer than anything waits or works."""

_MAX_PRIORITY: Final = 1_000
"""Beyond it all are alike: ranks are floats, and within a band they are to tell a microsecond."""


@value
class Send:
    """Send it.

    Attributes:
        row: Where.
    """

    row: int


@value
class Wait:
    """Keep it.

    Attributes:
        until_s: Decide again then at the latest.
        rank: Order among those kept, lower first.
        row: The endpoint it waits for.
        closed: Every endpoint is full for those of higher rank too.
        counted: How often its work counts in `rank`.
        at_once_s: From its arrival to its first token, as foreseen had it been sent when it first waited.
        bound_s: How long after its arrival it goes at the latest by Rule 4; Rule 5 may be sooner.
        yields_s: How much later its place is because it can keep its limit nowhere any more: see Rule 3.
        lag_s: How much later its place is because others of its fairness id go before it; below 0, how much
            sooner, for other ids have had more.
        work_s: What others of lower rank see ahead at `row` because of it.
        least_s: Its part in the backlog of all endpoints.
    """

    until_s: float
    rank: float
    row: int
    closed: bool
    counted: WorkCount
    at_once_s: float = inf
    bound_s: float = inf
    yields_s: float = 0.0
    lag_s: float = 0.0
    work_s: float = 0.0
    least_s: float = 0.0


@value
class TurnAway:
    """Answer 429.

    Attributes:
        retry_after_s: When it should find a place to wait, and wait no longer than it may; >= 0.
        foreseen_s: How long it would wait altogether, from its arrival.
        most_s: How long it may.
    """

    retry_after_s: float
    foreseen_s: float
    most_s: float


HoldAnswer = Send | Wait | TurnAway


@value
class Place:
    """Where a request stands in the order.

    Attributes:
        rank: Lower goes first.
        counted: See `Wait`.
        yields_s: See `Wait`; part of `rank`.
        lag_s: See `Wait`; part of `rank`.
    """

    rank: float
    counted: WorkCount
    yields_s: float = 0.0
    lag_s: float = 0.0


@dataclass(slots=True)
class _Held:
    priority: int
    rank: float
    row: int
    work_s: float
    least_s: float


class HoldQueue:
    """Requests that wait: for what, and in which order.

    Args:
        max_held: Most requests, >= 1.
        max_hold_s: Longest, > 0.
        refuses: One beyond the bounds is refused; else it is sent.
        others: Those that wait elsewhere; None if nobody says.
    """

    def __init__(
        self,
        *,
        max_held: int = 1000,
        max_hold_s: float = 50.0,
        refuses: bool = False,
        others: OtherLines | None = None,
    ) -> None:
        self.bound(max_held, max_hold_s, refuses=refuses)
        self.shares = FairShares()
        self.others = OtherLines() if others is None else others
        self._held: dict[int, _Held] = {}
        self._least_s = 0.0
        self._mean_s = 0.0
        self._in_mean = 0

    def bound(self, max_held: int, max_hold_s: float, *, refuses: bool) -> None:
        """Other bounds, as of now; those that wait meet them when they are next asked for.

        Raises:
            ValueError: One is not positive.
        """
        if max_held < 1 or max_hold_s <= 0.0:
            raise ValueError("max_held and max_hold_s must be positive")
        self._max_held = max_held
        self._max_hold_s = max_hold_s
        self._refuses = refuses

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._held)

    @property
    def least_s(self) -> float:
        """Work that waits here for time to prefill, each request counted where it has the least."""
        return max(0.0, self._least_s)

    def ahead_s(self, request_id: int, rank: float, endpoints: int) -> list[float]:
        """Work per endpoint of requests that wait for it and go before `rank`; not `request_id` itself."""
        ahead = [0.0] * endpoints
        for other_id, other in self._held.items():
            if (
                other_id != request_id
                and other.row < endpoints
                and (other.rank, other_id) < (rank, request_id)
            ):
                ahead[other.row] += other.work_s
        return ahead

    def place(
        self,
        arrived_s: float,
        now_s: float,
        costs: Costs,
        limit_s: float,
        before: Wait | None,
        priority: int = 0,
        fairness_id: str | None = None,
        elsewhere_s: float = 0.0,
    ) -> Place:
        """Where a request stands in the order, see Rules 2 and 3.

        Args:
            arrived_s: When it came.
            now_s: The time.
            costs: Of each endpoint, those ahead in this queue left out.
            limit_s: On the time to its first token, from its arrival.
            before: How it waited until now; None if it did not.
            priority: Of the request.
            fairness_id: Whose turn it takes; None names nobody.
            elsewhere_s: Work that waits at others for time to prefill.
        """
        lag_s = self._lag_s(fairness_id, arrived_s, priority) if before is None else before.lag_s
        waits_s = self.least_s + elsewhere_s
        waiting_s, are_turns = waits_s / len(costs), self.shares.are_taking_turns(now_s, priority)
        work_s = min(costs.works_s)
        mean_s = self._mean_with(work_s) if before is None else before.counted.mean_s
        times = times_of(waiting_s, work_s, mean_s, are_turns=are_turns)
        counted = WorkCount(times, work_s, waiting_s, mean_s, are_turns)
        rank, yields = _rank(arrived_s + lag_s, counted.times * counted.work_s, priority), False
        if before is not None:
            yields = before.yields_s > 0.0
            if before.rank - before.yields_s < rank:
                rank, counted = before.rank - before.yields_s, before.counted
        if not yields and waits_s > limit_s * len(costs):
            soonest_s = min(map(sum, zip(costs.waits_s, costs.rooms_s, costs.works_s, strict=True)))
            yields = now_s + soonest_s > arrived_s + limit_s
        yields_s = max(limit_s, ASSUMED_TTFT_S) if yields else 0.0
        return Place(rank + yields_s, counted, yields_s, lag_s)

    def sent(self, arrived_s: float, before: Wait, priority: int) -> None:
        """A request that waited is sent, see `FairShares.sent`.

        Args:
            arrived_s: When it came.
            before: How it waited.
            priority: Of the request.
        """
        self.shares.sent(arrived_s, before.lag_s, priority)

    def _lag_s(self, fairness_id: str | None, arrived_s: float, priority: int) -> float:
        """Of a request that did not wait before; those that wait elsewhere are taken to have had no turn."""
        if all(held.priority != priority for held in self._held.values()):
            band_s = _band_s(priority)
            middle = arrived_s - band_s
            first = self.others.first(middle - _BAND_S / 2.0, middle + _BAND_S / 2.0)
            self.shares.rest(priority, first + band_s)
        return self.shares.lag_s(fairness_id, arrived_s, priority)

    def forget(self, request_id: int) -> None:
        """It was sent, refused, or its client left."""
        held = self._held.pop(request_id, None)
        if held is not None:
            self._least_s = self._least_s - held.least_s if self._held else 0.0

    def decide(
        self,
        request_id: int,
        arrived_s: float,
        now_s: float,
        costs: Sequence[Cost],
        opens_s: Sequence[float],
        row: int,
        limit_s: float | None = None,
        place: Place | None = None,
        before: Wait | None = None,
        priority: int = 0,
        fairness_id: str | None = None,
    ) -> HoldAnswer:
        """What happens to a request now; one that is kept is remembered, any other is forgotten.

        Args:
            request_id: Whose.
            arrived_s: When it came.
            now_s: The time.
            costs: Of each endpoint, those ahead in this queue counted as waiting time.
            opens_s: Prefill ahead with which each endpoint still takes a request.
            row: The best of them.
            limit_s: The request's own limit on the time to its first token, from its arrival.
            place: In the order; None for that of its arrival and least work.
            before: How it waited until now; None if it did not.
            priority: Of the request.
            fairness_id: See `place`.
        """
        best = costs[row]
        self.forget(request_id)
        if best.wait_s <= opens_s[row] and best.room_s == 0.0:
            return Send(row)
        least_s = min(cost.work_s for cost in costs)
        if before is None:
            at_once_s = now_s - arrived_s + best.wait_s + best.room_s + best.work_s
            bound_s = REGRET * at_once_s + REGRET_S + STRETCH * least_s
        else:
            at_once_s, bound_s = before.at_once_s, before.bound_s
        due_s = arrived_s + bound_s
        latest_s = arrived_s + self._max_hold_s
        if limit_s is not None:
            by_then_s = limit_s if self._refuses else max(limit_s, at_once_s)
            latest_s = min(latest_s, arrived_s + by_then_s - best.work_s)
        if due_s <= now_s < latest_s:
            return Send(row)
        free_s = now_s + best.wait_s - opens_s[row] + best.room_s
        is_late, is_full = now_s >= latest_s, len(self._held) >= self._max_held
        if self._refuses and (is_late or is_full or free_s > latest_s):
            rank = -inf if place is None else place.rank
            place_s = self._freed_after_s(costs, opens_s, rank) if is_full else 0.0
            return TurnAway(max(0.0, place_s, free_s - latest_s), free_s - arrived_s, latest_s - arrived_s)
        if place is None:
            lag_s = self._lag_s(fairness_id, arrived_s, priority)
            mean_s = self._mean_with(least_s) if before is None else before.counted.mean_s
            are_turns = self.shares.are_taking_turns(now_s, priority)
            counted = WorkCount(1.0, least_s, 0.0, mean_s, are_turns)
            place = Place(_rank(arrived_s + lag_s, least_s, priority), counted, lag_s=lag_s)
        if is_late or self._makes_room(request_id, place.rank, is_new=before is None):
            return Send(row)
        if before is None and priority >= 0:  # below 0 the caller refuses it, see `Scheduler`: on no clock
            self.shares.waits(fairness_id, arrived_s, place.lag_s, least_s / len(costs), priority)
        # One that fell behind others has counted them as ahead, though they are still to be asked for.
        closed = (before is None or place.yields_s == before.yields_s) and all(
            cost.wait_s > open_s or (cost.turn_s > 0.0 and cost.room_s > 0.0)
            for cost, open_s in zip(costs, opens_s, strict=True)
        )
        prefill_s = 0.0 if best.turn_s > 0.0 and best.room_s > 0.0 else least_s
        held = _Held(priority, place.rank, row, max(best.work_s, best.turn_s), prefill_s)
        self._held[request_id] = held
        self._least_s += held.least_s
        return Wait(
            min(latest_s, due_s),
            held.rank,
            held.row,
            closed,
            place.counted,
            at_once_s,
            bound_s,
            place.yields_s,
            place.lag_s,
            held.work_s,
            held.least_s,
        )

    def _mean_with(self, work_s: float) -> float:
        """The mean work of requests that had to wait or came while others did, with one more."""
        self._in_mean = min(MEAN_OF, self._in_mean + 1)
        self._mean_s += (work_s - self._mean_s) / self._in_mean
        return self._mean_s

    def _freed_after_s(self, costs: Sequence[Cost], opens_s: Sequence[float], rank: float) -> float:
        """When the first of those that wait should go: an endpoint that one of them waits for takes it.

        Args:
            costs: Of each endpoint, those before `rank` counted as waiting time.
            opens_s: See `decide`.
            rank: Of one that has no place.
        """
        ahead_s = self.ahead_s(-1, rank, len(costs))
        rows = {held.row for held in self._held.values() if held.row < len(costs)}
        return min(
            (max(0.0, costs[row].wait_s - ahead_s[row] - opens_s[row]) + costs[row].room_s for row in rows),
            default=0.0,
        )

    def _makes_room(self, request_id: int, rank: float, *, is_new: bool) -> bool:
        """Whether a request is sent because so many wait: the first in line, or one too many; see Rule 5."""
        if self._refuses or len(self._held) < self._max_held - self._max_held // SPARE:
            return False
        if is_new and len(self._held) >= self._max_held:
            return True
        return all((rank, request_id) < (other.rank, other_id) for other_id, other in self._held.items())


def times_of(waiting_s: float, work_s: float, mean_s: float, *, are_turns: bool) -> float:
    """How often work counts, see Rule 2.

    Args:
        waiting_s: Work that waits for time to prefill, in seconds per endpoint.
        work_s: The work in question.
        mean_s: Of those that came lately; 0 if that is not known.
        are_turns: Fairness ids are taking turns.
    """
    if are_turns:
        return 1.0
    length = work_s / mean_s if mean_s > 0.0 else 0.0
    return min(_MOST_TIMES, 1.0 + SHORT_FIRST * waiting_s * (1.0 + LONG_LAST * length * length))


def after_arrival_s(rank: float, arrived_s: float, priority: int) -> float:
    """A place in seconds after the request's arrival, as among its own priority."""
    return rank - arrived_s + _band_s(priority)


def _rank(arrived_s: float, work_s: float, priority: int) -> float:
    return arrived_s + work_s - _band_s(priority)


def _band_s(priority: int) -> float:
    return max(-_MAX_PRIORITY, min(_MAX_PRIORITY, priority)) * _BAND_S


class Waiting(Protocol):
    """One request that waits, as a round sees it."""

    @property
    def order(self) -> tuple[float, int]:
        """Its rank and its ticket: lower goes first."""
        ...

    @property
    def until_s(self) -> float:
        """When its wait is over."""
        ...

    @property
    def queue(self) -> object:
        """The queue it waits in, by identity."""
        ...


W = TypeVar("W", bound=Waiting)


class SchedulingRound(Generic[W]):
    """All that wait, in their order, each asked for once, as they were when the round began.

    Args:
        waiting: In any order.
    """

    __slots__ = ("_closed", "_order")

    def __init__(self, waiting: Iterable[W]) -> None:
        self._order = iter(sorted(waiting, key=lambda each: each.order))
        self._closed: set[int] = set()

    def next(self, now_s: float) -> W | None:
        """The next to ask for: its queue is not closed, or its time is up; None after the last."""
        for each in self._order:
            if each.until_s <= now_s or id(each.queue) not in self._closed:
                return each
        return None

    def close(self, queue: object) -> None:
        """Every endpoint is full for all that come later in that queue: they are left out of this round."""
        self._closed.add(id(queue))
