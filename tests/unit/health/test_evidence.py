"""Which endpoint failed, as endings and failed attempts show it."""

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


class Judged:
    """A `HealthEvidence` over two endpoints, and all that it reports."""

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
        """An attempt of the request failed; its end was reported before if `is_over`."""
        judged = AttemptFailed(request.record.request_id, None, AT, kind)
        self.evidence.attempt_failed(judged, at, None if is_over else request, 1.0)

    def doubted(self) -> set[EndpointKey]:
        """What to leave out for the model."""
        return set(self.health.doubted(MODEL))


@pytest.fixture
def judged() -> Judged:
    """Nothing was reported yet."""
    return Judged()


def test_a_failure_that_the_client_saw_counts_at_its_endpoint(judged: Judged) -> None:
    """It is counted, and the endpoint is doubted: no other failed."""
    judged.evidence.ended(ending(sent(), FailureKind.SERVER_ERROR, status=500))
    assert judged.failures == [(A, FailureKind.SERVER_ERROR)]
    assert judged.doubted() == {A}


def test_an_answer_says_that_all_is_well(judged: Judged) -> None:
    """Nothing is counted; answers, refusals and clients that left speak against none."""
    judged.evidence.ended(ending(sent()))
    judged.evidence.ended(refusal())
    judged.evidence.ended(ending(sent(), NoFailure.UNKNOWN, status=0))
    assert (judged.failures, judged.transitions, judged.doubted()) == ([], [], set())


def test_a_refused_connection_ejects_before_the_request_ends(judged: Judged) -> None:
    """It never arrived, so nothing about the request can be the cause; its end counts it no second time."""
    request = sent()
    judged.failed(request, A, FailureKind.CONNECT_FAILURE)
    assert [(change.key, change.after) for change in judged.transitions] == [(A, HealthState.EJECTED)]
    request.endpoint = B
    judged.evidence.ended(ending(request, attempts=2))
    assert judged.failures == [(A, FailureKind.CONNECT_FAILURE)]


@pytest.mark.parametrize("is_over", [False, True])
def test_a_connection_that_is_not_made_in_time_speaks_against_its_endpoint(
    judged: Judged, is_over: bool
) -> None:
    """Once, whatever becomes of the request: it is doubted beside a peer, not ejected as if refused."""
    request = sent()
    if not is_over:
        judged.failed(request, A, FailureKind.CONNECT_TIMEOUT)
    assert judged.failures == []
    request.endpoint = B
    judged.evidence.ended(ending(request, attempts=2))
    if is_over:
        judged.failed(request, A, FailureKind.CONNECT_TIMEOUT, is_over=True)
    assert judged.failures == [(A, FailureKind.CONNECT_TIMEOUT)]
    assert (judged.transitions, judged.doubted()) == ([], {A})


def test_connections_that_time_out_at_two_are_no_fault_of_the_request(judged: Judged) -> None:
    """Each counts, also where the client left meanwhile; nothing arrived, so nothing is poison; both stay."""
    request = sent()
    judged.failed(request, A, FailureKind.CONNECT_TIMEOUT)
    request.endpoint = B
    judged.evidence.ended(ending(request, FailureKind.CONNECT_TIMEOUT, status=503, attempts=2))
    assert judged.failures == [(A, FailureKind.CONNECT_TIMEOUT), (B, FailureKind.CONNECT_TIMEOUT)]
    assert (judged.transitions, judged.poisoned, len(judged.poison), judged.doubted()) == ([], 0, 0, set())
    request = sent()
    judged.failed(request, A, FailureKind.CONNECT_TIMEOUT)
    request.endpoint = B
    judged.evidence.ended(ending(request, NoFailure.UNKNOWN, status=0, attempts=2))
    assert judged.failures[2:] == [(A, FailureKind.CONNECT_TIMEOUT)]


@pytest.mark.parametrize("is_over", [False, True])
def test_what_another_endpoint_answers_speaks_against_the_first(judged: Judged, is_over: bool) -> None:
    """Whether its failure is reported before the end or after it."""
    request = sent()
    if not is_over:
        judged.failed(request, A, FailureKind.RESET)
    request.endpoint = B
    judged.evidence.ended(ending(request, attempts=2))
    if is_over:
        assert judged.doubted() == set()
        judged.failed(request, A, FailureKind.RESET, is_over=True)
        judged.failed(request, A, FailureKind.RESET, is_over=True)  # reported twice counts once
    assert judged.failures == [(A, FailureKind.RESET)]
    assert judged.doubted() == {A}


def test_what_two_fail_at_is_the_requests_own_fault(judged: Judged) -> None:
    """Both are counted, neither is doubted, and the request is known from then on."""
    request = sent()
    judged.failed(request, A, FailureKind.RESET)
    request.endpoint = B
    judged.evidence.ended(ending(request, FailureKind.RESET, attempts=2, status=503))
    assert dict(judged.failures) == {A: FailureKind.RESET, B: FailureKind.RESET}
    assert (judged.doubted(), judged.poisoned) == (set(), 1)
    assert judged.poison.is_poison(request.fingerprint, 2.0)


def test_an_answer_blames_those_that_failed_at_what_was_held_for_poison(judged: Judged) -> None:
    """The engines were at fault after all."""
    request = sent()
    judged.failed(request, A, FailureKind.RESET)
    request.endpoint = B
    judged.evidence.ended(ending(request, FailureKind.RESET, attempts=2, status=503))
    again = sent("again")
    judged.evidence.ended(ending(again))
    assert judged.doubted() == {B}
    assert len(judged.poison) == 0


def test_a_failure_about_a_stored_response_speaks_against_none(judged: Judged) -> None:
    """Clients can name any: a 404 may be about that."""
    request = sent()
    request.builds_on = True
    judged.evidence.ended(ending(request, FailureKind.MISSING_MODEL, status=404))
    assert judged.failures == [(A, FailureKind.MISSING_MODEL)]
    assert judged.doubted() == set()


def test_requests_that_wait_for_their_attempts_are_bounded(judged: Judged) -> None:
    """The oldest is let go; what is reported of it later counts nowhere."""
    for number in range(MAX_UNSETTLED + 1):
        request = sent(str(number))
        request.endpoint = B
        judged.evidence.ended(ending(request, attempts=2))
    for name in ("0", "1"):
        failed = AttemptFailed(RequestId(name), None, AT, FailureKind.RESET)
        judged.evidence.attempt_failed(failed, A, None, 2.0)
    assert judged.failures == [(A, FailureKind.RESET)]
