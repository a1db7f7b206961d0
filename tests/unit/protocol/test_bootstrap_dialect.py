"""Answers in the dialect of our own bootstrap: parsed back, they hold what Envoy 1.40 needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st

from extproc.protocol.bootstrap_dialect import (
    DECISION_NAMESPACE,
    LB_NAMESPACE,
    ROUTE_NAMESPACE,
    BootstrapDialect,
)
from extproc.server.envoys.bootstrap import template
from extproc.values.exchange import NO_OWNER, PassTo
from extproc.values.headers import OWNER_HEADER
from extproc.values.placements import Decision, Plan
from extproc.values.requests import Operation
from metadata_center.types import RequestId

KEYS = ("10.0.0.1:8000", "10.0.0.2:8000", "[fd00::1]:8000")
DIALECT = BootstrapDialect("0.a")


def plan(**changes: Any) -> Plan:
    """Three endpoints, two retries."""
    return replace(Plan("pool", KEYS, retries=2), rendered={}, **changes)


def decision(**changes: Any) -> Decision:
    """About a chat that keeps its body."""
    return replace(Decision(RequestId("id-1"), Operation.CHAT, True, plan()), **changes)


def answer(made: Decision, *, to_trailers: bool = False) -> Any:
    """As Envoy reads it."""
    return pb.ProcessingResponse.FromString(DIALECT.decision(made, to_trailers=to_trailers))


def passed(made: Plan, new_path: str | None = None) -> Any:
    """The answer to headers, as Envoy reads it."""
    return pb.ProcessingResponse.FromString(DIALECT.pass_to(PassTo(made, new_path)))


def headers_of(mutation: Any) -> dict[str, str]:
    """The headers a mutation sets; every one replaces what was there."""
    assert all(option.append_action == option.OVERWRITE_IF_EXISTS_OR_ADD for option in mutation.set_headers)
    return {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}


def metadata_of(message: Any) -> dict[str, Any]:
    """Dynamic metadata as plain values."""
    plain: dict[str, Any] = MessageToDict(message.dynamic_metadata)
    return plain


ROUTED = {"x-tokenway-owner": "0.a", ":tokenway-owner": "0.a", "x-envoy-max-retries": "2"}


@pytest.mark.parametrize("field", ["request_headers", "request_body"])
def test_a_routing_answer_clears_the_route_and_mutates_a_header(field: str) -> None:
    """Envoy ignores `clear_route_cache` in an answer that mutates no header."""
    message = answer(decision()) if field == "request_body" else passed(plan())
    assert message.WhichOneof("response") == field
    common = getattr(message, field).response
    assert common.clear_route_cache
    assert headers_of(common.header_mutation) == ROUTED
    assert not common.HasField("body_mutation")


def test_a_path_of_ours_replaces_the_clients() -> None:
    """Beside the decision, which is otherwise what it was."""
    for field, message in (
        ("request_headers", passed(plan(), "/v1/responses/a")),
        ("request_body", answer(decision(new_path="/v1/responses/a"))),
    ):
        common = getattr(message, field).response
        assert common.clear_route_cache
        assert headers_of(common.header_mutation) == {**ROUTED, ":path": "/v1/responses/a"}
        assert metadata_of(message) == metadata_of(answer(decision()))


def test_an_answer_to_trailers_carries_the_same_headers_and_metadata() -> None:
    """A message of trailers has no route to clear and no body, but the rest of the decision."""
    message = answer(decision(new_body=(b"x",), drops_encoding=True, shows_id=True), to_trailers=True)
    assert message.WhichOneof("response") == "request_trailers"
    assert headers_of(message.request_trailers.header_mutation) == ROUTED
    assert metadata_of(message) == metadata_of(answer(decision()))


@given(st.lists(st.sampled_from(KEYS), max_size=6).map(tuple))
def test_endpoints_and_groups_are_in_lock_step(endpoints: tuple[str, ...]) -> None:
    """Attempt i takes endpoint i and group i: there is one group per endpoint, each naming the cluster."""
    for message in (passed(Plan("pool", endpoints)), answer(decision(plan=Plan("pool", endpoints)))):
        metadata = metadata_of(message)
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


@pytest.mark.parametrize(
    ("changes", "headers"),
    [
        ({"timeout_s": 9.0001}, {"x-envoy-upstream-rq-timeout-ms": "9001"}),
        ({"first_byte_timeout_s": 2.5}, {"x-envoy-upstream-rq-per-try-timeout-ms": "2500"}),
        ({"pinned": True}, {"x-envoy-retry-on": "connect-failure,reset,refused-stream"}),
        ({"retries": 0}, {"x-envoy-max-retries": "0"}),
    ],
)
def test_bounds_and_retries_are_headers(changes: dict[str, Any], headers: dict[str, str]) -> None:
    """What a plan bounds goes to Envoy's router; what it leaves open is left to Envoy's configuration."""
    message = answer(decision(plan=plan(**changes)))
    assert headers_of(message.request_body.response.header_mutation) == {**ROUTED, **headers}
    bare = answer(decision(plan=Plan("pool", KEYS)))
    assert set(headers_of(bare.request_body.response.header_mutation)) == {OWNER_HEADER, ":tokenway-owner"}


@given(st.binary(max_size=2000), st.booleans())
def test_a_new_body_comes_with_its_length(body: bytes, drops_encoding: bool) -> None:
    """An appended body merges into the decision: nothing is lost and the length is the body's."""
    message = answer(decision(new_body=(body[:3], bytearray(body[3:])), drops_encoding=drops_encoding))
    common = message.request_body.response
    assert common.clear_route_cache
    assert common.body_mutation.body == body
    assert headers_of(common.header_mutation) == {**ROUTED, "content-length": str(len(body))}
    removed = list(common.header_mutation.remove_headers)
    assert removed == (["content-encoding"] if drops_encoding else [])
    assert message.dynamic_metadata == answer(decision()).dynamic_metadata


def test_an_encoding_that_was_none_goes_without_a_new_body() -> None:
    """`identity` is no coding: the body stays the client's."""
    common = answer(decision(drops_encoding=True)).request_body.response
    assert not common.HasField("body_mutation")
    assert list(common.header_mutation.remove_headers) == ["content-encoding"]


def test_the_id_joins_the_metadata() -> None:
    """It adds its namespace and leaves the others and the answered message alone."""
    message = answer(decision(shows_id=True))
    assert message.WhichOneof("response") == "request_body"
    assert metadata_of(message) == {**metadata_of(answer(decision())), "tokenway": {"debug": "id-1"}}


def test_every_namespace_is_one_that_envoy_takes(bootstrap_namespaces: list[str]) -> None:
    """Metadata in a namespace that the shipped bootstrap does not list would be dropped in silence."""
    assert {LB_NAMESPACE, ROUTE_NAMESPACE, DECISION_NAMESPACE} == set(bootstrap_namespaces)


@pytest.fixture
def bootstrap_namespaces() -> list[str]:
    """`receiving_namespaces` of the shipped bootstrap."""
    (listener,) = template()["static_resources"]["listeners"]
    filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    namespaces: list[str] = filters[0]["typed_config"]["metadata_options"]["receiving_namespaces"]["untyped"]
    return namespaces


def test_a_plan_is_rendered_once() -> None:
    """Decisions of one plan share its bytes."""
    shared = plan()
    first, second = (DIALECT.decision(decision(plan=shared), to_trailers=False) for _ in range(2))
    assert first is second


@pytest.mark.parametrize("made", [Plan("pool"), plan(charged=False)])
def test_a_request_without_a_charge_has_no_owner(made: Plan) -> None:
    """It is charged nowhere, and the owner header says so."""
    headers = headers_of(passed(made).request_headers.response.header_mutation)
    assert headers[OWNER_HEADER] == NO_OWNER


def test_only_a_wanted_first_chunk_overrides_the_mode() -> None:
    """The override asks for response chunks, keeps the body whole and leaves response headers alone."""
    plain = pb.ProcessingResponse.FromString(DIALECT.await_body(first_chunk=False))
    assert plain.WhichOneof("response") == "request_headers"
    assert not plain.HasField("mode_override")
    mode = pb.ProcessingResponse.FromString(DIALECT.await_body(first_chunk=True)).mode_override
    names = processing_mode_pb2.ProcessingMode
    assert mode.request_body_mode == names.BUFFERED
    assert mode.response_body_mode == names.STREAMED
    assert mode.response_header_mode == names.SKIP
    assert mode.request_trailer_mode == names.SEND
