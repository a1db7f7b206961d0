"""What became of a request, in the words of logs, metrics and explain."""

from __future__ import annotations

from enum import StrEnum

from metadata_center.types import EndpointKey, value


class Ended(StrEnum):
    """How a request ended; a metric label, a log value and an explain field at once."""

    COMPLETED = "completed"
    CLIENT_ABORT = "client_abort"
    UPSTREAM_ERROR = "upstream_error"
    UPSTREAM_RESET = "upstream_reset"
    TIMEOUT = "timeout"
    REJECTED = "rejected"
    LEASE_EXPIRED = "lease_expired"


@value
class Outcome:
    """What became of one request, as Envoy and the engine reported it.

    Attributes:
        ended: How it ended.
        duration_s: From Envoy's first byte of the request to its last byte of the answer.
        endpoint: The endpoint that answered, after any retries; None if none did.
        attempts: Upstream attempts, 0 for a rejected request.
        status: HTTP status the client saw, None if it saw none.
        ttft_s: Until the first response byte; None unless the answer was streamed, because only
            then is the first byte the first token.
        prompt_tokens: As the engine counted; None if it reported no usage.
        completion_tokens: As the engine counted, or None.
        cached_tokens: Prompt tokens the engine took from its prefix cache, or None.
        request_bytes: Received from the client.
        response_bytes: Sent to the client.
        predicted_ttft_s: What the decision expected of `endpoint`, or None.
        predicted_cached_tokens: What the decision expected `endpoint` to have cached, or None.
        response_flags: Envoy's short flags (`UC`, `DC`, ...).
        details: Envoy's `response_code_details`.
    """

    ended: Ended
    duration_s: float
    endpoint: EndpointKey | None = None
    attempts: int = 0
    status: int | None = None
    ttft_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    request_bytes: int = 0
    response_bytes: int = 0
    predicted_ttft_s: float | None = None
    predicted_cached_tokens: int | None = None
    response_flags: tuple[str, ...] = ()
    details: str = ""
