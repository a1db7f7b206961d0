"""Requests from their charge to their end: remembered once, released once, and what else hears of it."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from extproc.choosing.max_num_seqs import LimitSource
from extproc.choosing.replacements import SURE_REPLACEMENTS
from extproc.observing.metrics.collector import Metrics
from extproc.routing.ages import Ages
from extproc.routing.engines import Engines
from extproc.routing.running import LINGER_S, MAX_LINGERING, RunningRequests
from extproc.values.decisions import DecisionRecord
from extproc.values.inflight import Inflight
from extproc.values.requests import Operation
from metadata_center.history.running_blocks import RunningBlocks
from metadata_center.load.counters import Counters
from metadata_center.load.ledger import LedgerBounds
from metadata_center.load.table import LoadTable
from metadata_center.types import Charge, EndpointKey, RequestId

A, B = EndpointKey("10.0.0.1:8000"), EndpointKey("10.0.0.2:8000")
R = RequestId("r")
BLOCKS = [11, 12, 13]
LEASE_S = 60.0


class Course:
    """Running requests, and all that they report."""

    def __init__(self) -> None:
        self.load = LoadTable(Counters(), LedgerBounds(lease_s=LEASE_S, tombstone_s=10.0))
        self.load.retain(frozenset([A, B]))
        self.blocks = RunningBlocks()
        self.engines = Engines()
        self.registry = CollectorRegistry()
        self.freed = 0
        self.prefilled: list[Inflight] = []
        self.lost: list[tuple[Inflight, float]] = []
        self.running = RunningRequests(
            self.load,
            self.blocks,
            self.engines,
            Metrics(self.registry, "test"),
            self._free,
            self.prefilled.append,
            lambda request, now_s: self.lost.append((request, now_s)),
        )

    def _free(self) -> None:
        self.freed += 1

    def begin(self, request_id: RequestId = R, at: EndpointKey = A, due_s: float | None = None) -> Inflight:
        """A request with three blocks is charged and begins at time 0."""
        assert self.load.charge(Charge(request_id, at, 100, 200), 0.0, due_s)
        record = DecisionRecord(request_id=request_id, time_unix_s=0.0, data_age_s={})
        request = Inflight(record, Operation.CHAT, at, BLOCKS, "g", ("g",), 0.0, prefill_s=0.1)
        self.running.begin(request_id, request)
        return request

    def counted(self) -> tuple[list[int], list[int], list[int]]:
        """Requests and prefill tokens charged, and blocks that run, at A and B."""
        view = self.load.view(self.load.slots([A, B]))
        return list(view.requests), list(view.prefill_tokens), list(self.blocks.match(BLOCKS, (A, B)))


@pytest.fixture
def course() -> Course:
    """Nothing runs."""
    return Course()


def test_a_first_token_counts_once(course: Course) -> None:
    """It ends the prefill and frees room; a second one, or one of a stranger, is none."""
    request = course.begin()
    assert course.counted() == ([1, 0], [100, 0], [3, 0])
    assert course.running.first_token(R, 2.0, late=True) is request
    assert (request.first_token_s, request.first_byte_is_token) == (2.0, False)
    assert course.counted() == ([1, 0], [0, 0], [3, 0])
    assert course.freed == 1
    assert course.running.first_token(R, 3.0, late=False) is None
    assert course.running.first_token(RequestId("x"), 3.0, late=False) is None
    assert (request.first_token_s, course.freed) == (2.0, 1)


def test_a_prefill_that_is_due_is_taken_to_be_over(course: Course) -> None:
    """Once; the request goes on."""
    request = course.begin(due_s=1.0)
    course.running.advance(0.9)
    assert course.prefilled == []
    course.running.advance(1.0)
    course.running.advance(2.0)
    assert course.prefilled == [request]
    assert course.counted() == ([1, 0], [0, 0], [3, 0])
    assert course.load.prefill_since_s(course.load.slots([A])) == [1.0]


@pytest.mark.parametrize("completed", [True, False])
def test_blocks_of_what_completed_linger(course: Course, completed: bool) -> None:
    """For a while; those of anything else go at once, and either goes once."""
    request = course.begin()
    assert course.running.release(R, 5.0) is request
    assert course.running.finish(R, 5.0, completed=completed) is request
    assert course.running.finish(R, 5.0, completed=completed) is None
    assert course.running.get(R) is None
    assert course.counted() == ([0, 0], [0, 0], [3 if completed else 0, 0])
    assert len(course.running._lingering) == completed
    course.running.advance(5.0 + LINGER_S)
    assert course.counted() == ([0, 0], [0, 0], [0, 0])


def test_what_lingers_is_bounded(course: Course) -> None:
    """The oldest linger no longer."""
    for number in range(MAX_LINGERING + 3):
        course.begin(RequestId(str(number)))
        course.running.release(RequestId(str(number)), 0.0)
        course.running.finish(RequestId(str(number)), 0.0, completed=True)
    course.running.advance(0.0)
    assert len(course.running._lingering) == MAX_LINGERING


def test_a_request_that_moves_takes_charge_and_blocks_along(course: Course) -> None:
    """By a proxy's retry: room is free where it was. The same place again, or a stranger, changes nothing."""
    request = course.begin()
    course.running.moved(R, A, 1.0)
    course.running.moved(RequestId("x"), B, 1.0)
    assert course.freed == 0
    course.running.moved(R, B, 1.0)
    assert request.endpoint == B
    assert course.counted() == ([0, 1], [0, 100], [0, 3])
    assert course.freed == 1


def test_another_place_by_compare_and_set_is_recorded(course: Course) -> None:
    """The rendezvous has moved the charge by then; the first place was not reported."""
    request = course.begin()
    course.running.reassigned(R, B)
    course.running.reassigned(RequestId("x"), B)
    assert (request.endpoint, request.record.placed) == (B, B)
    assert list(course.blocks.match(BLOCKS, (A, B))) == [0, 3]


def test_a_lost_request_is_released_before_it_is_reported(course: Course) -> None:
    """A request that still runs has its lease anew."""
    request, other = course.begin(), RequestId("other")
    course.begin(other, B)
    course.running.alive(other, 30.0)
    course.running.advance(LEASE_S)
    assert course.lost == [(request, LEASE_S)]
    assert [kept.endpoint for kept in course.running] == [B]
    assert course.counted()[0] == [0, 1]
    assert course.registry.get_sample_value("tokenway_lease_expirations_total") == 1


def test_an_end_before_its_decision_is_no_request_of_ours(course: Course) -> None:
    """It leaves a tombstone, which voids the late charge."""
    assert course.running.release(R, 0.0) is None
    assert not course.load.charge(Charge(R, A, 1, 1), 1.0, None)
    assert len(course.running) == 0


def test_ages_are_those_of_the_last_change() -> None:
    """The first configuration is the first news of health as well."""
    ages = Ages(lambda now_s: now_s / 2)
    ages.configured(10.0)
    assert ages.of(12.0) == {"load": 6.0, "health": 2.0, "configuration": 2.0}
    ages.health_changed(15.0)
    ages.configured(18.0)
    assert ages.of(20.0) == {"load": 10.0, "health": 5.0, "configuration": 2.0}


def test_an_engine_that_begins_only_as_another_ends_is_known_to_be_full(course: Course) -> None:
    """By first tokens and ends alone, whatever its metrics say or do not say."""
    ids = [RequestId(str(number)) for number in range(2 * SURE_REPLACEMENTS + 4)]
    for request_id in ids:
        course.begin(request_id)
    running, waiting, now_s = ids[:4], ids[4:], 1.0
    for request_id in running:
        course.running.first_token(request_id, now_s, late=False)
    while waiting:
        limit = course.engines.sequence_limit(A)
        now_s += 1.0
        over, following = running.pop(0), waiting.pop(0)
        course.running.release(over, now_s)
        course.running.finish(over, now_s, completed=True)
        course.running.first_token(following, now_s + 0.5, late=False)
        running.append(following)
        if len(waiting) == SURE_REPLACEMENTS + 1:
            assert limit == (0, LimitSource.UNKNOWN)
    assert course.engines.sequence_limit(A) == (4, LimitSource.FIRST_TOKENS)
    assert course.engines.sequence_limit(B) == (0, LimitSource.UNKNOWN)


def test_a_request_without_a_first_token_gives_no_place(course: Course) -> None:
    """It was in nobody's way: an engine that refuses it decodes as many as before."""
    ids = [RequestId(str(number)) for number in range(4 * SURE_REPLACEMENTS)]
    for request_id in ids:
        course.begin(request_id)
    course.running.first_token(ids[0], 1.0, late=False)
    for request_id in ids[1:-1]:
        course.running.release(request_id, 2.0)
        course.running.finish(request_id, 2.0, completed=False)
    course.running.first_token(ids[-1], 3.0, late=False)
    assert course.engines.sequence_limit(A) == (0, LimitSource.UNKNOWN)
