"""Which endpoints may be chosen: one state machine per endpoint, fed by probes and by real traffic.

Rules:
    1. An endpoint is available iff it is listed, ready by its source's word, not draining and not ejected.
    2. Only a successful probe ends an ejection; after an ejection caused by traffic only once its time is
       over. What merely timed out when probed is back at once when real traffic has its answer from there.
    3. No ejection takes a cluster below its floor (`min_available_ratio`, one at least). Only refused
       connections and engines that say they sleep do; if they take it below, others that are ejected come
       back, the earliest due first.
    4. An available endpoint whose failures exceed those of its peers, for a model, is *doubted* for it: it is
       left out of the choice while others are not, but for one request at a time on trial, whose success
       speaks for it. That sends the traffic to the peers, and so separates its fault from the request's.
    5. A doubted endpoint is ejected when its failures reach `passive_threshold` in a row, nothing else it was
       asked succeeded meanwhile, and a peer answered: it is alone in failing.
    6. What every peer fails at is no endpoint's fault: it doubts none for long and ejects none.
    7. A model that an endpoint does not have is missed there: doubted for longer, never ejected for.
    8. An event that changes no state returns no `Transition`; doubts are not states.
    9. Memory is bounded by the endpoints times `MAX_MODELS`; events about other keys are ignored.

One failure is one request's, never one attempt's: the caller settles that (`health.evidence`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

from extproc.health.doubts import Doubts
from extproc.health.floors import Floors
from extproc.health.levels import FAST, TRIAL_LEASE_S
from extproc.health.records import ROUNDING, Record, Records
from extproc.health.settings import HealthSettings
from extproc.health.states import (
    BELOW_THE_FLOOR,
    Cause,
    HealthState,
    ProbeFailure,
    Transition,
    Transitions,
)
from extproc.values.endpoints import Endpoint
from extproc.values.evidence import FailureKind
from metadata_center.types import EndpointKey

_MOST_PATIENCE: Final = 3
"""Doublings of a probe's time-out."""


class HealthTracker:
    """Health of all endpoints. Not thread-safe; owned by one event loop.

    Args:
        settings: Thresholds and times; see `HealthSettings`.
    """

    def __init__(self, settings: HealthSettings) -> None:
        self._settings = settings
        self._records = Records()
        self._doubts = Doubts(self._records)
        self._floors = Floors(self._records, settings.min_available_ratio)

    def configure(self, settings: HealthSettings) -> None:
        """Go by these from now on; what was counted so far keeps counting.

        Models that were missed are asked for again: their names may be others.
        """
        self._settings = settings
        self._floors.configure(settings.min_available_ratio)
        for key in self._records.by_key:
            self._doubts.forget_misses(key)

    @property
    def generation(self) -> int:
        """Grows whenever a state, a doubt or an endpoint changes, and only then."""
        return self._records.generation

    @property
    def withheld(self) -> int:
        """Ejections that the floor prevented."""
        return self._floors.withheld

    def generation_of(self, cluster: str) -> int:
        """`generation` when something of that cluster changed last; the latest for one without endpoints."""
        return self._records.generation_of(cluster)

    def update(self, changed: Mapping[EndpointKey, Collection[Endpoint]], now_s: float = 0.0) -> Transitions:
        """Endpoints came, changed or left; those that stay keep their history, new ones count as healthy.

        Args:
            changed: What each of them is now, once per cluster that it serves; nothing if it left. It drains,
                or is not ready, if any of its clusters says so: both are said of the server as a whole.
            now_s: Monotonic time.

        Returns:
            Transitions of those that their sources withdrew or gave back, and of those that the floor brings
            back.
        """
        records = self._records
        touched: dict[str, None] = {}
        changes: list[Transition] = []
        for key, endpoints in changed.items():
            record = records.by_key.get(key)
            if record is not None:
                touched.update(dict.fromkeys(record.clusters))
            if not endpoints:
                if record is not None:
                    for model in list(record.levels):
                        self._doubts.trust(key, model)
                    records.remove(key)
                continue
            clusters = frozenset(endpoint.cluster for endpoint in endpoints)
            draining = any(endpoint.draining for endpoint in endpoints)
            touched.update(dict.fromkeys(clusters))
            before = None if record is None else record.state
            ready = all(endpoint.ready for endpoint in endpoints)
            state = records.place(key, clusters, draining=draining, ready=ready).state
            self._doubts.forget_misses(key)
            if before is not None and state is not before:
                changes.append(Transition(key, before, state, _said_by_source(before, state)))
        records.changed(touched)
        changes += self._floors.hold([cluster for cluster in touched if cluster in records.members], now_s)
        return tuple(changes)

    def reconsider(self, clusters: Iterable[str]) -> None:
        """What requests see of these clusters is another: pools are made anew."""
        self._records.changed(clusters)

    # Probes.

    def probe_succeeded(self, key: EndpointKey, now_s: float, took_s: float = 0.0) -> Transitions:
        """A probe was answered with 2xx after `took_s`: ends an ejection whose time is over."""
        record = self._records.by_key.get(key)
        if record is None:
            return ()
        before = record.state
        record.probe_failures = 0
        if took_s <= self._settings.timeout_s:
            record.patience = 0
        if record.ejected is not None and now_s >= record.ejected_until_s:
            record.readmit(now_s)
        self._schedule(record, now_s)
        return self._transitions(key, record, before, "probe succeeded", now_s)

    def probe_failed(
        self, key: EndpointKey, now_s: float, detail: str, how: ProbeFailure = ProbeFailure.OTHER
    ) -> Transitions:
        """A probe failed: `unhealthy_threshold` in a row eject until the next successful probe.

        A time-out is not counted where real traffic had bytes from there since about the last probe: busy
        engines answer both from one event loop. `detail` is a short cause for `reason`, e.g. "status 503".
        """
        record = self._records.by_key.get(key)
        if record is None:
            return ()
        before = record.state
        limit = self._settings.unhealthy_threshold
        is_slow = how is ProbeFailure.TIMEOUT
        if is_slow:
            recent_s = self._settings.interval_s + self.probe_timeout_s(key)
            record.patience = min(record.patience + 1, _MOST_PATIENCE)
            answers = record.alive_s is not None and now_s - record.alive_s <= recent_s
        else:
            answers = False
        if not answers:
            record.probe_failures = min(record.probe_failures + 1, limit)
        if record.probe_failures >= limit and not answers:
            if how is ProbeFailure.REFUSED:
                cause = Cause.GONE
            else:
                cause = Cause.SLOW_PROBES if is_slow else Cause.PROBES
            if record.ejected is None:
                if cause in BELOW_THE_FLOOR or self._floors.may_go(record):
                    record.eject(cause, f"probe failed: {detail}", now_s)
            elif cause is Cause.GONE:  # what kept it in reach of the floor is over
                record.cause, record.ejected = cause, f"probe failed: {detail}"
        self._schedule(record, now_s)
        return self._transitions(key, record, before, record.ejected or detail, now_s)

    def engine_asleep(self, key: EndpointKey, now_s: float) -> Transitions:
        """The engine answers probes but says it sleeps: ejected at once, until a successful probe.

        The caller must not report `probe_succeeded` while the engine sleeps.
        """
        record = self._records.by_key.get(key)
        if record is None:
            return ()
        before = record.state
        if record.ejected is None:
            record.eject(Cause.ASLEEP, "engine is asleep", now_s)
        else:
            record.cause, record.ejected = Cause.ASLEEP, "engine is asleep"
        self._schedule(record, now_s)
        return self._transitions(key, record, before, "engine is asleep", now_s)

    def next_probe_due(self, key: EndpointKey) -> float | None:
        """When to probe next, in the caller's seconds; -inf if never probed, None if not configured."""
        record = self._records.by_key.get(key)
        return None if record is None else record.next_probe_s

    def probe_timeout_s(self, key: EndpointKey) -> float:
        """How long the next probe may take: longer after each that timed out, which may be slow, not gone."""
        record = self._records.by_key.get(key)
        return self._settings.timeout_s * (1 if record is None else 1 << record.patience)

    # Real traffic.

    def alive(self, key: EndpointKey, model: str, now_s: float) -> Transitions:
        """A first token came: the engine runs, whatever its probes say; one on trial may have company."""
        record = self._records.by_key.get(key)
        if record is None:
            return ()
        record.alive_s = now_s
        level = record.levels.get(model)
        if level is not None and level.trial_until_s:
            level.pass_trial(now_s)
        return self._alive(key, record, now_s)

    def attempt_succeeded(self, key: EndpointKey, now_s: float, model: str = "") -> Transitions:
        """A request was answered. What timed out when probed is back with it; other ejections stay."""
        record = self._records.by_key.get(key)
        if record is None:
            return ()
        record.alive_s = now_s
        self._doubts.level(key, record, model, now_s).succeeded(now_s)
        if model in self._doubts.by_model:
            self._doubts.review(key, record, model, now_s)
        return self._alive(key, record, now_s)

    def attempt_failed(
        self, key: EndpointKey, kind: FailureKind, now_s: float, model: str = ""
    ) -> Transitions:
        """A request failed there and, as far as is known, nowhere else; see Rules 4 to 7.

        A refused connection ejects at once. The time out starts at `ejection_s` and doubles up to
        `max_ejection_s` for ejections in a row. Failures of an ejected endpoint are echoes of earlier
        requests and are ignored.
        """
        record = self._records.by_key.get(key)
        if record is None or (record.ejected is not None and record.cause is not Cause.SLOW_PROBES):
            return ()
        before = record.state
        if kind is FailureKind.CONNECT_FAILURE:
            self._doubts.forget_misses(key)  # what listens there next may be another engine
            self._eject_by_traffic(record, Cause.GONE, kind, now_s)
            return self._transitions(key, record, before, kind.value, now_s)
        level = self._doubts.level(key, record, model, now_s)
        if kind is FailureKind.MISSING_MODEL:
            self._doubts.missed(key, level, model, now_s)
            return ()
        level.failed(kind, now_s)
        self._doubts.review(key, record, model, now_s, kind)
        if level.doubted is None or record.ejected is not None:
            return ()
        enough = 1.0 - (1.0 - FAST) ** self._settings.passive_threshold - ROUNDING
        if level.fast >= enough and self._doubts.is_alone(key, record, level, model, now_s):
            if self._floors.may_go(record):
                self._eject_by_traffic(record, Cause.TRAFFIC, kind, now_s)
            return self._transitions(key, record, before, kind.value, now_s)
        return ()

    def retract(self, key: EndpointKey, kind: FailureKind, now_s: float, model: str = "") -> None:
        """A failure reported before was the request's own fault: another endpoint failed at it as well."""
        record = self._records.by_key.get(key)
        if record is not None and model in record.levels:
            record.levels[model].retracted(kind)
            self._doubts.review(key, record, model, now_s)

    def undecided(self, key: EndpointKey, model: str, now_s: float) -> None:
        """A request ended without any evidence, its client gone: if it was a trial, the next may be."""
        record = self._records.by_key.get(key)
        level = None if record is None else record.levels.get(model)
        if level is not None and level.trial_until_s:
            level.try_now(now_s)

    # What the router asks.

    def is_available(self, key: EndpointKey) -> bool:
        """True iff requests may be sent there."""
        record = self._records.by_key.get(key)
        return record is not None and record.state is HealthState.HEALTHY

    def state(self, key: EndpointKey) -> HealthState | None:
        """Current state, or None for a key that is not configured."""
        record = self._records.by_key.get(key)
        return None if record is None else record.state

    def reason(self, key: EndpointKey) -> str | None:
        """Why the endpoint may not be chosen, in a few words; None if it may."""
        record = self._records.by_key.get(key)
        if record is None:
            return "not configured"
        if record.is_withdrawn:
            return record.state.value
        return record.ejected

    def doubted(self, model: str) -> Collection[EndpointKey]:
        """Endpoints that are doubted for `model`; usually none."""
        return self._doubts.by_model.get(model, ())

    def trial_due(self, key: EndpointKey, model: str, now_s: float) -> bool:
        """True iff a doubted endpoint may be given one request."""
        level = self._records.by_key[key].levels[model]
        return level.trial_due_s <= now_s and level.trial_until_s <= now_s

    def trial_began(self, key: EndpointKey, model: str, now_s: float) -> None:
        """A doubted endpoint was given a request: no other one until more is known of it."""
        self._records.by_key[key].levels[model].trial_until_s = now_s + TRIAL_LEASE_S

    def doubt(self, key: EndpointKey, model: str) -> str | None:
        """Why the endpoint is left out of the choice for `model`, in a few words; None if it is not."""
        record = self._records.by_key.get(key)
        level = None if record is None else record.levels.get(model)
        if level is None or level.doubted is None:
            return None
        if level.doubted is FailureKind.MISSING_MODEL:
            return "does not have this model"
        return f"fails more than its peers: {level.doubted.value}"

    def doubts_of(self, key: EndpointKey) -> list[str]:
        """Models that the endpoint is doubted for, sorted."""
        return sorted(model for model, keys in self._doubts.by_model.items() if key in keys)

    # Ejections.

    def _alive(self, key: EndpointKey, record: Record, now_s: float) -> Transitions:
        if record.cause is not Cause.SLOW_PROBES:
            return ()
        before = record.state
        record.probe_failures = 0
        record.readmit(now_s)
        return self._transitions(key, record, before, "answered a request", now_s)

    def _eject_by_traffic(self, record: Record, cause: Cause, kind: FailureKind, now_s: float) -> None:
        limit_s = self._settings.max_ejection_s
        is_in_a_row = record.recovered_s is not None and now_s - record.recovered_s < limit_s
        record.ejections_in_a_row = record.ejections_in_a_row + 1 if is_in_a_row else 1
        # 2**30 s is past any limit; the bound keeps the float finite after a long row.
        doublings = min(record.ejections_in_a_row - 1, 30)
        until_s = now_s + min(self._settings.ejection_s * 2**doublings, limit_s)
        record.eject(cause, f"traffic failed: {kind.value}", until_s)
        # An earlier probe could not end the ejection, so it would only cost the engine work.
        record.next_probe_s = until_s

    def _transitions(
        self, key: EndpointKey, record: Record, before: HealthState, reason: str, now_s: float
    ) -> Transitions:
        """What an event changed, that of its own endpoint first."""
        changes: list[Transition] = []
        if record.state is not before:
            self._records.changed(record.clusters)
            changes.append(Transition(key, before, record.state, reason))
        if record.ejected is not None:
            changes += self._floors.hold(record.clusters, now_s)
        return tuple(changes)

    def _schedule(self, record: Record, now_s: float) -> None:
        if record.ejected is None:
            record.next_probe_s = now_s + self._settings.interval_s
        else:
            record.next_probe_s = max(now_s + self._settings.recovery_interval_s, record.ejected_until_s)


def _said_by_source(before: HealthState, after: HealthState) -> str:
    """What a source said when it withdrew an endpoint or gave it back."""
    if HealthState.DRAINING in (before, after):
        return "draining set" if after is HealthState.DRAINING else "draining cleared"
    return "not ready" if after is HealthState.NOT_READY else "ready again"
