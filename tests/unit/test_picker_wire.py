"""What the endpoint picker says on the wire, and what it reads of an answer."""

from __future__ import annotations

import orjson
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.accesslog.usage import UNKNOWN, Usage
from extproc.errors import Reason, RouterError
from extproc.picker.answer import TAIL_BYTES, PassingAnswer
from extproc.picker.dialect import CHUNK_BYTES, PickerDialect
from extproc.picker.health import NOT_SERVING, SERVING, Health
from extproc.protocol.machine import MessageKind
from extproc.values.placements import Decision, Plan
from extproc.values.requests import Operation
from extproc.values.subsets import Subset
from metadata_center.types import RequestId

DESTINATION = "x-gateway-destination-endpoint"


def dialect(fallbacks: int = 1) -> PickerDialect:
    """One that gives every request the same id."""
    return PickerDialect(fallbacks, ("authorization",), lambda: "id")


def decision(*endpoints: str, new_body: list[bytes] | None = None, drops: bool = False) -> Decision:
    """One for these endpoints."""
    return Decision(RequestId("id"), Operation.CHAT, False, Plan("c", endpoints), new_body, drops)


def answered(*args: object, **kwargs: object) -> list[pb.ProcessingResponse]:
    """What `PickerDialect.decision` says."""
    return [pb.ProcessingResponse.FromString(raw) for raw in dialect().decision(*args, **kwargs)]  # type: ignore[arg-type]


@pytest.mark.parametrize("trailers", [False, True])
@pytest.mark.parametrize(
    "size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 1_200_000]
)
def test_the_body_comes_back_whole_and_ends_once(size: int, trailers: bool) -> None:
    """In chunks of at most 62,000 bytes; the last one ends it, unless trailers do."""
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)
    first, *rest = answered(decision("10.0.0.1:80"), body, trailers=trailers)
    assert first.WhichOneof("response") == "request_headers"
    if trailers:
        assert rest.pop().WhichOneof("response") == "request_trailers"
    chunks = [each.request_body.response.body_mutation.streamed_response for each in rest]
    assert b"".join(chunk.body for chunk in chunks) == body
    assert all(len(chunk.body) <= CHUNK_BYTES for chunk in chunks)
    assert [chunk.end_of_stream for chunk in chunks] == [
        *[False] * (len(chunks) - 1),
        *([not trailers] if chunks else []),
    ]
    assert len(chunks) == max(-(-size // CHUNK_BYTES), 0 if trailers else 1)


def headers_set(message: pb.ProcessingResponse) -> dict[str, str]:
    """What an answer to headers sets."""
    mutation = message.request_headers.response.header_mutation
    return {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}


def test_the_destination_is_said_twice_and_equal() -> None:
    """Header and metadata; an endpoint once, and as many others as are wanted."""
    (message,) = answered(
        decision("10.0.0.1:80", "10.0.0.1:80", "[::1]:80", "10.0.0.3:80"), None, trailers=False
    )
    expected = "10.0.0.1:80,[::1]:80"
    assert headers_set(message) == {DESTINATION: expected}
    assert message.dynamic_metadata["envoy.lb"][DESTINATION] == expected
    removed = message.request_headers.response.header_mutation.remove_headers
    assert {"x-gateway-destination-endpoint-served", "x-session-token", "x-tokenway-debug"} <= set(removed)
    assert DESTINATION not in removed


def test_a_rewritten_body_replaces_the_clients_and_has_its_length() -> None:
    """And the coding of the client's is no more."""
    made = decision("10.0.0.1:80", new_body=[b"new ", b"body"], drops=True)
    first, second = answered(made, b"old", trailers=False)
    assert headers_set(first)["content-length"] == "8"
    assert "content-encoding" in first.request_headers.response.header_mutation.remove_headers
    assert second.request_body.response.body_mutation.streamed_response.body == b"new body"


@pytest.mark.parametrize("kind", [MessageKind.REQUEST_BODY, MessageKind.RESPONSE_BODY])
@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_384, 1 << 20])
def test_a_chunk_is_answered_with_itself(kind: MessageKind, end: bool, size: int) -> None:
    """Written by hand, and what protobuf reads."""
    message = pb.ProcessingResponse.FromString(dialect().echo(kind, b"x" * size, end_of_stream=end))
    assert message.WhichOneof("response") == kind.value
    response = message.request_body if kind is MessageKind.REQUEST_BODY else message.response_body
    mutation = response.response.body_mutation
    assert mutation.WhichOneof("mutation") == "streamed_response"
    assert mutation.streamed_response == pb.StreamedBodyResponse(body=b"x" * size, end_of_stream=end)


def test_nothing_a_client_says_of_itself_is_believed() -> None:
    """Neither an id nor a destination; secrets are not kept."""
    message = pb.ProcessingRequest()
    for name, value in {
        ":method": "POST",
        "x-tokenway-request-id": "mine",
        DESTINATION: "10.6.6.6:80",
        "authorization": "Bearer secret",
        "x-tier": "gold",
    }.items():
        message.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    read = dialect().request_headers(message)
    assert read.headers == {":method": "POST", "x-tokenway-request-id": "id", "x-tier": "gold"}
    assert read.within is None


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        (Reason.OVERLOADED, b"rejected-saturated"),
        (Reason.NO_HEALTHY_ENDPOINT, b"rejected-no-endpoints"),
        (Reason.MODEL_NOT_FOUND, None),
    ],
)
def test_refusals_say_why(reason: Reason, word: bytes | None) -> None:
    """Beside what every refusal says."""
    error = RouterError(reason, "No.", retry_after_s=3)
    raw = dialect().immediate(error.status, error.body(), "d", error)
    answer = pb.ProcessingResponse.FromString(raw).immediate_response
    said = {option.header.key: option.header.raw_value for option in answer.headers.set_headers}
    assert said.get("x-llm-d-request-dropped-reason") == word
    assert (answer.status.code, said["retry-after"], answer.body) == (error.status, b"3", error.body())


@pytest.mark.parametrize(
    ("entries", "members"),
    [
        (["10.0.0.1:8000"], {"10.0.0.1:8000"}),
        (["10.0.0.1"], {"10.0.0.1:8000", "10.0.0.1:8001"}),
        ([" 10.0.0.1:8001 ", "10.0.0.2"], {"10.0.0.1:8001", "10.0.0.2:8000"}),
        (["[fd00::1]:8000"], {"[fd00::1]:8000"}),
        (["[FD00:0::1]"], {"[fd00::1]:8000"}),
        (["fd00::1"], {"[fd00::1]:8000"}),
        ([], set()),
        (["", "nonsense", "10.0.0.1:99999", "[", "10.0.0.1:"], set()),
    ],
)
def test_subset_hints(entries: list[str], members: set[str]) -> None:
    """With and without a port, both families, as a list and as text with commas; nonsense names none."""
    everybody = ["10.0.0.1:8000", "10.0.0.1:8001", "10.0.0.2:8000", "[fd00::1]:8000"]
    subset = Subset(entries)
    assert {address for address in everybody if subset.has(address)} == members
    for hint in ({"list": entries}, {"text": ",".join(entries)}):
        message = pb.ProcessingRequest()
        message.metadata_context.filter_metadata["envoy.lb.subset_hint"].update(
            {"x-gateway-destination-endpoint-subset": next(iter(hint.values()))}
        )
        within = dialect().request_headers(message).within
        assert within is not None
        assert {address for address in everybody if within.has(address)} == members


USAGE = {"prompt_tokens": 7, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 3}}
EVENT = b"data: " + orjson.dumps({"choices": [], "usage": USAGE}) + b"\n\n"
NULL = b'data: {"choices": [{"delta": {"content": "\\"usage\\": {"}}], "usage": null}\n\n'


@pytest.mark.parametrize("at", range(0, len(EVENT), 3))
def test_usage_is_found_wherever_the_stream_is_cut(at: int) -> None:
    """After megabytes, and before events that have none."""
    answer = PassingAnswer()
    for _ in range(300):
        answer.add(NULL * 3)
    for chunk in (EVENT[:at], EVENT[at:], NULL, b"data: [DONE]\n\n"):
        answer.add(chunk)
    assert answer.usage() == Usage(7, 10, 3)
    assert answer.num_bytes == 901 * len(NULL) + len(EVENT) + 14


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", NULL, b'{"usage": {', b'"usage": {"prompt_tokens": "x"}', b"\xff" * 100, b'"usage"' * 9],
)
def test_no_usage_is_none(body: bytes) -> None:
    """Whatever the engine sent."""
    answer = PassingAnswer()
    answer.add(body)
    assert answer.usage() == UNKNOWN


def test_the_tail_of_an_answer_is_bounded() -> None:
    """One chunk or many; usage that is not in the tail is not looked for."""
    answer = PassingAnswer()
    answer.add(EVENT)
    answer.add(b"x" * (5 << 20))
    for _ in range(1000):
        answer.add(b"y" * 1000)
        assert len(answer._tail) <= 2 * TAIL_BYTES
    assert answer.usage() == UNKNOWN


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("name", ["", "readiness", "liveness", "inference-extension", "any"])
def test_health_answers_to_every_name(name: str, ready: bool) -> None:
    """A picker that drains is alive."""
    request = b"" if not name else b"\x0a" + bytes([len(name)]) + name.encode()
    expected = SERVING if ready or name == "liveness" else NOT_SERVING
    assert Health(lambda: ready).status(request) == expected
