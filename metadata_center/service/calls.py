"""A call of the metadata center as values: what is asked, what is answered, and every way to refuse.

Rules:
    1. Every answer but `/metrics`, `/openapi.json` and shares is the envelope
       `{"status","error","data","trace_id"}`. Success is HTTP 200; a failure's HTTP status is its code
       divided by 100,000, rounded down.
    2. What a caller can do wrong is a 4xx; 500 is a fault of ours. A failure names the field and what is
       accepted, and never quotes what was sent.

Source: AIGW's metadata center, `docs/en/api.md`, `pkg/utils/errors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import orjson

from metadata_center.errors import MetadataError
from metadata_center.sharing.http_messages import FRAMES_TYPE

MAX_BODY_BYTES: Final = 1 << 20
"""Holds the most hashes of a call (`fields.MAX_HASHES`), of 20 digits and a comma each, and the rest."""

TRACE_HEADER: Final = "X-Trace-ID"

JSON_TYPE: Final = "application/json; charset=utf-8"


class Code(IntEnum):
    """Failures on the wire. AIGW documents 40001400, 40101001 and 50001000; the others follow its rule."""

    INVALID_INPUT = 40001400
    UNAUTHENTICATED = 40101001
    FORBIDDEN = 40301400
    UNKNOWN_PATH = 40401400
    METHOD_NOT_ALLOWED = 40501400
    BODY_TOO_LARGE = 41301400
    TOO_MUCH = 42901400
    INTERNAL = 50001000

    @property
    def status(self) -> int:
        """HTTP status (Rule 1)."""
        return self // 100_000


MESSAGES: Final[Mapping[Code, str]] = {
    Code.INVALID_INPUT: "Invalid input parameters",
    Code.UNAUTHENTICATED: "Authentication failed",
    Code.FORBIDDEN: "Not for web pages",
    Code.UNKNOWN_PATH: "Unknown path",
    Code.METHOD_NOT_ALLOWED: "Method not allowed",
    Code.BODY_TOO_LARGE: "Request body too large",
    Code.TOO_MUCH: "Capacity reached",
    Code.INTERNAL: "Internal server error",
}


@dataclass(frozen=True, slots=True)
class ServiceRequest:
    """One HTTP request.

    Attributes:
        method: As sent, upper case.
        path: Undecoded, without the query.
        trace_id: Printable ASCII without spaces; echoed.
        query: Undecoded, without the question mark.
        body: At most `MAX_BODY_BYTES`.
        authorization: That header, or None.
        event_type: The `Event-Type` header, or None.
    """

    method: str
    path: str
    trace_id: str
    query: str = ""
    body: bytes = b""
    authorization: str | None = None
    event_type: str | None = None


@dataclass(frozen=True, slots=True)
class ServiceResponse:
    """One HTTP response.

    Attributes:
        status: HTTP status.
        body: Bytes of the body.
        headers: Content type included, length not.
        follows: The body goes on with every message that followers get.
    """

    status: int
    body: bytes
    headers: Mapping[str, str]
    follows: bool = False


class RefusedError(MetadataError):
    """A request that is refused.

    Args:
        code: Fixes the HTTP status and the message.
        reason: For the caller; one clause, nothing of the request quoted.
        detail: Completes the message after a colon, or None.
        headers: Further ones that the status calls for.
    """

    def __init__(
        self,
        code: Code,
        reason: str,
        *,
        detail: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.detail = detail
        self.headers = headers or {}

    def answer(self, trace_id: str) -> ServiceResponse:
        """The envelope that says so."""
        message = MESSAGES[self.code] + ("" if self.detail is None else f": {self.detail}")
        error = {"code": self.code, "message": message, "reason": self.reason}
        return envelope(self.code.status, "ERROR", error, None, trace_id, self.headers)


Handler = Callable[[ServiceRequest, float], ServiceResponse]
"""Answers a call at a monotonic time in seconds."""


def invalid(reason: str) -> RefusedError:
    """The refusal of a request whose input will not do."""
    return RefusedError(Code.INVALID_INPUT, reason, detail=reason)


def frames_of(request: ServiceRequest, frames: bytes, *, follows: bool = False) -> ServiceResponse:
    """An answer of frames, which goes on if `follows`."""
    headers = {"Content-Type": FRAMES_TYPE, TRACE_HEADER: request.trace_id}
    return ServiceResponse(200, frames, headers, follows)


def ok(request: ServiceRequest, data: object = None) -> ServiceResponse:
    """The envelope of a success."""
    return envelope(200, "OK", None, data, request.trace_id, {})


def envelope(
    status: int,
    outcome: str,
    error: Mapping[str, object] | None,
    data: object,
    trace_id: str,
    headers: Mapping[str, str],
) -> ServiceResponse:
    """The envelope that every answer in JSON comes in (Rule 1)."""
    body = orjson.dumps({"status": outcome, "error": error, "data": data, "trace_id": trace_id})
    return ServiceResponse(status, body, {"Content-Type": JSON_TYPE, TRACE_HEADER: trace_id, **headers})
