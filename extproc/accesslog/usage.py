"""An engine's usage object as the three numbers that are learned from: one definition for every API.

Rules:
    1. Prompt tokens are all of the prompt, those from the prefix cache included; cached tokens are a part of
       them; completion tokens are all that was generated, reasoning included.
    2. Nothing is believed that makes no sense (negative, huge, textual): it is as if it were not there.
    3. Any text gives a `Usage`. It comes from Envoy, which found it in the answer and did not parse it: in an
       event of several `data:` lines it goes over some of them.

How the APIs report it:

    chat, completion, embeddings    prompt_tokens; of it prompt_tokens_details.cached_tokens;
                                    completion_tokens
    Responses                       input_tokens; of it input_tokens_details.cached_tokens; output_tokens
    Messages                        input_tokens, and beside it cache_read_input_tokens and
                                    cache_creation_input_tokens; output_tokens
    rerank, score                   prompt_tokens, or total_tokens alone

A stream of the Messages API reports it twice. `message_start` has the prompt, `message_delta` the output and,
where the engine knows no better before (vLLM 0.32), how much of the prompt was cached.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

MAX_TOKENS = 10**12
"""No request has as many; what says more is no count."""

_CACHE_READ = "cache_read_input_tokens"
_CACHE_CREATION = "cache_creation_input_tokens"


class Usage(NamedTuple):
    """Tokens of one answer; None where the engine did not say.

    Attributes:
        prompt_tokens: All of the prompt.
        completion_tokens: All of the output.
        cached_tokens: The part of the prompt that came from the prefix cache.
    """

    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None


UNKNOWN = Usage(None, None, None)


def read_usage(top: str, nested: str = "") -> Usage:
    """The tokens of one answer.

    Args:
        top: The object under `usage` of the answer or of its last event that had one; "" if there was none.
        nested: The same, one level below: in `message` of `message_start`, in `response` of
            `response.completed`.
    """
    if not nested:
        return _read(_decoded(top))
    last, first = _decoded(top), _decoded(nested)
    if not last:
        return _read(first)
    merged = {**first, **{name: count for name, count in last.items() if count is not None}}
    usage = _read(merged)
    first_input, last_input = _count(first, "input_tokens"), _count(last, "input_tokens")
    if usage.cached_tokens is None or first_input is None or _count(merged, "prompt_tokens") is not None:
        return usage
    if _caches(last) and not _caches(first) and last_input is None:
        # The beginning did not know what was cached, so it counted all of the prompt.
        return usage._replace(prompt_tokens=first_input, cached_tokens=min(usage.cached_tokens, first_input))
    if _caches(first) and not _caches(last) and last_input not in (None, first_input):
        return _read(last)  # another count, of which the cached ones of the beginning are no part
    return usage


def joined(text: str) -> str:
    """What the `data:` lines of a server-sent event say together: in JSON, line ends are between tokens."""
    return text.replace("\ndata:", "\n")


def _decoded(text: str) -> Mapping[str, Any]:
    if not text:
        return {}
    try:
        fields = orjson.loads(text)
    except orjson.JSONDecodeError:
        try:
            fields = orjson.loads(joined(text))
        except orjson.JSONDecodeError:
            return {}
    return fields if type(fields) is dict else {}


def _read(fields: Mapping[str, Any]) -> Usage:
    prompt = _count(fields, "prompt_tokens")
    completion = _count(fields, "completion_tokens")
    if completion is None:
        completion = _count(fields, "output_tokens")
    details = fields.get("prompt_tokens_details" if prompt is not None else "input_tokens_details")
    cached = _count(details, "cached_tokens") if type(details) is dict else None
    if cached is None:
        cached = _count(fields, _CACHE_READ)
        if prompt is None:
            uncached = _count(fields, "input_tokens")
            if uncached is not None:
                prompt = uncached + (cached or 0) + (_count(fields, _CACHE_CREATION) or 0)
        elif cached is None:
            cached = _count(fields, "cached_tokens")  # where some engines have it
    elif prompt is None:
        prompt = _count(fields, "input_tokens")
    if prompt is None and completion is None:
        prompt = _count(fields, "total_tokens")
    if cached is not None and (prompt is None or cached > prompt):
        cached = prompt
    return Usage(prompt, completion, cached)


def _caches(fields: Mapping[str, Any]) -> bool:
    return _count(fields, _CACHE_READ) is not None or _count(fields, _CACHE_CREATION) is not None


def _count(fields: Mapping[str, Any], name: str) -> int | None:
    count = fields.get(name)
    if count is None:
        return None
    if type(count) is int:
        return count if 0 <= count < MAX_TOKENS else None
    if type(count) is float and 0.0 <= count < MAX_TOKENS:  # not NaN, which is not below anything
        return int(count)
    return None
