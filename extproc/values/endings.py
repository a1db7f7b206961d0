"""What happens to a request after it was sent to its endpoint, up to its end, whichever side reports it.

Rules:
    1. `RequestEnd` comes once for each request that a proxy finished, whatever the ending.
    2. `AttemptStarted` and `AttemptFailed` come for attempts worth reporting: retries and failures. A first
       attempt that went well is reported by its request's end.
    3. Events of one request may come in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from extproc.values.decisions import DecisionRecord
from extproc.values.evidence import Evidence, FailureKind, NoFailure
from extproc.values.inflight import Inflight
from extproc.values.outcomes import Ended, Outcome
from metadata_center.addresses import Address
from metadata_center.types import RequestId, value


@value
class RequestEnd:
    """One request is over.

    Attributes:
        request_id: Made by Envoy at the edge.
        owner: The worker that decided, or None if none did or its answer came too late.
        address: Where the last attempt went, or None if no attempt was made; the fleet knows the endpoint.
        attempts: Upstream attempts made.
        status: HTTP status the client saw; 0 if it left before any.
        ended: How.
        details: Envoy's `response_code_details`.
        flags: Envoy's short response flags.
        ttft_s: From sending to the engine to its first body byte, or None.
        duration_s: From first byte received to last byte sent.
        stream_s: From the first to the last body byte of the engine; None without usage.
        request_bytes: Body bytes received.
        response_bytes: Body bytes sent; None if nobody saw them.
        prompt_tokens: As the engine reported, or None; all of the prompt (`extproc.accesslog.usage`).
        completion_tokens: As the engine reported, or None.
        cached_tokens: As the engine reported, or None; a part of `prompt_tokens`.
        usage_unseen: Why Envoy did not look for usage ("encoded": the answer was compressed), or "".
        error: Type and code of an error seen in the body of the answer, see `error_seen`; None if none was.
        content_type: Of the answer, or None if it is not known.
    """

    request_id: RequestId
    owner: str | None
    address: Address | None
    attempts: int
    status: int
    ended: Ended
    details: str
    flags: tuple[str, ...]
    ttft_s: float | None
    duration_s: float
    stream_s: float | None
    request_bytes: int
    response_bytes: int | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    usage_unseen: str = ""
    error: str | None = None
    content_type: str | None = None


@dataclass(frozen=True, slots=True)
class RequestAlive:
    """A long request still runs."""

    request_id: RequestId
    owner: str | None


@dataclass(frozen=True, slots=True)
class AttemptStarted:
    """A further attempt was dispatched to `address`."""

    request_id: RequestId
    owner: str | None
    address: Address


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """An attempt at `address` failed."""

    request_id: RequestId
    owner: str | None
    address: Address
    kind: FailureKind


RequestEvent = RequestEnd | RequestAlive | AttemptStarted | AttemptFailed


@value
class Ending:
    """One request is over; for all listeners that make something of it.

    Attributes:
        record: Its decision, or its refusal.
        outcome: What became of it; its token counts are within what the request and its engine allow.
        now_s: Monotonic time at which it was reported.
        request: What was remembered of it; None if it was refused before it was sent. No code changes it any
            more except the owner that records its prompt as cached.
        evidence: What the ending says of `request.endpoint`.
        row: The candidate row of `request.endpoint`; None if it was no candidate.
        stream_s: From the first token to the last byte of the engine's answer; None if that is not known.
        usage_unseen: Why usage was not looked for, or "".
        retried_s: From the decision to the attempt that was answered: what earlier ones took; 0 if not known.
    """

    record: DecisionRecord
    outcome: Outcome
    now_s: float
    request: Inflight | None = None
    evidence: Evidence = NoFailure.UNKNOWN
    row: int | None = None
    stream_s: float | None = None
    usage_unseen: str = ""
    retried_s: float = 0.0

    @property
    def choice_tokens(self) -> int | None:
        """Output tokens of one of its choices, of several the mean; None if they are not known."""
        tokens, request = self.outcome.completion_tokens, self.request
        return tokens if tokens is None or request is None else tokens // request.choices

    @property
    def tpot_s(self) -> float | None:
        """Mean time between the output tokens of a choice after the first; None if that is not known."""
        tokens = self.choice_tokens
        return None if tokens is None or tokens <= 1 or not self.stream_s else self.stream_s / (tokens - 1)

    @property
    def is_answered(self) -> bool:
        """The client has its whole answer, of status 200: what can be learned from."""
        return self.evidence is NoFailure.ANSWERED and self.outcome.status == 200


EndingListener = Callable[[Ending], None]
"""Gets each ending once. It changes what it owns and nothing else, so that their order says nothing."""
