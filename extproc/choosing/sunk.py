"""How much of a prompt's prefill further endpoints are going to compute sooner or later, whatever is decided.

Rules:
    1. Requests in flight that begin alike crowd the endpoints that they run at. As far as those of one prefix
       are an endpoint's usual load by themselves, more endpoints are going to compute it: the next request
       that goes elsewhere does, if this one does not. What others pay for that is no price of this decision.
    2. The share is that of the requests per endpoint where the prefix runs, one left out, in the requests per
       endpoint in flight: 0 for a prompt of its own or a conversation, whose turns follow each other, 1 from
       the point on where a prefix fills its endpoints alone.
    3. It is a share of the blocks that are not cached at a row: what none in flight has is nobody's but the
       request's.
"""

from __future__ import annotations

from collections.abc import Sequence

from metadata_center.history.running_blocks import RunningBlocks, SharedRun

NOTHING_SUNK: Sequence[float] = ()
"""Most prompts share nothing that is crowded."""


def crowded_ratios(
    running: RunningBlocks,
    blocks: Sequence[int],
    requests: Sequence[int],
    processes: float,
    prompt_tokens: int,
    cached_tokens: Sequence[int],
) -> Sequence[float]:
    """`sunk_ratios` by what runs now.

    Args:
        running: Requests of this process in flight.
        blocks: Of the prompt.
        requests: In flight at each endpoint that may serve it, of all processes; at least one.
        processes: How many send to these endpoints, >= 1.
        prompt_tokens: See `sunk_ratios`.
        cached_tokens: See `sunk_ratios`.
    """
    runs = running.shared(blocks)
    for run in runs:
        if run.requests > run.endpoints:
            usual = sum(requests) / (len(requests) * processes)
            return sunk_ratios(runs, usual, len(blocks), prompt_tokens, cached_tokens)
    return NOTHING_SUNK


def sunk_ratios(
    runs: Sequence[SharedRun],
    requests_per_endpoint: float,
    num_blocks: int,
    prompt_tokens: int,
    cached_tokens: Sequence[int],
) -> Sequence[float]:
    """Of each row's own prefill, the share that is computed there anyway, 0..1; empty if it is 0 everywhere.

    Args:
        runs: Leading blocks of the prompt that are in flight, see `RunningBlocks.shared`.
        requests_per_endpoint: Of this process, in flight, in the mean over the endpoints that may serve it.
        num_blocks: Of the prompt.
        prompt_tokens: Of the prompt.
        cached_tokens: Of it believed cached, per row.
    """
    usual = max(1.0, requests_per_endpoint)
    spans, end = [], 0
    for run in runs:
        begin, end = end, end + run.blocks
        share = min(1.0, max(0.0, (run.requests / run.endpoints - 1.0) / usual))
        if share > 0.0:
            spans.append((begin, end, share))
    if not spans or prompt_tokens <= 0:
        return NOTHING_SUNK
    blocks_per_token = num_blocks / prompt_tokens
    ratios = {cached: _behind(spans, cached * blocks_per_token, num_blocks) for cached in set(cached_tokens)}
    return [ratios[cached] for cached in cached_tokens]


def _behind(spans: Sequence[tuple[int, int, float]], cached_blocks: float, num_blocks: int) -> float:
    """The share of what is behind the cached blocks."""
    left = num_blocks - cached_blocks
    if left <= 0.0:
        return 0.0
    sunk = 0.0
    for begin, end, share in spans:
        if end > cached_blocks:
            sunk += share * (end - max(begin, cached_blocks))
    return min(1.0, sunk / left)
