"""Requests that break engines: distinguished from engines that break, remembered, forgiven, bounded."""

from __future__ import annotations

from extproc.health.poison import MAX_SUSPECTS, MEMORY_S, Poison
from extproc.values.evidence import FailureKind
from metadata_center.types import EndpointKey

A, B, C = (EndpointKey(f"10.0.0.{i}:8000") for i in (1, 2, 3))
RESET, ERROR = FailureKind.RESET, FailureKind.SERVER_ERROR


def test_one_endpoint_that_fails_proves_nothing_about_the_request() -> None:
    """However often the same endpoint fails at it, the request is not poison."""
    poison = Poison()
    assert poison.failed(1, {A: RESET}, 0.0) is None
    assert poison.failed(1, {A: RESET}, 1.0) is None
    assert not poison.is_poison(1, 1.0)


def test_two_endpoints_in_one_request_are_proof() -> None:
    """Both attempts of one request broke: poison at once, with nothing reported before."""
    poison = Poison()
    assert poison.failed(1, {A: RESET, B: RESET}, 0.0) == {}
    assert poison.is_poison(1, 1.0)
    assert not poison.is_poison(2, 1.0)


def test_a_retry_that_fails_elsewhere_takes_the_first_failure_back() -> None:
    """The same body failed at another endpoint: what was reported of the first is to be taken back, once."""
    poison = Poison()
    poison.failed(1, {A: ERROR}, 0.0)
    assert poison.failed(1, {B: ERROR}, 1.0) == {A: ERROR}
    assert poison.failed(1, {C: ERROR}, 2.0) == {}


def test_an_answer_forgives_the_request_and_blames_the_others() -> None:
    """One that failed at what can be answered is at fault after all."""
    poison = Poison()
    poison.failed(1, {A: RESET, B: ERROR}, 0.0)
    assert poison.answered(1, 1.0) == {A: RESET, B: ERROR}
    assert not poison.is_poison(1, 1.0)
    poison.failed(2, {A: RESET}, 0.0)
    assert poison.answered(2, 1.0) == {}
    assert len(poison) == 0


def test_what_is_old_is_forgotten() -> None:
    """After `MEMORY_S` a repaired engine is tried again, and two failures so far apart are no pair."""
    poison = Poison()
    poison.failed(1, {A: RESET, B: RESET}, 0.0)
    assert not poison.is_poison(1, MEMORY_S)
    assert poison.answered(1, MEMORY_S) == {}
    poison.failed(2, {A: RESET}, 0.0)
    assert poison.failed(2, {B: RESET}, MEMORY_S) is None


def test_memory_is_bounded() -> None:
    """However many bodies a client fails with, the latest are remembered, and few endpoints of each."""
    poison = Poison()
    keys = [EndpointKey(f"10.0.1.{number}:8000") for number in range(20)]
    for number in range(MAX_SUSPECTS + 50):
        poison.failed(number, dict.fromkeys(keys, RESET), 0.0)
    assert len(poison) == MAX_SUSPECTS
    assert not poison.is_poison(0, 0.0)
    assert poison.is_poison(MAX_SUSPECTS + 49, 0.0)
    assert len(poison.answered(MAX_SUSPECTS + 49, 0.0)) == 4
