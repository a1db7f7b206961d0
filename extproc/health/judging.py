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

from collections.abc import Collection
from functools import lru_cache
from typing import Final

from extproc.values.evidence import EMPTY, TRUNCATED, UNLIKE, Evidence, FailureKind, NoFailure
from extproc.values.outcomes import Ended

LEAST_STREAM_BYTES: Final = 24
"""`data: [DONE]` with its two line ends, and a comment's worth of air: less holds no token of any API."""

LEAST_WHOLE_BYTES: Final = 3
"""`{}` and `[]` are no answers."""

_BROKEN_FLAGS: Final = frozenset({"UC", "UR", "UPE"})

_CONNECTION_TIMEOUT: Final = "connection_timeout"
"""Of a connection that was not made within the cluster's `connect_timeout`, in Envoy's details."""

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
    details: str,
    error: str | None,
    content_type: str | None,
    is_stream: bool,
    response_bytes: int | None,
    attempts: int,
    generates: bool = True,
    is_speech_to_text: bool = False,
) -> Evidence:
    """Judge an ending.

    Args:
        status: HTTP status the client saw; 0 if it left before any.
        ended: How.
        flags: Envoy's short response flags.
        details: Envoy's words for the end.
        error: What `error_seen` gave.
        content_type: Of the answer, or None if it is not known.
        is_stream: The client asked for a stream.
        response_bytes: Body bytes of the answer; None if nobody saw them.
        attempts: Upstream attempts made.
        generates: The operation answers with objects or events; others may do so with text or bytes.
        is_speech_to_text: Of silence its text, if the client asked for text alone, is empty.
    """
    if error == UNLIKE and not generates:
        error = None
    if status != 200 or ended is not Ended.COMPLETED or error is not None or flags or not attempts:
        verdict = _of_what_went_wrong(status, ended, flags, details, error, attempts)
        if verdict is not None:
            return verdict
    least_bytes = LEAST_STREAM_BYTES if is_stream else LEAST_WHOLE_BYTES
    may_be_silence = is_speech_to_text and _is_text(content_type)
    if response_bytes is not None and response_bytes < least_bytes and not may_be_silence:
        return FailureKind.EMPTY_ANSWER
    if content_type is not None and not _may_answer(content_type, is_stream, generates):
        return FailureKind.WRONG_CONTENT
    return NoFailure.ANSWERED


def _of_what_went_wrong(
    status: int, ended: Ended, flags: Collection[str], details: str, error: str | None, attempts: int
) -> Evidence | None:
    """The verdict by what is unusual in an ending; None if that says nothing."""
    if not attempts or ended in (Ended.REJECTED, Ended.LEASE_EXPIRED):
        return NoFailure.UNKNOWN
    if ended is Ended.CLIENT_ABORT:
        return NoFailure.UNKNOWN if error in (None, TRUNCATED, EMPTY, UNLIKE) else _of_error(error)
    if "UF" in flags:
        return FailureKind.CONNECT_TIMEOUT if _CONNECTION_TIMEOUT in details else FailureKind.CONNECT_FAILURE
    if "UT" in flags:
        return FailureKind.FIRST_BYTE_TIMEOUT
    if ended is Ended.TIMEOUT:
        return FailureKind.STALLED if status == 200 else NoFailure.UNKNOWN
    if ended is Ended.UPSTREAM_RESET or not _BROKEN_FLAGS.isdisjoint(flags):
        return FailureKind.RESET
    if status >= 400:
        return _of_status(status)
    if status == 0:
        return NoFailure.UNKNOWN
    if not 200 <= status < 300:  # to a page to log in, to what nobody has cached: no inference API's answer
        return FailureKind.REFUSED
    return None if error is None else _of_error(error)


def _of_status(status: int) -> FailureKind:
    if status == 404:
        return FailureKind.MISSING_MODEL
    if status == 429:
        return FailureKind.OVERLOADED
    if status < 500 or status == 501:  # vLLM: a parameter that it does not implement
        return FailureKind.REFUSED
    return FailureKind.SERVER_ERROR


def _of_error(error: str) -> FailureKind:
    if error == TRUNCATED:
        return FailureKind.TRUNCATED
    if error == EMPTY:
        return FailureKind.EMPTY_ANSWER
    if error == UNLIKE:
        return FailureKind.WRONG_CONTENT
    words = set(error.split())
    if words & _OVERLOAD_WORDS:
        return FailureKind.OVERLOADED
    if words & _MISSING_WORDS:
        return FailureKind.MISSING_MODEL
    if words & _CLIENTS_WORDS or any(len(word) == 3 and word.startswith("4") for word in words):
        return FailureKind.REFUSED
    return FailureKind.ERROR_IN_ANSWER


@lru_cache(maxsize=64)
def _may_answer(content_type: str, is_stream: bool, generates: bool) -> bool:
    """What was generated is events or JSON, whole or streamed; any other answer is anything but a page.

    Whatever else is sent in its place (text, bytes, XML) is from a server that says the same to all.
    """
    kind = _kind(content_type)
    if is_stream or generates:
        return kind in ("", "text/event-stream") or kind.endswith("json")
    return kind != "text/html"


def _is_text(content_type: str | None) -> bool:
    """Words or subtitles without an object around them."""
    kind = "" if content_type is None else _kind(content_type)
    return (kind.startswith("text/") and kind not in ("text/html", "text/event-stream")) or (
        kind == "application/x-subrip"
    )


def _kind(content_type: str) -> str:
    """Without parameters and in lower case; of several, which Envoy joins by commas, the first."""
    return content_type.partition(",")[0].partition(";")[0].strip().lower()
