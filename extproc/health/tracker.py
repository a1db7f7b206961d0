"""Who may be chosen: one state machine per endpoint, fed by probes and by real traffic.

Rules:
    1. An endpoint is available iff it is configured, not draining and not ejected.
    2. Only a successful probe ends an ejection; after an ejection caused by traffic only once its time is
       over. What merely timed out when probed is back at once when real traffic has its answer from there.
    3. No ejection takes a cluster below its floor (`min_available_ratio`, one at least). Only refused
       connections and engines that say they sleep do; if they take it below, others that are ejected come
       back, the earliest due first.
    4. An available endpoint whose failures exceed those of its peers, for a model, is *doubted* for it: it is
       left out of the choice while others are not, but for one request at a time on trial, whose success
       speaks for it. That sends the traffic to the peers, and so tells its fault from the request's.
    5. A doubted endpoint is ejected when its failures reach `passive_threshold` in a row, nothing else it was
       asked succeeded meanwhile, and a peer answered: it is alone in failing.
    6. What every peer fails at is nobody's fault here: it doubts nobody for long and ejects nobody.
    7. A model that an endpoint does not have is missed there: doubted for longer, never ejected for.
    8. An event that changes no state returns no `Transition`; doubts are not states.
    9. Memory is bounded by the endpoints times `MAX_MODELS`; events about other keys are ignored.

One failure is one request's, never one attempt's: the caller settles that (`health.evidence`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from extproc.health.failures import MAY_BE_THE_CLIENTS
from extproc.health.settings import HealthSettings
from extproc.values.endpoints import Endpoint
from extproc.values.evidence import FailureKind
from metadata_center.types import EndpointKey

__all__ = ["FailureKind", "HealthState", "HealthTracker", "ProbeFailure", "Transition"]

MAX_MODELS: Final = 256
"""Models whose failures one endpoint remembers; the one not heard of for longest goes first."""

MEMORY_S: Final = 60.0
"""What an endpoint did longer ago says nothing of it now; the longest ejection by default."""

_FAST: Final = 0.3
"""Gain of the failing share that acts: the last few answers count, one failure lifts it over the doubt."""

_SLOW: Final = 0.05
"""Gain of the failing share that tells fluctuation from fault: the last twenty answers or so."""

_DOUBT: Final = 0.25
"""Fast share above the peers' that doubts: one failure where they have none; two that may be the client's."""

_TRUST: Final = 0.125
"""And below which the doubt is over: half of it, so that one answer does not change it to and fro."""

_SLOW_RATIO: Final = 1.5
"""The slow share must exceed the peers' this many times: if a client breaks half of all requests by itself,
shares of 0.5 scatter by 0.08, and of a hundred endpoints none is doubted for that."""

_SLOW_MARGIN: Final = 0.03
"""And by this: less than one failure, or two that may be the client's."""

_ALONE_RATIO: Final = 4.0
"""For an ejection it must exceed that of all peers, doubted ones included, this many times: three failures in
a row against peers of which none failed lately. A client that breaks half of all requests by itself lets one
endpoint look so in its first moments at most."""

_WELL: Final = 0.1
"""A peer below this share, and not failing now, is well: nine successes after three failures."""

TRIAL_S: Final = 0.25
"""From a doubt to the first trial; doubles with each that fails. A failure costs a client, so not less; an
engine that hiccupped is back before its queue has run dry."""

MAX_TRIAL_S: Final = 30.0
"""Longest time between trials."""

TRIAL_LEASE_S: Final = 30.0
"""A trial that nobody heard of any more is over after this."""

MISS_S: Final = 10.0
"""From a miss to the next request that may try; doubles up to `MAX_MISS_S`. Adapters are loaded by hand."""

MAX_MISS_S: Final = 300.0

_MISSES_IN_A_ROW: Final = 3
"""Of an endpoint that answered for the model within `MEMORY_S`: one 404 may be about something else that the
request names (a stored response), and clients can name anything."""

_MOST_PATIENCE: Final = 3
"""Doublings of a probe's time-out."""

_ROUNDING: Final = 1e-9


class HealthState(StrEnum):
    """What an endpoint is to the router; draining hides whether it is also ejected."""

    HEALTHY = "healthy"
    EJECTED = "ejected"
    DRAINING = "draining"


class ProbeFailure(StrEnum):
    """How a probe failed: what it proves differs."""

    REFUSED = "refused"
    TIMEOUT = "timeout"
    OTHER = "other"


class _Cause(StrEnum):
    """What an ejection rests on."""

    GONE = "gone"
    ASLEEP = "asleep"
    PROBES = "probes"
    SLOW_PROBES = "slow probes"
    TRAFFIC = "traffic"


_BELOW_THE_FLOOR = frozenset({_Cause.GONE, _Cause.ASLEEP})


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


Transitions = tuple[Transition, ...]


@dataclass(slots=True)
class _Level:
    """How one endpoint does for one model.

    Attributes:
        fast: Share of failures among its last few answers.
        slow: The same among its last twenty.
        good_s: Its last success, or None.
        bad_s: The first failure since, or None.
        heard_s: Its last answer of either kind.
        misses: 404s in a row.
        doubted: Why it is doubted, or None.
        trial_due_s: From when a request may try it.
        trial_until_s: A trial is under way until then at most.
        failed_trials: In a row.
    """

    fast: float = 0.0
    slow: float = 0.0
    good_s: float | None = None
    bad_s: float | None = None
    heard_s: float = 0.0
    misses: int = 0
    doubted: FailureKind | None = None
    trial_due_s: float = 0.0
    trial_until_s: float = 0.0
    failed_trials: int = 0

    def succeeded(self, now_s: float) -> None:
        self.fast *= 1.0 - _FAST
        self.slow *= 1.0 - _SLOW
        self.good_s = self.heard_s = now_s
        self.bad_s = None
        self.misses = self.failed_trials = 0
        self.pass_trial(now_s)

    def failed(self, kind: FailureKind, now_s: float) -> None:
        self.heard_s = now_s
        self.end_trial(now_s, TRIAL_S, MAX_TRIAL_S)
        if kind is not FailureKind.MISSING_MODEL:
            weight = 0.5 if kind in MAY_BE_THE_CLIENTS else 1.0
            self.fast += weight * _FAST * (1.0 - self.fast)
            self.slow += weight * _SLOW * (1.0 - self.slow)
            if self.bad_s is None:
                self.bad_s = now_s

    def retracted(self, kind: FailureKind) -> None:
        weight = 0.5 if kind in MAY_BE_THE_CLIENTS else 1.0
        fast, slow = weight * _FAST, weight * _SLOW
        self.fast = max(0.0, (self.fast - fast) / (1.0 - fast))
        self.slow = max(0.0, (self.slow - slow) / (1.0 - slow))

    def pass_trial(self, now_s: float) -> None:
        """A trial went well as far as it went; the more failed before, the longer until the next."""
        self.trial_until_s, self.trial_due_s = 0.0, now_s + TRIAL_S * self.fast

    def end_trial(self, now_s: float, first_s: float, most_s: float) -> None:
        """A trial failed, if one is under way; what fails otherwise was sent before the doubt."""
        if self.trial_until_s > now_s:
            self.failed_trials = min(self.failed_trials + 1, 16)
            self.trial_due_s = now_s + min(first_s * 2**self.failed_trials, most_s)
        self.trial_until_s = 0.0


@dataclass(slots=True)
class _Record:
    """Private state of one endpoint; times are the caller's monotonic seconds.

    Attributes:
        probe_failures: Consecutive, 0 after a success.
        patience: Doublings of the next probe's time-out.
        alive_s: When real traffic last had bytes of an answer from there, or None.
        levels: How it does, by model.
        ejected: Reason while ejected, else None.
        cause: What that rests on; None while not ejected.
        ejected_until_s: Earliest recovery, meaningful while ejected.
        ejections_in_a_row: Ejections by traffic, each less than `max_ejection_s` after the last recovery.
        recovered_s: End of the last ejection, or None.
        next_probe_s: When to probe again; -inf before the first probe.
    """

    clusters: frozenset[str]
    draining: bool
    probe_failures: int = 0
    patience: int = 0
    alive_s: float | None = None
    levels: dict[str, _Level] = field(default_factory=dict)
    ejected: str | None = None
    cause: _Cause | None = None
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
        self.withheld = 0
        """Ejections that the floor prevented."""
        self._records: dict[EndpointKey, _Record] = {}
        self._members: dict[str, list[EndpointKey]] = {}
        self._doubts: dict[str, set[EndpointKey]] = {}
        self._generation = 0

    @property
    def generation(self) -> int:
        """Grows whenever a state, a doubt or the endpoint set changes, and only then."""
        return self._generation

    def set_endpoints(self, endpoints: Iterable[Endpoint], now_s: float = 0.0) -> Transitions:
        """Replace the endpoint set; known endpoints keep their history, new ones count as healthy.

        A key listed by several clusters is one endpoint; it drains if any of them says so, because
        draining announces that the server goes away. Models that were missed are asked for again.

        Returns:
            Transitions of endpoints that stayed and started or stopped draining, or were kept by the floor.
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
            for model in list(self._records[key].levels):
                self._trust(key, model)
            del self._records[key]
        self._members = {}
        for key, names in clusters.items():
            for name in names:
                self._members.setdefault(name, []).append(key)
            self._forget_misses(key)
        after = {key: record.state for key, record in self._records.items()}
        if before != after:
            self._changed()
        changes = tuple(
            Transition(key, before[key], state, "draining set" if key in draining else "draining cleared")
            for key, state in after.items()
            if before.get(key, state) is not state
        )
        return changes + tuple(self._hold_floors(self._members, now_s))

    # Probes.

    def probe_succeeded(self, key: EndpointKey, now_s: float, took_s: float = 0.0) -> Transitions:
        """A probe was answered with 2xx after `took_s`: ends an ejection whose time is over."""
        record = self._records.get(key)
        if record is None:
            return ()
        before = record.state
        record.probe_failures = 0
        if took_s <= self.settings.timeout_s:
            record.patience = 0
        if record.ejected is not None and now_s >= record.ejected_until_s:
            self._readmit(record, now_s)
        self._schedule(record, now_s)
        return self._transitions(key, record, before, "probe succeeded", now_s)

    def probe_failed(
        self, key: EndpointKey, now_s: float, detail: str, how: ProbeFailure = ProbeFailure.OTHER
    ) -> Transitions:
        """A probe failed: `unhealthy_threshold` in a row eject until the next successful probe.

        A time-out is not counted where real traffic had bytes from there since about the last probe: busy
        engines answer both from one event loop. `detail` is a short cause for `reason`, e.g. "status 503".
        """
        record = self._records.get(key)
        if record is None:
            return ()
        before = record.state
        limit = self.settings.unhealthy_threshold
        is_slow = how is ProbeFailure.TIMEOUT
        if is_slow:
            recent_s = self.settings.interval_s + self.probe_timeout_s(key)
            record.patience = min(record.patience + 1, _MOST_PATIENCE)
            answers = record.alive_s is not None and now_s - record.alive_s <= recent_s
        else:
            answers = False
        if not answers:
            record.probe_failures = min(record.probe_failures + 1, limit)
        if record.probe_failures >= limit and not answers:
            if how is ProbeFailure.REFUSED:
                cause = _Cause.GONE
            else:
                cause = _Cause.SLOW_PROBES if is_slow else _Cause.PROBES
            if record.ejected is None:
                if cause in _BELOW_THE_FLOOR or self._may_go(record):
                    self._eject(record, cause, f"probe failed: {detail}", now_s)
            elif cause is _Cause.GONE:  # what kept it in reach of the floor is over
                record.cause, record.ejected = cause, f"probe failed: {detail}"
        self._schedule(record, now_s)
        return self._transitions(key, record, before, record.ejected or detail, now_s)

    def engine_asleep(self, key: EndpointKey, now_s: float) -> Transitions:
        """The engine answers probes but says it sleeps: ejected at once, until a successful probe.

        The caller must not report `probe_succeeded` while the engine sleeps.
        """
        record = self._records.get(key)
        if record is None:
            return ()
        before = record.state
        if record.ejected is None:
            self._eject(record, _Cause.ASLEEP, "engine is asleep", now_s)
        else:
            record.cause, record.ejected = _Cause.ASLEEP, "engine is asleep"
        self._schedule(record, now_s)
        return self._transitions(key, record, before, "engine is asleep", now_s)

    def next_probe_due(self, key: EndpointKey) -> float | None:
        """When to probe next, in the caller's seconds; -inf if never probed, None if not configured."""
        record = self._records.get(key)
        return None if record is None else record.next_probe_s

    def probe_timeout_s(self, key: EndpointKey) -> float:
        """How long the next probe may take: longer after each that timed out, to tell slow from gone."""
        record = self._records.get(key)
        return self.settings.timeout_s * (1 if record is None else 1 << record.patience)

    # Real traffic.

    def alive(self, key: EndpointKey, model: str, now_s: float) -> Transitions:
        """A first token came: the engine runs, whatever its probes say; one on trial may have company."""
        record = self._records.get(key)
        if record is None:
            return ()
        record.alive_s = now_s
        level = record.levels.get(model)
        if level is not None and level.trial_until_s:
            level.pass_trial(now_s)
        return self._alive(key, record, now_s)

    def attempt_succeeded(self, key: EndpointKey, now_s: float, model: str = "") -> Transitions:
        """A request was answered. What timed out when probed is back with it; other ejections stay."""
        record = self._records.get(key)
        if record is None:
            return ()
        record.alive_s = now_s
        self._level(key, record, model, now_s).succeeded(now_s)
        if model in self._doubts:
            self._review(key, record, model, now_s)
        return self._alive(key, record, now_s)

    def attempt_failed(
        self, key: EndpointKey, kind: FailureKind, now_s: float, model: str = ""
    ) -> Transitions:
        """A request failed there and, as far as is known, nowhere else; see Rules 4 to 7.

        A refused connection ejects at once. The time out starts at `ejection_s` and doubles up to
        `max_ejection_s` for ejections in a row. Failures of an ejected endpoint are echoes of earlier
        requests and are ignored.
        """
        record = self._records.get(key)
        if record is None or (record.ejected is not None and record.cause is not _Cause.SLOW_PROBES):
            return ()
        before = record.state
        if kind is FailureKind.CONNECT_FAILURE:
            self._forget_misses(key)  # what listens there next may be another engine
            self._eject_by_traffic(record, _Cause.GONE, kind, now_s)
            return self._transitions(key, record, before, kind.value, now_s)
        level = self._level(key, record, model, now_s)
        if kind is FailureKind.MISSING_MODEL:
            self._missed(key, level, model, now_s)
            return ()
        level.failed(kind, now_s)
        self._review(key, record, model, now_s, kind)
        if level.doubted is None or record.ejected is not None:
            return ()
        enough = 1.0 - (1.0 - _FAST) ** self.settings.passive_threshold - _ROUNDING
        if level.fast >= enough and self._is_alone(key, record, level, model, now_s):
            if self._may_go(record):
                self._eject_by_traffic(record, _Cause.TRAFFIC, kind, now_s)
            return self._transitions(key, record, before, kind.value, now_s)
        return ()

    def retract(self, key: EndpointKey, kind: FailureKind, now_s: float, model: str = "") -> None:
        """A failure told before was the request's own fault: another endpoint failed at it as well."""
        record = self._records.get(key)
        if record is not None and model in record.levels:
            record.levels[model].retracted(kind)
            self._review(key, record, model, now_s)

    def undecided(self, key: EndpointKey, model: str, now_s: float) -> None:
        """A request ended without telling anything, its client gone: if it was a trial, the next may be."""
        record = self._records.get(key)
        level = None if record is None else record.levels.get(model)
        if level is not None and level.trial_until_s:
            level.trial_until_s, level.trial_due_s = 0.0, now_s

    # What the router asks.

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

    def doubted(self, model: str) -> Collection[EndpointKey]:
        """Endpoints that are doubted for `model`; usually none."""
        return self._doubts.get(model, ())

    def trial_due(self, key: EndpointKey, model: str, now_s: float) -> bool:
        """True iff a doubted endpoint may be given one request."""
        level = self._records[key].levels[model]
        return level.trial_due_s <= now_s and level.trial_until_s <= now_s

    def trial_began(self, key: EndpointKey, model: str, now_s: float) -> None:
        """A doubted endpoint was given a request: no other one until more is known of it."""
        self._records[key].levels[model].trial_until_s = now_s + TRIAL_LEASE_S

    def doubt(self, key: EndpointKey, model: str) -> str | None:
        """Why the endpoint is left out of the choice for `model`, in a few words; None if it is not."""
        record = self._records.get(key)
        level = None if record is None else record.levels.get(model)
        if level is None or level.doubted is None:
            return None
        if level.doubted is FailureKind.MISSING_MODEL:
            return "does not have this model"
        return f"fails more than its peers: {level.doubted.value}"

    def doubts_of(self, key: EndpointKey) -> list[str]:
        """Models that the endpoint is doubted for, sorted."""
        return sorted(model for model, keys in self._doubts.items() if key in keys)

    # Doubts.

    def _level(self, key: EndpointKey, record: _Record, model: str, now_s: float) -> _Level:
        """How an endpoint does for `model`; blank if it was not heard of lately."""
        levels = record.levels
        level = levels.get(model)
        if level is None:
            if len(levels) >= MAX_MODELS:
                oldest = min(levels, key=lambda name: levels[name].heard_s)
                self._trust(key, oldest)
                del levels[oldest]
            level = levels[model] = _Level()
        elif level.doubted is None and now_s - level.heard_s > MEMORY_S:
            level = levels[model] = _Level()
        return level

    def _missed(self, key: EndpointKey, level: _Level, model: str, now_s: float) -> None:
        level.misses += 1
        level.heard_s = now_s
        if level.doubted is FailureKind.MISSING_MODEL:
            level.end_trial(now_s, MISS_S, MAX_MISS_S)
            return
        answers = level.good_s is not None and now_s - level.good_s <= MEMORY_S
        if answers and level.misses < _MISSES_IN_A_ROW:
            return
        level.doubted = FailureKind.MISSING_MODEL
        level.trial_until_s, level.trial_due_s, level.failed_trials = 0.0, now_s + MISS_S, 0
        self._doubts.setdefault(model, set()).add(key)
        self._changed()

    def _forget_misses(self, key: EndpointKey) -> None:
        record = self._records[key]
        for model, level in record.levels.items():
            if level.doubted is FailureKind.MISSING_MODEL:
                level.misses = 0
                self._trust(key, model)

    def _review(
        self, key: EndpointKey, record: _Record, model: str, now_s: float, kind: FailureKind | None = None
    ) -> None:
        """Doubt, or trust again, whoever of these clusters the newest answer tells something about.

        Args:
            key: Whose answer it was.
            record: Its record.
            model: What was asked for.
            now_s: The time.
            kind: How it failed; None if it did not.
        """
        level = record.levels[model]
        if kind is not None and level.doubted is None and record.state is HealthState.HEALTHY:
            company, fast, slow = self._peers(key, record, model, now_s)
            if (
                company
                and level.fast - fast >= _DOUBT - _ROUNDING
                and level.slow >= _SLOW_RATIO * slow + _SLOW_MARGIN
            ):
                level.doubted = kind
                level.trial_until_s, level.trial_due_s, level.failed_trials = 0.0, now_s + TRIAL_S, 0
                self._doubts.setdefault(model, set()).add(key)
                self._changed()
        for other in tuple(self._doubts.get(model, ())):
            peer = self._records[other]
            known = peer.levels[model]
            if known.doubted is FailureKind.MISSING_MODEL:
                if other == key and known.good_s == now_s:
                    self._trust(other, model)
            elif peer.clusters & record.clusters:
                _, fast, _ = self._peers(other, peer, model, now_s)
                if known.fast - fast < _TRUST:
                    self._trust(other, model)

    def _peers(
        self, key: EndpointKey, record: _Record, model: str, now_s: float
    ) -> tuple[bool, float, float]:
        """Whether there is anybody else to choose, and the mean shares of those that were heard lately."""
        company, heard, fast, slow = False, 0, 0.0, 0.0
        doubted = self._doubts.get(model, ())
        for other, peer in self._others(key, record):
            if peer.state is not HealthState.HEALTHY or other in doubted:
                continue
            company = True
            level = peer.levels.get(model)
            if level is not None and now_s - level.heard_s <= MEMORY_S:
                heard += 1
                fast += level.fast
                slow += level.slow
        return company, fast / max(1, heard), slow / max(1, heard)

    def _is_alone(self, key: EndpointKey, record: _Record, level: _Level, model: str, now_s: float) -> bool:
        """Nothing else it was asked succeeded since it began to fail, and its peers are well meanwhile."""
        began_s = level.bad_s
        if began_s is None or any(
            other.good_s is not None and other.good_s > began_s for other in record.levels.values()
        ):
            return False
        heard, slow, is_anybody_well = 0, 0.0, False
        for _, peer in self._others(key, record):
            known = peer.levels.get(model)
            if (
                known is None
                or peer.state is not HealthState.HEALTHY
                or known.doubted is FailureKind.MISSING_MODEL
                or now_s - known.heard_s > MEMORY_S
            ):
                continue
            heard += 1
            slow += known.slow
            if known.good_s is not None:
                is_well = known.bad_s is None and known.fast < _WELL and now_s - known.good_s <= MEMORY_S
                is_anybody_well |= is_well or known.good_s >= began_s
        return is_anybody_well and level.slow >= _ALONE_RATIO * slow / heard

    def _others(self, key: EndpointKey, record: _Record) -> Iterator[tuple[EndpointKey, _Record]]:
        """Endpoints of the same clusters; one that shares two of them comes twice."""
        for cluster in record.clusters:
            for other in self._members.get(cluster, ()):
                if other != key:
                    yield other, self._records[other]

    def _trust(self, key: EndpointKey, model: str) -> None:
        keys = self._doubts.get(model)
        self._records[key].levels[model].doubted = None
        if keys is not None and key in keys:
            keys.remove(key)
            if not keys:
                del self._doubts[model]
            self._changed()

    # Ejections.

    def _alive(self, key: EndpointKey, record: _Record, now_s: float) -> Transitions:
        if record.cause is not _Cause.SLOW_PROBES:
            return ()
        before = record.state
        record.probe_failures = 0
        self._readmit(record, now_s)
        return self._transitions(key, record, before, "answered a request", now_s)

    @staticmethod
    def _eject(record: _Record, cause: _Cause, reason: str, until_s: float) -> None:
        record.ejected, record.cause, record.ejected_until_s = reason, cause, until_s

    def _eject_by_traffic(self, record: _Record, cause: _Cause, kind: FailureKind, now_s: float) -> None:
        limit_s = self.settings.max_ejection_s
        is_in_a_row = record.recovered_s is not None and now_s - record.recovered_s < limit_s
        record.ejections_in_a_row = record.ejections_in_a_row + 1 if is_in_a_row else 1
        # 2**30 s is past any limit; the bound keeps the float finite after a long row.
        doublings = min(record.ejections_in_a_row - 1, 30)
        until_s = now_s + min(self.settings.ejection_s * 2**doublings, limit_s)
        self._eject(record, cause, f"traffic failed: {kind.value}", until_s)
        # An earlier probe could not end the ejection, so it would only cost the engine work.
        record.next_probe_s = until_s

    @staticmethod
    def _readmit(record: _Record, now_s: float) -> None:
        """Back; whatever it is doubted for goes on with a trial at once."""
        record.ejected = record.cause = None
        record.recovered_s = now_s
        for level in record.levels.values():
            if level.doubted is not None and level.doubted is not FailureKind.MISSING_MODEL:
                level.trial_until_s, level.trial_due_s = 0.0, now_s

    def _may_go(self, record: _Record) -> bool:
        """Whether enough of its clusters stay available without it."""
        if record.draining:
            return True
        for cluster in record.clusters:
            available, floor = self._available(cluster)
            if available - 1 < floor:
                self.withheld += 1
                return False
        return True

    def _available(self, cluster: str) -> tuple[int, int]:
        """How many endpoints of a cluster are available, and how many have to be."""
        available = members = 0
        for key in self._members.get(cluster, ()):
            record = self._records[key]
            if not record.draining:
                members += 1
                available += record.ejected is None
        return available, max(1, int(members * self.settings.min_available_ratio + _ROUNDING))

    def _hold_floors(self, clusters: Iterable[str], now_s: float) -> list[Transition]:
        """Bring back whoever may be well where refused connections took a cluster below its floor."""
        changes = []
        for cluster in clusters:
            available, floor = self._available(cluster)
            if available >= floor:
                continue
            out = [
                key
                for key in self._members[cluster]
                if (record := self._records[key]).ejected is not None
                and not record.draining
                and record.cause not in _BELOW_THE_FLOOR
            ]
            out.sort(key=lambda key: self._records[key].ejected_until_s)
            for key in out[: floor - available]:
                self._readmit(self._records[key], now_s)
                self._changed()
                changes.append(
                    Transition(key, HealthState.EJECTED, HealthState.HEALTHY, "too few others are left")
                )
        return changes

    def _transitions(
        self, key: EndpointKey, record: _Record, before: HealthState, reason: str, now_s: float
    ) -> Transitions:
        """What an event changed, that of its own endpoint first."""
        changes: list[Transition] = []
        if record.state is not before:
            self._changed()
            changes.append(Transition(key, before, record.state, reason))
        if record.ejected is not None:
            changes += self._hold_floors(record.clusters, now_s)
        return tuple(changes)

    def _schedule(self, record: _Record, now_s: float) -> None:
        if record.ejected is None:
            record.next_probe_s = now_s + self.settings.interval_s
        else:
            record.next_probe_s = max(now_s + self.settings.recovery_interval_s, record.ejected_until_s)

    def _changed(self) -> None:
        self._generation += 1
