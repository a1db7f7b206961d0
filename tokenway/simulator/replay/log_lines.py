"""The gateway's request log as `requests` records.

Rules:
    1. A request arrived when its line was written less its `duration_ms`.
    2. Only what an engine counted tokens of is kept: refusals, aborts and answers without usage do not say
       how much work they were.
    3. The log's blocks are bytes, an engine's are tokens. One size in tokens stands for all: the log's mean,
       to the nearest whole engine block. A prompt with more tokens per byte ends in private blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

REQUEST_LOGGER: Final = "tokenway.request"
"""Whose lines these are; other loggers write to the same file."""

ENGINE_BLOCK_TOKENS: Final = 16
"""Sizes in tokens are multiples of vLLM's default block."""

_DEFAULT_BLOCK_TOKENS: Final = 128
"""Of a log without blocks, where it does not matter."""


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """What a replay takes from one line.

    Attributes:
        time_s: Unix time of arrival.
        prompt_tokens: >= 1.
        completion_tokens: >= 1.
        prompt_bytes: Of the canonical prompt; 0 if it was not logged.
        block_bytes: Likewise of one block.
        blocks: Keyed hashes of its full blocks, chained.
    """

    time_s: float
    prompt_tokens: int
    completion_tokens: int
    prompt_bytes: int = 0
    block_bytes: int = 0
    blocks: tuple[int, ...] = ()


def ended_request(line: Any) -> EndedRequest | None:
    """What a decoded line says; None if it is no request's, or of one without token counts.

    Raises:
        ValueError: A request's line has a field of another form than the gateway writes.
    """
    if not isinstance(line, dict) or line.get("logger") != REQUEST_LOGGER:
        return None
    if not line.get("prompt_tokens") or not line.get("completion_tokens"):
        return None
    try:
        request = EndedRequest(
            datetime.fromisoformat(line["time"]).timestamp() - line["duration_ms"] / 1000.0,
            line["prompt_tokens"],
            line["completion_tokens"],
            line.get("prompt_bytes", 0),
            line.get("block_bytes", 0),
            tuple(line.get("prompt_blocks", ())),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"not a request's line: {type(error).__name__}: {error}") from None
    numbers = (request.prompt_tokens, request.completion_tokens, request.prompt_bytes, request.block_bytes)
    if not all(isinstance(number, int) and number >= 0 for number in (*numbers, *request.blocks)):
        raise ValueError("not a request's line: a negative number, or none")
    return request


def request_records(ended: Sequence[EndedRequest]) -> Iterator[dict[str, Any]]:
    """Lines of a `requests` file, in the order of arrival.

    Args:
        ended: In any order.

    Raises:
        ValueError: The size of blocks changed within the log.
    """
    sizes = {request.block_bytes for request in ended if request.blocks}
    if len(sizes) > 1:
        raise ValueError(f"blocks of {', '.join(map(str, sorted(sizes)))} bytes in one log")
    block_tokens = _DEFAULT_BLOCK_TOKENS
    if sizes:
        of = [request for request in ended if request.blocks]
        tokens_per_byte = sum(r.prompt_tokens for r in of) / max(1, sum(r.prompt_bytes for r in of))
        engine_blocks = max(1, round(sizes.pop() * tokens_per_byte / ENGINE_BLOCK_TOKENS))
        block_tokens = engine_blocks * ENGINE_BLOCK_TOKENS
    for request in sorted(ended, key=lambda each: each.time_s):
        yield {
            "time_s": request.time_s,
            "prompt_tokens": request.prompt_tokens,
            "completion_tokens": request.completion_tokens,
            "block_tokens": block_tokens,
            "blocks": list(request.blocks),
        }
