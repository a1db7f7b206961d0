"""The ends of decided requests: taken from whichever side, released once, and passed to all listeners.

Rules:
    1. A request ends once: by the end that a proxy reports, by its lease, or by its refusal. News of it that
       comes afterwards finds nothing to release and reaches no listener.
    2. It is released before any listener is called, so that no listener's fault holds a charge.
    3. A listener that fails is reported and keeps no other from being called.
    4. What an ending means is said here, by its values; what becomes of it is each listener's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from extproc.choosing.foreseen import foreseen_ttft_s
from extproc.discovery.fleet import Fleet
from extproc.health.judging import evidence_of
from extproc.routing.possible import possible
from extproc.routing.running import RunningRequests
from extproc.values.decisions import DecisionRecord
from extproc.values.endings import (
    AttemptFailed,
    AttemptStarted,
    Ending,
    EndingListener,
    RequestAlive,
    RequestEnd,
    RequestEvent,
)
from extproc.values.evidence import FailureKind, NoFailure
from extproc.values.inflight import Inflight
from extproc.values.outcomes import Ended, Outcome
from extproc.values.requests import GENERATING, SPEECH_TO_TEXT, Operation
from metadata_center.addresses import Address
from metadata_center.types import EndpointKey

AttemptListener = Callable[[AttemptFailed, EndpointKey, Inflight | None, float], None]
"""Gets each failed attempt, where it was sent, its request unless that has ended, and the time."""


class Endings:
    """Takes what is reported of requests that this worker decided.

    Args:
        running: The requests.
        fleet: Knows which endpoint is at an address.
        kv_tokens: Sizes of KV caches, as far as they are known.
        on_unmatched: Called for an end that says it is of a request decided here, and of none that is known.
        listeners: Called with each ending.
        attempt_listeners: Called with each failed attempt.
        on_fault: Called with each exception that a listener raised.
    """

    def __init__(
        self,
        running: RunningRequests,
        fleet: Fleet,
        kv_tokens: Mapping[EndpointKey, int],
        on_unmatched: Callable[[], None],
        listeners: Sequence[EndingListener],
        attempt_listeners: Sequence[AttemptListener],
        on_fault: Callable[[Exception], None],
    ) -> None:
        self._running = running
        self._fleet = fleet
        self._kv_tokens = kv_tokens
        self._on_unmatched = on_unmatched
        self._listeners = tuple(listeners)
        self._attempt_listeners = tuple(attempt_listeners)
        self._on_fault = on_fault

    def take(self, event: RequestEvent, now_s: float) -> None:
        """Something is reported of a request, which may be none of ours."""
        match event:
            case RequestEnd():
                self._ended(event, now_s)
            case AttemptStarted():
                request = self._running.get(event.request_id)
                if request is not None:
                    self._running.moved(event.request_id, self._at(event.address, request), now_s)
            case AttemptFailed():
                request = self._running.get(event.request_id)
                endpoint = self._at(event.address, request)
                for listener in self._attempt_listeners:
                    listener(event, endpoint, request, now_s)
            case RequestAlive():
                self._running.alive(event.request_id, now_s)

    def lost(self, request: Inflight, now_s: float) -> None:
        """The lease of a request expired, and it was released: no end of it was reported in time."""
        outcome = Outcome(
            ended=Ended.LEASE_EXPIRED,
            duration_s=now_s - request.decided_s,
            endpoint=request.endpoint,
            details="no end was reported in time",
        )
        self._notify(Ending(request.record, outcome, now_s, request))

    def refused(self, record: DecisionRecord, outcome: Outcome, now_s: float) -> None:
        """A request was refused before it was sent anywhere: nothing was charged."""
        record.outcome = outcome
        self._notify(Ending(record, outcome, now_s))

    def _notify(self, ending: Ending) -> None:
        for listener in self._listeners:
            try:
                listener(ending)
            except Exception as error:
                self._on_fault(error)

    def _at(self, address: Address, request: Inflight | None) -> EndpointKey:
        """Which endpoint an attempt at an address was sent to."""
        fleet = self._fleet
        if request is None:
            return fleet.at(address)
        if fleet.address(request.endpoint) == address:
            return request.endpoint
        record = request.record
        expected = [request.endpoint]
        if record.choice is not None and record.snapshot is not None:
            expected += [record.snapshot.keys[row] for row in record.choice.order]
        return fleet.at(address, expected)

    def _ended(self, end: RequestEnd, now_s: float) -> None:
        request = self._running.release(end.request_id, now_s)
        if request is None:
            if end.owner is not None:
                self._on_unmatched()
            return
        record, is_answered = request.record, False
        try:
            evidence = evidence_of(
                status=end.status,
                ended=end.ended,
                flags=end.flags,
                details=end.details,
                error=end.error,
                content_type=end.content_type,
                is_stream=record.stream,
                response_bytes=end.response_bytes,
                attempts=end.attempts,
                generates=record.operation in GENERATING,
                is_speech_to_text=record.operation in SPEECH_TO_TEXT,
            )
            is_answered = evidence is NoFailure.ANSWERED and end.status == 200
        finally:
            self._running.finish(end.request_id, now_s, completed=is_answered)
        if end.address is not None:
            request.endpoint = self._at(end.address, request)
        row = record.row(request.endpoint)
        ended = end.ended
        if ended is Ended.COMPLETED and end.status < 400 and isinstance(evidence, FailureKind):
            ended = Ended.UPSTREAM_ERROR
        ttft_s = _ttft_s(request, end) if is_answered and record.stream else None
        outcome = self._outcome(request, end, ended, row, ttft_s)
        stream_s, retried_s = _times(request, end)
        self._notify(
            Ending(record, outcome, now_s, request, evidence, row, stream_s, end.usage_unseen, retried_s)
        )

    def _outcome(
        self, request: Inflight, end: RequestEnd, ended: Ended, row: int | None, ttft_s: float | None
    ) -> Outcome:
        record, endpoint = request.record, request.endpoint
        prompt, completion, cached = possible(end, request, self._kv_tokens.get(endpoint, 0))
        return Outcome(
            ended,
            end.duration_s,
            endpoint if end.attempts else None,
            end.attempts,
            end.status or None,
            ttft_s,
            prompt,
            completion,
            cached,
            end.request_bytes,
            end.response_bytes or 0,
            None if row is None else _foreseen_ttft_s(request, row),
            None if row is None else record.cached_tokens[row],
            end.flags,
            end.details,
        )


def _foreseen_ttft_s(request: Inflight, row: int) -> float | None:
    """What the decision expected of candidate `row`: as it said itself, or as its record says."""
    foreseen = request.foreseen
    return (
        foreseen[1] if foreseen is not None and foreseen[0] == row else foreseen_ttft_s(request.record, row)
    )


def _ttft_s(request: Inflight, end: RequestEnd) -> float | None:
    """From sending to the engine to its first token: as Envoy saw it, unless other bytes came first."""
    if _begins_unseen(request):
        return None
    if request.first_byte_is_token or request.first_token_s is None:
        return end.ttft_s
    return request.first_token_s - request.decided_s


def _begins_unseen(request: Inflight) -> bool:
    """Nobody saw its first token (`signals.first_chunk` is off), and the first byte says nothing of it.

    A stream of the Responses API begins with `response.created`, before anything is computed.
    """
    record = request.record
    return request.first_token_s is None and record.stream and record.operation is Operation.RESPONSES


def _times(request: Inflight, end: RequestEnd) -> tuple[float | None, float]:
    """From the first token to the last byte, None if that is not known; and what earlier attempts took.

    Envoy's times are of the attempt that was answered, from its first byte, which may come long before
    a token.
    """
    if request.first_token_s is None or end.ttft_s is None:
        return None if _begins_unseen(request) else end.stream_s, 0.0
    later_s = max(0.0, request.first_token_s - request.decided_s - end.ttft_s)
    if request.first_byte_is_token:
        return end.stream_s, later_s if end.attempts > 1 else 0.0
    if end.attempts > 1 or end.stream_s is None:
        return None, 0.0
    return max(0.0, end.stream_s - later_s), 0.0
