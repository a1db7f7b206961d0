"""Answers on the wire: parsed back by protobuf, they hold what Envoy 1.40 needs to act on them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.errors import Reason, RouterError
from extproc.protocol import wire
from extproc.protocol.machine import MessageKind
from extproc.values.exchange import RequestHeaders


def parsed(data: bytes) -> Any:
    """An answer as Envoy reads it."""
    return pb.ProcessingResponse.FromString(data)


def headers_of(mutation: Any) -> dict[str, str]:
    """The headers a mutation sets; every one replaces what was there."""
    assert all(option.append_action == option.OVERWRITE_IF_EXISTS_OR_ADD for option in mutation.set_headers)
    return {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}


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


@pytest.mark.parametrize("kind", list(wire.CONTINUE))
def test_a_message_is_let_through_by_its_own_kind(kind: MessageKind) -> None:
    """Envoy takes an answer of another kind for a spurious message."""
    message = parsed(wire.CONTINUE[kind])
    assert MessageKind(message.WhichOneof("response")) is kind
    assert not message.HasField("dynamic_metadata")


def test_each_message_is_known_by_its_kind() -> None:
    """The names of the six messages are the values of their kinds."""
    names = {field.name for field in pb.ProcessingRequest.DESCRIPTOR.oneofs_by_name["request"].fields}
    assert {MessageKind(name) for name in names} == set(MessageKind) - {
        MessageKind.DECIDED,
        MessageKind.REFUSED,
        MessageKind.CLOSED,
    }


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
