"""The health state machine after any order of events."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from extproc.health.states import HealthState, ProbeFailure, Transition
from extproc.health.tracker import HealthTracker
from extproc.values.evidence import FailureKind
from metadata_center.types import EndpointKey
from tests.unit.tracked import (
    SETTINGS,
    A,
    B,
    C,
    D,
    endpoint,
    replace_endpoints,
)


class HealthMachine(RuleBasedStateMachine):
    """Any order of events over four endpoints of two clusters, in advancing time."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker = HealthTracker(SETTINGS)
        self.now_s = 0.0
        self.configured: dict[EndpointKey, bool] = {}
        self.choice_at: dict[int, object] = {}
        self.keys = (A, B, C, D)
        self.clusters = {"m": (A, B, C), "n": (C, D)}

    def states(self) -> dict[EndpointKey, HealthState | None]:
        """All of them."""
        return {key: self.tracker.state(key) for key in self.keys}

    def check(self, transitions: Sequence[Transition], before: dict[EndpointKey, HealthState | None]) -> None:
        """Transitions are returned exactly for the states that changed, and say how."""
        reported = {each.key: (each.before, each.after) for each in transitions}
        assert len(reported) == len(transitions)
        changed = {key: (before[key], after) for key, after in self.states().items() if before[key] != after}
        assert reported == changed

    @rule(draining=st.dictionaries(st.sampled_from((A, B, C, D)), st.booleans()))
    def set_endpoints(self, draining: dict[EndpointKey, bool]) -> None:
        """The configuration names a new set."""
        self.configured = draining
        replace_endpoints(
            self.tracker,
            (
                endpoint(key, name, draining=draining[key])
                for name, keys in self.clusters.items()
                for key in keys
                if key in draining
            ),
            self.now_s,
        )

    @rule(step_s=st.sampled_from([0.01, 0.3, 3.0, 40.0, 100.0]))
    def pass_time(self, step_s: float) -> None:
        """Time goes on."""
        self.now_s += step_s

    @rule(
        key=st.sampled_from((A, B, C, D)),
        kind=st.sampled_from(FailureKind),
        model=st.sampled_from(("x", "y")),
    )
    def attempt_failed(self, key: EndpointKey, kind: FailureKind, model: str) -> None:
        """Real traffic fails."""
        before = self.states()
        self.check(self.tracker.attempt_failed(key, kind, self.now_s, model), before)

    @rule(key=st.sampled_from((A, B, C, D)), model=st.sampled_from(("x", "y")))
    def attempt_succeeded(self, key: EndpointKey, model: str) -> None:
        """Real traffic succeeds, which ejects none."""
        before, out = self.states(), self.out()
        self.check(self.tracker.attempt_succeeded(key, self.now_s, model), before)
        assert self.out() <= out

    @rule(key=st.sampled_from((A, B, C, D)), model=st.sampled_from(("x", "y")))
    def alive(self, key: EndpointKey, model: str) -> None:
        """A first token passes, which ejects none."""
        before, out = self.states(), self.out()
        self.check(self.tracker.alive(key, model, self.now_s), before)
        assert self.out() <= out

    @rule(
        key=st.sampled_from((A, B, C, D)),
        model=st.sampled_from(("x", "y")),
        kind=st.sampled_from(FailureKind),
    )
    def retract(self, key: EndpointKey, model: str, kind: FailureKind) -> None:
        """A failure is taken back, which changes no state."""
        before = self.states()
        self.tracker.retract(key, kind, self.now_s, model)
        assert self.states() == before

    @rule(model=st.sampled_from(("x", "y")), gone=st.booleans())
    def trial(self, model: str, gone: bool) -> None:
        """An endpoint that is due is given one request; its client may leave."""
        for key in list(self.tracker.doubted(model)):
            if self.tracker.trial_due(key, model, self.now_s):
                self.tracker.trial_began(key, model, self.now_s)
                assert not self.tracker.trial_due(key, model, self.now_s)
                if gone:
                    self.tracker.undecided(key, model, self.now_s)
                    assert self.tracker.trial_due(key, model, self.now_s)

    @rule(key=st.sampled_from((A, B, C, D)), how=st.sampled_from(ProbeFailure))
    def probe_failed(self, key: EndpointKey, how: ProbeFailure) -> None:
        """A probe fails, which does not make its endpoint available."""
        before, was_available = self.states(), self.tracker.is_available(key)
        self.check(self.tracker.probe_failed(key, self.now_s, "detail", how), before)
        assert was_available or not self.tracker.is_available(key)

    @rule(key=st.sampled_from((A, B, C, D)))
    def engine_asleep(self, key: EndpointKey) -> None:
        """An engine sleeps and is therefore not available."""
        before = self.states()
        self.check(self.tracker.engine_asleep(key, self.now_s), before)
        assert not self.tracker.is_available(key)

    @precondition(lambda self: self.configured)
    @rule()
    def probes_recover(self) -> None:
        """Probing each endpoint when it is due brings every one back that is not draining."""
        for key in self.configured:
            due_s = self.tracker.next_probe_due(key)
            assert due_s is not None
            self.now_s = max(self.now_s, due_s)
            before = self.states()
            self.check(self.tracker.probe_succeeded(key, self.now_s), before)
            assert self.tracker.is_available(key) is not self.configured[key]

    def out(self) -> set[EndpointKey]:
        """Those ejected."""
        return {key for key, state in self.states().items() if state is HealthState.EJECTED}

    @invariant()
    def the_floor_holds(self) -> None:
        """So many of each cluster are available as the floor says, but for those that refused or sleep."""
        for keys in self.clusters.values():
            members = [key for key in keys if self.configured.get(key) is False]
            reasons = [self.tracker.reason(key) for key in members]
            below = sum(
                reason is not None and (self.tracker._records.by_key[key].cause in ("gone", "asleep"))
                for key, reason in zip(members, reasons, strict=True)
            )
            floor = max(1, len(members) // 2)
            assert reasons.count(None) >= min(floor, len(members) - below)

    @invariant()
    def ejected_is_never_available(self) -> None:
        """Available means configured, healthy, without a reason against it; one generation, one choice."""
        for key in self.keys:
            is_healthy = self.tracker.state(key) is HealthState.HEALTHY
            assert self.tracker.is_available(key) is is_healthy is (self.tracker.reason(key) is None)
        choice = [(self.tracker.is_available(key), self.tracker.doubts_of(key)) for key in self.keys]
        assert self.choice_at.setdefault(self.tracker.generation, choice) == choice

    @invariant()
    def values_stay_in_range(self) -> None:
        """Counts and shares stay within their bounds, and exist for configured endpoints only."""
        assert self.tracker._records.by_key.keys() == self.configured.keys()
        for key, record in self.tracker._records.by_key.items():
            assert 0 <= record.probe_failures <= SETTINGS.unhealthy_threshold
            assert (record.ejected is None) == (record.cause is None)
            for model, level in record.levels.items():
                assert 0.0 <= level.fast <= 1.0
                assert 0.0 <= level.slow <= 1.0
                assert (level.doubted is not None) == (key in self.tracker.doubted(model))


HealthMachine.TestCase.settings = hypothesis_settings(max_examples=60, stateful_step_count=40)


TestHealthMachine = HealthMachine.TestCase
