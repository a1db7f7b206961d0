"""Late binding: requests wait at the gateway while the endpoints that suit them are full.

Rules:
    1. An endpoint is full while the prefill ahead there is more than `OPEN_STEPS` engine steps, or its KV
       cache has no room, or it runs `max_num_seqs` sequences (`extproc.choosing.max_num_seqs`). It never runs
       dry for being full, so what waits here loses nothing.
    2. Order is by arrival plus work, which is when an idle fleet would have answered: short work goes first,
       and no request is overtaken by one that comes later than its own work takes. No request falls back when
       work turns out longer than it was thought: so the first request sees none ahead. A request waits for
       the endpoint that suits it best; those ahead that wait for the same one count as prefill there, or as
       the ends of sequences that they wait for where those are longer, so a queue for one makes others the
       better. Among priorities the higher one goes first, however long others wait.
    3. At most `max_held` requests wait, each `max_hold_s` at most. One that is too many, or that cannot be
       answered within that time (or within its own limit) by what is ahead of it, is refused at once.
    4. Wake-ups are the caller's: ask again when a prefill or a request ends anywhere, and at `until_s`.
    5. A request that was sent, refused or forgotten is in no other's way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, Generic, Protocol, TypeVar

from extproc.choosing.completion import Cost
from metadata_center.types import value

OPEN_STEPS: Final = 2.0
"""One step that runs and one that is ready when it ends: what is sent on the news of an end comes in time."""

POLL_S: Final = 0.02
"""Other workers and gateways free room without a word to us, and so does time: all that wait are asked for
this often. The news of other gateways are about this old, and an engine step is no shorter."""

_BAND_S: Final = 1e6
"""Between the ranks of two priorities: longer than anything waits or works."""

_MAX_PRIORITY: Final = 1_000
"""Beyond it all are alike: ranks are floats, and within a band they are to tell a microsecond."""

_LEAST_RETRY_S: Final = 1.0
"""`Retry-After` has whole seconds."""


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
    """

    until_s: float
    rank: float
    row: int
    closed: bool


@value
class TurnAway:
    """Answer 429.

    Attributes:
        retry_after_s: When there should be room, > 0.
    """

    retry_after_s: float


HoldAnswer = Send | Wait | TurnAway


@dataclass(slots=True)
class _Held:
    rank: float
    row: int
    work_s: float
    least_s: float


class HoldQueue:
    """Requests that wait: for what, and in which order.

    Args:
        max_held: Most requests, >= 1.
        max_hold_s: Longest, > 0.
    """

    def __init__(self, *, max_held: int = 1000, max_hold_s: float = 30.0) -> None:
        if max_held < 1 or max_hold_s <= 0.0:
            raise ValueError("max_held and max_hold_s must be positive")
        self._max_held = max_held
        self._max_hold_s = max_hold_s
        self._held: dict[int, _Held] = {}
        self._least_s = 0.0

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._held)

    @property
    def least_s(self) -> float:
        """Work that waits, each request counted where it has the least."""
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

    def rank(self, arrived_s: float, works_s: Sequence[float], priority: int = 0) -> float:
        """Place in the order, see Rule 2."""
        return arrived_s + min(works_s) - max(-_MAX_PRIORITY, min(_MAX_PRIORITY, priority)) * _BAND_S

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
        rank: float = inf,
        priority: int = 0,
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
            rank: What it had until now, if it waited.
            priority: Of the request, see Rule 2.
        """
        best = costs[row]
        self.forget(request_id)
        if best.wait_s <= opens_s[row] and best.room_s == 0.0:
            return Send(row)
        latest_s = arrived_s + self._max_hold_s
        if limit_s is not None:
            latest_s = min(latest_s, arrived_s + limit_s - best.work_s)
        free_s = now_s + best.wait_s - opens_s[row] + best.room_s
        if now_s >= latest_s or free_s > latest_s or len(self._held) >= self._max_held:
            return TurnAway(max(_LEAST_RETRY_S, free_s - latest_s))
        works_s = [cost.work_s for cost in costs]
        rank, least_s = min(rank, self.rank(arrived_s, works_s, priority)), min(works_s)
        self._held[request_id] = _Held(rank, row, max(best.work_s, best.turn_s), least_s)
        self._least_s += least_s
        closed = all(
            cost.wait_s > open_s or (cost.turn_s > 0.0 and cost.room_s > 0.0)
            for cost, open_s in zip(costs, opens_s, strict=True)
        )
        return Wait(latest_s, rank, row, closed)


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
