"""How an answer may fail its client; what that says of the endpoint is `tracker`'s judgement."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class FailureKind(StrEnum):
    """How an attempt of real traffic failed; a metric label. A client that left is no failure.

    Attributes:
        CONNECT_FAILURE: Nobody listens there, or does not answer a SYN; the request never arrived.
        RESET: The connection broke after the request was sent, before or within the answer.
        SERVER_ERROR: A status of 500 or more.
        FIRST_BYTE_TIMEOUT: No response headers in time.
        STALLED: The answer began and then stood still until Envoy gave up.
        ERROR_IN_ANSWER: A good status, and an error in the body or among the events of the stream.
        TRUNCATED: The answer ended well formed and before its last event.
        EMPTY_ANSWER: A good status and nothing, or no token, in the body.
        WRONG_CONTENT: A good status and a body that no inference API answers with, such as HTML.
        OVERLOADED: 429.
        REFUSED: Any other 4xx or 501, by status or by the error in the stream: often the client's own fault.
        MISSING_MODEL: 404: the endpoint does not serve the model or adapter that it was asked for.
    """

    CONNECT_FAILURE = "connect_failure"
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


MAY_BE_THE_CLIENTS: Final = frozenset({FailureKind.REFUSED, FailureKind.OVERLOADED})
"""What a client can cause at will, with a bad request or with many; it weighs half."""

MAY_BE_POISON: Final = frozenset({FailureKind.RESET, FailureKind.SERVER_ERROR, FailureKind.ERROR_IN_ANSWER})
"""How an engine answers an input that it cannot bear: it dies, or it fails."""
