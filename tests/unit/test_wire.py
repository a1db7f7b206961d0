"""Answers on the wire: parsed back by protobuf, they hold what Envoy 1.40 needs to act on them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st

from extproc.errors import Reason, RouterError
from extproc.protocol import wire
from extproc.protocol.machine import Kind
from extproc.protocol.wire import Answers
from extproc.server.bootstrap import template
from extproc.values.exchange import NO_OWNER, RequestHeaders
from extproc.values.headers import OWNER_HEADER

FIELDS = ("request_headers", "request_body", "request_trailers")
KEYS = ("10.0.0.1:8000", "10.0.0.2:8000", "[fd00::1]:8000")
EXTRA = (("x-envoy-max-retries", "2"),)


def parsed(data: bytes) -> Any:
    """An answer as Envoy reads it."""
    return pb.ProcessingResponse.FromString(data)


def headers_of(mutation: Any) -> dict[str, str]:
    """The headers a mutation sets; every one replaces what was there."""
    assert all(option.append_action == option.OVERWRITE_IF_EXISTS_OR_ADD for option in mutation.set_headers)
    return {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}


def metadata_of(message: Any) -> dict[str, Any]:
    """Dynamic metadata as plain values."""
    plain: dict[str, Any] = MessageToDict(message.dynamic_metadata)
    return plain


@pytest.mark.parametrize("field", FIELDS[:2])
def test_a_routing_answer_clears_the_route_and_mutates_a_header(field: str) -> None:
    """Envoy ignores `clear_route_cache` in an answer that mutates no header."""
    message = parsed(Answers("0.a").decision(field, KEYS, "pool", EXTRA))
    assert message.WhichOneof("response") == field
    common = getattr(message, field).response
    assert common.clear_route_cache
    assert headers_of(common.header_mutation) == {
        "x-tokenway-owner": "0.a",
        ":tokenway-owner": "0.a",
        "x-envoy-max-retries": "2",
    }
    assert not common.HasField("body_mutation")


def test_an_answer_to_trailers_carries_the_same_headers_and_metadata() -> None:
    """A message of trailers has no route to clear, but the rest of the decision."""
    message = parsed(Answers("0.a").decision("request_trailers", KEYS, "pool", EXTRA))
    assert message.WhichOneof("response") == "request_trailers"
    assert headers_of(message.request_trailers.header_mutation)["x-tokenway-owner"] == "0.a"
    assert metadata_of(message) == metadata_of(
        parsed(Answers("0.a").decision("request_body", KEYS, "pool", EXTRA))
    )


@given(st.lists(st.sampled_from(KEYS), max_size=6).map(tuple), st.sampled_from(FIELDS))
def test_endpoints_and_groups_are_in_lock_step(endpoints: tuple[str, ...], field: str) -> None:
    """Attempt i takes endpoint i and group i: there is one group per endpoint, each naming the cluster."""
    metadata = metadata_of(parsed(Answers("0.a").decision(field, endpoints, "pool")))
    groups = metadata["tokenway.route"]["priority_groups"]
    assert [group["clusters"] for group in groups] == [[{"cluster_name": "pool", "weight": 1.0}]] * max(
        1, len(endpoints)
    )
    assert len({group["name"] for group in groups}) == len(groups)
    if endpoints:
        assert metadata["envoy.lb"] == {"x-gateway-destination-endpoint": ",".join(endpoints)}
    else:
        assert "envoy.lb" not in metadata
    assert set(metadata) <= {"envoy.lb", "tokenway.route"}


@given(st.binary(max_size=2000))
def test_a_new_body_comes_with_its_length(body: bytes) -> None:
    """An appended body merges into the decision: nothing is lost and the length is the body's."""
    decision = Answers("0.a").decision("request_body", KEYS, "pool", EXTRA)
    message = parsed(b"".join((decision, *Answers.new_body((body[:3], bytearray(body[3:]))))))
    common = message.request_body.response
    assert common.clear_route_cache
    assert common.body_mutation.body == body
    assert headers_of(common.header_mutation) == {
        "x-tokenway-owner": "0.a",
        ":tokenway-owner": "0.a",
        "x-envoy-max-retries": "2",
        "content-length": str(len(body)),
    }
    assert message.dynamic_metadata == parsed(decision).dynamic_metadata


@pytest.mark.parametrize("field", FIELDS)
def test_the_debug_id_joins_the_metadata(field: str) -> None:
    """An appended debug id adds its namespace and leaves the others and the answered message alone."""
    decision = Answers("0.a").decision(field, KEYS, "pool")
    message = parsed(decision + Answers.debug("id-1"))
    assert message.WhichOneof("response") == field
    assert metadata_of(message) == {**metadata_of(parsed(decision)), "tokenway": {"debug": "id-1"}}


def test_every_namespace_is_one_that_envoy_takes(bootstrap_namespaces: list[str]) -> None:
    """Metadata in a namespace that the shipped bootstrap does not list would be dropped in silence."""
    assert {wire.LB_NAMESPACE, wire.ROUTE_NAMESPACE, wire.DECISION_NAMESPACE} == set(bootstrap_namespaces)


@pytest.fixture
def bootstrap_namespaces() -> list[str]:
    """`receiving_namespaces` of the shipped bootstrap."""
    (listener,) = template()["static_resources"]["listeners"]
    filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    namespaces: list[str] = filters[0]["typed_config"]["metadata_options"]["receiving_namespaces"]["untyped"]
    return namespaces


def test_each_part_of_a_decision_shows_in_its_answer() -> None:
    """Message, order, cluster and headers each make another answer."""
    answers = Answers("0.a")
    made = [
        answers.decision("request_body", KEYS, "pool", EXTRA),
        answers.decision("request_headers", KEYS, "pool", EXTRA),
        answers.decision("request_body", KEYS[::-1], "pool", EXTRA),
        answers.decision("request_body", KEYS, "other", EXTRA),
        answers.decision("request_body", KEYS, "pool", ()),
    ]
    assert len(set(made)) == len(made)


def test_a_request_passed_on_has_no_owner() -> None:
    """Without endpoints nobody keeps books, and the owner header says so."""
    message = parsed(Answers("0.a").decision("request_headers", (), "pool"))
    headers = headers_of(message.request_headers.response.header_mutation)
    assert headers[OWNER_HEADER] == NO_OWNER


@pytest.mark.parametrize("retry_after_s", [None, 7])
def test_a_refusal_is_a_whole_response(retry_after_s: int | None) -> None:
    """Status, JSON body, content type and details are there; `retry-after` exactly if the refusal says so."""
    error = RouterError(Reason.NO_HEALTHY_ENDPOINT, "None is left.", retry_after_s=retry_after_s)
    message = parsed(wire.immediate(error.status, error.body(), "tokenway_x", error))
    reply = message.immediate_response
    assert reply.status.code == 503
    assert json.loads(reply.body)["error"]["code"] == "no_healthy_endpoint"
    assert reply.details == "tokenway_x"
    expected = {"content-type": "application/json"}
    if retry_after_s is not None:
        expected["retry-after"] = "7"
    assert headers_of(reply.headers) == expected


def test_an_answer_of_our_own_is_no_refusal() -> None:
    """Without an error there is no `retry-after`."""
    reply = parsed(wire.immediate(200, b"[]", "tokenway_answer", None)).immediate_response
    assert (reply.status.code, reply.body) == (200, b"[]")
    assert headers_of(reply.headers) == {"content-type": "application/json"}


def test_only_who_wants_the_first_chunk_overrides_the_mode() -> None:
    """The override asks for response chunks, keeps the body whole and leaves response headers alone."""
    plain = parsed(wire.AWAIT_BODY)
    assert plain.WhichOneof("response") == "request_headers"
    assert not plain.HasField("mode_override")
    mode = parsed(wire.AWAIT_BODY_AND_FIRST_CHUNK).mode_override
    names = processing_mode_pb2.ProcessingMode
    assert mode.request_body_mode == names.BUFFERED
    assert mode.response_body_mode == names.STREAMED
    assert mode.response_header_mode == names.SKIP
    assert mode.request_trailer_mode == names.SEND


@pytest.mark.parametrize("kind", list(wire.CONTINUE))
def test_a_message_is_let_through_by_its_own_kind(kind: Kind) -> None:
    """Envoy takes an answer of another kind for a spurious message."""
    message = parsed(wire.CONTINUE[kind])
    assert Kind(message.WhichOneof("response")) is kind
    assert not message.HasField("dynamic_metadata")


def test_each_message_is_known_by_its_kind() -> None:
    """The names of the six messages are the values of their kinds."""
    names = {field.name for field in pb.ProcessingRequest.DESCRIPTOR.oneofs_by_name["request"].fields}
    assert {Kind(name) for name in names} == set(Kind) - {Kind.DECIDED, Kind.REFUSED, Kind.CLOSED}


def test_headers_come_from_raw_values() -> None:
    """Envoy 1.40 fills `raw_value`; `value` is read where it is not, undecodable bytes do not fail."""
    message = pb.ProcessingRequest()
    http = message.request_headers
    http.end_of_stream = True
    for key, value, raw in [
        (":method", "", b"POST"),
        (":path", "/v1/chat/completions?x=1", b""),
        ("x-twice", "", b"first"),
        ("x-twice", "", b"last"),
        ("x-bad", "", b"a\xff"),
    ]:
        http.headers.headers.add(key=key, value=value, raw_value=raw)
    assert wire.request_headers(message) == RequestHeaders(
        method="POST",
        path="/v1/chat/completions?x=1",
        headers={
            ":method": "POST",
            ":path": "/v1/chat/completions?x=1",
            "x-twice": "last",
            "x-bad": "a\ufffd",
        },
        end_of_stream=True,
    )
