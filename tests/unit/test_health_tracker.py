"""The health state machine: who may be chosen after which events."""

from __future__ import annotations

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from extproc.health.settings import HealthSettings
from extproc.health.tracker import FailureKind, HealthState, HealthTracker, Transition
from extproc.types import Endpoint
from metadata_center.types import EndpointKey

A, B, C = (EndpointKey(f"10.0.0.{i}:8000") for i in (1, 2, 3))
SETTINGS = HealthSettings()


def endpoint(key: EndpointKey, cluster: str = "m", *, draining: bool = False) -> Endpoint:
    """An endpoint of the configuration."""
    return Endpoint(key=key, cluster=cluster, draining=draining)


def tracker(*keys: EndpointKey) -> HealthTracker:
    """A tracker of healthy endpoints, all of one cluster."""
    built = HealthTracker(SETTINGS)
    built.set_endpoints(endpoint(key) for key in keys)
    return built


def fail(built: HealthTracker, key: EndpointKey, kind: FailureKind, times: int, now_s: float = 0.0) -> None:
    """Let real traffic fail so many times."""
    for _ in range(times):
        built.attempt_failed(key, kind, now_s)


def test_new_endpoint_is_available_and_due_at_once() -> None:
    """An endpoint counts as healthy until proven otherwise, and its first probe is overdue."""
    built = tracker(A)
    assert built.is_available(A)
    assert built.reason(A) is None
    assert built.next_probe_due(A) == float("-inf")


def test_connect_failure_ejects_at_once() -> None:
    """One refused connection ejects, even the last endpoint: nobody listens there."""
    built = tracker(A)
    transition = built.attempt_failed(A, FailureKind.CONNECT_FAILURE, 10.0)
    assert transition == Transition(A, HealthState.HEALTHY, HealthState.EJECTED, "connect_failure")
    assert not built.is_available(A)
    assert built.reason(A) == "traffic failed: connect_failure"


@pytest.mark.parametrize(
    "kind", [FailureKind.RESET, FailureKind.SERVER_ERROR, FailureKind.FIRST_BYTE_TIMEOUT]
)
def test_other_failures_eject_at_the_threshold(kind: FailureKind) -> None:
    """Failures that a single request can cause eject only when `passive_threshold` come in a row."""
    built = tracker(A, B)
    fail(built, A, kind, SETTINGS.passive_threshold - 1)
    assert built.is_available(A)
    fail(built, A, kind, 1)
    assert not built.is_available(A)


def test_success_of_traffic_resets_the_count() -> None:
    """Failures are counted in a row: an answered request starts over."""
    built = tracker(A, B)
    fail(built, A, FailureKind.RESET, SETTINGS.passive_threshold - 1)
    built.attempt_succeeded(A, 0.0)
    fail(built, A, FailureKind.RESET, SETTINGS.passive_threshold - 1)
    assert built.is_available(A)


@pytest.mark.parametrize("kind", [FailureKind.SERVER_ERROR, FailureKind.FIRST_BYTE_TIMEOUT])
def test_overload_never_ejects_the_last_of_a_cluster(kind: FailureKind) -> None:
    """What may be load leaves the last available endpoint in place, until another one is back."""
    built = tracker(A, B)
    built.attempt_failed(B, FailureKind.CONNECT_FAILURE, 0.0)
    fail(built, A, kind, 10 * SETTINGS.passive_threshold)
    assert built.is_available(A)
    built.probe_succeeded(B, SETTINGS.ejection_s)
    fail(built, A, kind, 1, SETTINGS.ejection_s)
    assert not built.is_available(A)


def test_a_reset_among_server_errors_ejects_the_last() -> None:
    """The protection of the last endpoint is for overload alone; a broken connection is more than that."""
    built = tracker(A)
    fail(built, A, FailureKind.RESET, 1)
    fail(built, A, FailureKind.SERVER_ERROR, SETTINGS.passive_threshold - 1)
    assert not built.is_available(A)


def test_other_clusters_do_not_count_as_company() -> None:
    """Being last is per cluster: a healthy endpoint elsewhere does not replace this one."""
    built = HealthTracker(SETTINGS)
    built.set_endpoints([endpoint(A, "m"), endpoint(B, "other"), endpoint(C, "m", draining=True)])
    fail(built, A, FailureKind.SERVER_ERROR, SETTINGS.passive_threshold)
    assert built.is_available(A)


def test_probe_before_the_ejection_time_does_not_recover() -> None:
    """After an ejection by traffic a good probe counts only once the time is over."""
    built = tracker(A)
    built.attempt_failed(A, FailureKind.CONNECT_FAILURE, 10.0)
    assert built.next_probe_due(A) == 10.0 + SETTINGS.ejection_s
    assert built.probe_succeeded(A, 10.0 + SETTINGS.ejection_s - 0.1) is None
    assert not built.is_available(A)
    transition = built.probe_succeeded(A, 10.0 + SETTINGS.ejection_s)
    assert transition == Transition(A, HealthState.EJECTED, HealthState.HEALTHY, "probe succeeded")


def test_traffic_success_does_not_recover() -> None:
    """Only a probe ends an ejection: late answers of earlier requests prove nothing."""
    built = tracker(A)
    built.attempt_failed(A, FailureKind.CONNECT_FAILURE, 0.0)
    built.attempt_succeeded(A, 100.0)
    assert not built.is_available(A)


def test_ejection_time_doubles_in_a_row_up_to_the_limit() -> None:
    """Each ejection soon after the last recovery lasts twice as long, at most `max_ejection_s`."""
    built, now_s, lengths = tracker(A), 0.0, []
    for _ in range(8):
        built.attempt_failed(A, FailureKind.CONNECT_FAILURE, now_s)
        due_s = built.next_probe_due(A)
        assert due_s is not None
        lengths.append(due_s - now_s)
        now_s = due_s
        built.probe_succeeded(A, now_s)
    assert lengths == [2, 4, 8, 16, 32, 60, 60, 60]
    now_s += SETTINGS.max_ejection_s
    built.attempt_failed(A, FailureKind.CONNECT_FAILURE, now_s)
    assert built.next_probe_due(A) == now_s + SETTINGS.ejection_s


def test_failures_while_ejected_do_not_prolong() -> None:
    """Echoes of requests sent before the ejection neither extend it nor double the next."""
    built = tracker(A)
    fail(built, A, FailureKind.CONNECT_FAILURE, 20)
    assert built.probe_succeeded(A, SETTINGS.ejection_s) is not None


def test_failed_probes_eject_and_one_good_probe_recovers() -> None:
    """`unhealthy_threshold` failed probes in a row eject; there is no time to sit out."""
    built = tracker(A)
    assert built.probe_failed(A, 0.0, "timeout") is None
    assert built.next_probe_due(A) == SETTINGS.interval_s
    transition = built.probe_failed(A, 5.0, "status 503")
    assert transition is not None
    assert transition.reason == built.reason(A) == "probe failed: status 503"
    assert built.next_probe_due(A) == 5.0 + SETTINGS.recovery_interval_s
    assert built.probe_succeeded(A, 5.1) is not None


def test_sleeping_engine_is_ejected_until_it_is_awake() -> None:
    """An engine that says it sleeps leaves at once and returns with the first success reported."""
    built = tracker(A)
    assert built.engine_asleep(A, 0.0) is not None
    assert built.engine_asleep(A, 1.0) is None
    assert built.reason(A) == "engine is asleep"
    assert built.probe_succeeded(A, 2.0) is not None


def test_draining_is_reported_and_hides_ejection() -> None:
    """Draining makes unavailable whatever the health; lifting it reveals the health underneath."""
    built = tracker(A)
    (transition,) = built.set_endpoints([endpoint(A, draining=True)])
    assert (transition.before, transition.after) == (HealthState.HEALTHY, HealthState.DRAINING)
    assert built.attempt_failed(A, FailureKind.CONNECT_FAILURE, 0.0) is None
    assert built.reason(A) == "draining"
    (transition,) = built.set_endpoints([endpoint(A)])
    assert (transition.before, transition.after) == (HealthState.DRAINING, HealthState.EJECTED)


def test_one_draining_mention_drains_the_endpoint() -> None:
    """An endpoint of two clusters is one server: it drains as soon as either says so."""
    built = HealthTracker(SETTINGS)
    built.set_endpoints([endpoint(A, "m"), endpoint(A, "n", draining=True)])
    assert built.state(A) is HealthState.DRAINING


def test_removed_endpoints_are_forgotten() -> None:
    """A removed endpoint is unavailable, ignored by events, and starts afresh when it returns."""
    built = tracker(A, B)
    built.attempt_failed(A, FailureKind.CONNECT_FAILURE, 0.0)
    built.set_endpoints([endpoint(B)])
    assert (built.state(A), built.reason(A), built.next_probe_due(A)) == (None, "not configured", None)
    assert built.probe_failed(A, 0.0, "timeout") is None
    built.set_endpoints([endpoint(A), endpoint(B)])
    assert built.is_available(A)


def test_the_generation_tells_when_availability_changes() -> None:
    """Events that change nobody's availability leave the generation alone; one that does moves it on."""
    built, keys = tracker(A, B), (B, C, A)
    assert [built.is_available(key) for key in keys] == [True, False, True]
    generation = built.generation
    built.attempt_failed(A, FailureKind.RESET, 0.0)
    built.probe_succeeded(B, 0.0)
    built.set_endpoints([endpoint(A), endpoint(B)])
    assert built.generation == generation
    assert [built.is_available(key) for key in keys] == [True, False, True]
    built.attempt_failed(B, FailureKind.CONNECT_FAILURE, 0.0)
    assert built.generation > generation
    assert [built.is_available(key) for key in keys] == [False, False, True]


class HealthMachine(RuleBasedStateMachine):
    """Any order of events over three endpoints of one cluster, in advancing time."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker = HealthTracker(SETTINGS)
        self.now_s = 0.0
        self.configured: dict[EndpointKey, bool] = {}
        self.available_at: dict[int, list[bool]] = {}
        self.keys = (A, B, C)

    def check(self, transition: Transition | None, key: EndpointKey, before: HealthState | None) -> None:
        """A transition is returned exactly when the state changed, and says how."""
        after = self.tracker.state(key)
        if transition is None:
            assert after is before
        else:
            assert (transition.key, transition.before, transition.after) == (key, before, after)
            assert before is not after

    @rule(draining=st.dictionaries(st.sampled_from((A, B, C)), st.booleans()))
    def set_endpoints(self, draining: dict[EndpointKey, bool]) -> None:
        """The configuration names a new set."""
        before = {key: self.tracker.state(key) for key in self.keys}
        moved = self.tracker.set_endpoints(endpoint(k, draining=v) for k, v in draining.items())
        self.configured = draining
        assert {t.key for t in moved} == {
            key for key in draining if before[key] is not None and before[key] != self.tracker.state(key)
        }

    @rule(step_s=st.floats(0.0, 100.0))
    def pass_time(self, step_s: float) -> None:
        """Time goes on."""
        self.now_s += step_s

    @rule(key=st.sampled_from((A, B, C)), kind=st.sampled_from(FailureKind))
    def attempt_failed(self, key: EndpointKey, kind: FailureKind) -> None:
        """Real traffic fails; overload never takes the last available endpoint."""
        before = self.tracker.state(key)
        available = sum(self.tracker.is_available(k) for k in self.keys)
        hard = self.tracker._records[key].is_hard if key in self.configured else False
        self.check(self.tracker.attempt_failed(key, kind, self.now_s), key, before)
        if available and not hard and kind in {FailureKind.SERVER_ERROR, FailureKind.FIRST_BYTE_TIMEOUT}:
            assert any(self.tracker.is_available(k) for k in self.keys)

    @rule(key=st.sampled_from((A, B, C)))
    def attempt_succeeded(self, key: EndpointKey) -> None:
        """Real traffic succeeds, which never changes a state."""
        assert self.tracker.attempt_succeeded(key, self.now_s) is None

    @rule(key=st.sampled_from((A, B, C)))
    def probe_failed(self, key: EndpointKey) -> None:
        """A probe fails, which never makes anything available."""
        before, was_available = self.tracker.state(key), self.tracker.is_available(key)
        self.check(self.tracker.probe_failed(key, self.now_s, "timeout"), key, before)
        assert was_available or not self.tracker.is_available(key)

    @rule(key=st.sampled_from((A, B, C)))
    def engine_asleep(self, key: EndpointKey) -> None:
        """An engine sleeps and is therefore not available."""
        before = self.tracker.state(key)
        self.check(self.tracker.engine_asleep(key, self.now_s), key, before)
        assert not self.tracker.is_available(key)

    @precondition(lambda self: self.configured)
    @rule()
    def probes_recover(self) -> None:
        """Probing each endpoint when it is due brings every one back that is not draining."""
        for key in self.configured:
            due_s = self.tracker.next_probe_due(key)
            assert due_s is not None
            self.now_s = max(self.now_s, due_s)
            before = self.tracker.state(key)
            self.check(self.tracker.probe_succeeded(key, self.now_s), key, before)
            assert self.tracker.is_available(key) is not self.configured[key]

    @invariant()
    def ejected_is_never_available(self) -> None:
        """Available means configured, healthy, without a reason against it; one generation, one answer."""
        for key in self.keys:
            is_healthy = self.tracker.state(key) is HealthState.HEALTHY
            assert self.tracker.is_available(key) is is_healthy is (self.tracker.reason(key) is None)
        available = [self.tracker.is_available(key) for key in self.keys]
        assert self.available_at.setdefault(self.tracker.generation, available) == available

    @invariant()
    def counts_stay_in_range(self) -> None:
        """Counts are never negative nor above their thresholds, and exist for configured endpoints only."""
        assert self.tracker._records.keys() == self.configured.keys()
        for record in self.tracker._records.values():
            assert 0 <= record.probe_failures <= SETTINGS.unhealthy_threshold
            assert 0 <= record.attempt_failures <= SETTINGS.passive_threshold


HealthMachine.TestCase.settings = hypothesis_settings(max_examples=60, stateful_step_count=30, deadline=None)
TestHealthMachine = HealthMachine.TestCase
