"""What the ending of a request says of the endpoint that served it.

Rules:
    1. Success means an answer, not a status: a good status with an error in the body, with no token, or with
       what no inference API says is a failure.
    2. The strongest sign wins: what broke the connection before what the status says, the status before what
       the body says.
    3. A client that left says nothing, unless an error was seen before.
    4. Pure, and fed by values: where an error was seen (Envoy's filters, the tail of the answer, the first
       chunk) is no business of this module.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, Final

from extproc.values.evidence import Evidence, FailureKind, NoFailure
from extproc.values.outcomes import Ended

ERROR_NAMESPACE: Final = "llm.error"
"""Where Envoy's filters leave what they saw of an error in an answer, see `error_seen`."""

LEAST_STREAM_BYTES: Final = 24
"""`data: [DONE]` with its two line ends, and a comment's worth of air: less holds no token of any API."""

_MAX_WORD: Final = 64
_WORD: Final = re.compile(r"[A-Za-z0-9_.-]+")

_ERROR_EVENTS: Final = frozenset({"error", "response.failed"})
_LAST_EVENTS: Final = frozenset(
    {"message_stop", "response.completed", "response.incomplete", "response.cancelled"}
)
_EARLIER_EVENTS: Final = frozenset(
    {
        *("message_start", "content_block_start", "content_block_delta", "content_block_stop"),
        *("ping", "chat.completion.chunk", "text_completion"),
    }
)
"""Types of events that end a stream, or do not, where the API gives each event one. After `message_delta`,
which has the stop reason, nothing is missing; chunks of a chat are told if the stream ends with one that has
no finish reason."""

_TRUNCATED: Final = "truncated"
_EMPTY: Final = "empty"
_NO_EVENT: Final = "none"
"""What Envoy's filter tells of a stream without any data."""

LEAST_WHOLE_BYTES: Final = 3
"""`{}` and `[]` are no answers."""

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
"""To a page to log in, or to the same path with or without a slash: no inference API answers with them."""

_BROKEN_FLAGS: Final = frozenset({"UC", "UR", "UPE"})

_CLIENTS_WORDS: Final = frozenset(
    {
        # OpenAI and vLLM
        *("invalid_request_error", "BadRequestError", "BadRequest", "UnprocessableEntityError"),
        *("authentication_error", "AuthenticationError", "permission_error", "PermissionDeniedError"),
        *("ValidationError", "NotImplementedError", "context_length_exceeded", "invalid_prompt"),
        # Anthropic
        *("request_too_large", "billing_error"),
    }
)
_OVERLOAD_WORDS: Final = frozenset(
    {"429", "529", "rate_limit_error", "rate_limit_exceeded", "RateLimitError", "overloaded_error"}
)
_MISSING_WORDS: Final = frozenset({"404", "NotFoundError", "not_found_error", "model_not_found"})
"""The types and codes of errors, as the OpenAI, Anthropic and vLLM references list them."""


def evidence_of(
    *,
    status: int,
    ended: Ended,
    flags: Collection[str],
    error: str | None,
    content_type: str | None,
    is_stream: bool,
    response_bytes: int,
    attempts: int,
) -> Evidence:
    """Judge an ending.

    Args:
        status: HTTP status the client saw; 0 if it left before any.
        ended: How.
        flags: Envoy's short response flags.
        error: What `error_seen` gave.
        content_type: Of the answer, or None if it is not known.
        is_stream: The client asked for a stream.
        response_bytes: Body bytes of the answer.
        attempts: Upstream attempts made.
    """
    if status != 200 or ended is not Ended.COMPLETED or error is not None or flags or not attempts:
        verdict = _of_what_went_wrong(status, ended, flags, error, attempts)
        if verdict is not None:
            return verdict
    if response_bytes < (LEAST_STREAM_BYTES if is_stream else LEAST_WHOLE_BYTES):
        return FailureKind.EMPTY_ANSWER
    if content_type is not None and not _may_answer(content_type, is_stream):
        return FailureKind.WRONG_CONTENT
    return NoFailure.ANSWERED


def _of_what_went_wrong(
    status: int, ended: Ended, flags: Collection[str], error: str | None, attempts: int
) -> Evidence | None:
    """The verdict by what is unusual in an ending; None if that says nothing."""
    if not attempts or ended in (Ended.REJECTED, Ended.LEASE_EXPIRED):
        return NoFailure.UNKNOWN
    if ended is Ended.CLIENT_ABORT:
        return NoFailure.UNKNOWN if error in (None, _TRUNCATED, _EMPTY) else _of_error(error)
    if "UF" in flags:
        return FailureKind.CONNECT_FAILURE
    if "UT" in flags:
        return FailureKind.FIRST_BYTE_TIMEOUT
    if ended is Ended.TIMEOUT:
        return FailureKind.STALLED if status == 200 else NoFailure.UNKNOWN
    if ended is Ended.UPSTREAM_RESET or not _BROKEN_FLAGS.isdisjoint(flags):
        return FailureKind.RESET
    if status >= 400:
        return _of_status(status)
    if status in _REDIRECTS:
        return FailureKind.REFUSED
    if error is not None:
        return _of_error(error)
    return None if 200 <= status < 300 else NoFailure.UNKNOWN


def error_seen(fields: Mapping[str, Any]) -> str | None:
    """An error in an answer, in words that are safe to log: its type and code; None if there was none.

    Args:
        fields: Of `ERROR_NAMESPACE`: `type` and `code` of the error object; `event`, the type of the last
            event of a stream that was seen, whatever it was, and `event_code`, which is one of an error if
            the event is; whatever else says that there was an error. A text of an error (a message may
            repeat the prompt) is never among them.
    """
    event = fields.get("event")
    if event not in _ERROR_EVENTS and fields.keys() <= {"event", "event_code"}:
        if event == _NO_EVENT:
            return _EMPTY
        earlier = event in _EARLIER_EVENTS or (
            str(event).startswith("response.") and event not in _LAST_EVENTS
        )
        return _TRUNCATED if earlier else None
    words = []
    for name in ("type", "code", "event_code"):
        found = fields.get(name)
        if isinstance(found, float) and found.is_integer():
            found = int(found)
        word = str(found)
        if found is not None and len(word) <= _MAX_WORD and _WORD.fullmatch(word):
            words.append(word)
    return " ".join(words) or "error"


def _of_status(status: int) -> FailureKind:
    if status == 404:
        return FailureKind.MISSING_MODEL
    if status == 429:
        return FailureKind.OVERLOADED
    if status < 500 or status == 501:  # vLLM: a parameter that it does not implement
        return FailureKind.REFUSED
    return FailureKind.SERVER_ERROR


def _of_error(error: str) -> FailureKind:
    if error == _TRUNCATED:
        return FailureKind.TRUNCATED
    if error == _EMPTY:
        return FailureKind.EMPTY_ANSWER
    words = set(error.split())
    if words & _OVERLOAD_WORDS:
        return FailureKind.OVERLOADED
    if words & _MISSING_WORDS:
        return FailureKind.MISSING_MODEL
    if words & _CLIENTS_WORDS or any(len(word) == 3 and word.startswith("4") for word in words):
        return FailureKind.REFUSED
    return FailureKind.ERROR_IN_ANSWER


@lru_cache(maxsize=64)
def _may_answer(content_type: str, is_stream: bool) -> bool:
    """Streams are events, or JSON from engines that do not stream; a whole answer is anything but a page."""
    kind = content_type.partition(";")[0].strip().lower()
    if is_stream:
        return kind in ("", "text/event-stream", "application/x-ndjson") or kind.endswith("json")
    return kind != "text/html"
