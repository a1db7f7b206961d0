"""What one request or attempt says of the endpoint that served it; `extproc.health` judges by it."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class FailureKind(StrEnum):
    """How an attempt of real traffic failed; a metric label. A client that left is no failure.

    Attributes:
        CONNECT_FAILURE: Nothing listens there, or speaks no TLS; the request never arrived.
        CONNECT_TIMEOUT: No connection was made in time: nobody answered, or either side had no processor; the
            request never arrived.
        RESET: The connection broke after the request was sent, before or within the answer.
        SERVER_ERROR: A status of 500 or more.
        FIRST_BYTE_TIMEOUT: No response headers in time.
        STALLED: The answer began and then stood still until Envoy gave up.
        ERROR_IN_ANSWER: A good status, and an error in the body or among the events of the stream.
        TRUNCATED: The answer ended well formed and before its last event.
        EMPTY_ANSWER: A good status and nothing, no choice or no token, in the body.
        WRONG_CONTENT: A good status and a body that no inference API answers with, such as HTML, or JSON
            without anything that was generated.
        OVERLOADED: 429.
        REFUSED: Any other 4xx or 501, by status or by the error in the stream: often the client's own fault.
        MISSING_MODEL: 404: the endpoint does not serve the model or adapter that it was asked for.
    """

    CONNECT_FAILURE = "connect_failure"
    CONNECT_TIMEOUT = "connect_timeout"
    RESET = "reset"
    SERVER_ERROR = "server_error"
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    STALLED = "stalled"
    ERROR_IN_ANSWER = "error_in_answer"
    TRUNCATED = "truncated"
    EMPTY_ANSWER = "empty_answer"
    WRONG_CONTENT = "wrong_content"
    OVERLOADED = "overloaded"
    REFUSED = "refused"
    MISSING_MODEL = "missing_model"


NEVER_ARRIVED: Final = frozenset({FailureKind.CONNECT_FAILURE, FailureKind.CONNECT_TIMEOUT})
"""Failures of the connection: no input is to blame for them, for none arrived."""


class NoFailure(StrEnum):
    """An ending that is no failure of anybody."""

    ANSWERED = "answered"
    UNKNOWN = "unknown"


Evidence = FailureKind | NoFailure

TRUNCATED: Final = "truncated"
"""In place of an error's words: the answer ended well formed and before its last event."""

EMPTY: Final = "empty"
"""Likewise: an answer without any choice, a stream without any token."""

UNLIKE: Final = "unlike"
"""Likewise: JSON that no API of `GENERATING` answers with; others may."""
