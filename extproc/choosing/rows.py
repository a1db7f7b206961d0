"""What one endpoint of a snapshot says of a request's time there: `least_completion`, row by row.

`columns` and `arrays` say the same of all rows at once, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from extproc.choosing.completion import Costs, room_wait_s
from extproc.choosing.holding import OPEN_STEPS
from extproc.predicting.ttft import Backlog, beside_s, step_s, times_s, total_s
from extproc.values.choices import Learned, Snapshot

BLANK_PROMPT: Final = 1
"""Tokens of a prompt that says nothing: an engine computes at least one."""


def backlog(snapshot: Snapshot, row: int) -> Backlog:
    """What is on one endpoint before the request.

    The ledger has prompt tokens of all requests in flight; those that still prefill have their share of
    them, and at least what is left of theirs.
    """
    requests, prefilling = snapshot.requests[row], snapshot.prefilling[row]
    context, pending = snapshot.context_tokens[row], snapshot.prefill_tokens[row]
    ahead = max(pending, context * prefilling // requests) if requests else pending
    decoding = max(0, requests - prefilling)
    read = max(0, context - ahead) + decoding * snapshot.output_tokens / 2
    return Backlog(prefilling, pending, ahead, decoding, read)


def row_times_s(snapshot: Snapshot, row: int) -> tuple[float, float, float]:
    """Prefill ahead, own prefill, and the wait for room of one row, as its parts say.

    Raises:
        ValueError: The snapshot has no learned prices.
    """
    return _times_s(snapshot, row, _prices_s(learned_of(snapshot), row), backlog(snapshot, row))


def expected_ttft_s(snapshot: Snapshot, row: int) -> float:
    """Time to first token that the request is expected to have on one row, from being sent there.

    It is what the row's cost says of waiting, room and work, and one step of the decodes there: in the cost
    that step is one of the tokens of decoding.

    Raises:
        ValueError: The snapshot has no learned prices.
    """
    prices_s, ahead = _prices_s(learned_of(snapshot), row), backlog(snapshot, row)
    return _expected_ttft_s(snapshot, row, prices_s, ahead, _times_s(snapshot, row, prices_s, ahead))


def expected_ttft_at_s(snapshot: Snapshot, row: int, costs: Costs) -> float:
    """`expected_ttft_s`, to the last bit, of a row whose costs are known.

    Args:
        snapshot: The rows.
        row: Which.
        costs: What `completion_costs` gave for the snapshot.

    Raises:
        ValueError: The snapshot has no learned prices.
    """
    if snapshot.ahead_s:  # a part of the costs' waits, which is to be added last
        return expected_ttft_s(snapshot, row)
    prices_s, ahead = _prices_s(learned_of(snapshot), row), backlog(snapshot, row)
    parts_s = costs.waits_s[row], costs.works_s[row], costs.rooms_s[row]
    return _expected_ttft_s(snapshot, row, prices_s, ahead, parts_s)


def _expected_ttft_s(
    snapshot: Snapshot,
    row: int,
    prices_s: Sequence[float],
    ahead: Backlog,
    parts_s: tuple[float, float, float],
) -> float:
    ahead_s = snapshot.ahead_s[row] if snapshot.ahead_s else 0.0
    return total_s(*parts_s, ahead_s, beside_s(prices_s, ahead) / snapshot.weights[row])


def open_until_s(snapshot: Snapshot) -> list[float]:
    """Prefill ahead, in seconds, with which each row still takes a request that is held for it.

    What is ahead is counted until its first token; of what is under way, the time since is done.

    Raises:
        ValueError: The snapshot has no learned prices.
    """
    return [row_open_until_s(snapshot, row) for row in range(len(snapshot.weights))]


def row_open_until_s(snapshot: Snapshot, row: int) -> float:
    """`open_until_s` of one row."""
    done_s = snapshot.under_way_s[row] if snapshot.under_way_s else 0.0
    a_step_s = step_s(_prices_s(learned_of(snapshot), row), backlog(snapshot, row))
    return OPEN_STEPS * a_step_s / snapshot.weights[row] + done_s


def has_room(snapshot: Snapshot, row: int) -> bool:
    """Whether prefill alone is between the request and its first token there; else that teaches nothing."""
    uncached = max(BLANK_PROMPT, snapshot.prompt_tokens - snapshot.cached_tokens[row])
    return batch_s(snapshot, row)[0] == 0.0 and kv_s(snapshot, row, backlog(snapshot, row), uncached) == 0.0


def learned_of(snapshot: Snapshot) -> Learned:
    """What was learned, as the decision took it.

    Raises:
        ValueError: The snapshot has no learned prices.
    """
    if snapshot.learned is None:
        raise ValueError("a snapshot without prices")
    return snapshot.learned


def _times_s(
    snapshot: Snapshot, row: int, prices_s: Sequence[float], ahead: Backlog
) -> tuple[float, float, float]:
    cached, weight = snapshot.cached_tokens[row], snapshot.weights[row]
    uncached = max(BLANK_PROMPT, snapshot.prompt_tokens - cached)
    wait_s, work_s = times_s(prices_s, ahead, uncached, cached)
    wait_s, work_s = wait_s / weight, work_s / weight
    return (
        wait_s,
        work_s,
        max(kv_s(snapshot, row, ahead, uncached), batch_s(snapshot, row)[0] - wait_s, 0.0),
    )


def _prices_s(learned: Learned, row: int) -> tuple[float, ...]:
    return learned.row_prices_s[row] if learned.row_prices_s else learned.prefill_prices_s


def batch_s(snapshot: Snapshot, row: int) -> tuple[float, float]:
    """Until the engine may run the request, and from one end of a sequence to the next; zeros if it may now.

    One more than `max_num_seqs` counts as none: it is ready when the next one ends.
    """
    limit = snapshot.max_num_seqs[row] if snapshot.max_num_seqs else 0
    excess = snapshot.requests[row] - limit
    if not limit or excess <= 0:
        return 0.0, 0.0
    turn_s = snapshot.output_tokens * snapshot.steps_s[row] / limit
    return excess * turn_s, turn_s


def kv_s(snapshot: Snapshot, row: int, ahead: Backlog, uncached_tokens: int) -> float:
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
