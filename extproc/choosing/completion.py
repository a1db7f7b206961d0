"""Least predicted completion: the endpoint where a request costs the least time, its own and that of others.

Rules:
    1. Everything is seconds. The cost of an endpoint is what the request waits there for the prefill ahead
       and for room in the KV cache, what its own prefill takes, what that costs later requests, and
       what decoding there takes. No part has a weight.
    2. Prefill that is not cached costs `tokens + pairs`; while it lasts each engine step also carries the
       decodes that run there. Prices are learned per group of equal endpoints, see `predicting.ttft`.
    3. The cost to others is the relative value of an M/G/1 queue, shared by all endpoints because later
       requests go around a full one: work of w seconds delays by w/n each request that comes while the
       backlog lasts. Those are rate * backlog / (1 - utilisation), both learned from what was placed. So an
       idle fleet asks for the quickest endpoint, and a full one for the least work: affinity where it pays,
       nowhere else. Utilisation is that of whatever is scarcer: time for prefill, or `max_num_seqs` where it
       is known.
    4. Missing the limit on TPOT is the same failure as missing that on TTFT, so a second of time per token is
       worth at most the limit on TTFT over that on TPOT, and the less the further the pace is from its limit:
       the failure is a parabola up to the limit, and its slope goes on beyond.
    5. Prefill stalls what decodes on the same engine: each sequence waits for it once, and its time per token
       is longer by that time over its tokens. Counted are the endpoint's share of all sequences that decode,
       by its weight: its own number would send prefill where fewest decode, away from its cache, and the pace
       there is in `decode_s` already. So lost cache has the same price everywhere, and a slow endpoint, whose
       prefill takes longer and stalls fewer, is not charged twice.
    6. Others pay for a prefix that crowds the endpoints that have it, whoever is first to compute it
       elsewhere: that share of own prefill is neither delay of later requests nor stall.
    7. The last places of an engine that is nearly full cost those who come later, see `places`.
    8. What is computed evicts what others would have found cached, see `displacing`.
    9. Of equal costs where most of the prompt is cached; what is equal in that too is drawn among.

Source of the relative value: E. Hyytia, A. Penttinen, S. Aalto, "Size- and state-aware dispatching problem
with queue-specific job sizes", EJOR 217 (2012): v(u) = rate * u^2 / (2 * (1 - utilisation)).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import add
from typing import Final, overload

from extproc.predicting.sums import plain_sum
from metadata_center.types import value

DECODE_TOKENS: Final = 50.0
"""The default limits of 5 s to the first token and 0.1 s per token, the first over the second."""

TPOT_LIMIT_S: Final = 0.1
"""The default limit on the time per token."""

MOST_TAKEN: Final = 0.95
"""Share of `max_num_seqs` in use that is believed at most: 0.99 has prefill outweigh any queue for a place,
0.9 gives away too much of the cache where a whole fleet is full."""


@value
class Cost:
    """What one endpoint would cost the request, in seconds.

    Attributes:
        wait_s: Prefill ahead of it.
        room_s: Until the KV cache has room for it.
        work_s: Its own prefill.
        others_s: Delay of later requests, summed over them.
        decode_s: Time per output token, weighed by Rule 4.
        turn_s: Time from one end of a sequence to the next; 0 where fewer run than may. Part of `room_s`.
        stall_s: What its own prefill costs the sequences that decode, see Rule 5.
        place_s: What its place there costs later requests, see Rule 7.
        displacement_s: What its own prefill has computed once more later, see Rule 8.
    """

    wait_s: float
    room_s: float
    work_s: float
    others_s: float
    decode_s: float
    turn_s: float = 0.0
    stall_s: float = 0.0
    place_s: float = 0.0
    displacement_s: float = 0.0


class Costs(Sequence[Cost]):
    """What each endpoint would cost, kept in columns: a decision over a thousand endpoints makes eight lists.

    Args:
        waits_s: See `Cost`; shape (n,) like all others.
        rooms_s: See `Cost`.
        works_s: See `Cost`.
        others_s: See `Cost`.
        stalls_s: See `Cost`.
        decodes_s: See `Cost`.
        turns_s: See `Cost`; empty for zeros.
        totals_s: Sums of all but `turns_s`; None has them made.
        places_s: See `Cost`; empty for zeros.
        displacements_s: See `Cost`; empty for zeros.
    """

    __slots__ = (
        "decodes_s",
        "displacements_s",
        "others_s",
        "places_s",
        "rooms_s",
        "stalls_s",
        "totals_s",
        "turns_s",
        "waits_s",
        "works_s",
    )

    def __init__(
        self,
        waits_s: Sequence[float],
        rooms_s: Sequence[float],
        works_s: Sequence[float],
        others_s: Sequence[float],
        stalls_s: Sequence[float],
        decodes_s: Sequence[float],
        turns_s: Sequence[float],
        totals_s: Sequence[float] | None = None,
        places_s: Sequence[float] = (),
        displacements_s: Sequence[float] = (),
    ) -> None:
        self.waits_s = waits_s
        self.rooms_s = rooms_s
        self.works_s = works_s
        self.others_s = others_s
        self.stalls_s = stalls_s
        self.decodes_s = decodes_s
        self.turns_s = turns_s
        self.places_s = places_s
        self.displacements_s = displacements_s
        if totals_s is None:
            totals_s = [
                wait_s + room_s + work_s + other_s + stall_s + decode_s
                for wait_s, room_s, work_s, other_s, stall_s, decode_s in zip(
                    waits_s, rooms_s, works_s, others_s, stalls_s, decodes_s, strict=True
                )
            ]
            if places_s:
                totals_s = list(map(add, totals_s, places_s))
            if displacements_s:
                totals_s = list(map(add, totals_s, displacements_s))
        self.totals_s = totals_s

    def __len__(self) -> int:
        return len(self.waits_s)

    @overload
    def __getitem__(self, row: int) -> Cost: ...

    @overload
    def __getitem__(self, row: slice) -> Sequence[Cost]: ...

    def __getitem__(self, row: int | slice) -> Cost | Sequence[Cost]:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        return Cost(
            self.waits_s[row],
            self.rooms_s[row],
            self.works_s[row],
            self.others_s[row],
            self.decodes_s[row],
            self.turns_s[row] if self.turns_s else 0.0,
            self.stalls_s[row],
            self.places_s[row] if self.places_s else 0.0,
            self.displacements_s[row] if self.displacements_s else 0.0,
        )

    def behind(self, ahead_s: Sequence[float]) -> Costs:
        """The same for a request that waits for so much more at each endpoint."""
        return Costs(
            list(map(add, self.waits_s, ahead_s)),
            self.rooms_s,
            self.works_s,
            self.others_s,
            self.stalls_s,
            self.decodes_s,
            self.turns_s,
            places_s=self.places_s,
            displacements_s=self.displacements_s,
        )


def room_wait_s(
    needed_tokens: float, used_tokens: float, kv_tokens: int, output_tokens: float, step_s: float
) -> float:
    """How long a prompt waits for room in the KV cache: until enough of the running requests have ended.

    Args:
        needed_tokens: Uncached tokens of the prompt and of those ahead of it.
        used_tokens: Held by running requests.
        kv_tokens: Capacity, > 0.
        output_tokens: Usual length of an answer; what is left of one is taken to be as long at any age.
        step_s: Time per output token.
    """
    excess = used_tokens + needed_tokens - kv_tokens
    if excess <= 0.0 or used_tokens <= 0.0:
        return 0.0
    return min(1.0, excess / used_tokens) * output_tokens * step_s


def decode_price(decode_tokens: float, tpot_limit_s: float, steps_s: Sequence[float]) -> float:
    """Seconds of TTFT that a second of time per output token is worth at the fleet's pace, see Rule 4.

    Args:
        decode_tokens: The limit on TTFT over that on TPOT.
        tpot_limit_s: The latter, > 0.
        steps_s: Time per output token of each endpoint, at least one.
    """
    return decode_tokens * min(1.0, plain_sum(steps_s) / len(steps_s) / tpot_limit_s)


def price_at_pace(decode_tokens: float, tpot_limit_s: float, pace_s: float) -> float:
    """`decode_price` where the fleet's mean time per output token is known."""
    return decode_tokens * min(1.0, pace_s / tpot_limit_s)


def mean_backlog_s(backlogs_s: Sequence[float], held_s: float) -> float:
    """What later requests find ahead of them, see Rule 3.

    The emptier half is where they go: a queue for one hot prefix alone delays none of them. Of two both
    count: the next request takes the idle one, and those after it wait for either.

    Args:
        backlogs_s: Of each endpoint, the least first.
        held_s: See `cost_columns`.
    """
    endpoints = len(backlogs_s)
    half_s = backlogs_s[: max(2, (endpoints + 1) // 2)]
    return plain_sum(half_s) / max(1, len(half_s)) + held_s / max(1, endpoints)


def cost_columns(
    waits_s: Sequence[float],
    works_s: Sequence[float],
    rooms_s: Sequence[float],
    steps_s: Sequence[float],
    followers_per_s: float,
    pace_price: float,
    held_s: float,
    turns_s: Sequence[float] = (),
    stalled: Sequence[float] = (),
    sunk_ratios: Sequence[float] = (),
    places_s: Sequence[float] = (),
    displaced_s: float = 0.0,
) -> Costs:
    """What each endpoint would cost.

    Args:
        waits_s: Prefill ahead per endpoint; shape (n,) like all that follow.
        works_s: Own prefill, see `extproc.predicting.ttft.times_s`.
        rooms_s: See `room_wait_s`.
        steps_s: Time per output token there.
        followers_per_s: See `extproc.predicting.traffic.Traffic`.
        pace_price: See `decode_price`; by the request's own limits, where it has both.
        held_s: Least work of all requests that wait elsewhere for these endpoints.
        turns_s: See `Cost.turn_s`; empty if every endpoint runs fewer sequences than it may.
        stalled: Seconds that a second of prefill costs the sequences that decode, Rule 5; empty for zeros.
        sunk_ratios: Of own prefill, what others pay in any case, Rule 6; empty for zeros.
        places_s: See `Cost.place_s`; empty for zeros.
        displaced_s: Later prefill that a second of prefill displaces, Rule 8.
    """
    endpoints = len(waits_s)
    backlog_s = mean_backlog_s(sorted(map(add, waits_s, rooms_s)), held_s)
    twice = 2 * endpoints
    others_s, stalls_s, decodes_s, totals_s = [], [], [], []
    zeros = [0.0] * endpoints
    for wait_s, room_s, work_s, step_s, stalled_s, sunk_ratio in zip(
        waits_s, rooms_s, works_s, steps_s, stalled or zeros, sunk_ratios or zeros, strict=True
    ):
        other_s = followers_per_s * work_s * (backlog_s + work_s / twice)
        stall_s = stalled_s * work_s
        if sunk_ratio:
            other_s, stall_s = other_s * (1.0 - sunk_ratio), stall_s * (1.0 - sunk_ratio)
        decode_s = pace_price * step_s
        others_s.append(other_s)
        stalls_s.append(stall_s)
        decodes_s.append(decode_s)
        totals_s.append(wait_s + room_s + work_s + other_s + stall_s + decode_s)
    if places_s:
        totals_s = list(map(add, totals_s, places_s))
    displacements_s = _displacements_s(displaced_s, works_s, sunk_ratios) if displaced_s else ()
    if displacements_s:
        totals_s = list(map(add, totals_s, displacements_s))
    columns = waits_s, rooms_s, works_s, others_s, stalls_s, decodes_s, turns_s, totals_s
    return Costs(*columns, places_s, displacements_s)


def _displacements_s(
    displaced_s: float, works_s: Sequence[float], sunk_ratios: Sequence[float]
) -> Sequence[float]:
    """See `Cost.displacement_s`: but for what is computed there in any case."""
    if not sunk_ratios:
        return [displaced_s * work_s for work_s in works_s]
    return [
        displaced_s * work_s * (1.0 - sunk_ratio)
        for work_s, sunk_ratio in zip(works_s, sunk_ratios, strict=True)
    ]
