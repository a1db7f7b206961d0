"""Workloads made up by seed: what they share, how they burst, what they favour.

Rules:
    1. Equal parameters and equal draws make equal traces.
    2. A conversation never changes its past: block `i` of it is the same in every turn, what was generated
       included, so a turn's prompt holds all of the turn before.
    3. Lengths are lognormal around the given median, as in published traces, and bounded.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final

from tokenway.simulator.replay.draws import Draws
from tokenway.simulator.replay.trace import Runs, Trace, TraceRequest

BLOCK_TOKENS: Final = 64
"""Fine enough for short prompts, four engine blocks."""

_SIGMA: Final = 0.8
"""Spread of lengths: the 90th percentile is 2.8 medians, as in the Azure conversation trace (2.7)."""

_MAX_TOKENS: Final = 65_536
"""Ids kept for one conversation; longer ones are private beyond. Half of the usual context limit."""

_MAX_TURNS: Final = 8
"""Turns of a conversation are even between 1 and this: few enough that thinking does not outlast arrivals."""

_THINK_S: Final = 5.0
"""Mean pause between turns, likewise; agents' own pauses are of this size."""

_MAX_OPEN: Final = 64
"""Conversations that a request without ids may continue."""


class _Ids:
    """Hands out ranges of ids that no other has."""

    def __init__(self) -> None:
        self._next = 0

    def take(self, tokens: int) -> int:
        """First of enough ids for so many tokens."""
        first = self._next
        self._next += -(-tokens // BLOCK_TOKENS)
        return first


@dataclass(slots=True)
class _Conversation:
    """A conversation: a shared beginning of whole blocks, then ids of its own for all it may grow to."""

    prefix: Runs
    prefix_tokens: int
    first_id: int
    tokens: int
    name: str
    last: int | None = None

    def turn(self, arrival_s: float, new_tokens: int, output_tokens: int, think_s: float) -> TraceRequest:
        """The next turn: all so far and `new_tokens` more; its answer then belongs to the conversation."""
        prompt = self.tokens + new_tokens
        self.tokens = prompt + output_tokens
        own = -(-min(self.tokens - self.prefix_tokens, _MAX_TOKENS) // BLOCK_TOKENS)
        return TraceRequest(
            arrival_s=arrival_s,
            prompt_tokens=prompt,
            output_tokens=output_tokens,
            runs=(*self.prefix, (self.first_id, own)),
            keyed_tokens=min(self.tokens, self.prefix_tokens + own * BLOCK_TOKENS),
            session=self.name,
            after=self.last,
            think_s=0.0 if self.last is None else think_s,
        )


def _lognormal(rng: Draws, median: float, most: int) -> int:
    return max(1, min(most, round(rng.lognormvariate(0.0, _SIGMA) * median)))


def _zipf(rng: Draws, weights: list[float]) -> int:
    return bisect(weights, rng.random() * weights[-1], hi=len(weights) - 1)


def _prefixes(ids: _Ids, lengths: list[int]) -> list[tuple[Runs, int]]:
    """Shared beginnings of whole blocks, so many tokens each."""
    whole = [max(1, length // BLOCK_TOKENS) * BLOCK_TOKENS for length in lengths]
    return [(((ids.take(tokens), tokens // BLOCK_TOKENS),), tokens) for tokens in whole]


def _single(
    ids: _Ids, prefix: tuple[Runs, int], arrival_s: float, new_tokens: int, output_tokens: int
) -> TraceRequest:
    """A request that is not continued."""
    runs, tokens = prefix
    total = tokens + new_tokens + output_tokens
    made = _Conversation(runs, tokens, ids.take(total), tokens, "").turn(
        arrival_s, new_tokens, output_tokens, 0.0
    )
    return replace(made, session=None)


def shared_prefix(rng: Draws, requests: int = 3000, rps: float = 20.0) -> Trace:
    """32 system prompts of about 4,000 tokens, a few of them popular, and short questions behind them."""
    ids = _Ids()
    prefixes = _prefixes(ids, [_lognormal(rng, 4096, 16_384) for _ in range(32)])
    weights = list(accumulate(1.0 / (rank + 1) for rank in range(32)))
    now_s, made = 0.0, []
    for _ in range(requests):
        prefix = prefixes[_zipf(rng, weights)]
        made.append(_single(ids, prefix, now_s, _lognormal(rng, 256, 4096), _lognormal(rng, 150, 1000)))
        now_s += rng.expovariate(rps)
    return Trace("shared-prefix", BLOCK_TOKENS, tuple(made))


def multi_tenant(rng: Draws, requests: int = 3000, rps: float = 12.0) -> Trace:
    """40 tenants with prompts of their own, each with conversations of several turns and think times."""
    ids = _Ids()
    prefixes = _prefixes(ids, [_lognormal(rng, 2048, 16_384) for _ in range(40)])
    weights = list(accumulate(1.0 / (rank + 1) for rank in range(40)))
    now_s, made = 0.0, list[TraceRequest]()
    while len(made) < requests:
        runs, tokens = prefixes[_zipf(rng, weights)]
        talk = _Conversation(runs, tokens, ids.take(_MAX_TOKENS), tokens, f"session-{len(made)}")
        for _ in range(min(1 + int(rng.random() * _MAX_TURNS), requests - len(made))):
            new, output = _lognormal(rng, 400, 8192), _lognormal(rng, 250, 1500)
            if talk.tokens + new + output > _MAX_TOKENS:
                break
            made.append(talk.turn(now_s, new, output, rng.expovariate(1.0 / _THINK_S)))
            talk.last = len(made) - 1
        now_s += rng.expovariate(2.0 * rps / (1 + _MAX_TURNS))
    return Trace("multi-tenant", BLOCK_TOKENS, tuple(made))


def bursty(rng: Draws, requests: int = 3000, rps: float = 12.0) -> Trace:
    """Conversations as in `multi_tenant`, begun four times as often for ten seconds of each minute."""
    trace = multi_tenant(rng, requests, rps)
    warped = [replace(r, arrival_s=_burst_time(r.arrival_s)) for r in trace.requests]
    return replace(trace, name="bursty", requests=tuple(warped))


def _burst_time(time_s: float) -> float:
    """The moment by which a rate of 4 for 10 s and 0.4 for 50 s, a mean of 1, has brought `time_s` worth."""
    minutes, rest = divmod(time_s, 60.0)
    return minutes * 60.0 + (rest / 4.0 if rest <= 40.0 else 10.0 + (rest - 40.0) / 0.4)


def low_sharing(rng: Draws, requests: int = 3000, rps: float = 12.0) -> Trace:
    """One short system prompt before everything, and nothing else in common."""
    ids = _Ids()
    (prefix,) = _prefixes(ids, [512])
    now_s, made = 0.0, []
    for _ in range(requests):
        made.append(_single(ids, prefix, now_s, _lognormal(rng, 3000, 32_768), _lognormal(rng, 250, 1500)))
        now_s += rng.expovariate(rps)
    return Trace("low-sharing", BLOCK_TOKENS, tuple(made))


def hot_spot(rng: Draws, requests: int = 3000, rps: float = 20.0) -> Trace:
    """As `shared_prefix` with even popularity, but one prompt draws six in ten of the middle third."""
    ids = _Ids()
    prefixes = _prefixes(ids, [_lognormal(rng, 6144, 16_384) for _ in range(32)])
    now_s, made = 0.0, []
    for index in range(requests):
        is_hot = requests <= 3 * index < 2 * requests and rng.random() < 0.6
        prefix = prefixes[0] if is_hot else prefixes[int(rng.random() * len(prefixes))]
        made.append(_single(ids, prefix, now_s, _lognormal(rng, 256, 4096), _lognormal(rng, 150, 1000)))
        now_s += rng.expovariate(rps)
    return Trace("hot-spot", BLOCK_TOKENS, tuple(made))


def sample(rng: Draws, requests: int = 300, rps: float = 4.0) -> Trace:
    """A small chat workload, open loop: some continue conversations, the rest share a few system prompts."""
    now_s, made = 0.0, []
    for _ in range(requests):
        made.append(TraceRequest(now_s, _lognormal(rng, 2500, 16_384), _lognormal(rng, 200, 1000)))
        now_s += rng.expovariate(rps)
    return with_sharing(Trace("sample", BLOCK_TOKENS, tuple(made)), rng)


GENERATORS: Mapping[str, Callable[[Draws, int], Trace]] = {
    "shared-prefix": shared_prefix,
    "multi-tenant": multi_tenant,
    "bursty": bursty,
    "low-sharing": low_sharing,
    "hot-spot": hot_spot,
    "sample": sample,
}
"""By name; the command line says `gen:NAME`."""


def with_sharing(trace: Trace, rng: Draws, *, follow_ratio: float = 0.5, prefixes: int = 16) -> Trace:
    """Give requests without ids something in common; times and lengths stay as they are.

    A request continues, with the given probability, the longest of the latest conversations that fits into
    its prompt; otherwise it begins one behind one of a few system prompts of 256 to 1,024 tokens.

    Args:
        trace: Without ids.
        rng: Draws which request continues which.
        follow_ratio: How many requests look for a conversation to continue, 0..1.
        prefixes: System prompts.
    """
    ids = _Ids()
    systems = _prefixes(ids, [256 + int(rng.random() * 769) for _ in range(prefixes)])
    weights = list(accumulate(1.0 / (rank + 1) for rank in range(prefixes)))
    talks: list[_Conversation] = []
    made = []
    for index, request in enumerate(trace.requests):
        fitting = [talk for talk in talks if talk.tokens < request.prompt_tokens]
        if fitting and rng.random() < follow_ratio:
            talk = max(fitting, key=lambda each: each.tokens)
            talks.remove(talk)
        else:
            runs, tokens = systems[_zipf(rng, weights)]
            if tokens >= request.prompt_tokens:
                runs, tokens = (), 0
            talk = _Conversation(runs, tokens, ids.take(_MAX_TOKENS), tokens, f"session-{index}")
        new_tokens = request.prompt_tokens - talk.tokens
        made.append(talk.turn(request.arrival_s, new_tokens, request.output_tokens, 0.0))
        talks.append(talk)
        del talks[:-_MAX_OPEN]
    return replace(trace, block_tokens=BLOCK_TOKENS, requests=tuple(made))
