"""Which endpoint failed, as endings and failed attempts show it: a listener of both.

Rules:
    1. Evidence counts per request and once, however many attempts there were: what an endpoint fails at and
       another one answers speaks against the endpoint, what several fail at against the request.
    2. Only a refused connection speaks at once: the request never arrived there. Nor did it where none was
       made in time, which speaks against that endpoint whatever became of the request.
    3. A request that ended before all its failed attempts were reported is settled when the last one is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from extproc.health.failures import MAY_BE_POISON
from extproc.health.poison import Poison
from extproc.health.states import Transition
from extproc.health.tracker import HealthTracker
from extproc.values.endings import AttemptFailed, Ending
from extproc.values.evidence import NEVER_ARRIVED, Evidence, FailureKind, NoFailure
from extproc.values.inflight import Inflight
from metadata_center.types import EndpointKey, RequestId

MAX_UNSETTLED: Final = 1024
"""Ended requests whose failed attempts are still to come; the two come within `buffer_flush_interval`
(10 ms) of each other, so this is enough for 100,000 fallbacks a second."""

_ABOUT_WHAT_IS_NAMED: Final = frozenset((FailureKind.REFUSED, FailureKind.MISSING_MODEL))
"""Failures that a stored response may be the cause of: it is not there, or does not go with the rest."""


@dataclass(frozen=True, slots=True)
class _Unsettled:
    """A request that ended before all its failed attempts were reported.

    Attributes:
        request: What was remembered of it.
        evidence: Of its end.
        known: Failures reported so far.
        missing: Endpoints whose failures are not.
    """

    request: Inflight
    evidence: Evidence
    known: dict[EndpointKey, FailureKind]
    missing: set[EndpointKey]


class HealthEvidence:
    """Reports to the health tracker which endpoints failed, and which answered.

    Args:
        health: Which endpoints may be chosen.
        poison: Requests that several endpoints failed at.
        on_failure: Called with each failure that counts: where, and how.
        on_poison: Called when one more request is known as poison.
        on_transition: Called when an endpoint's health changed.
    """

    def __init__(
        self,
        health: HealthTracker,
        poison: Poison,
        on_failure: Callable[[EndpointKey, FailureKind], None],
        on_poison: Callable[[], None],
        on_transition: Callable[[Transition], None],
    ) -> None:
        self._health = health
        self._poison = poison
        self._on_failure = on_failure
        self._on_poison = on_poison
        self._on_transition = on_transition
        self._unsettled: OrderedDict[RequestId, _Unsettled] = OrderedDict()

    def attempt_failed(
        self, failed: AttemptFailed, endpoint: EndpointKey, request: Inflight | None, now_s: float
    ) -> None:
        """An attempt failed.

        Args:
            failed: What, and how.
            endpoint: Where.
            request: Whose it was; None if that has ended.
            now_s: Monotonic time.
        """
        kind = failed.kind
        if kind is FailureKind.CONNECT_FAILURE:
            self._on_failure(endpoint, kind)
            model = "" if request is None else request.served_model
            self._changed(self._health.attempt_failed(endpoint, kind, now_s, model))
        if request is not None:
            if request.failed is None:
                request.failed = {}
            request.failed[endpoint] = kind
            return
        unsettled = self._unsettled.get(failed.request_id)
        if unsettled is not None and endpoint in unsettled.missing:
            unsettled.missing.remove(endpoint)
            unsettled.known[endpoint] = kind
            if not unsettled.missing:
                del self._unsettled[failed.request_id]
                self._settle(unsettled.request, unsettled.evidence, unsettled.known, now_s)

    def ended(self, ending: Ending) -> None:
        """Report the endpoints that failed, now or when all is known."""
        request, evidence, attempts = ending.request, ending.evidence, ending.outcome.attempts
        if request is None:
            return
        if attempts <= 1:
            known = {request.endpoint: evidence} if isinstance(evidence, FailureKind) else {}
            self._settle(request, evidence, known, ending.now_s)
            return
        known = dict(request.failed or {})
        known.pop(request.endpoint, None)
        record = request.record
        missing: set[EndpointKey] = set()
        if record.choice is not None and record.snapshot is not None and record.placed is None:
            tried = record.choice.order[: attempts - 1]
            missing = {record.snapshot.keys[row] for row in tried} - known.keys() - {request.endpoint}
        if isinstance(evidence, FailureKind):
            known[request.endpoint] = evidence
        if not missing:
            self._settle(request, evidence, known, ending.now_s)
            return
        if len(self._unsettled) >= MAX_UNSETTLED:
            self._unsettled.popitem(last=False)
        self._unsettled[record.request_id] = _Unsettled(request, evidence, known, missing)

    def _settle(
        self, request: Inflight, evidence: Evidence, failed: Mapping[EndpointKey, FailureKind], now_s: float
    ) -> None:
        """One request's evidence.

        Args:
            request: What was remembered of it.
            evidence: Of its last attempt, at `request.endpoint`.
            failed: All endpoints that failed at it, and how.
            now_s: The time.
        """
        model, health, endpoint = request.served_model, self._health, request.endpoint
        for key, kind in failed.items():
            if kind is FailureKind.CONNECT_TIMEOUT:
                self._on_failure(key, kind)
                self._changed(health.attempt_failed(key, kind, now_s, model))
        if evidence is NoFailure.ANSWERED:
            if failed or len(self._poison):
                # An endpoint that failed at what another one answers is to blame, now or for an earlier time.
                blamed = {**self._poison.answered(request.fingerprint, now_s), **failed}
                for key in blamed.keys() - failed.keys() - {endpoint}:
                    self._changed(health.attempt_failed(key, blamed[key], now_s, model))
            self._changed(health.attempt_succeeded(endpoint, now_s, model))
        elif evidence is NoFailure.UNKNOWN and request.first_token_s is None:
            health.undecided(endpoint, model, now_s)
            return  # it is not known whether another one would have answered what these failed at
        if not failed:
            return
        counting = {key: kind for key, kind in failed.items() if kind not in NEVER_ARRIVED}
        for key, kind in counting.items():
            self._on_failure(key, kind)
        if isinstance(evidence, FailureKind):
            self._failed_for_good(request, counting, now_s)
            return
        for key, kind in counting.items():
            self._changed(health.attempt_failed(key, kind, now_s, model))

    def _failed_for_good(
        self, request: Inflight, failed: Mapping[EndpointKey, FailureKind], now_s: float
    ) -> None:
        """A request whose client got a failure; `failed` are the endpoints that it reached."""
        model, health = request.served_model, self._health
        is_pinned = request.record.holder is not None
        if request.builds_on and (is_pinned or _ABOUT_WHAT_IS_NAMED.issuperset(failed.values())):
            # Clients can name any response, and by one that is theirs they choose the endpoint: no peer is
            # asked the same, so this shows nothing that other requests do not show better.
            for key in failed:
                health.undecided(key, model, now_s)
            return
        suspicious = {key: kind for key, kind in failed.items() if kind in MAY_BE_POISON}
        if suspicious:
            excused = self._poison.failed(request.fingerprint, suspicious, now_s)
            if excused is not None:
                self._on_poison()
                for key, kind in excused.items():
                    health.retract(key, kind, now_s, model)
        else:
            excused = None
        if excused is not None or len(failed) > 1:
            for key in failed:
                health.undecided(key, model, now_s)
            return
        for key, kind in failed.items():
            self._changed(health.attempt_failed(key, kind, now_s, model))

    def _changed(self, transitions: Iterable[Transition]) -> None:
        for transition in transitions:
            self._on_transition(transition)
