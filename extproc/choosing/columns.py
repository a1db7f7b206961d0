"""What each endpoint of a snapshot says of a request's time there: `rows`, for all rows in one loop.

One loop without an object or a call per row is several times as quick. Most endpoints of most fleets have
nothing ahead, and room.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import gt

from extproc.choosing.rows import BLANK_PROMPT, backlog, batch_s, kv_s
from extproc.predicting.ttft import STEP_TOKENS, TOKENS
from extproc.values.choices import Learned, Snapshot

_LEAST_STEP_TOKENS = STEP_TOKENS // 8


def times_s(snapshot: Snapshot, learned: Learned) -> tuple[list[float], list[float]]:
    """Prefill ahead and own prefill of each row, to the last bit as `rows.row_times_s` has them."""
    prompt_tokens, half_tokens = snapshot.prompt_tokens, snapshot.output_tokens / 2
    own_prices_s = learned.row_prices_s
    base, token, pair, from_cache, sequence, in_context = learned.prefill_prices_s
    waits_s, works_s = [], []
    for row, (requests, prefilling, pending, context, cached, weight) in enumerate(
        zip(
            snapshot.requests,
            snapshot.prefilling,
            snapshot.prefill_tokens,
            snapshot.context_tokens,
            snapshot.cached_tokens,
            snapshot.weights,
            strict=True,
        )
    ):
        if own_prices_s:
            base, token, pair, from_cache, sequence, in_context = own_prices_s[row]
        per_pair, per_token, wait_s = pair / (TOKENS * TOKENS), token / TOKENS, 0.0
        if requests or pending:
            ahead = pending
            if requests:
                shared = context * prefilling // requests
                if shared > pending:
                    ahead = shared
            decoding = requests - prefilling if requests > prefilling else 0
            read = (context - ahead if context > ahead else 0) + decoding * half_tokens
            room_tokens = STEP_TOKENS - decoding
            if room_tokens < _LEAST_STEP_TOKENS:
                room_tokens = _LEAST_STEP_TOKENS
            per_token += (sequence * decoding + in_context * read / TOKENS) / room_tokens
            pairs = pending * (ahead - pending + pending / 2) / prefilling if prefilling else 0.0
            wait_s = (pending * per_token + pairs * per_pair) / weight
        uncached = prompt_tokens - cached
        if uncached < BLANK_PROMPT:
            uncached = BLANK_PROMPT
        pairs = uncached * (cached + uncached / 2)
        work_s = base + cached * (from_cache / TOKENS) + uncached * per_token + pairs * per_pair
        waits_s.append(wait_s)
        works_s.append(work_s / weight)
    return waits_s, works_s


def _is_any_full(snapshot: Snapshot) -> bool:
    """Whether more run anywhere than may; also where it is unknown how many may."""
    return any(map(gt, snapshot.requests, snapshot.max_num_seqs))


def turns_s(snapshot: Snapshot) -> Sequence[float]:
    """From one end of a sequence to the next, 0 where no more run than may; empty if so everywhere."""
    if not _is_any_full(snapshot):
        return ()
    found = [batch_s(snapshot, row)[1] for row in range(len(snapshot.keys))]
    return found if any(found) else ()


def taken_ratios(snapshot: Snapshot) -> Sequence[float]:
    """Of `max_num_seqs`, what is in use of each row; 0 where it is unknown."""
    return [
        min(1.0, requests / limit) if limit else 0.0
        for requests, limit in zip(snapshot.requests, snapshot.max_num_seqs, strict=True)
    ]


def rooms_s(snapshot: Snapshot, waits_s: Sequence[float]) -> list[float]:
    """The wait for room of each row, to the last bit as `rows.row_times_s` has it.

    Args:
        snapshot: The rows.
        waits_s: Prefill ahead of each.
    """
    found = [0.0] * len(waits_s)
    if snapshot.kv_tokens:
        kv_used = snapshot.kv_used or [None] * len(waits_s)
        for row, (kv_tokens, used, pending, cached) in enumerate(
            zip(snapshot.kv_tokens, kv_used, snapshot.prefill_tokens, snapshot.cached_tokens, strict=True)
        ):
            if kv_tokens:
                uncached = max(BLANK_PROMPT, snapshot.prompt_tokens - cached)
                if used is None or used + pending + uncached > kv_tokens:
                    found[row] = kv_s(snapshot, row, backlog(snapshot, row), uncached)
    if _is_any_full(snapshot):
        for row, wait_s in enumerate(waits_s):
            # Those ahead prefill while running sequences end: the longer of both waits is the whole.
            found[row] = max(found[row], batch_s(snapshot, row)[0] - wait_s, 0.0)
    return found
