"""`least_completion` over a snapshot: the columns of `completion`, and its costs as terms of a score."""

from __future__ import annotations

from operator import neg
from typing import Final

from extproc.choosing.completion import Costs, cost_columns, room_wait_s
from extproc.choosing.holding import OPEN_STEPS
from extproc.predicting.ttft import TOKENS, Backlog, beside_s, step_s, step_tokens, times_s, total_s
from extproc.values.choices import Learned, Snapshot

_MOST_TAKEN: Final = 0.99
"""Share of seats taken is not believed above this, so that there is a bound: it is counted, not estimated."""

_BLANK_PROMPT = 1
"""Tokens of a prompt that says nothing: an engine computes at least one."""


def backlog(snapshot: Snapshot, row: int) -> Backlog:
    """What is on one endpoint before the request.

    Books tell prompt tokens of all requests in flight; those that still prefill have their share of them, and
    at least what is left of theirs.
    """
    requests, prefilling = snapshot.requests[row], snapshot.prefilling[row]
    context, pending = snapshot.context_tokens[row], snapshot.prefill_tokens[row]
    ahead = max(pending, context * prefilling // requests) if requests else pending
    decoding = max(0, requests - prefilling)
    read = max(0, context - ahead) + decoding * snapshot.output_tokens / 2
    return Backlog(prefilling, pending, ahead, decoding, read)


def completion_costs(snapshot: Snapshot) -> Costs:
    """What each row would cost, in seconds.

    Raises:
        ValueError: The snapshot has no learned prices.
    """
    learned = _learned(snapshot)
    found = cost_columns(
        *_columns(snapshot, learned),
        snapshot.steps_s,
        max(learned.followers_per_s, _followers_per_s(snapshot, learned)),
        learned.decode_tokens,
        snapshot.held_s,
        [_seat_s(snapshot, row)[1] for row in range(len(snapshot.keys))] if any(snapshot.seats) else (),
    )
    return found.behind(snapshot.ahead_s) if snapshot.ahead_s else found


def _columns(snapshot: Snapshot, learned: Learned) -> tuple[list[float], list[float], list[float]]:
    """Prefill ahead, own prefill, and the wait for room: `row_times_s` of each row, to the last bit.

    In one loop without an object or a call per row, which is four times as quick; most endpoints of most
    fleets have nothing ahead and room.
    """
    prompt_tokens, half_tokens = snapshot.prompt_tokens, snapshot.output_tokens / 2
    prices_s, own_prices_s = learned.prefill_prices_s, learned.row_prices_s
    has_seats, kv_used = any(snapshot.seats), snapshot.kv_used
    kv_sizes = snapshot.kv_tokens or [0] * len(snapshot.keys)
    waits_s, works_s, rooms_s = [], [], []
    for row, (requests, prefilling, pending, context, cached, weight, kv_tokens) in enumerate(
        zip(
            snapshot.requests,
            snapshot.prefilling,
            snapshot.prefill_tokens,
            snapshot.context_tokens,
            snapshot.cached_tokens,
            snapshot.weights,
            kv_sizes,
            strict=True,
        )
    ):
        if own_prices_s:
            prices_s = own_prices_s[row]
        base, token, pair, from_cache, sequence, in_context = prices_s
        per_pair = pair / (TOKENS * TOKENS)
        per_token = token / TOKENS
        wait_s = 0.0
        if requests or pending:
            ahead = max(pending, context * prefilling // requests) if requests else pending
            decoding = max(0, requests - prefilling)
            read = max(0, context - ahead) + decoding * half_tokens
            per_token += (sequence * decoding + in_context * read / TOKENS) / step_tokens(decoding)
            pairs = pending * (max(0, ahead - pending) + pending / 2) / prefilling if prefilling else 0.0
            wait_s = (pending * per_token + pairs * per_pair) / weight
        uncached = max(_BLANK_PROMPT, prompt_tokens - cached)
        pairs = uncached * (cached + uncached / 2)
        work_s = base + cached * (from_cache / TOKENS) + uncached * per_token + pairs * per_pair
        room_s = 0.0
        if kv_tokens:
            used = kv_used[row] if kv_used else None
            if used is None or used + pending + uncached > kv_tokens:
                room_s = _kv_s(snapshot, row, backlog(snapshot, row), uncached)
        if has_seats:
            # Those ahead prefill while seats become free: the longer of both waits is the whole.
            room_s = max(room_s, _seat_s(snapshot, row)[0] - wait_s, 0.0)
        waits_s.append(wait_s)
        works_s.append(work_s / weight)
        rooms_s.append(room_s)
    return waits_s, works_s, rooms_s


def row_times_s(snapshot: Snapshot, row: int) -> tuple[float, float, float]:
    """Prefill ahead, own prefill, and the wait for room of one row, as its parts say.

    Raises:
        ValueError: The snapshot has no learned prices.
    """
    ahead = backlog(snapshot, row)
    cached, weight = snapshot.cached_tokens[row], snapshot.weights[row]
    uncached = max(_BLANK_PROMPT, snapshot.prompt_tokens - cached)
    wait_s, work_s = times_s(_prices_s(_learned(snapshot), row), ahead, uncached, cached)
    wait_s, work_s = wait_s / weight, work_s / weight
    return wait_s, work_s, max(_kv_s(snapshot, row, ahead, uncached), _seat_s(snapshot, row)[0] - wait_s, 0.0)


def expected_ttft_s(snapshot: Snapshot, row: int) -> float:
    """Time to first token that the request is expected to have on one row, from being sent there.

    It is what the row's cost says of waiting, room and work, and one step of the decodes there: in the cost
    that step is one of the tokens of decoding.

    Raises:
        ValueError: The snapshot has no learned prices.
    """
    ahead_s = snapshot.ahead_s[row] if snapshot.ahead_s else 0.0
    one_step_s = beside_s(_prices_s(_learned(snapshot), row), backlog(snapshot, row)) / snapshot.weights[row]
    return total_s(*row_times_s(snapshot, row), ahead_s, one_step_s)


def open_until_s(snapshot: Snapshot) -> list[float]:
    """Prefill ahead, in seconds, with which each row still takes a request that is held for it.

    What is ahead is counted until its first token; of what is under way, the time since is done.

    Raises:
        ValueError: The snapshot has no learned prices.
    """
    learned = _learned(snapshot)
    done_s = snapshot.under_way_s or [0.0] * len(snapshot.weights)
    return [
        OPEN_STEPS * step_s(_prices_s(learned, row), backlog(snapshot, row)) / weight + done_s[row]
        for row, weight in enumerate(snapshot.weights)
    ]


def has_room(snapshot: Snapshot, row: int) -> bool:
    """Whether prefill alone is between the request and its first token there; else that teaches nothing."""
    uncached = max(_BLANK_PROMPT, snapshot.prompt_tokens - snapshot.cached_tokens[row])
    seat_s, _ = _seat_s(snapshot, row)
    return seat_s == 0.0 and _kv_s(snapshot, row, backlog(snapshot, row), uncached) == 0.0


def _learned(snapshot: Snapshot) -> Learned:
    if snapshot.learned is None:
        raise ValueError("a snapshot without prices")
    return snapshot.learned


def _prices_s(learned: Learned, row: int) -> tuple[float, ...]:
    return learned.row_prices_s[row] if learned.row_prices_s else learned.prefill_prices_s


def _seat_s(snapshot: Snapshot, row: int) -> tuple[float, float]:
    """Until the engine has a seat for the request, and from one seat to the next; zeros if one is free.

    One more than it has seats counts as none: it is ready when the next one ends.
    """
    limit = snapshot.seats[row] if snapshot.seats else 0
    excess = snapshot.requests[row] - limit
    if not limit or excess <= 0:
        return 0.0, 0.0
    turn_s = snapshot.output_tokens * snapshot.steps_s[row] / limit
    return excess * turn_s, turn_s


def _followers_per_s(snapshot: Snapshot, learned: Learned) -> float:
    """As `Traffic.followers_per_s`, by the share of seats taken; an endpoint of unknown size has all free."""
    if not snapshot.seats:
        return 0.0
    taken = [
        min(1.0, requests / limit) if limit else 0.0
        for requests, limit in zip(snapshot.requests, snapshot.seats, strict=True)
    ]
    return learned.rate_per_s / (1.0 - min(_MOST_TAKEN, sum(taken) / len(taken)))


def _kv_s(snapshot: Snapshot, row: int, ahead: Backlog, uncached_tokens: int) -> float:
    """Until the KV cache has room for what is ahead and the request; 0 where its size is unknown."""
    kv_tokens = snapshot.kv_tokens[row] if snapshot.kv_tokens else 0
    if not kv_tokens:
        return 0.0
    used: float | None = snapshot.kv_used[row] if snapshot.kv_used else None
    if used is None:
        used = ahead.context_tokens + ahead.prompt_tokens - ahead.prefill_tokens
    return room_wait_s(
        ahead.prefill_tokens + uncached_tokens,
        used,
        kv_tokens,
        snapshot.output_tokens,
        snapshot.steps_s[row],
    )


def completion_terms(snapshot: Snapshot) -> dict[str, list[float]]:
    """Terms `wait`, `room`, `work`, `others` and `decode`: seconds, negated."""
    found = completion_costs(snapshot)
    return {
        "wait": list(map(neg, found.waits_s)),
        "room": list(map(neg, found.rooms_s)),
        "work": list(map(neg, found.works_s)),
        "others": list(map(neg, found.others_s)),
        "decode": list(map(neg, found.decodes_s)),
    }
