"""Late binding: requests wait at the gateway while the endpoints that suit them are full.

Rules:
    1. An endpoint is full while the prefill ahead there lasts longer than it takes to hear that it is done and
       to send more: it never runs dry for being full, so what waits here loses nothing.
    2. Order is by arrival plus `STRETCH` times the work: short work goes first, and nobody is overtaken by who
       comes more than that later. Whom an endpoint suits, waits for it alone; who is ahead for it counts as
       prefill there.
    3. Bounds: `max_held` requests, `max_hold_s` each. Beyond the first, and where the work ahead predicts that
       the second, or a limit of the request's own, cannot be kept, it is refused at once with the time after
       which there should be room.
    4. Wake-ups are the caller's: ask again when anything on an endpoint ends, and at `until_s`. Several
       gateways leave `1/gateways` of an endpoint's room to each, so that nobody races for what was freed.
    5. A request that is forgotten (sent, refused, gone) is at once in nobody's way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from extproc.choosing.completion import Cost
from metadata_center.types import value

STRETCH: Final = 10.0
"""Seconds of waiting per second of own work that are as bad for a long request as for a short one."""


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
    """

    until_s: float
    rank: float
    row: int


@value
class Refuse:
    """Answer 429.

    Attributes:
        retry_after_s: When there should be room, > 0.
    """

    retry_after_s: float


Verdict = Send | Wait | Refuse


@dataclass(slots=True)
class _Held:
    rank: float
    row: int
    work_s: float
    least_s: float


class HoldQueue:
    """Who waits, for what, and in which order.

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
        """Work per endpoint of those who wait for it and go before `rank`; `request_id` itself left out."""
        ahead = [0.0] * endpoints
        for other_id, other in self._held.items():
            if (
                other_id != request_id
                and other.row < endpoints
                and (other.rank, other_id) < (rank, request_id)
            ):
                ahead[other.row] += other.work_s
        return ahead

    def rank(self, arrived_s: float, works_s: Sequence[float]) -> float:
        """Place in the order, see Rule 2."""
        return arrived_s + STRETCH * min(works_s)

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
        row: int,
        open_s: float,
        limit_s: float | None = None,
    ) -> Verdict:
        """What happens to a request now; whoever is kept is remembered, whoever is not is forgotten.

        Args:
            request_id: Whose.
            arrived_s: When it came.
            now_s: The time.
            costs: Of each endpoint, those ahead in this queue counted as waiting time.
            row: The best of them.
            open_s: An endpoint whose waiting time is below this takes another request.
            limit_s: The request's own limit on the time to its first token, from its arrival.
        """
        best = costs[row]
        self.forget(request_id)
        if best.wait_s <= open_s:
            return Send(row)
        latest_s = arrived_s + self._max_hold_s
        held_until_s = now_s + best.wait_s - open_s
        if limit_s is not None:
            latest_s = min(latest_s, arrived_s + limit_s - best.work_s)
        if now_s >= latest_s or held_until_s > latest_s or len(self._held) >= self._max_held:
            return Refuse(max(1.0, held_until_s - latest_s))
        works_s = [cost.work_s for cost in costs]
        rank, least_s = self.rank(arrived_s, works_s), min(works_s)
        self._held[request_id] = _Held(rank, row, best.work_s, least_s)
        self._least_s += least_s
        return Wait(latest_s, rank, row)
