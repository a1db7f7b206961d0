"""Who failed, as endings and failed attempts tell it."""

from __future__ import annotations

import pytest

from extproc.health.evidence import MAX_UNSETTLED, HealthEvidence
from extproc.health.poison import Poison
from extproc.health.settings import HealthSettings
from extproc.health.states import HealthState, Transition
from extproc.health.tracker import HealthTracker
from extproc.values.endings import AttemptFailed
from extproc.values.endpoints import Endpoint
from extproc.values.evidence import FailureKind, NoFailure
from extproc.values.inflight import Inflight
from metadata_center.addresses import Address
from metadata_center.types import EndpointKey, RequestId
from tests.unit.ended import GROUP, MODEL, A, B, ending, refusal, sent

AT = Address("10.0.0.1", 8000)


class Told:
    """A `HealthEvidence` over two endpoints, and all that it tells."""

    def __init__(self) -> None:
        self.health = HealthTracker(HealthSettings())
        self.health.update({key: [Endpoint(key, GROUP, AT)] for key in (A, B)})
        self.failures: list[tuple[EndpointKey, FailureKind]] = []
        self.transitions: list[Transition] = []
        self.poisoned = 0
        self.poison = Poison()
        self.evidence = HealthEvidence(
            self.health,
            self.poison,
            lambda key, kind: self.failures.append((key, kind)),
            self._more_poison,
            self.transitions.append,
        )

    def _more_poison(self) -> None:
        self.poisoned += 1

    def failed(self, request: Inflight, at: EndpointKey, kind: FailureKind, *, is_over: bool = False) -> None:
        """An attempt of the request failed; its end was told before if `is_over`."""
        told = AttemptFailed(request.record.request_id, None, AT, kind)
        self.evidence.attempt_failed(told, at, None if is_over else request, 1.0)

    def doubted(self) -> set[EndpointKey]:
        """Whom to leave out for the model."""
        return set(self.health.doubted(MODEL))


@pytest.fixture
def told() -> Told:
    """Nothing was told yet."""
    return Told()


def test_a_failure_that_the_client_saw_counts_at_its_endpoint(told: Told) -> None:
    """It is counted, and the endpoint is doubted: nobody else failed."""
    told.evidence.ended(ending(sent(), FailureKind.SERVER_ERROR, status=500))
    assert told.failures == [(A, FailureKind.SERVER_ERROR)]
    assert told.doubted() == {A}


def test_an_answer_says_that_all_is_well(told: Told) -> None:
    """Nothing is counted; answers, refusals and clients that left speak against nobody."""
    told.evidence.ended(ending(sent()))
    told.evidence.ended(refusal())
    told.evidence.ended(ending(sent(), NoFailure.UNKNOWN, status=0))
    assert (told.failures, told.transitions, told.doubted()) == ([], [], set())


def test_a_refused_connection_ejects_before_the_request_ends(told: Told) -> None:
    """It never arrived, so nothing about the request can be the cause; its end counts it no second time."""
    request = sent()
    told.failed(request, A, FailureKind.CONNECT_FAILURE)
    assert [(change.key, change.after) for change in told.transitions] == [(A, HealthState.EJECTED)]
    request.endpoint = B
    told.evidence.ended(ending(request, attempts=2))
    assert told.failures == [(A, FailureKind.CONNECT_FAILURE)]


@pytest.mark.parametrize("is_over", [False, True])
def test_what_another_endpoint_answers_speaks_against_the_first(told: Told, is_over: bool) -> None:
    """Whether its failure is told before the end or after it."""
    request = sent()
    if not is_over:
        told.failed(request, A, FailureKind.RESET)
    request.endpoint = B
    told.evidence.ended(ending(request, attempts=2))
    if is_over:
        assert told.doubted() == set()
        told.failed(request, A, FailureKind.RESET, is_over=True)
        told.failed(request, A, FailureKind.RESET, is_over=True)  # told twice counts once
    assert told.failures == [(A, FailureKind.RESET)]
    assert told.doubted() == {A}


def test_what_two_fail_at_is_the_requests_own_fault(told: Told) -> None:
    """Both are counted, neither is doubted, and the request is known from then on."""
    request = sent()
    told.failed(request, A, FailureKind.RESET)
    request.endpoint = B
    told.evidence.ended(ending(request, FailureKind.RESET, attempts=2, status=503))
    assert dict(told.failures) == {A: FailureKind.RESET, B: FailureKind.RESET}
    assert (told.doubted(), told.poisoned) == (set(), 1)
    assert told.poison.is_poison(request.fingerprint, 2.0)


def test_an_answer_blames_those_who_failed_at_what_was_held_for_poison(told: Told) -> None:
    """The engines were at fault after all."""
    request = sent()
    told.failed(request, A, FailureKind.RESET)
    request.endpoint = B
    told.evidence.ended(ending(request, FailureKind.RESET, attempts=2, status=503))
    again = sent("again")
    told.evidence.ended(ending(again))
    assert told.doubted() == {B}
    assert len(told.poison) == 0


def test_a_failure_about_a_stored_response_speaks_against_nobody(told: Told) -> None:
    """Clients can name any: a 404 may be about that."""
    request = sent()
    request.builds_on = True
    told.evidence.ended(ending(request, FailureKind.MISSING_MODEL, status=404))
    assert told.failures == [(A, FailureKind.MISSING_MODEL)]
    assert told.doubted() == set()


def test_requests_that_wait_for_their_attempts_are_bounded(told: Told) -> None:
    """The oldest is let go; what is told of it later counts nowhere."""
    for number in range(MAX_UNSETTLED + 1):
        request = sent(str(number))
        request.endpoint = B
        told.evidence.ended(ending(request, attempts=2))
    for name in ("0", "1"):
        failed = AttemptFailed(RequestId(name), None, AT, FailureKind.RESET)
        told.evidence.attempt_failed(failed, A, None, 2.0)
    assert told.failures == [(A, FailureKind.RESET)]
