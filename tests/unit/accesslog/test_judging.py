"""What an ending says of its endpoint: an answer, whose fault, or nothing."""

from __future__ import annotations

from typing import Any

import pytest

from extproc.accesslog.answer_errors import error_seen
from extproc.health.judging import evidence_of
from extproc.values.evidence import Evidence, FailureKind, NoFailure
from extproc.values.outcomes import Ended


def judged(**changes: Any) -> Evidence:
    """The verdict of a good stream, but for these values."""
    good: dict[str, Any] = {
        "status": 200,
        "ended": Ended.COMPLETED,
        "flags": (),
        "details": "",
        "error": None,
        "content_type": "text/event-stream; charset=utf-8",
        "is_stream": True,
        "response_bytes": 500,
        "attempts": 1,
    }
    return evidence_of(**{**good, **changes})


SILENCE: dict[str, Any] = {
    "is_stream": False,
    "response_bytes": 0,
    "generates": False,
    "is_speech_to_text": True,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, NoFailure.ANSWERED),
        ({"content_type": None}, NoFailure.ANSWERED),
        ({"content_type": "application/json"}, NoFailure.ANSWERED),
        ({"is_stream": False, "content_type": "text/plain"}, FailureKind.WRONG_CONTENT),
        ({"is_stream": False, "content_type": "application/octet-stream"}, FailureKind.WRONG_CONTENT),
        ({"is_stream": False, "content_type": "text/xml"}, FailureKind.WRONG_CONTENT),
        ({"is_stream": False, "content_type": "image/png"}, FailureKind.WRONG_CONTENT),
        ({"is_stream": False, "content_type": "Application/JSON; charset=utf-8"}, NoFailure.ANSWERED),
        ({"is_stream": False, "content_type": "application/vnd.api+json"}, NoFailure.ANSWERED),
        ({"is_stream": False, "content_type": "application/x-ndjson"}, NoFailure.ANSWERED),
        ({"is_stream": False, "content_type": "text/event-stream"}, NoFailure.ANSWERED),
        ({"is_stream": False, "content_type": ""}, NoFailure.ANSWERED),
        (
            {"is_stream": False, "content_type": "application/octet-stream", "generates": False},
            NoFailure.ANSWERED,
        ),
        ({"is_stream": False, "content_type": "text/plain", "generates": False}, NoFailure.ANSWERED),
        ({**SILENCE, "content_type": "text/plain; charset=utf-8"}, NoFailure.ANSWERED),
        ({**SILENCE, "content_type": "application/x-subrip"}, NoFailure.ANSWERED),
        ({**SILENCE, "content_type": "text/plain", "response_bytes": len("ok")}, NoFailure.ANSWERED),
        ({**SILENCE, "content_type": "text/plain", "is_speech_to_text": False}, FailureKind.EMPTY_ANSWER),
        ({**SILENCE, "content_type": "application/json"}, FailureKind.EMPTY_ANSWER),
        ({**SILENCE, "content_type": None}, FailureKind.EMPTY_ANSWER),
        ({**SILENCE, "content_type": "text/html"}, FailureKind.EMPTY_ANSWER),
        ({**SILENCE, "content_type": "text/plain", "error": "empty"}, FailureKind.EMPTY_ANSWER),
        ({"is_stream": False, "response_bytes": 3}, NoFailure.ANSWERED),
        ({"is_stream": False, "response_bytes": len(b"{}")}, FailureKind.EMPTY_ANSWER),
        ({"attempts": 0}, NoFailure.UNKNOWN),
        ({"ended": Ended.REJECTED, "status": 429}, NoFailure.UNKNOWN),
        ({"status": 0}, NoFailure.UNKNOWN),
        ({"status": 304}, FailureKind.REFUSED),
        ({"status": 101}, FailureKind.REFUSED),
        ({"ended": Ended.CLIENT_ABORT, "flags": ("DC",)}, NoFailure.UNKNOWN),
        ({"ended": Ended.CLIENT_ABORT, "error": "truncated"}, NoFailure.UNKNOWN),
        ({"status": 302}, FailureKind.REFUSED),
        ({"ended": Ended.CLIENT_ABORT, "error": "empty"}, NoFailure.UNKNOWN),
        ({"error": "empty"}, FailureKind.EMPTY_ANSWER),
        ({"ended": Ended.CLIENT_ABORT, "error": "InternalServerError 500"}, FailureKind.ERROR_IN_ANSWER),
        ({"status": 503, "ended": Ended.UPSTREAM_ERROR, "flags": ("UF",)}, FailureKind.CONNECT_FAILURE),
        (
            {
                "status": 503,
                "ended": Ended.UPSTREAM_ERROR,
                "flags": ("UF", "URX"),
                "details": "upstream_reset_before_response_started{connection_timeout}",
            },
            FailureKind.CONNECT_TIMEOUT,
        ),
        ({"status": 504, "ended": Ended.TIMEOUT, "flags": ("UT",)}, FailureKind.FIRST_BYTE_TIMEOUT),
        ({"ended": Ended.TIMEOUT, "flags": ("SI",)}, FailureKind.STALLED),
        ({"status": 408, "ended": Ended.TIMEOUT, "flags": ("SI",)}, NoFailure.UNKNOWN),
        ({"ended": Ended.UPSTREAM_RESET}, FailureKind.RESET),
        ({"status": 503, "ended": Ended.UPSTREAM_ERROR, "flags": ("URX", "UC")}, FailureKind.RESET),
        ({"status": 500, "ended": Ended.UPSTREAM_ERROR}, FailureKind.SERVER_ERROR),
        ({"status": 501, "ended": Ended.UPSTREAM_ERROR}, FailureKind.REFUSED),
        ({"status": 429}, FailureKind.OVERLOADED),
        ({"status": 404}, FailureKind.MISSING_MODEL),
        ({"status": 400}, FailureKind.REFUSED),
        ({"status": 401}, FailureKind.REFUSED),
        ({"error": "InternalServerError 500"}, FailureKind.ERROR_IN_ANSWER),
        ({"error": "server_error"}, FailureKind.ERROR_IN_ANSWER),
        ({"error": "error"}, FailureKind.ERROR_IN_ANSWER),
        ({"error": "BadRequestError 400"}, FailureKind.REFUSED),
        ({"error": "invalid_request_error"}, FailureKind.REFUSED),
        ({"error": "unheard_of 413"}, FailureKind.REFUSED),
        ({"error": "overloaded_error"}, FailureKind.OVERLOADED),
        ({"error": "NotFoundError 404"}, FailureKind.MISSING_MODEL),
        ({"error": "truncated"}, FailureKind.TRUNCATED),
        ({"error": "abort"}, FailureKind.ERROR_IN_ANSWER),
        ({"error": "unlike"}, FailureKind.WRONG_CONTENT),
        ({"error": "unlike", "ended": Ended.CLIENT_ABORT}, NoFailure.UNKNOWN),
        ({"error": "unlike", "generates": False, "is_stream": False}, NoFailure.ANSWERED),
        ({"error": "unlike", "generates": False, "response_bytes": 2}, FailureKind.EMPTY_ANSWER),
        ({"error": "unlike", "generates": False, "status": 500}, FailureKind.SERVER_ERROR),
        ({"content_type": "text/event-stream,text/event-stream"}, NoFailure.ANSWERED),
        ({"content_type": "text/event-stream; a=b, text/plain"}, NoFailure.ANSWERED),
        ({"content_type": "text/html, text/event-stream"}, FailureKind.WRONG_CONTENT),
        ({"response_bytes": 0}, FailureKind.EMPTY_ANSWER),
        ({"response_bytes": len(b"data: [DONE]\n\n")}, FailureKind.EMPTY_ANSWER),
        ({"is_stream": False, "response_bytes": 0}, FailureKind.EMPTY_ANSWER),
        ({"content_type": "text/html"}, FailureKind.WRONG_CONTENT),
        ({"content_type": "text/plain"}, FailureKind.WRONG_CONTENT),
        ({"is_stream": False, "content_type": "TEXT/HTML; charset=utf-8"}, FailureKind.WRONG_CONTENT),
    ],
)
def test_an_ending_is_judged_by_its_strongest_sign(changes: dict[str, Any], expected: Evidence) -> None:
    """Success means an answer; a failure differs from a client's own, and both from knowing nothing."""
    assert judged(**changes) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"event": "message_stop"}, None),
        ({"event": "message_delta"}, None),
        ({"event": "chat.completion.chunk"}, "truncated"),
        ({"event": "text_completion"}, "truncated"),
        ({"event": "none"}, "empty"),
        ({"event": "unlike"}, "unlike"),
        ({"event": "unlike", "code": "500"}, "500"),
        ({"event": None}, None),
        ({"event": "response.completed"}, None),
        ({"event": "response.incomplete"}, None),
        ({"event": "response.failed"}, "error"),
        ({"event": "error"}, "error"),
        ({"event": "content_block_delta"}, "truncated"),
        ({"event": "error", "type": "api_error"}, "api_error"),
        ({"event": "error", "event_code": "server_error"}, "server_error"),
        ({"event": "response.in_progress"}, "truncated"),
        ({"event": "an engine's own"}, None),
        ({"event_code": 0.0}, None),
        ({"type": "InternalServerError", "code": 500.0}, "InternalServerError 500"),
        ({"code": "server_error", "event": "response.failed"}, "server_error"),
        ({"type": None, "code": None}, "error"),
        ({"seen": "1"}, "error"),
        ({"type": "the prompt was: hello\nworld"}, "error"),
        ({"type": "x" * 65}, "error"),
    ],
)
def test_an_error_is_named_in_words_safe_to_log(fields: dict[str, Any], expected: str | None) -> None:
    """Type and code are repeated if they are such; anything else an engine wrote there is not."""
    assert error_seen(fields) == expected
