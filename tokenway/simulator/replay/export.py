"""A trace in the format of our own request logs, for samples and for other tools."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenway.simulator.replay.trace import Trace, engine_keys


def records(trace: Trace, block_tokens: int) -> Iterator[dict[str, Any]]:
    """The lines of a `requests` file, in the order of arrival; what waits for an answer must not be in it.

    Args:
        trace: Open loop.
        block_tokens: Of the file; a multiple of the trace's.

    Raises:
        ValueError: A request waits for another, or the blocks do not fit.
    """
    ratio, rest = divmod(block_tokens, trace.block_tokens)
    if rest or not ratio or any(request.after is not None for request in trace.requests):
        raise ValueError("only open-loop traces of blocks that divide block_tokens can be written")
    for request in sorted(trace.requests, key=lambda each: each.arrival_s):
        keys = engine_keys(request, trace.block_tokens, trace.block_tokens)
        record: dict[str, Any] = {
            "time_s": round(request.arrival_s, 3),
            "prompt_tokens": request.prompt_tokens,
            "completion_tokens": request.output_tokens,
            "block_tokens": block_tokens,
            "blocks": keys[ratio - 1 : request.prompt_tokens // trace.block_tokens : ratio],
        }
        if request.session is not None:
            record["session"] = request.session
        yield record
