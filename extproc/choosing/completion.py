"""Least predicted completion: the endpoint where a request costs the least time, its own and that of others.

Rules:
    1. Everything is seconds. The cost of an endpoint is what the request waits there for the prefill ahead
       and for room in the KV cache, what its own prefill takes, what that costs those who come later, and
       what decoding there takes. No part has a weight.
    2. Prefill that is not cached costs `tokens + pairs`; while it lasts each engine step also carries the
       decodes that run there. Prices are learned per group of equal endpoints, see `PrefillModel`.
    3. The cost to others is the relative value of an M/G/1 queue, shared by all endpoints because later
       requests go around a full one: work of w seconds delays by w/n whoever comes while the backlog lasts.
       Those are rate * backlog / (1 - utilisation), both learned from what was placed. So an idle fleet asks
       for the quickest endpoint, and a full one for the least work: affinity where it pays, nowhere else.
       Utilisation is that of whatever is scarcer: time for prefill, or seats where their number is known.
    4. A token of decoding counts as much as the limit on TTFT over that on TPOT says: missing either is the
       same failure.
    5. Equal costs are drawn among; nothing else here draws.

Source of the relative value: E. Hyytia, A. Penttinen, S. Aalto, "Size- and state-aware dispatching problem
with queue-specific job sizes", EJOR 217 (2012): v(u) = rate * u^2 / (2 * (1 - utilisation)).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, isfinite
from operator import add
from typing import Final, overload

from extproc.predicting.priced_terms import PricedTerms
from extproc.types import Rng
from metadata_center.types import value

STEP_TOKENS: Final = 2048
"""Prompt tokens of one full engine step: both calibrations of the prior prices used vLLM's 2,048, and engines
do not announce theirs. Only the share of decodes in a step's time depends on it, and that is learned."""

MEMORY_S: Final = 30.0
"""Time constant of the traffic seen: several hundred requests at a full fleet's rate, and short beside the
minutes in which load changes."""

MOST_BUSY: Final = 0.9
"""Utilisation is not believed above this: the estimate's own error exceeds the idle share that it leaves."""

DECODE_TOKENS: Final = 50.0
"""The default limits of 5 s to the first token and 0.1 s per token, the first over the second."""

_TIE_S: Final = 1e-9

TOKENS: Final = 1_000.0
"""Unit of the prices."""

_FLOOR_S: Final = 0.001

_PRICES: Final = (0.010, 0.022, 0.0013, 0.00001, 0.00006)
"""Prior prices in seconds, an 8B model on one H100: front end and step; 1,000 tokens; 1,000,000 pairs; a
decode in one step; 1,000 tokens of context in one step. Sources: `extproc.predicting.ttft` and `tpot`."""


@value
class Backlog:
    """What is on one endpoint before the request.

    Attributes:
        prefilling: Requests without first token.
        prefill_tokens: Their uncached tokens.
        prompt_tokens: Their prompt tokens, cached ones included.
        decoding: Requests that are being answered.
        context_tokens: KV tokens that those read in each step.
    """

    prefilling: int
    prefill_tokens: int
    prompt_tokens: int
    decoding: int
    context_tokens: float


@value
class Cost:
    """What one endpoint would cost the request, in seconds.

    Attributes:
        wait_s: Prefill ahead of it.
        room_s: Until the KV cache has room for it.
        work_s: Its own prefill.
        others_s: Delay of those who come later, summed over them.
        decode_s: Time per output token, weighed by Rule 4.
        turn_s: Time from one seat to the next that becomes free; 0 where a seat is free. Part of `room_s`.
    """

    wait_s: float
    room_s: float
    work_s: float
    others_s: float
    decode_s: float
    turn_s: float = 0.0

    @property
    def total_s(self) -> float:
        """What is compared."""
        return self.wait_s + self.room_s + self.work_s + self.others_s + self.decode_s


class Costs(Sequence[Cost]):
    """What each endpoint would cost, kept in columns: a decision over a thousand endpoints makes six lists.

    Args:
        waits_s: See `Cost`; shape (n,) like all others.
        rooms_s: See `Cost`.
        works_s: See `Cost`.
        others_s: See `Cost`.
        decodes_s: See `Cost`.
        turns_s: See `Cost`; empty for zeros.
    """

    __slots__ = ("decodes_s", "others_s", "rooms_s", "totals_s", "turns_s", "waits_s", "works_s")

    def __init__(
        self,
        waits_s: Sequence[float],
        rooms_s: Sequence[float],
        works_s: Sequence[float],
        others_s: Sequence[float],
        decodes_s: Sequence[float],
        turns_s: Sequence[float],
    ) -> None:
        self.waits_s = waits_s
        self.rooms_s = rooms_s
        self.works_s = works_s
        self.others_s = others_s
        self.decodes_s = decodes_s
        self.turns_s = turns_s
        self.totals_s = [
            wait_s + room_s + work_s + other_s + decode_s
            for wait_s, room_s, work_s, other_s, decode_s in zip(
                waits_s, rooms_s, works_s, others_s, decodes_s, strict=True
            )
        ]

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
        )

    def behind(self, ahead_s: Sequence[float]) -> Costs:
        """The same for a request that waits for so much more at each endpoint."""
        return Costs(
            list(map(add, self.waits_s, ahead_s)),
            self.rooms_s,
            self.works_s,
            self.others_s,
            self.decodes_s,
            self.turns_s,
        )


class PrefillModel:
    """Learns what prefill costs on one group of equal endpoints.

    A first token comes after the prefill ahead and the request's own, so both are one sum of priced terms.
    """

    __slots__ = ("_terms",)

    def __init__(self) -> None:
        self._terms = PricedTerms(_PRICES, floor_s=_FLOOR_S)

    @property
    def prices_s(self) -> tuple[float, ...]:
        """The current prices in the order of the prior ones."""
        return self._terms.prices_s

    def step_s(self, backlog: Backlog) -> float:
        """Seconds of a step full of prompt tokens, beside the decodes of `backlog`."""
        return prefill_step_s(self._terms.prices_s, backlog)

    def times_s(self, backlog: Backlog, uncached_tokens: int, cached_tokens: int) -> tuple[float, float]:
        """Seconds of prefill ahead, and of the request's own."""
        return prefill_times_s(self._terms.prices_s, backlog, uncached_tokens, cached_tokens)

    @property
    def reference_s(self) -> float:
        """Seconds of one unit of everything: how the prices are as a whole."""
        return max(_FLOOR_S, sum(self._terms.prices_s))

    def ttft_s(self, backlog: Backlog, uncached_tokens: int, cached_tokens: int) -> float:
        """Seconds to the first token as `learn` takes it, > 0."""
        return self._terms.predict(_terms_of(backlog, uncached_tokens, cached_tokens))

    def learn(self, backlog: Backlog, uncached_tokens: int, cached_tokens: int, ttft_s: float) -> None:
        """Learn from one request.

        Args:
            backlog: Of its endpoint when it was sent.
            uncached_tokens: Of its prompt, >= 1.
            cached_tokens: Of its prompt, >= 0.
            ttft_s: Sent to first token, seconds; what is not finite and > 0 is passed over.
        """
        if not (isfinite(ttft_s) and ttft_s > 0.0):
            return
        self._terms.learn(_terms_of(backlog, uncached_tokens, cached_tokens), ttft_s)


def _terms_of(backlog: Backlog, uncached_tokens: int, cached_tokens: int) -> tuple[float, ...]:
    """What the prices of `PrefillModel` are multiplied by."""
    tokens = backlog.prefill_tokens + uncached_tokens
    pairs = _pairs_ahead(backlog) + uncached_tokens * (cached_tokens + uncached_tokens / 2)
    # One more on average: half of the step that runs when it comes, and half of the one that it ends in.
    steps = tokens / step_tokens(backlog.decoding) + 1.0
    return (
        1.0,
        tokens / TOKENS,
        pairs / (TOKENS * TOKENS),
        steps * backlog.decoding,
        steps * backlog.context_tokens / TOKENS,
    )


def prefill_step_s(prices_s: Sequence[float], backlog: Backlog) -> float:
    """Seconds of a step full of prompt tokens beside the decodes of `backlog`."""
    return STEP_TOKENS * _per_token_s(prices_s, backlog)


def prefill_times_s(
    prices_s: Sequence[float], backlog: Backlog, uncached_tokens: int, cached_tokens: int
) -> tuple[float, float]:
    """Seconds of prefill ahead, and of the request's own, at the prices of `PrefillModel`."""
    base, pair = prices_s[0], prices_s[2]
    per_token = _per_token_s(prices_s, backlog)
    per_pair = pair / (TOKENS * TOKENS)
    wait_s = backlog.prefill_tokens * per_token + _pairs_ahead(backlog) * per_pair
    pairs = uncached_tokens * (cached_tokens + uncached_tokens / 2)
    return wait_s, base + uncached_tokens * per_token + pairs * per_pair


class Traffic:
    """How much comes and how busy it keeps the fleet, from what was placed lately."""

    __slots__ = ("_at_s", "_requests", "_work_s")

    def __init__(self) -> None:
        self._at_s: float | None = None
        self._requests = 0.0
        self._work_s = 0.0

    def placed(self, now_s: float, work_s: float) -> None:
        """A request was placed; it is `work_s` seconds of prefill where it went."""
        self._forget(now_s)
        self._requests += 1.0
        self._work_s += work_s

    def followers_per_s(self, now_s: float, endpoints: float) -> float:
        """Requests that come to one endpoint while a second of backlog per endpoint is worked off.

        Args:
            now_s: The time.
            endpoints: How many take what was placed here, > 0; with several gateways this one's share.
        """
        rate = self.rate_per_s(now_s, endpoints)
        busy = min(self._work_s / MEMORY_S / endpoints, MOST_BUSY)
        return rate / (1.0 - busy)

    def rate_per_s(self, now_s: float, endpoints: float) -> float:
        """Requests that come to one endpoint; arguments as for `followers_per_s`."""
        self._forget(now_s)
        return self._requests / MEMORY_S / endpoints

    def _forget(self, now_s: float) -> None:
        if self._at_s is not None and now_s > self._at_s:
            kept = exp((self._at_s - now_s) / MEMORY_S)
            self._requests *= kept
            self._work_s *= kept
        self._at_s = now_s


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


def costs(
    times_s: Sequence[tuple[float, float]],
    rooms_s: Sequence[float],
    steps_s: Sequence[float],
    followers_per_s: float,
    decode_tokens: float = DECODE_TOKENS,
    held_s: float = 0.0,
    turns_s: Sequence[float] = (),
) -> Costs:
    """What each endpoint would cost.

    Args:
        times_s: Prefill ahead and own prefill per endpoint, see `PrefillModel.times_s`; shape (n, 2).
        rooms_s: See `room_wait_s`; shape (n,).
        steps_s: Time per output token there, shape (n,).
        followers_per_s: See `Traffic`.
        decode_tokens: See Rule 4: the request's own limits, the first over the second, where it has both.
        held_s: Least work of all requests that wait elsewhere for these endpoints.
        turns_s: See `Cost.turn_s`, shape (n,); empty if every endpoint has a free seat.

    Returns:
        One per endpoint.
    """
    waits_s = [wait_s for wait_s, _ in times_s]
    works_s = [work_s for _, work_s in times_s]
    return cost_columns(waits_s, works_s, rooms_s, steps_s, followers_per_s, decode_tokens, held_s, turns_s)


def cost_columns(
    waits_s: Sequence[float],
    works_s: Sequence[float],
    rooms_s: Sequence[float],
    steps_s: Sequence[float],
    followers_per_s: float,
    decode_tokens: float,
    held_s: float,
    turns_s: Sequence[float] = (),
) -> Costs:
    """`costs`, given prefill ahead and own prefill as columns."""
    endpoints = len(waits_s)
    # The emptier half is where later requests go: a queue for one hot prefix alone delays none of them. Of
    # two both count: the next request takes the idle one, and those after it wait for either.
    half_s = sorted(map(add, waits_s, rooms_s))[: max(2, (endpoints + 1) // 2)]
    backlog_s = sum(half_s) / max(1, len(half_s)) + held_s / max(1, endpoints)
    twice = 2 * endpoints
    others_s = [followers_per_s * work_s * (backlog_s + work_s / twice) for work_s in works_s]
    return Costs(waits_s, rooms_s, works_s, others_s, [decode_tokens * step_s for step_s in steps_s], turns_s)


def least(costs_s: Costs, rng: Rng) -> int:
    """The row of the least cost; draws once if several have it.

    Raises:
        ValueError: There is no row.
    """
    totals = costs_s.totals_s
    lowest = min(totals) + _TIE_S
    rows = [row for row, total in enumerate(totals) if total <= lowest]
    return rows[int(rng.random() * len(rows))] if len(rows) > 1 else rows[0]


def _per_token_s(prices_s: Sequence[float], backlog: Backlog) -> float:
    """Seconds per prompt token, its share of the decodes in its step included."""
    _, token, _, sequence, context = prices_s
    beside_s = sequence * backlog.decoding + context * backlog.context_tokens / TOKENS
    return token / TOKENS + beside_s / step_tokens(backlog.decoding)


def _pairs_ahead(backlog: Backlog) -> float:
    """Pairs of (token, earlier token) in the prefill ahead, as if its requests were alike."""
    if not backlog.prefilling:
        return 0.0
    tokens = backlog.prefill_tokens
    cached = max(0, backlog.prompt_tokens - tokens)
    return tokens * (cached + tokens / 2) / backlog.prefilling


def step_tokens(decoding: int) -> float:
    """Prompt tokens that a step has room for beside so many decodes."""
    return float(max(STEP_TOKENS // 8, STEP_TOKENS - decoding))
