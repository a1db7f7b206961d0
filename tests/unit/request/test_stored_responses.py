"""Requests about stored responses over real state: they go to the endpoint that holds them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from google.protobuf.json_format import MessageToDict

from extproc.observing.explain import recompute, render, to_json
from extproc.request.responses import response_key
from extproc.request.rules import ModelRules, Rule
from extproc.values.balancing import Algorithm, LoadBalancing
from extproc.values.evidence import FailureKind
from extproc.values.exchange import PassTo, RefuseAtOnce, RequestHeaders
from extproc.values.headers import REQUEST_ID_HEADER
from extproc.values.outcomes import Ended
from extproc.values.pending import Pending
from metadata_center.sharing.messages import RESPONSES_MARK
from metadata_center.types import EndpointKey, RequestId
from tests.conftest import (
    CLUSTER,
    DIALECT,
    MODEL,
    OWNER,
    Rig,
    answer_of,
    build_rig,
    decided,
    endpoint,
    identities,
)

KEYS = tuple(endpoint(number).key for number in range(3))
RESPONSES = "/v1/responses"
NOTHING = (0, 0, 0)


def ask(rig: Rig, request_id: str, **fields: Any) -> dict[str, Any]:
    """Decide a request of the Responses API; the answer to Envoy."""
    headers = RequestHeaders("POST", RESPONSES, {REQUEST_ID_HEADER: request_id}, end_of_stream=False)
    decision = decided(
        rig.gateway.decide(headers, orjson.dumps({"model": MODEL, "input": "hello", **fields}))
    )
    return MessageToDict(answer_of(decision))


def begins(rig: Rig, request_id: str, response_id: str) -> None:
    """The answer begins."""
    rig.gateway.answer_head(request_id, orjson.dumps({"id": response_id, "object": "response"}))


def made(rig: Rig, response_id: str, at: EndpointKey | None = None) -> EndpointKey:
    """Make a response, at an endpoint of one's own choice by a retry of Envoy's; returns where."""
    ask(rig, f"makes {response_id}")
    begins(rig, f"makes {response_id}", response_id)
    where = at or rig.chosen(f"makes {response_id}")
    rig.end(f"makes {response_id}", endpoint=where)
    return where


def line(
    rig: Rig, response_id: str, method: str = "GET", tail: str = "", **headers: str
) -> PassTo | RefuseAtOnce:
    """The verdict on a request line about a response."""
    verdict = rig.gateway.judge(RequestHeaders(method, f"{RESPONSES}/{response_id}{tail}", headers, True))
    assert isinstance(verdict, PassTo | RefuseAtOnce)
    return verdict


def goes_to(verdict: PassTo | RefuseAtOnce) -> EndpointKey:
    """The first endpoint."""
    assert isinstance(verdict, PassTo)
    return identities(verdict.plan.endpoints[0])[0]


def test_a_chain_of_responses_stays_where_it_began(rig: Rig) -> None:
    """However loaded its endpoint becomes: each turn is charged there and released once."""
    home = made(rig, "resp_0")
    for turn in range(10):
        ask(rig, f"turn {turn}", previous_response_id=f"resp_{turn}")
        assert rig.chosen(f"turn {turn}") == home
        assert rig.record(f"turn {turn}").holder == home
        begins(rig, f"turn {turn}", f"resp_{turn + 1}")
    assert rig.load(home)[0] == 10
    for turn in range(10):
        rig.end(f"turn {turn}")
    assert [rig.load(key) for key in KEYS] == [NOTHING] * 3


@pytest.mark.parametrize("algorithm", Algorithm)
def test_every_policy_yields_to_the_holder(algorithm: Algorithm) -> None:
    """What the policy would have chosen is recorded beside it, and can be computed again."""
    rig = build_rig(load_balancing=LoadBalancing(algorithm=algorithm))
    for number, home in enumerate(KEYS):
        made(rig, f"resp_{number}", home)
        ask(rig, f"r{number}", previous_response_id=f"resp_{number}")
        record = rig.record(f"r{number}")
        assert record.chosen == home
        assert rig.load(home)[0] == 1
        as_json = to_json(record)
        assert recompute(as_json) == tuple(as_json["choice"]["order"])
        assert "holds the response it builds on" in render(as_json)


def test_the_served_endpoint_holds_it_not_the_chosen_one(rig: Rig) -> None:
    """A fallback's answer is the fallback's, whether its start or only its end was reported."""
    ask(rig, "r")
    first = rig.chosen("r")
    other = next(key for key in KEYS if key != first)
    begins(rig, "r", "resp_1")
    rig.end("r", endpoint=other)
    assert goes_to(line(rig, "resp_1")) == other
    ask(rig, "s")
    other = next(key for key in KEYS if key != rig.chosen("s"))
    rig.started("s", other)
    begins(rig, "s", "resp_2")
    assert goes_to(line(rig, "resp_2")) == other


def test_a_response_can_be_cancelled_while_it_is_made(rig: Rig) -> None:
    """From its first bytes on; a background response's are all its bytes."""
    ask(rig, "r", background=True)
    begins(rig, "r", "resp_1")
    assert goes_to(line(rig, "resp_1", "POST", "/cancel")) == rig.chosen("r")


def test_an_end_before_the_head_is_no_harm(rig: Rig) -> None:
    """Two connections of Envoy report the two; nothing orders them."""
    ask(rig, "r")
    home = rig.chosen("r")
    rig.end("r")
    begins(rig, "r", "resp_1")
    assert goes_to(line(rig, "resp_1")) == home
    begins(rig, "unknown", "resp_2")
    assert len(rig.scheduling.homes) == 1


def test_requests_about_a_response_are_not_charged(rig: Rig) -> None:
    """Nothing is computed for them: no charge changes, now or when they end."""
    home = made(rig, "resp_1")
    verdict = line(rig, "resp_1")
    assert isinstance(verdict, PassTo)
    message = MessageToDict(pb.ProcessingResponse.FromString(DIALECT.pass_to(verdict)))
    assert identities(message["dynamicMetadata"]["envoy.lb"]["x-gateway-destination-endpoint"])[0] == home
    headers = message["requestHeaders"]["response"]["headerMutation"]["setHeaders"]
    assert OWNER not in str(headers)
    assert [rig.load(key) for key in KEYS] == [NOTHING] * 3


def test_a_holder_that_is_gone_leaves_the_404_to_another(rig: Rig) -> None:
    """Envoy asks the next one if the holder cannot be reached, twice, and only then."""
    home = made(rig, "resp_1")
    verdict = line(rig, "resp_1")
    assert isinstance(verdict, PassTo)
    first, again, other = identities(",".join(verdict.plan.endpoints))
    assert first == again == home != other
    assert (verdict.plan.retries, verdict.plan.pinned, verdict.plan.charged) == (2, True, False)
    answer = ask(rig, "r", previous_response_id="resp_1")
    assert identities(answer["dynamicMetadata"]["envoy.lb"]["x-gateway-destination-endpoint"])[0] == home
    assert "x-envoy-retry-on" in str(answer)
    assert "x-envoy-retry-on" not in str(ask(rig, "s"))


def test_ill_health_and_draining_do_not_hide_a_response(rig: Rig) -> None:
    """No other endpoint has it, so the holder is asked whatever is thought of it."""
    home = made(rig, "resp_1")
    for number in range(8):
        rig.failed(f"x{number}", home, FailureKind.CONNECT_FAILURE)
    assert not rig.scheduling.health.is_available(home)
    assert goes_to(line(rig, "resp_1", "DELETE")) == home
    ask(rig, "r", previous_response_id="resp_1")
    assert rig.chosen("r") == home
    draining = build_rig([endpoint(number) for number in range(3)])
    home = made(draining, "resp_1")
    draining.configure([replace(endpoint(n), draining=endpoint(n).key == home) for n in range(3)])
    assert goes_to(line(draining, "resp_1")) == home
    ask(draining, "r", previous_response_id="resp_1")
    assert draining.chosen("r") == home
    ask(draining, "s")
    assert draining.chosen("s") != home


def test_an_endpoint_that_left_holds_nothing(rig: Rig) -> None:
    """What builds on its responses goes anywhere; an engine says 404 by itself."""
    home = made(rig, "resp_1")
    rig.configure([endpoint(number) for number in range(3) if endpoint(number).key != home])
    assert goes_to(line(rig, "resp_1")) != home
    ask(rig, "r", previous_response_id="resp_1")
    assert rig.chosen("r") != home
    assert rig.record("r").holder is None


def test_what_is_unknown_goes_to_any_endpoint(rig: Rig) -> None:
    """And is refused only where no endpoint is there."""
    assert goes_to(line(rig, "resp_unknown")) in KEYS
    rig.configure([])
    verdict = line(rig, "resp_unknown")
    assert isinstance(verdict, RefuseAtOnce)
    assert verdict.error.status == 503


def test_a_response_of_a_closed_model_is_closed() -> None:
    """Knowing an id opens nothing that the request's headers do not."""
    rule = Rule(CLUSTER, headers={"x-tier": "gold"}, subset={"tier": "gold"})
    members = [endpoint(0, labels={"tier": "gold"}), endpoint(1)]
    rig = build_rig(members, models=[ModelRules(MODEL, (rule, Rule(CLUSTER, subset={"tier": "iron"})))])
    rig.scheduling.homes.learn(response_key("resp_1"), KEYS[0], 0.0)
    assert goes_to(line(rig, "resp_1", **{"x-tier": "gold"})) == KEYS[0]
    assert isinstance(line(rig, "resp_1"), RefuseAtOnce)


def test_a_conversation_stays_together(rig: Rig) -> None:
    """Once one of its turns was answered; a refused turn settles nothing."""
    ask(rig, "0", conversation="conv_1")
    rig.end("0", status=400)
    ask(rig, "1", conversation="conv_1")
    assert rig.record("1").holder is None
    home = rig.chosen("1")
    rig.end("1")
    for turn in range(2, 9):
        ask(rig, f"{turn}", conversation={"id": "conv_1"} if turn % 2 else "conv_1")
        assert rig.chosen(f"{turn}") == home
    ask(rig, "other", conversation="conv_2")
    assert rig.record("other").holder is None


def test_a_lost_answer_still_has_its_place(rig: Rig) -> None:
    """A client that left early may ask for its response later: its head was seen."""
    ask(rig, "r", stream=True)
    home = rig.chosen("r")
    begins(rig, "r", "resp_1")
    rig.end("r", ended=Ended.CLIENT_ABORT, status=200)
    assert goes_to(line(rig, "resp_1")) == home


def test_others_are_informed_once(rig: Rig) -> None:
    """Of each response when it is seen, and again only if it lives elsewhere after all."""
    ask(rig, "r")
    begins(rig, "r", "resp_1")
    rig.end("r", status=500)  # no prompt is cached then
    (one,) = rig.shared
    other = build_rig()
    assert other.scheduling.homes.hear(*one, other.clock())
    assert goes_to(line(other, "resp_1")) == one[0]
    assert one[1][0] == RESPONSES_MARK
    assert not other.scheduling.homes.hear(KEYS[0], [1, 2], 0.0)


def test_compare_and_set_does_not_move_what_is_held() -> None:
    """The rendezvous is not asked where there is nothing to choose."""

    def reserve(_: RequestId, __: object) -> Pending[EndpointKey | None]:
        raise AssertionError

    rig = build_rig(reserve=reserve)
    rig.ending.stored.settle(response_key("resp_1"), KEYS[2], 0.0)
    ask(rig, "r", previous_response_id="resp_1")
    assert rig.chosen("r") == KEYS[2]
