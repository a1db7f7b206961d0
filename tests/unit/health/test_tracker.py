"""The health state machine: which endpoints may be chosen after which events."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.health.doubts import MAX_MODELS
from extproc.health.failures import MAY_BE_THE_CLIENTS
from extproc.health.levels import MEMORY_S, MISS_S, TRIAL_LEASE_S, TRIAL_S
from extproc.health.settings import HealthSettings
from extproc.health.states import HealthState, ProbeFailure, Transition
from extproc.health.tracker import HealthTracker
from extproc.values.evidence import FailureKind
from metadata_center.types import EndpointKey
from tests.unit.tracked import (
    ENDPOINTS_FAULTS,
    NOT_REFUSED,
    SETTINGS,
    A,
    B,
    C,
    D,
    candidates,
    endpoint,
    fail,
    refuse,
    replace_endpoints,
    tracker,
)


def test_new_endpoint_is_available_and_due_at_once() -> None:
    """An endpoint counts as healthy until proven otherwise, and its first probe is overdue."""
    built = tracker(A)
    assert built.is_available(A)
    assert built.reason(A) is None
    assert built.next_probe_due(A) == float("-inf")


def test_connect_failure_ejects_at_once() -> None:
    """One refused connection ejects, even the last endpoint: no server listens there."""
    built = tracker(A)
    assert refuse(built, A, 10.0) == Transition(
        A, HealthState.HEALTHY, HealthState.EJECTED, "connect_failure"
    )
    assert not built.is_available(A)
    assert built.reason(A) == "traffic failed: connect_failure"


@pytest.mark.parametrize("kind", ENDPOINTS_FAULTS)
def test_alone_in_failing_is_doubted_at_once_and_ejected_at_the_threshold(kind: FailureKind) -> None:
    """One failure leaves it out of the choice where a peer is; `passive_threshold` in a row eject it."""
    built = tracker(A, B)
    built.attempt_succeeded(B, 0.0)
    fail(built, A, kind, 1)
    assert built.is_available(A)
    assert candidates(built, (A, B), 0.0) == [B]
    assert built.doubt(A, "") == f"fails more than its peers: {kind.value}"
    fail(built, A, kind, SETTINGS.passive_threshold - 2)
    assert built.is_available(A)
    (transition,) = built.attempt_failed(A, kind, 0.0)
    assert (transition.after, transition.reason) == (HealthState.EJECTED, kind.value)


@pytest.mark.parametrize("kind", sorted(MAY_BE_THE_CLIENTS))
def test_what_a_client_can_cause_weighs_half(kind: FailureKind) -> None:
    """One 400 or 429 doubts none, two in a row do; a run twice as long ejects one that is alone in it."""
    built = tracker(A, B)
    built.attempt_succeeded(B, 0.0)
    fail(built, A, kind, 1)
    assert candidates(built, (A, B), 0.0) == [A, B]
    fail(built, A, kind, 1)
    assert candidates(built, (A, B), 0.0) == [B]
    fail(built, A, kind, 4)
    assert built.is_available(A)
    fail(built, A, kind, 1)
    assert not built.is_available(A)


def test_success_of_traffic_takes_back() -> None:
    """A doubt is over when a few answers have come: none is left of a hiccup."""
    built = tracker(A, B)
    built.attempt_succeeded(B, 0.0)
    fail(built, A, FailureKind.RESET, SETTINGS.passive_threshold - 1)
    for _ in range(5):
        built.attempt_succeeded(A, 0.0)
    assert not built.doubted("")
    fail(built, A, FailureKind.RESET, SETTINGS.passive_threshold - 1)
    assert built.is_available(A)


@pytest.mark.parametrize("kind", NOT_REFUSED)
def test_the_only_endpoint_stays_whatever_fails(kind: FailureKind) -> None:
    """With no peer to do better, failures neither eject nor doubt; only a refused connection does."""
    built = tracker(A)
    fail(built, A, kind, 100)
    assert candidates(built, (A,), 0.0) == [A]
    refuse(built, A)
    assert not built.is_available(A)


@pytest.mark.parametrize("kind", NOT_REFUSED)
def test_what_every_peer_fails_at_ejects_none(kind: FailureKind) -> None:
    """An error that all give in turn, as to a client's bad requests, leaves all of them candidates."""
    built = tracker(A, B, C)
    for turn in range(30):
        for key in (A, B, C):
            built.attempt_failed(key, kind, float(turn))
    assert all(built.is_available(key) for key in (A, B, C))
    assert candidates(built, (A, B, C), 30.0) == [A, B, C]


@pytest.mark.parametrize("members", [2, 3, 4])
@pytest.mark.parametrize("kind", [FailureKind.SERVER_ERROR, FailureKind.REFUSED])
def test_failures_that_half_of_all_requests_bring_along_eject_none(members: int, kind: FailureKind) -> None:
    """A client whose every request fails anywhere, beside one whose requests do not, ejects none.

    Chance alone makes an endpoint look broken when it had all of the bad requests and its peers none; that
    is so in the first moments of a few of a hundred runs.
    """
    ejected_runs = 0
    for seed in range(100):
        rng, keys = random.Random(seed), (A, B, C, D)[:members]
        built = tracker(*keys)
        for number in range(300):
            now_s = number / 50
            found = candidates(built, keys, now_s)
            key = found[int(rng.random() * len(found))]
            if key in built.doubted(""):
                built.trial_began(key, "", now_s)
            if rng.random() < 0.5:
                built.attempt_succeeded(key, now_s)
            else:
                built.attempt_failed(key, kind, now_s)
        ejected_runs += any(not built.is_available(key) for key in keys)
    assert ejected_runs <= 10


def test_a_flapping_engine_is_left_out_but_not_ejected() -> None:
    """Every other answer an error, its peer without: doubted throughout, available for trials."""
    built = tracker(A, B)
    for number in range(20):
        built.attempt_succeeded(B, float(number))
        built.attempt_failed(A, FailureKind.ERROR_IN_ANSWER, float(number))
        assert A in built.doubted("")
        built.attempt_succeeded(A, float(number))
    assert A in built.doubted("")
    assert built.is_available(A)


def test_one_trial_at_a_time_and_less_often_as_they_fail() -> None:
    """A doubted endpoint gets one request, then no other until that ended; each failure doubles the wait."""
    built = tracker(A, B)
    built.attempt_failed(A, FailureKind.REFUSED, 0.0)
    built.attempt_failed(A, FailureKind.REFUSED, 0.0)
    assert candidates(built, (A, B), 0.0) == [B]
    now_s, waits_s = TRIAL_S, []
    for _ in range(3):
        assert candidates(built, (A, B), now_s) == [A, B]
        built.trial_began(A, "", now_s)
        assert candidates(built, (A, B), now_s) == [B]
        built.attempt_failed(A, FailureKind.REFUSED, now_s)
        wait_s = 0.0
        while candidates(built, (A, B), now_s + wait_s) == [B]:
            wait_s += TRIAL_S
        waits_s.append(wait_s)
        now_s += wait_s
    assert waits_s == [2 * TRIAL_S, 4 * TRIAL_S, 8 * TRIAL_S]


def test_a_first_token_or_silence_ends_a_trial() -> None:
    """The next trial comes soon after a first token, at once if the client left, or after the lease."""
    built = tracker(A, B)
    built.attempt_failed(A, FailureKind.STALLED, 0.0)
    built.trial_began(A, "", 1.0)
    assert not built.trial_due(A, "", 2.0)
    built.alive(A, "", 2.0)
    assert built.trial_due(A, "", 2.0 + TRIAL_S)
    built.trial_began(A, "", 3.0)
    built.undecided(A, "", 3.1)
    assert built.trial_due(A, "", 3.1)
    built.trial_began(A, "", 4.0)
    assert built.trial_due(A, "", 4.0 + TRIAL_LEASE_S)


def test_a_success_of_another_model_keeps_from_ejection() -> None:
    """What fails at one model and answers for another is left out for the one alone."""
    built = tracker(A, B)
    for now_s in range(10):
        built.attempt_succeeded(B, now_s, "x")
        built.attempt_failed(A, FailureKind.SERVER_ERROR, now_s, "x")
        built.attempt_succeeded(A, now_s + 0.5, "y")
    assert built.is_available(A)
    assert A in built.doubted("x")
    assert not built.doubted("y")
    assert built.doubts_of(A) == ["x"]


def test_a_model_that_is_missing_is_missing_there_alone() -> None:
    """One 404 leaves the endpoint out for that model, for a while; never for others, and never ejected."""
    built = tracker(A, B)
    fail(built, A, FailureKind.MISSING_MODEL, 50)
    assert built.is_available(A)
    assert candidates(built, (A, B), 0.0) == [B]
    assert built.doubt(A, "") == "does not have this model"
    assert not built.doubted("another")
    assert candidates(built, (A, B), MISS_S) == [A, B]
    built.trial_began(A, "", MISS_S)
    built.attempt_succeeded(A, MISS_S + 1)
    assert not built.doubted("")


def test_a_404_of_an_endpoint_that_has_the_model_needs_three() -> None:
    """Where the model was answered for lately, a single 404 is about something else in the request."""
    built = tracker(A, B)
    built.attempt_succeeded(A, 0.0)
    fail(built, A, FailureKind.MISSING_MODEL, 2)
    built.attempt_succeeded(A, 1.0)
    fail(built, A, FailureKind.MISSING_MODEL, 2, 2.0)
    assert not built.doubted("")
    fail(built, A, FailureKind.MISSING_MODEL, 1, 3.0)
    assert A in built.doubted("")


def test_a_reload_or_another_process_forgets_what_was_missed() -> None:
    """A new configuration asks again; so does a refused connection: what listens there next is new."""
    built = tracker(A, B)
    fail(built, A, FailureKind.MISSING_MODEL, 1)
    replace_endpoints(built, [endpoint(A), endpoint(B)])
    assert not built.doubted("")
    fail(built, A, FailureKind.MISSING_MODEL, 1)
    refuse(built, A)
    assert not built.doubted("")


def test_a_failure_can_be_taken_back() -> None:
    """What turns out to be the request's fault leaves no doubt behind."""
    built = tracker(A, B)
    built.attempt_failed(A, FailureKind.SERVER_ERROR, 0.0)
    assert A in built.doubted("")
    built.retract(A, FailureKind.SERVER_ERROR, 0.0)
    assert not built.doubted("")


def test_models_remembered_are_bounded() -> None:
    """The model not heard of for longest is forgotten, with its doubt."""
    built = tracker(A, B)
    for number in range(MAX_MODELS + 10):
        built.attempt_failed(A, FailureKind.RESET, float(number), f"model {number}")
    assert len(built.doubts_of(A)) == MAX_MODELS
    assert not built.doubted("model 0")


def test_old_failures_are_forgotten() -> None:
    """After `MEMORY_S` without an answer an endpoint that was not doubted starts afresh."""
    built = tracker(A, B)
    built.attempt_succeeded(B, 0.0)
    fail(built, A, FailureKind.REFUSED, 1)
    built.attempt_failed(A, FailureKind.REFUSED, MEMORY_S + 1)
    assert not built.doubted("")


# The floor.


@pytest.mark.parametrize(
    ("members", "ratio", "floor"),
    [(1, 0.5, 1), (2, 0.5, 1), (3, 0.5, 1), (4, 0.5, 2), (4, 0.0, 1), (3, 1.0, 3)],
)
def test_probes_never_eject_below_the_floor(members: int, ratio: float, floor: int) -> None:
    """However all probes fail, so many endpoints stay: half of them by default, and one at least."""
    keys = (A, B, C, D)[:members]
    built = tracker(*keys, settings=HealthSettings(min_available_ratio=ratio))
    for turn in range(10):
        for key in keys:
            built.probe_failed(key, float(turn), "timeout", ProbeFailure.TIMEOUT)
            built.probe_failed(key, float(turn), "status 503")
    assert sum(map(built.is_available, keys)) == floor
    assert built.withheld > 0


def test_a_reload_moves_the_floor() -> None:
    """What is configured later counts from then on, as every other threshold does."""
    built = tracker(A, B, settings=HealthSettings(min_available_ratio=1.0))
    for turn in range(10):
        built.probe_failed(A, float(turn), "status 503")
    assert built.is_available(A)
    built.configure(HealthSettings(min_available_ratio=0.5))
    built.probe_failed(A, 10.0, "status 503")
    assert not built.is_available(A)


def test_refused_connections_bring_back_what_may_be_well() -> None:
    """When connections are refused where others were ejected for less, those are the better choice."""
    built = tracker(A, B)
    fail(built, A, FailureKind.RESET, 1)
    built.attempt_succeeded(B, 0.0)
    fail(built, A, FailureKind.RESET, SETTINGS.passive_threshold)
    assert not built.is_available(A)
    gone, back = built.attempt_failed(B, FailureKind.CONNECT_FAILURE, 1.0)
    assert (gone.key, gone.after) == (B, HealthState.EJECTED)
    assert back == Transition(A, HealthState.EJECTED, HealthState.HEALTHY, "too few others are left")


def test_other_clusters_do_not_count_as_company() -> None:
    """The floor is per cluster: no healthy endpoint elsewhere, and none that drains, replaces this one."""
    built = HealthTracker(SETTINGS)
    replace_endpoints(built, [endpoint(A, "m"), endpoint(B, "other"), endpoint(C, "m", draining=True)])
    for _ in range(9):
        built.probe_failed(A, 0.0, "status 500")
        built.attempt_failed(A, FailureKind.SERVER_ERROR, 0.0)
    assert built.is_available(A)


# Probes.


def test_time_outs_do_not_count_where_traffic_has_answers() -> None:
    """An engine that answers requests is busy, however late its probe; without answers it is ejected."""
    built = tracker(A, B)
    for number in range(10):
        now_s = number * SETTINGS.interval_s
        built.attempt_succeeded(A, now_s)
        built.probe_failed(A, now_s, "timeout", ProbeFailure.TIMEOUT)
    assert built.is_available(A)
    later_s = now_s + 100.0
    built.probe_failed(A, later_s, "timeout", ProbeFailure.TIMEOUT)
    built.probe_failed(A, later_s, "timeout", ProbeFailure.TIMEOUT)
    assert not built.is_available(A)


@pytest.mark.parametrize("by_first_token", [True, False])
def test_an_answer_brings_back_what_only_timed_out(by_first_token: bool) -> None:
    """Ejected for slow probes alone, an engine is back with its next answer, or the first token of one."""
    built = tracker(A, B)
    for _ in range(2):
        built.probe_failed(A, 0.0, "timeout", ProbeFailure.TIMEOUT)
    assert not built.is_available(A)
    (transition,) = built.alive(A, "", 1.0) if by_first_token else built.attempt_succeeded(A, 1.0)
    assert (transition.key, transition.after) == (A, HealthState.HEALTHY)


def test_probes_that_timed_out_get_longer() -> None:
    """Each time-out doubles the next probe's time, up to eight times; a quick answer alone ends that."""
    built = tracker(A, B)
    times_s = []
    for _ in range(5):
        times_s.append(built.probe_timeout_s(A))
        built.probe_failed(A, 0.0, "timeout", ProbeFailure.TIMEOUT)
    assert times_s == [1.0, 2.0, 4.0, 8.0, 8.0]
    built.probe_succeeded(A, 10.0, took_s=1.4)
    assert built.probe_timeout_s(A) == 8.0
    built.probe_succeeded(A, 20.0, took_s=0.1)
    assert built.probe_timeout_s(A) == 1.0


def test_refused_probes_eject_the_last() -> None:
    """No server listens: there is nothing to keep."""
    built = tracker(A)
    for _ in range(2):
        built.probe_failed(A, 0.0, "refused", ProbeFailure.REFUSED)
    assert not built.is_available(A)


def test_probe_before_the_ejection_time_does_not_recover() -> None:
    """After an ejection by traffic a good probe counts only once the time is over."""
    built = tracker(A)
    refuse(built, A, 10.0)
    assert built.next_probe_due(A) == 10.0 + SETTINGS.ejection_s
    assert built.probe_succeeded(A, 10.0 + SETTINGS.ejection_s - 0.1) == ()
    assert not built.is_available(A)
    (transition,) = built.probe_succeeded(A, 10.0 + SETTINGS.ejection_s)
    assert transition == Transition(A, HealthState.EJECTED, HealthState.HEALTHY, "probe succeeded")


def test_recovery_begins_with_a_trial() -> None:
    """A good probe does not show that answers are: what was ejected for those gets one request first."""
    built = tracker(A, B)
    built.attempt_succeeded(B, 0.0)
    fail(built, A, FailureKind.EMPTY_ANSWER, SETTINGS.passive_threshold)
    built.probe_succeeded(A, SETTINGS.ejection_s)
    assert candidates(built, (A, B), SETTINGS.ejection_s) == [A, B]
    built.trial_began(A, "", SETTINGS.ejection_s)
    assert candidates(built, (A, B), SETTINGS.ejection_s) == [B]
    (transition,) = built.attempt_failed(A, FailureKind.EMPTY_ANSWER, SETTINGS.ejection_s)
    assert transition.after is HealthState.EJECTED


def test_traffic_success_does_not_recover() -> None:
    """Only a probe ends such an ejection: late answers of earlier requests prove nothing."""
    built = tracker(A)
    refuse(built, A)
    assert built.attempt_succeeded(A, 100.0) == ()
    assert not built.is_available(A)


def test_ejection_time_doubles_in_a_row_up_to_the_limit() -> None:
    """Each ejection soon after the last recovery lasts twice as long, at most `max_ejection_s`."""
    built, now_s, lengths = tracker(A), 0.0, []
    for _ in range(8):
        refuse(built, A, now_s)
        due_s = built.next_probe_due(A)
        assert due_s is not None
        lengths.append(due_s - now_s)
        now_s = due_s
        built.probe_succeeded(A, now_s)
    assert lengths == [2, 4, 8, 16, 32, 60, 60, 60]
    now_s += SETTINGS.max_ejection_s
    refuse(built, A, now_s)
    assert built.next_probe_due(A) == now_s + SETTINGS.ejection_s


def test_failures_while_ejected_do_not_prolong() -> None:
    """Echoes of requests sent before the ejection neither extend it nor double the next."""
    built = tracker(A)
    fail(built, A, FailureKind.CONNECT_FAILURE, 20)
    assert built.probe_succeeded(A, SETTINGS.ejection_s)


def test_failed_probes_eject_and_one_good_probe_recovers() -> None:
    """`unhealthy_threshold` failed probes in a row eject; there is no time to sit out."""
    built = tracker(A, B)
    assert built.probe_failed(A, 0.0, "timeout") == ()
    assert built.next_probe_due(A) == SETTINGS.interval_s
    (transition,) = built.probe_failed(A, 5.0, "status 503")
    assert transition.reason == built.reason(A) == "probe failed: status 503"
    assert built.next_probe_due(A) == 5.0 + SETTINGS.recovery_interval_s
    assert built.probe_succeeded(A, 5.1)


def test_sleeping_engine_is_ejected_until_it_is_awake() -> None:
    """An engine that says it sleeps leaves at once and returns with the first success reported."""
    built = tracker(A)
    assert built.engine_asleep(A, 0.0)
    assert not built.engine_asleep(A, 1.0)
    assert built.reason(A) == "engine is asleep"
    assert built.probe_succeeded(A, 2.0)


def test_draining_is_reported_and_hides_ejection() -> None:
    """Draining makes unavailable whatever the health; lifting it reveals the health underneath."""
    built = tracker(A)
    (transition,) = replace_endpoints(built, [endpoint(A, draining=True)])
    assert (transition.before, transition.after) == (HealthState.HEALTHY, HealthState.DRAINING)
    assert built.attempt_failed(A, FailureKind.CONNECT_FAILURE, 0.0) == ()
    assert built.reason(A) == "draining"
    (transition,) = replace_endpoints(built, [endpoint(A)])
    assert (transition.before, transition.after) == (HealthState.DRAINING, HealthState.EJECTED)


def test_one_draining_mention_drains_the_endpoint() -> None:
    """An endpoint of two clusters is one server: it drains as soon as either says so."""
    built = HealthTracker(SETTINGS)
    replace_endpoints(built, [endpoint(A, "m"), endpoint(A, "n", draining=True)])
    assert built.state(A) is HealthState.DRAINING


def test_removed_endpoints_are_forgotten() -> None:
    """A removed endpoint is unavailable, ignored by events, and starts afresh when it returns."""
    built = tracker(A, B)
    fail(built, A, FailureKind.RESET, 1)
    refuse(built, A)
    replace_endpoints(built, [endpoint(B)])
    assert (built.state(A), built.reason(A), built.next_probe_due(A)) == (None, "not configured", None)
    assert not built.doubted("")
    assert built.probe_failed(A, 0.0, "timeout") == ()
    replace_endpoints(built, [endpoint(A), endpoint(B)])
    assert built.is_available(A)


def test_the_generation_shows_when_the_choice_changes() -> None:
    """Events that change no state and no doubts leave the generation alone; one that does moves it on."""
    built, keys = tracker(A, B), (B, C, A)
    assert [built.is_available(key) for key in keys] == [True, False, True]
    generation = built.generation
    built.attempt_failed(A, FailureKind.REFUSED, 0.0)
    built.probe_succeeded(B, 0.0)
    assert built.generation == generation
    built.attempt_failed(A, FailureKind.RESET, 0.0)
    assert built.generation > generation
    generation = built.generation
    refuse(built, B)
    assert built.generation > generation
    assert [built.is_available(key) for key in keys] == [False, False, True]


# Over all orders.


@given(
    members=st.integers(2, 4),
    kind=st.sampled_from(ENDPOINTS_FAULTS),
    draws=st.lists(st.integers(0, 3), min_size=60, max_size=60),
)
def test_alone_in_failing_takes_few_requests(members: int, kind: FailureKind, draws: list[int]) -> None:
    """Whichever candidate the router prefers, one that fails gets few requests and is ejected."""
    keys = (A, B, C, D)[:members]
    built, now_s, failed = tracker(*keys), 0.0, 0
    for draw in draws:
        now_s += 0.05
        found = candidates(built, keys, now_s)
        chosen = found[draw % len(found)]
        if chosen in built.doubted(""):
            built.trial_began(chosen, "", now_s)
        if chosen == A:
            failed += 1
            built.attempt_failed(A, kind, now_s)
        else:
            built.attempt_succeeded(chosen, now_s)
    assert failed <= SETTINGS.passive_threshold + 1
    assert failed < SETTINGS.passive_threshold or not built.is_available(A)
    assert all(built.is_available(key) for key in keys[1:])
    # Mended, it has its share again after a few trials.
    now_s += SETTINGS.max_ejection_s
    built.probe_succeeded(A, now_s)
    for _ in range(12):
        now_s += TRIAL_S
        if A in candidates(built, keys, now_s):
            if A in built.doubted(""):
                built.trial_began(A, "", now_s)
            built.attempt_succeeded(A, now_s)
    assert not built.doubted("")
    assert built.is_available(A)


@given(st.lists(st.tuples(st.permutations((A, B, C)), st.sampled_from(NOT_REFUSED)), max_size=30))
def test_requests_that_all_fail_alike_eject_none(
    rounds: list[tuple[list[EndpointKey], FailureKind]],
) -> None:
    """In whatever order each endpoint fails once, again and again, none is ejected."""
    built = tracker(A, B, C)
    for turn, (order, kind) in enumerate(rounds):
        for key in order:
            built.attempt_failed(key, kind, float(turn))
        assert all(built.is_available(key) for key in order)
