"""What an answer may have of tokens, whatever its engine says of it (docs/adr/0018)."""

from __future__ import annotations

from typing import Final

from extproc.values.endings import RequestEnd
from extproc.values.inflight import Inflight

MAX_ANSWER_TOKENS: Final = 1 << 20
"""Of one request, whose bounds are not known: ten times what the models of today write at most."""

PROMPT_SLACK_TOKENS: Final = 1 << 16
"""What a prompt has beyond one token for each of its bytes: a template's own text, and pictures."""


def possible(end: RequestEnd, request: Inflight, kv_tokens: int) -> tuple[int | None, int | None, int | None]:
    """Prompt, completion and cached tokens, none above what the request and the engine allow.

    Args:
        end: The end of `request`, as it was reported.
        request: What is remembered of it.
        kv_tokens: Size of the endpoint's KV cache, 0 if it is not known; it holds prompt and answer at once.
    """
    prompt, completion, cached = end.prompt_tokens, end.completion_tokens, end.cached_tokens
    if prompt is not None:
        record = request.record
        most = max(record.prompt_bytes, record.prompt_tokens) + max(PROMPT_SLACK_TOKENS, kv_tokens)
        prompt = min(prompt, most)
        if cached is not None:
            cached = min(cached, prompt)
    if completion is not None:
        room = kv_tokens or MAX_ANSWER_TOKENS
        completion = min(completion, room, request.max_output_tokens or room)
    return prompt, completion, cached
