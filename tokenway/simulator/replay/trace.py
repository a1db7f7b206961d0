"""Requests of a workload: when they come, how long they are and which blocks they share.

Rules:
    1. Block ids are chained: equal ids mean equal prefixes, and an id has one position in every prompt that
       holds it. They are kept as runs of consecutive ids; a long conversation is a handful of them.
    2. An id of `block_tokens` tokens stands for as many engine blocks as fit: engine block `j` of id `i` has
       key `i * n + j`. So keys need no hashing, and every `m`-th key is the chain of larger blocks.
    3. A trace is a value. What differs between seeds (the place inside a coarse tick, the start of a session)
       is drawn by `arrivals`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain, islice, pairwise
from math import pi, sin

from tokenway.simulator.replay.draws import Draws

Runs = tuple[tuple[int, int], ...]
"""(first id, count) pairs: consecutive ids in a prompt's order."""


class Timing(StrEnum):
    """What a trace's arrival times mean."""

    EXACT = "exact"
    TICKS = "ticks"
    SESSIONS = "sessions"


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        arrival_s: Since the trace began, >= 0; without meaning if `after` is set.
        prompt_tokens: >= 1.
        output_tokens: >= 1.
        runs: Ids of the blocks, from the first token on.
        keyed_tokens: How many of prompt and output together the ids are good for: those beyond are private
            to the request.
        session: Name of the conversation, or None.
        after: Index of the request whose end this one waits for, or None; smaller than its own.
        think_s: How long it waits after that end, >= 0.
        slo_ttft_s: Limit on the time to first token that the client asks for, or None.
        slo_tpot_s: Likewise on the time per output token.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    runs: Runs = ()
    keyed_tokens: int = 0
    session: str | None = None
    after: int | None = None
    think_s: float = 0.0
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """A workload.

    Attributes:
        name: For reports.
        block_tokens: Tokens per block id, > 0.
        requests: In the order of the source.
        timing: EXACT: `arrival_s` is true. TICKS: it is the start of a tick that lasts until the next larger
            `arrival_s`. SESSIONS: sessions begin as a Poisson process of `sessions_per_s`.
        sessions_per_s: Rate at speed 1; for SESSIONS alone.
        dropped: Requests that `limited` took out.
    """

    name: str
    block_tokens: int
    requests: tuple[TraceRequest, ...]
    timing: Timing = Timing.EXACT
    sessions_per_s: float = 0.0
    dropped: int = 0


def engine_keys(request: TraceRequest, block_tokens: int, block_size: int) -> list[int]:
    """Keys of the engine blocks that have an id, prompt and output together.

    Args:
        request: Whose.
        block_tokens: Tokens per id.
        block_size: Tokens per engine block; divides `block_tokens`.
    """
    per_id = block_tokens // block_size
    keys = chain.from_iterable(
        range(first * per_id, (first + count) * per_id) for first, count in request.runs
    )
    total = request.prompt_tokens + request.output_tokens
    return list(islice(keys, min(request.keyed_tokens, total) // block_size))


def block_ratio(trace: Trace, block_size: int, router_block_tokens: int) -> int:
    """How many engine blocks a router's block spans: the most that fit its size and divide an id evenly.

    Raises:
        ValueError: The trace's blocks are not whole engine blocks.
    """
    per_id, rest = divmod(trace.block_tokens, block_size)
    if rest or not per_id:
        raise ValueError(
            f"trace {trace.name}: blocks of {trace.block_tokens} tokens are not multiples of {block_size}"
        )
    most = max(1, router_block_tokens // block_size)
    return max(ratio for ratio in range(1, per_id + 1) if per_id % ratio == 0 and ratio <= most)


def limited(trace: Trace, *, max_requests: int | None = None, max_context_tokens: int | None = None) -> Trace:
    """The trace's first requests, without those that are too long.

    What waited for a dropped request waits for the one before it, by both think times.

    Args:
        trace: Any.
        max_requests: Keep so many, or None for all.
        max_context_tokens: Drop what has more tokens, prompt and output together; None keeps all.
    """
    kept: list[TraceRequest] = []
    renamed: dict[int, int | None] = {}
    delay: dict[int, tuple[float, float]] = {}  # dropped -> (arrival, think) that its followers inherit
    dropped = 0
    for index, request in enumerate(trace.requests):
        if max_requests is not None and len(kept) == max_requests:
            break
        arrival_s, after, think_s = request.arrival_s, request.after, request.think_s
        if after is not None:
            inherited = delay.get(after)
            if inherited is not None:
                arrival_s, think_s = inherited[0], inherited[1] + think_s
            after = renamed[after]
            if after is None:
                arrival_s, think_s = arrival_s + think_s, 0.0
        if max_context_tokens is not None and (
            request.prompt_tokens + request.output_tokens > max_context_tokens
        ):
            renamed[index] = after
            delay[index] = (arrival_s, think_s)
            dropped += 1
            continue
        renamed[index] = len(kept)
        kept.append(replace(request, arrival_s=arrival_s, after=after, think_s=think_s))
    return replace(trace, requests=tuple(kept), dropped=trace.dropped + dropped)


def with_tide(trace: Trace, depth: float) -> Trace:
    """The same requests as a day brings them, from night over noon to night, in the time that they took.

    A request that came at the share `u` of the trace's span comes at the `x` for which
    `x - depth·sin(2πx)/2π` is `u`: where the rate was even, it is now `1 - depth·cos(2πx)` times as high.

    Args:
        trace: Of open-loop arrivals.
        depth: How far the rate falls below its mean at night, and rises above it at noon, 0..1.

    Raises:
        ValueError: `depth` is out of range, or the sessions' starts are drawn.
    """
    if not 0.0 <= depth <= 1.0 or trace.timing is Timing.SESSIONS:
        raise ValueError("a tide has a depth of 0 to 1, and the trace must say when requests come")
    span_s = max((request.arrival_s for request in trace.requests), default=0.0) or 1.0
    return replace(
        trace,
        name=f"{trace.name}, tide {depth:g}",
        requests=tuple(
            request
            if request.after is not None
            else replace(request, arrival_s=span_s * _at_tide(request.arrival_s / span_s, depth))
            for request in trace.requests
        ),
    )


def _at_tide(share: float, depth: float) -> float:
    """The `x` of `with_tide`, by bisection: what it is taken of rises with `x`."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2.0
        if middle - depth * sin(2.0 * pi * middle) / (2.0 * pi) < share:
            low = middle
        else:
            high = middle
    return high


def arrivals(trace: Trace, rng: Draws, speed: float) -> list[float]:
    """When each request comes, seconds from the start; for those that wait for another, 0.

    Speed divides the time between arrivals (or the starts of sessions); think times stay as they are.

    Args:
        trace: Any.
        rng: Draws what the source does not say.
        speed: > 0.
    """
    match trace.timing:
        case Timing.EXACT:
            return [0.0 if r.after is not None else r.arrival_s / speed for r in trace.requests]
        case Timing.TICKS:
            starts = sorted({r.arrival_s for r in trace.requests})
            ends = dict(pairwise(starts))
            last = starts[-1] - starts[-2] if len(starts) > 1 else 0.0
            return [
                _within(rng, r.arrival_s, ends.get(r.arrival_s, r.arrival_s + last)) / speed
                for r in trace.requests
            ]
        case Timing.SESSIONS:
            begun: dict[str | None, float] = {}
            now_s = 0.0
            for r in trace.requests:
                if r.after is None and r.session not in begun:
                    begun[r.session] = now_s
                    now_s += rng.expovariate(trace.sessions_per_s * speed)
            return [0.0 if r.after is not None else begun[r.session] + r.arrival_s for r in trace.requests]


def _within(rng: Draws, start_s: float, end_s: float) -> float:
    return start_s + rng.random() * (end_s - start_s)


def runs_of(ids: Sequence[int]) -> Runs:
    """Ids as runs of consecutive ones."""
    runs: list[tuple[int, int]] = []
    first = count = 0
    for block in ids:
        if count and block == first + count:
            count += 1
            continue
        if count:
            runs.append((first, count))
        first, count = block, 1
    if count:
        runs.append((first, count))
    return tuple(runs)


def num_blocks(runs: Runs) -> int:
    """How many ids there are."""
    return sum(count for _, count in runs)


def cut(runs: Runs, blocks: int) -> Runs:
    """The first `blocks` ids, or all."""
    kept: list[tuple[int, int]] = []
    for first, count in runs:
        if blocks <= 0:
            break
        kept.append((first, min(count, blocks)))
        blocks -= count
    return tuple(kept)


def beyond(runs: Runs, blocks: int) -> Runs:
    """What `cut` leaves."""
    kept: list[tuple[int, int]] = []
    for first, count in runs:
        skipped = min(count, blocks)
        blocks -= skipped
        if skipped < count:
            kept.append((first + skipped, count - skipped))
    return tuple(kept)


def shared_blocks(one: Runs, other: Runs) -> int:
    """Length of the common beginning of two lists of ids."""
    shared = 0
    left, right = list(reversed(one)), list(reversed(other))
    while left and right:
        (first, count), (first_other, count_other) = left.pop(), right.pop()
        if first != first_other:
            break
        both = min(count, count_other)
        shared += both
        if both < count:
            left.append((first + both, count - both))
        if both < count_other:
            right.append((first + both, count_other - both))
    return shared
