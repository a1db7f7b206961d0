"""`least_completion` over a snapshot: the columns of `completion`, and its costs as terms of a score."""

from __future__ import annotations

from dataclasses import replace

from extproc.choosing.completion import Backlog, Cost, costs, prefill_step_s, prefill_times_s, room_wait_s
from extproc.choosing.holding import OPEN_STEPS
from extproc.types import Learned, Snapshot

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


def completion_costs(snapshot: Snapshot, held_s: float = 0.0) -> list[Cost]:
    """What each row would cost, in seconds.

    Args:
        snapshot: What is known.
        held_s: Least work of the requests that wait at gateways, see `extproc.choosing.completion.costs`.

    Raises:
        ValueError: The snapshot has no learned prices.
    """
    learned = _learned(snapshot)
    times_s, rooms_s = [], []
    for row, cached in enumerate(snapshot.cached_tokens):
        ahead = backlog(snapshot, row)
        uncached = max(_BLANK_PROMPT, snapshot.prompt_tokens - cached)
        weight = snapshot.weights[row]
        wait_s, work_s = prefill_times_s(learned.prefill_prices_s, ahead, uncached, cached)
        times_s.append((wait_s / weight, work_s / weight))
        rooms_s.append(_room_s(snapshot, row, ahead, uncached))
    held_s = max(held_s, snapshot.held_s)
    found = costs(
        times_s, rooms_s, snapshot.steps_s, learned.followers_per_s, learned.decode_tokens, held_s
    )
    if not snapshot.ahead_s:
        return found
    return [
        replace(cost, wait_s=cost.wait_s + ahead_s)
        for cost, ahead_s in zip(found, snapshot.ahead_s, strict=True)
    ]


def open_until_s(snapshot: Snapshot) -> list[float]:
    """Prefill ahead, in seconds, with which each row still takes a request that is held for it.

    Raises:
        ValueError: The snapshot has no learned prices.
    """
    prices_s = _learned(snapshot).prefill_prices_s
    return [
        OPEN_STEPS * prefill_step_s(prices_s, backlog(snapshot, row)) / weight
        for row, weight in enumerate(snapshot.weights)
    ]


def _learned(snapshot: Snapshot) -> Learned:
    if snapshot.learned is None:
        raise ValueError("a snapshot without prices")
    return snapshot.learned


def _room_s(snapshot: Snapshot, row: int, ahead: Backlog, uncached_tokens: int) -> float:
    """Until the KV cache has room for what is ahead and the request; 0 where its size is unknown."""
    kv_tokens = snapshot.kv_tokens[row]
    if not kv_tokens:
        return 0.0
    return room_wait_s(
        ahead.prefill_tokens + uncached_tokens,
        ahead.context_tokens + ahead.prompt_tokens - ahead.prefill_tokens,
        kv_tokens,
        snapshot.output_tokens,
        snapshot.steps_s[row],
    )


def completion_terms(snapshot: Snapshot) -> dict[str, list[float]]:
    """Terms `wait`, `room`, `work`, `others` and `decode`: seconds, negated."""
    found = completion_costs(snapshot)
    return {
        "wait": [-cost.wait_s for cost in found],
        "room": [-cost.room_s for cost in found],
        "work": [-cost.work_s for cost in found],
        "others": [-cost.others_s for cost in found],
        "decode": [-cost.decode_s for cost in found],
    }
