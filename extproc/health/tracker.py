"""Who may be chosen: one state machine per endpoint, fed by probes and by real traffic.

Rules:
    1. An endpoint is available iff it is configured, not draining and not ejected.
    2. Only a successful probe ends an ejection; after an ejection caused by traffic only once its
       time is over. Until then nothing is routed there: the probe is the half-open trial.
    3. What merely may be overload (`server_error`, `first_byte_timeout`) never ejects the last
       available endpoint of a cluster: answering slowly or with 503 beats not answering.
    4. An event that changes nothing returns None; one that changes a state returns the `Transition`.
    5. Memory is bounded by the endpoint set; events about other keys are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from extproc.health.settings import HealthSettings
from extproc.types import Endpoint
from metadata_center.types import EndpointKey


class HealthState(StrEnum):
    """What an endpoint is to the router; draining hides whether it is also ejected."""

    HEALTHY = "healthy"
    EJECTED = "ejected"
    DRAINING = "draining"


class FailureKind(StrEnum):
    """How an attempt of real traffic failed.

    Not listed because not a failure: 429 and a client that left.
    """

    CONNECT_FAILURE = "connect_failure"
    RESET = "reset"
    SERVER_ERROR = "server_error"
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"


_MAY_BE_OVERLOAD = frozenset({FailureKind.SERVER_ERROR, FailureKind.FIRST_BYTE_TIMEOUT})


@dataclass(frozen=True, slots=True)
class Transition:
    """One endpoint changed state.

    Attributes:
        reason: For logs and explain, one short phrase; never from a request.
    """

    key: EndpointKey
    before: HealthState
    after: HealthState
    reason: str


@dataclass(slots=True)
class _Record:
    """Private state of one endpoint; times are the caller's monotonic seconds.

    Attributes:
        probe_failures: Consecutive, 0 after a success.
        attempt_failures: Consecutive while healthy, at most `passive_threshold`.
        is_hard: Some failure of that run cannot be explained by overload.
        ejected: Cause while ejected, else None.
        ejected_until_s: Earliest recovery, meaningful while ejected.
        ejections_in_a_row: Ejections by traffic, each less than `max_ejection_s` after the last recovery.
        recovered_s: End of the last ejection, or None.
        next_probe_s: When to probe again; -inf before the first probe.
    """

    clusters: frozenset[str]
    draining: bool
    probe_failures: int = 0
    attempt_failures: int = 0
    is_hard: bool = False
    ejected: str | None = None
    ejected_until_s: float = 0.0
    ejections_in_a_row: int = 0
    recovered_s: float | None = None
    next_probe_s: float = float("-inf")

    @property
    def state(self) -> HealthState:
        if self.draining:
            return HealthState.DRAINING
        return HealthState.HEALTHY if self.ejected is None else HealthState.EJECTED


class HealthTracker:
    """Health of all endpoints. Not thread-safe; owned by one event loop.

    Args:
        settings: Thresholds and times; see `HealthSettings`.
    """

    def __init__(self, settings: HealthSettings) -> None:
        self.settings = settings
        self._records: dict[EndpointKey, _Record] = {}
        self._generation = 0

    @property
    def generation(self) -> int:
        """Grows whenever a state or the endpoint set changes, and only then."""
        return self._generation

    def set_endpoints(self, endpoints: Iterable[Endpoint]) -> tuple[Transition, ...]:
        """Replace the endpoint set; known endpoints keep their history, new ones count as healthy.

        A key listed by several clusters is one endpoint; it drains if any of them says so, because
        draining announces that the server goes away.

        Returns:
            Transitions of endpoints that stayed and started or stopped draining.
        """
        clusters: dict[EndpointKey, set[str]] = {}
        draining: set[EndpointKey] = set()
        for endpoint in endpoints:
            clusters.setdefault(endpoint.key, set()).add(endpoint.cluster)
            if endpoint.draining:
                draining.add(endpoint.key)
        before = {key: record.state for key, record in self._records.items()}
        for key, names in clusters.items():
            record = self._records.get(key)
            if record is None:
                self._records[key] = _Record(frozenset(names), key in draining)
            else:
                record.clusters, record.draining = frozenset(names), key in draining
        for key in before.keys() - clusters.keys():
            del self._records[key]
        after = {key: record.state for key, record in self._records.items()}
        if before != after:
            self._changed()
        return tuple(
            Transition(key, before[key], state, "draining set" if key in draining else "draining cleared")
            for key, state in after.items()
            if before.get(key, state) is not state
        )

    def probe_succeeded(self, key: EndpointKey, now_s: float) -> Transition | None:
        """A probe was answered with 2xx: ends an ejection whose time is over."""

        def apply(record: _Record) -> str:
            record.probe_failures = 0
            if record.ejected is not None and now_s >= record.ejected_until_s:
                record.ejected = None
                record.attempt_failures, record.is_hard = 0, False
                record.recovered_s = now_s
            self._schedule(record, now_s)
            return "probe succeeded"

        return self._apply(key, apply)

    def probe_failed(self, key: EndpointKey, now_s: float, detail: str) -> Transition | None:
        """A probe failed: `unhealthy_threshold` in a row eject until the next successful probe.

        `detail` is a short cause for `reason`, e.g. "status 503" or "timeout".
        """

        def apply(record: _Record) -> str:
            record.probe_failures = min(record.probe_failures + 1, self.settings.unhealthy_threshold)
            if record.ejected is None and record.probe_failures >= self.settings.unhealthy_threshold:
                record.ejected, record.ejected_until_s = f"probe failed: {detail}", now_s
            self._schedule(record, now_s)
            return record.ejected or detail

        return self._apply(key, apply)

    def engine_asleep(self, key: EndpointKey, now_s: float) -> Transition | None:
        """The engine answers probes but says it sleeps: ejected at once, until a successful probe.

        The caller must not report `probe_succeeded` while the engine sleeps.
        """

        def apply(record: _Record) -> str:
            if record.ejected is None:
                record.ejected, record.ejected_until_s = "engine is asleep", now_s
            self._schedule(record, now_s)
            return "engine is asleep"

        return self._apply(key, apply)

    def attempt_succeeded(self, key: EndpointKey, now_s: float) -> Transition | None:
        """Real traffic was answered: ends the run of failures of a healthy endpoint.

        While ejected it proves nothing about now (the request was sent earlier) and is ignored.
        """
        del now_s  # part of the shape of every event, not of this rule
        record = self._records.get(key)
        if record is not None and record.ejected is None:
            record.attempt_failures, record.is_hard = 0, False
        return None

    def attempt_failed(self, key: EndpointKey, kind: FailureKind, now_s: float) -> Transition | None:
        """Real traffic failed: a refused connection ejects at once, else `passive_threshold` in a row.

        The time out starts at `ejection_s` and doubles up to `max_ejection_s` for ejections in a
        row. Failures of an ejected endpoint are echoes of earlier requests and are ignored.
        """

        def apply(record: _Record) -> str:
            if record.ejected is not None:
                return record.ejected
            threshold = self.settings.passive_threshold
            record.attempt_failures = min(record.attempt_failures + 1, threshold)
            record.is_hard |= kind not in _MAY_BE_OVERLOAD
            if kind is FailureKind.CONNECT_FAILURE or (
                record.attempt_failures >= threshold and (record.is_hard or not self._is_last(key, record))
            ):
                self._eject_by_traffic(record, kind, now_s)
            return kind.value

        return self._apply(key, apply)

    def is_available(self, key: EndpointKey) -> bool:
        """True iff requests may be sent there."""
        record = self._records.get(key)
        return record is not None and record.state is HealthState.HEALTHY

    def state(self, key: EndpointKey) -> HealthState | None:
        """Current state, or None for a key that is not configured."""
        record = self._records.get(key)
        return None if record is None else record.state

    def reason(self, key: EndpointKey) -> str | None:
        """Why the endpoint may not be chosen, in a few words; None if it may."""
        record = self._records.get(key)
        if record is None:
            return "not configured"
        return "draining" if record.draining else record.ejected

    def next_probe_due(self, key: EndpointKey) -> float | None:
        """When to probe next, in the caller's seconds; -inf if never probed, None if not configured."""
        record = self._records.get(key)
        return None if record is None else record.next_probe_s

    def _apply(self, key: EndpointKey, event: Callable[[_Record], str]) -> Transition | None:
        """Run an event on a known record; `event` returns the reason of a change it may have made."""
        record = self._records.get(key)
        if record is None:
            return None
        before = record.state
        reason = event(record)
        if record.state is before:
            return None
        self._changed()
        return Transition(key, before, record.state, reason)

    def _eject_by_traffic(self, record: _Record, kind: FailureKind, now_s: float) -> None:
        limit_s = self.settings.max_ejection_s
        is_in_a_row = record.recovered_s is not None and now_s - record.recovered_s < limit_s
        record.ejections_in_a_row = record.ejections_in_a_row + 1 if is_in_a_row else 1
        # 2**30 s is past any limit; the bound keeps the float finite after a long row.
        doublings = min(record.ejections_in_a_row - 1, 30)
        record.ejected = f"traffic failed: {kind.value}"
        record.ejected_until_s = now_s + min(self.settings.ejection_s * 2**doublings, limit_s)
        # An earlier probe could not end the ejection, so it would only cost the engine work.
        record.next_probe_s = record.ejected_until_s

    def _schedule(self, record: _Record, now_s: float) -> None:
        if record.ejected is None:
            record.next_probe_s = now_s + self.settings.interval_s
        else:
            record.next_probe_s = max(now_s + self.settings.recovery_interval_s, record.ejected_until_s)

    def _is_last(self, key: EndpointKey, record: _Record) -> bool:
        """True if some cluster of this endpoint has no other available one. O(endpoints), rare."""
        covered = {
            name
            for other, peer in self._records.items()
            if other != key and peer.state is HealthState.HEALTHY
            for name in peer.clusters
        }
        return not record.clusters <= covered

    def _changed(self) -> None:
        self._generation += 1
