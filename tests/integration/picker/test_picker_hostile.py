"""What a gateway, or a client behind it, may say to an endpoint picker in bad faith; all has its bound."""

from __future__ import annotations

import random
from typing import Any

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.picker.dialect import LB_NAMESPACE, SERVED, SUBSET, SUBSET_NAMESPACE
from extproc.transport.seam import Status
from extproc.values.subsets import MAX_ENTRIES
from tests.conftest import chat
from tests.picker_rig import MAX_BYTES, UPLOAD_S, Gateway

NOTHING_IN_IT: tuple[Any, ...] = (
    *(7, True, None, "", ",", [], [[]], [7, None, {"a": "b"}], {"10.0.0.1": "8000"}),
    *("\x00", "\ud7ff\U0010ffff", "[" * 1_000, "::" * 1_000, ["10.0.0.1:8000:8000", "10.0.0.1:99999"]),
)


def headers_of(**named: str | bytes) -> pb.HttpHeaders:
    """Of a chat request; underscores in names stand for dashes."""
    headers = pb.HttpHeaders()
    line = {":method": "POST", ":path": "/v1/chat/completions"}
    for name, value in {**line, **named}.items():
        raw = value.encode() if isinstance(value, str) else value
        headers.headers.headers.add(key=name.replace("_", "-"), raw_value=raw)
    return headers


def asks(gateway: Gateway, message: pb.ProcessingRequest) -> pb.ProcessingResponse:
    """The headers of a request, and then its body: what is answered first."""
    before = len(gateway.call.sent)
    gateway.exchange.on_message(message.SerializeToString())
    gateway.says(request_body=pb.HttpBody(body=chat(), end_of_stream=True))
    return pb.ProcessingResponse.FromString(gateway.call.sent[before])


@pytest.mark.parametrize("hint", NOTHING_IN_IT)
def test_a_hint_with_nothing_in_it_leaves_no_endpoint(hint: Any) -> None:
    """Whatever kind of value it is: a gateway that restricts is not to be sent anywhere."""
    gateway = Gateway()
    message = pb.ProcessingRequest(request_headers=headers_of())
    message.metadata_context.filter_metadata[SUBSET_NAMESPACE].update({SUBSET: hint})
    answer = asks(gateway, message)
    assert answer.immediate_response.status.code == 503
    assert gateway.is_clean()


def test_of_a_huge_hint_the_beginning_is_read() -> None:
    """As a list and as text; what stands beyond the bound names none."""
    gateway = Gateway()
    place = next(map(str, gateway.rig.places.values()))
    others = [f"10.9.{number >> 8 & 255}.{number & 255}:8000" for number in range(100_000)]
    for at, status in ((MAX_ENTRIES - 1, 0), (MAX_ENTRIES, 503)):
        entries = [*others[:at], place, *others[at:]]
        for hint in (entries, ",".join(entries)):
            message = pb.ProcessingRequest(request_headers=headers_of())
            message.metadata_context.filter_metadata[SUBSET_NAMESPACE].update({SUBSET: hint})
            assert asks(gateway, message).immediate_response.status.code == status
            gateway.exchange.on_reset()
            gateway.open()
    gateway.exchange.on_reset()
    assert gateway.is_clean()


@pytest.mark.parametrize("said", [*NOTHING_IN_IT, "10.9.9.9:1", "x" * 100_000])
def test_a_served_endpoint_that_makes_no_sense_moves_no_charge(said: Any) -> None:
    """Nor one that is none of the fleet's; the request ends as any other."""
    gateway = Gateway()
    gateway.asks()
    message = pb.ProcessingRequest(response_headers=pb.HttpHeaders())
    message.metadata_context.filter_metadata[LB_NAMESPACE].update({SERVED: said})
    gateway.exchange.on_message(message.SerializeToString())
    gateway.says(response_body=pb.HttpBody(end_of_stream=True))
    gateway.exchange.on_half_close()
    assert gateway.is_clean()


def test_foreign_metadata_is_passed_over() -> None:
    """A thousand namespaces of others, deep, large, and of types that are not known here."""
    gateway = Gateway()
    message = pb.ProcessingRequest(request_headers=headers_of())
    for number in range(1_000):
        message.metadata_context.filter_metadata[f"other.{number}"].update(
            {SUBSET: "10.6.6.6:1", "x" * 99: 1}
        )
    message.metadata_context.filter_metadata["deep"].update({"in": _deep(10)})
    message.metadata_context.typed_filter_metadata[SUBSET_NAMESPACE].type_url = "type.googleapis.com/no.such"
    message.attributes["envoy.filters.http.ext_proc"].update({"request.path": "/elsewhere"})
    assert asks(gateway, message).HasField("request_headers")
    gateway.exchange.on_reset()
    assert gateway.is_clean()


def _deep(levels: int) -> Any:
    return {"in": [_deep(levels - 1)]} if levels else "end"


def test_what_is_nested_without_end_is_no_message() -> None:
    """Its stream ends, with what is wrong."""
    gateway = Gateway()
    message = pb.ProcessingRequest(request_headers=headers_of())
    message.metadata_context.filter_metadata["deep"].update({"in": _deep(60)})
    gateway.exchange.on_message(message.SerializeToString())
    assert gateway.call.ended == [Status.INVALID_ARGUMENT]
    assert gateway.is_clean()


@pytest.mark.parametrize(
    "named",
    [
        {"x_llm_d_inference_objective": "../" * 1_000},
        {"x_llm_d_inference_objective": b"\xff\xfe\x00"},
        {"x_llm_d_inference_fairness_id": "a b\r\nx-evil: 1"},
        {"x_llm_d_inference_fairness_id": "x" * 1_000_000},
        {"x_llm_d_slo_ttft_ms": "NaN", "x_llm_d_slo_tpot_ms": "-1e999"},
        {"x_llm_d_slo_ttft_ms": "9" * 100_000},
        {"x_llm_d_model_name_rewrite": "x" * 1_000_000},
        {"x_llm_d_model_name_rewrite": b"\xff"},
        {
            "x_gateway_destination_endpoint": "10.6.6.6:1",
            "x_gateway_destination_endpoint_subset": "10.6.6.6:1",
        },
        {"test_epp_endpoint_selection": "10.6.6.6:1"},
        {f"x_{number}": "y" for number in range(5_000)},
        {"content_length": "-1", "content_type": b"\x00", "traceparent": "x" * 100_000},
    ],
)
def test_hostile_headers_change_nothing(named: dict[str, Any]) -> None:
    """The request is served as if they were not there, or refused as a whole; nothing of them is repeated."""
    gateway = Gateway()
    answer = asks(gateway, pb.ProcessingRequest(request_headers=headers_of(**named)))
    if answer.HasField("immediate_response"):
        assert answer.immediate_response.status.code == 404  # a model that is not served
        assert len(answer.immediate_response.body) < 2_000
    else:
        mutation = answer.request_headers.response.header_mutation
        said = {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}
        assert said.keys() <= {"x-gateway-destination-endpoint", "content-length"}
        places = set(map(str, gateway.rig.places.values()))
        assert set(said["x-gateway-destination-endpoint"].split(",")) <= places
    gateway.exchange.on_reset()
    assert gateway.is_clean()


def test_a_body_that_drips_for_ever_is_given_up() -> None:
    """Chunks without a byte keep nothing and put nothing off; those that fill the bound are refused."""
    gateway = Gateway()
    gateway.says(request_headers=headers_of())
    for _ in range(int(UPLOAD_S) - 1):
        gateway.rig.clock.advance(1.0)
        gateway.says(request_body=pb.HttpBody())
        gateway.picker.tick()
    assert gateway.call.sent == []
    gateway.rig.clock.advance(1.0)
    gateway.picker.tick()
    (raw,) = gateway.call.sent
    assert pb.ProcessingResponse.FromString(raw).immediate_response.status.code == 408
    gateway.open()
    gateway.says(request_headers=headers_of())
    answers = [
        gateway.says(request_body=pb.HttpBody(body=b"x" * 1_000)) for _ in range(2 * MAX_BYTES // 1_000)
    ]
    (refused,) = [answer for said in answers for answer in said]
    assert refused.immediate_response.status.code == 413
    assert gateway.is_clean()


def test_a_stream_that_says_nothing_is_given_up() -> None:
    """Nothing was asked, so nothing is answered: it ends, and nothing of it is kept."""
    gateway = Gateway()
    gateway.rig.clock.advance(UPLOAD_S)
    gateway.picker.tick()
    assert gateway.call.ended
    assert len(gateway.picker) == 0
    assert gateway.is_clean()


def test_an_answer_that_never_ends_is_charged_as_long_as_its_stream_lasts() -> None:
    """Hours of it: one charge, renewed, and none when the stream is gone."""
    gateway = Gateway()
    gateway.asks()
    gateway.says(response_headers=pb.HttpHeaders())
    for _ in range(360):
        gateway.rig.clock.advance(20.0)
        gateway.says(response_body=pb.HttpBody(body=b"data: x\n\n"))
        gateway.picker.tick()
    assert gateway.call.ended == []
    assert gateway.rig.scheduling.load.in_flight == 1
    gateway.exchange.on_reset()
    assert gateway.is_clean()


def test_a_stream_that_is_kept_open_after_its_answer_is_charged_nothing() -> None:
    """Whole days, and whatever it says then."""
    gateway = Gateway()
    gateway.asks()
    gateway.says(response_headers=pb.HttpHeaders())
    gateway.says(response_body=pb.HttpBody(body=b"{}", end_of_stream=True))
    assert gateway.rig.scheduling.load.in_flight == 0
    for _ in range(100):
        gateway.rig.clock.advance(1_000.0)
        gateway.picker.tick()
        gateway.says(response_body=pb.HttpBody(body=b"x"))
    gateway.exchange.on_reset()
    assert gateway.is_clean()


def test_messages_that_are_none_end_their_own_stream_only() -> None:
    """Valid ones with bytes changed, cut or doubled: whatever is made of them, nothing stays charged."""
    rng = random.Random(20261130)
    gateway = Gateway()
    body = pb.ProcessingRequest(request_body=pb.HttpBody(body=chat(stream=True), end_of_stream=True))
    answer = pb.ProcessingRequest(response_headers=pb.HttpHeaders())
    answer.metadata_context.filter_metadata[LB_NAMESPACE].update({SERVED: "10.0.0.1:8000"})
    first = pb.ProcessingRequest(request_headers=headers_of())
    first.metadata_context.filter_metadata[SUBSET_NAMESPACE].update({SUBSET: "10.0.0.1, 10.0.0.2:8000"})
    end = pb.ProcessingRequest(response_body=pb.HttpBody(body=b"data: x\n\n", end_of_stream=True))
    messages = [each.SerializeToString() for each in (first, body, answer, end)]
    refused = 0
    for _ in range(3_000):
        for message in messages:
            if gateway.call.ended:
                break
            gateway.exchange.on_message(_changed(message, rng))
        refused += gateway.call.ended == [Status.INVALID_ARGUMENT]
        gateway.exchange.on_reset()
        assert gateway.is_clean()
        gateway.open()
    assert refused > 100


def _changed(message: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return message
    data = bytearray(message)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data))
        how = rng.randrange(3)
        if how == 0:
            data[at] = rng.randrange(256)
        elif how == 1:
            del data[at:]
        else:
            data[at:at] = data[rng.randrange(len(data)) :][:50]
        if not data:
            break
    return bytes(data)


@pytest.mark.parametrize("status", ["\u00b2\u0660\u0660", "9" * 5_000, "", "-1", "2e2"])
def test_a_status_that_is_none_ends_no_stream(status: str) -> None:
    """As text or as bytes; the answer passes, and its end releases the request."""
    for raw in (True, False):
        gateway = Gateway()
        gateway.asks()
        message = pb.ProcessingRequest(response_headers=pb.HttpHeaders(end_of_stream=True))
        said = {"raw_value": status.encode()} if raw else {"value": status}
        message.response_headers.headers.headers.add(key=":status", **said)
        gateway.exchange.on_message(message.SerializeToString())
        gateway.exchange.on_half_close()
        assert gateway.is_clean()


def test_what_comes_after_a_refusal_is_not_answered() -> None:
    """A gateway that goes on, body, answer and all, gets no word more and costs no memory."""
    gateway = Gateway()
    message = pb.ProcessingRequest(request_headers=headers_of())
    message.metadata_context.filter_metadata[SUBSET_NAMESPACE].update({SUBSET: []})
    asks(gateway, message)
    assert gateway.call.ended == [Status.OK]
    count = len(gateway.call.sent)
    gateway.says(request_body=pb.HttpBody(body=b"x" * 9_000))
    gateway.says(request_body=pb.HttpBody(body=b"x", end_of_stream=True))
    assert len(gateway.call.sent) == count
    assert gateway.is_clean()
