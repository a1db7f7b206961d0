"""What failed attempts say of endpoints, of a request and of its client."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest

from extproc.health.states import HealthState
from extproc.request.responses import response_key
from extproc.request.rules import ModelRules, Rule
from extproc.values.evidence import FailureKind
from extproc.values.headers import REQUEST_ID_HEADER
from extproc.values.outcomes import Ended
from extproc.values.placements import Decision
from metadata_center.types import EndpointKey
from tests.conftest import (
    CLUSTER,
    MODEL,
    Rig,
    build_rig,
    chat,
    endpoint,
    identities,
    request_line,
)

KEYS = tuple(endpoint(number).key for number in range(3))


def endpoints_of(decision: Decision) -> list[EndpointKey]:
    """What Envoy is to try, in order."""
    return identities(",".join(decision.plan.endpoints))


def test_failed_attempts_eject_and_are_reported(rig: Rig) -> None:
    """A refused connection ejects at once; the report of changes of health is called once."""
    rig.decide()
    bad = rig.chosen()
    rig.failed("r", bad)
    rig.failed("r", bad)
    assert [(change.key, change.after) for change in rig.transitions] == [(bad, HealthState.EJECTED)]
    assert rig.ending.endpoints[bad].failures == 2
    rig.decide("next")
    assert rig.chosen("next") != bad


def failed_and_answered(rig: Rig, request_id: str, bad: EndpointKey, good: EndpointKey) -> None:
    """A request breaks at one endpoint, and the other one answers it."""
    rig.decide(request_id, chat(request_id))
    rig.failed(request_id, bad, FailureKind.RESET)
    rig.end(request_id, endpoint=good, attempts=2)


def test_what_another_endpoint_answers_is_the_first_ones_fault() -> None:
    """`passive_threshold` requests that break at one endpoint and not at the next eject it."""
    rig = build_rig([endpoint(0), endpoint(1)])
    for number in range(3):
        assert rig.transitions == []
        failed_and_answered(rig, str(number), KEYS[0], KEYS[1])
    assert [(change.key, change.after) for change in rig.transitions] == [(KEYS[0], HealthState.EJECTED)]
    assert rig.metric("tokenway_endpoint_failures_total", endpoint=KEYS[0], kind="reset") == 3


@pytest.mark.parametrize("order", ["before", "after"])
def test_what_several_fail_at_is_the_requests_fault(order: str) -> None:
    """A request that breaks two endpoints ejects and doubts neither, in whatever order that is reported."""
    rig = build_rig()
    for number in range(10):
        rig.decide(str(number), chat(f"poison {number}"))
        choice, snapshot = rig.record(str(number)).choice, rig.record(str(number)).snapshot
        assert choice is not None
        assert snapshot is not None
        first, second = (snapshot.keys[row] for row in choice.order[:2])
        end = {"endpoint": second, "attempts": 2, "status": 503, "ended": Ended.UPSTREAM_RESET}
        if order == "before":
            rig.failed(str(number), first, FailureKind.RESET)
            rig.failed(str(number), second, FailureKind.RESET)
            rig.end(str(number), **end)
        else:
            rig.end(str(number), **end)
            rig.failed(str(number), second, FailureKind.RESET)
            rig.failed(str(number), first, FailureKind.RESET)
    assert rig.transitions == []
    assert not rig.scheduling.health.doubted(MODEL)
    assert rig.metric("tokenway_poison_requests_total") == 10


def test_a_late_report_of_a_failed_attempt_counts() -> None:
    """Envoy's two logs come in any order: what the end left open is judged when that comes."""
    rig = build_rig([endpoint(0), endpoint(1)])
    for number in range(6):
        rig.decide(str(number), chat(str(number)))
        if rig.chosen(str(number)) == KEYS[0]:
            rig.end(str(number), endpoint=KEYS[1], attempts=2)
            assert not rig.scheduling.health.doubted(MODEL)
            rig.failed(str(number), KEYS[0], FailureKind.RESET)
            break
        rig.end(str(number))
    assert set(rig.scheduling.health.doubted(MODEL)) == {KEYS[0]}


def test_known_poison_is_tried_once() -> None:
    """The same body again gets one endpoint without fallback; an answer clears it and blames the others."""
    rig = build_rig()
    body = chat("poison")
    first, second, _ = endpoints_of(rig.decide("a", body))
    rig.failed("a", EndpointKey(first), FailureKind.RESET)
    rig.end("a", endpoint=EndpointKey(second), attempts=2, status=503, ended=Ended.UPSTREAM_RESET)
    again = rig.decide("b", body)
    assert endpoints_of(again) == [rig.chosen("b")]
    assert len(endpoints_of(rig.decide("c", chat("another")))) == 3
    rig.end("b")
    assert len(endpoints_of(rig.decide("d", body))) > 1
    assert set(rig.scheduling.health.doubted(MODEL)) == {EndpointKey(first), EndpointKey(second)} - {
        rig.chosen("b")
    }


def test_a_retrying_client_ejects_none() -> None:
    """The same body failing with 500 at one endpoint after another speaks against the body alone."""
    rig = build_rig()
    for number in range(12):
        rig.decide(str(number), chat("poison"))
        rig.end(str(number), endpoint=KEYS[number % 3], status=500, ended=Ended.UPSTREAM_ERROR)
    assert rig.transitions == []
    assert not rig.scheduling.health.doubted(MODEL)


def test_explain_says_why_an_endpoint_was_left_out() -> None:
    """A doubted endpoint is in the record, with the reason, and not among the candidates."""
    rig = build_rig()
    rig.scheduling.health.attempt_failed(KEYS[0], FailureKind.ERROR_IN_ANSWER, 0.0, MODEL)
    rig.scheduling.health.attempt_failed(KEYS[2], FailureKind.MISSING_MODEL, 0.0, MODEL)
    rig.decide()
    assert rig.record().filtered == (
        (KEYS[0], "fails more than its peers: error_in_answer"),
        (KEYS[2], "does not have this model"),
    )
    assert rig.chosen() == KEYS[1]


def test_a_model_that_one_lacks_goes_to_the_others_and_that_one_serves_the_rest() -> None:
    """404 for an adapter leaves the endpoint out for the adapter alone; where all lack it, all are asked."""
    rules = (
        ModelRules(MODEL, (Rule(CLUSTER),)),
        ModelRules("adapter", (Rule(CLUSTER, lora="adapter"),)),
    )
    rig = build_rig([endpoint(0), endpoint(1)], models=rules)
    adapter = orjson.dumps({"model": "adapter", "messages": [{"role": "user", "content": "hi"}]})
    for key in (KEYS[0], KEYS[1]):
        rig.decide(f"a {key}", adapter)
        rig.end(f"a {key}", endpoint=key, status=404)
        rig.decide(f"b {key}", adapter)
        left_out = {found for found, _ in rig.record(f"b {key}").filtered}
        assert left_out == ({KEYS[0]} if key == KEYS[0] else set())
        rig.decide(f"m {key}")
        assert rig.record(f"m {key}").filtered == ()
    assert rig.transitions == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/rerank", {"model": MODEL, "query": "hi", "documents": ["a"]}),
        ("/v1/embeddings", {"model": MODEL, "input": "hi"}),
        ("/v1/responses", {"model": MODEL, "input": "hi", "previous_response_id": "resp_unknown"}),
        ("/v1/responses", {"model": MODEL, "input": "hi", "conversation": {"id": "conv_unknown"}}),
    ],
)
def test_a_404_that_a_client_asks_for_leaves_none_out(path: str, body: dict[str, Any]) -> None:
    """An API that the model is not for, a response that is not there: the model is where it was."""
    rig = build_rig([endpoint(0), endpoint(1)])
    line = replace(request_line("a"), path=path)
    rig.gateway.decide(line, orjson.dumps(body))
    rig.end("a", endpoint=KEYS[0], status=404)
    rig.decide("b")
    assert rig.record("b").filtered == ()


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
def test_no_client_chooses_an_ejection_by_a_response_of_its_own(status: int) -> None:
    """Requests that only the holder of a response may answer fail there alone, as often as a client likes."""
    rig = build_rig([endpoint(0), endpoint(1)])
    rig.scheduling.homes.learn(response_key("resp_1"), KEYS[0], 0.0)
    line = replace(request_line("a"), path="/v1/responses")
    body = orjson.dumps({"model": MODEL, "input": "hi", "previous_response_id": "resp_1"})
    for number in range(20):
        rig.gateway.decide(replace(line, headers={**line.headers, REQUEST_ID_HEADER: f"p{number}"}), body)
        assert rig.chosen(f"p{number}") == KEYS[0]
        rig.end(f"p{number}", endpoint=KEYS[0], status=status, ended=Ended.UPSTREAM_ERROR)
        rig.decide(f"h{number}")
        assert rig.record(f"h{number}").filtered == ()
        rig.end(f"h{number}", endpoint=KEYS[1])
    assert rig.transitions == []
    assert rig.ending.endpoints[KEYS[0]].failures == 20


def test_a_client_that_left_settles_nothing_but_the_trial() -> None:
    """An abort before the first token neither blames nor clears anybody, and lets the next trial begin."""
    rig = build_rig([endpoint(0), endpoint(1)])
    health = rig.scheduling.health
    health.attempt_failed(KEYS[0], FailureKind.RESET, 0.0, MODEL)
    rig.clock.advance(1.0)
    for number in range(20):
        rig.decide(str(number))
        if rig.chosen(str(number)) == KEYS[0]:
            break
    assert rig.chosen(str(number)) == KEYS[0]
    assert not health.trial_due(KEYS[0], MODEL, rig.clock())
    rig.end(str(number), ended=Ended.CLIENT_ABORT)
    assert health.trial_due(KEYS[0], MODEL, rig.clock())
    assert set(health.doubted(MODEL)) == {KEYS[0]}
