"""What the endpoint picker says on the wire, and what it reads of an answer."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.errors import Reason, RouterError
from extproc.picker.dialect import CHUNK_BYTES, REPLACED_BYTES, PickerDialect, WrongMode
from extproc.picker.health import NOT_SERVING, SERVING, Health
from extproc.picker.machine import AnswerMode
from extproc.picker.renaming import Renaming
from extproc.protocol.machine import MessageKind
from extproc.values.exchange import PassTo, RequestHeaders
from extproc.values.placements import Decision, Plan, Renamed
from extproc.values.requests import Operation
from extproc.values.standing import Standing
from extproc.values.subsets import Subset
from metadata_center.types import RequestId

DESTINATION = "x-gateway-destination-endpoint"


def dialect(fallbacks: int = 1) -> PickerDialect:
    """One that gives every request the same id."""
    return PickerDialect(fallbacks, ("authorization",), lambda: "id")


def decision(*endpoints: str, new_body: tuple[bytes, ...] | None = None, drops: bool = False) -> Decision:
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


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES + 1, REPLACED_BYTES, REPLACED_BYTES + 1])
def test_with_trailers_envoy_gets_the_body_in_one_piece(size: int) -> None:
    """With the answer to the headers, which lets trailers go too; beyond what Envoy buffers, as one chunk."""
    body = bytes(size)
    first, *rest = answered(decision("10.0.0.1:80"), body, trailers=True, is_envoy=True)
    assert headers_set(first) == {DESTINATION: "10.0.0.1:80"}
    assert first.dynamic_metadata["envoy.lb"][DESTINATION] == "10.0.0.1:80"
    common = first.request_headers.response
    if 0 < size <= REPLACED_BYTES:
        assert (common.status, common.body_mutation.body) == (pb.CommonResponse.CONTINUE_AND_REPLACE, body)
        assert rest == []
        return
    assert common.status == pb.CommonResponse.CONTINUE
    assert not common.HasField("body_mutation")
    assert rest.pop().WhichOneof("response") == "request_trailers"
    chunks = [each.request_body.response.body_mutation.streamed_response for each in rest]
    assert [(chunk.body, chunk.end_of_stream) for chunk in chunks] == ([(body, False)] if size else [])


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


@pytest.mark.parametrize("is_envoy", [True, False])
def test_envoy_alone_is_given_another_path(is_envoy: bool) -> None:
    """Other gateways may take no path from an endpoint picker."""
    made = replace(decision("10.0.0.1:80"), new_path="/v1/completions")
    (message,) = answered(made, None, trailers=False, is_envoy=is_envoy)
    said = {":path": "/v1/completions"} if is_envoy else {}
    assert headers_set(message) == {DESTINATION: "10.0.0.1:80", **said}
    passes = PassTo(made.plan, "/v1/responses/a")
    (passed,) = [pb.ProcessingResponse.FromString(dialect().pass_to(passes, is_envoy=is_envoy))]
    assert headers_set(passed).get(":path") == ("/v1/responses/a" if is_envoy else None)


def test_a_rewritten_body_replaces_the_clients_and_has_its_length() -> None:
    """And the coding of the client's is no more."""
    made = decision("10.0.0.1:80", new_body=(b"new ", b"body"), drops=True)
    first, second = answered(made, b"old", trailers=False)
    assert headers_set(first)["content-length"] == "8"
    assert "content-encoding" in first.request_headers.response.header_mutation.remove_headers
    assert second.request_body.response.body_mutation.streamed_response.body == b"new body"


@pytest.mark.parametrize("kind", [MessageKind.REQUEST_BODY, MessageKind.RESPONSE_BODY])
@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_384, 1 << 20])
def test_a_chunk_is_answered_with_itself(kind: MessageKind, end: bool, size: int) -> None:
    """Written by hand, and what protobuf reads."""
    body = random.Random(1).randbytes(size)
    chunks = []
    for raw in dialect().echo(kind, body, end_of_stream=end):
        message = pb.ProcessingResponse.FromString(raw)
        assert message.WhichOneof("response") == kind.value
        response = message.request_body if kind is MessageKind.REQUEST_BODY else message.response_body
        mutation = response.response.body_mutation
        assert mutation.WhichOneof("mutation") == "streamed_response"
        chunks.append(mutation.streamed_response)
    assert b"".join(chunk.body for chunk in chunks) == body
    assert len(chunks) == max(1, -(-size // CHUNK_BYTES))
    assert [chunk.end_of_stream for chunk in chunks] == [*[False] * (len(chunks) - 1), end]


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
    read = dialect().request_headers(message, AnswerMode.ECHOED)
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
        within = dialect().request_headers(message, AnswerMode.ECHOED).within
        assert within is not None
        assert {address for address in everybody if within.has(address)} == members


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("name", ["", "readiness", "liveness", "inference-extension", "any"])
def test_health_answers_to_every_name(name: str, ready: bool) -> None:
    """A picker that drains is alive."""
    request = b"" if not name else b"\x0a" + bytes([len(name)]) + name.encode()
    expected = SERVING if ready or name == "liveness" else NOT_SERVING
    assert Health(lambda: ready).status(request) == expected


def request_of(**headers: str) -> pb.ProcessingRequest:
    """Headers of a request; underscores in names stand for dashes."""
    message = pb.ProcessingRequest()
    for name, value in headers.items():
        message.request_headers.headers.headers.add(key=name.replace("_", "-"), raw_value=value.encode())
    return message


PRIORITIES = {"batch": -3, "chat": 2}


def read_headers(message: pb.ProcessingRequest, *, obeys_tests: bool = False) -> RequestHeaders:
    """What a dialect that knows `PRIORITIES` reads."""
    made = PickerDialect(1, (), lambda: "id", priority_of=PRIORITIES.get, obeys_tests=obeys_tests)
    return made.request_headers(message, AnswerMode.ECHOED)


@pytest.mark.parametrize(
    ("headers", "standing"),
    [
        ({}, None),
        ({"x_llm_d_inference_objective": "batch"}, Standing("batch", -3, None)),
        ({"x_gateway_inference_objective": "chat"}, Standing("chat", 2, None)),
        (
            {"x_gateway_inference_objective": "batch", "x_llm_d_inference_objective": "chat"},
            Standing("chat", 2, None),
        ),
        ({"x_llm_d_inference_objective": "unknown"}, Standing("unknown", 0, None, is_known=False)),
        ({"x_gateway_inference_fairness_id": "team-1"}, Standing(None, 0, "team-1")),
        (
            {"x_llm_d_inference_fairness_id": "a", "x_gateway_inference_fairness_id": "b"},
            Standing(None, 0, "a"),
        ),
        ({"x_llm_d_inference_objective": "No Such Name!", "x_llm_d_inference_fairness_id": "x" * 129}, None),
        (
            {"x_llm_d_inference_objective": "No!", "x_gateway_inference_objective": "chat"},
            Standing("chat", 2, None),
        ),
        (
            {"x_llm_d_inference_fairness_id": "", "x_gateway_inference_fairness_id": "b"},
            Standing(None, 0, "b"),
        ),
        (
            {"x_llm_d_inference_objective": "unknown", "x_gateway_inference_objective": "chat"},
            Standing("unknown", 0, None, is_known=False),
        ),
    ],
)
def test_whose_a_request_is(headers: dict[str, str], standing: Standing | None) -> None:
    """By either name, of those that are well-formed the new one; what is malformed says nothing."""
    assert read_headers(request_of(**headers)).standing == standing


@pytest.mark.parametrize(
    ("headers", "model"),
    [
        ({"x_llm_d_model_name_rewrite": "new", "x_gateway_model_name_rewrite": "old"}, "new"),
        ({"x_gateway_model_name_rewrite": "old"}, "old"),
        ({"x_llm_d_model_name_rewrite": ""}, None),
        ({"x_llm_d_model_name_rewrite": "x" * 257}, None),
        ({"x_llm_d_model_name_rewrite": "", "x_gateway_model_name_rewrite": "old"}, "old"),
        ({}, None),
    ],
)
def test_which_model_is_asked_for(headers: dict[str, str], model: str | None) -> None:
    """The gateway's word, by either name."""
    assert read_headers(request_of(**headers)).model == model


def test_a_requests_own_limits_have_one_name() -> None:
    """Whichever the gateway used."""
    read = read_headers(request_of(x_llm_d_slo_ttft_ms="200", x_slo_ttft_ms="900", x_slo_tpot_ms="30"))
    assert (read.headers["x-slo-ttft-ms"], read.headers["x-slo-tpot-ms"]) == ("200", "30")


@pytest.mark.parametrize("malformed", ["", "soon", "0", "-1", "inf", "1_000"])
def test_a_limit_that_is_none_hides_no_limit(malformed: str) -> None:
    """The alias counts then; where there is none, there is no limit."""
    read = read_headers(request_of(x_llm_d_slo_ttft_ms=malformed, x_slo_ttft_ms="900"))
    assert read.headers["x-slo-ttft-ms"] == "900"
    assert "x-slo-ttft-ms" not in read_headers(request_of(x_llm_d_slo_ttft_ms=malformed)).headers


@pytest.mark.parametrize(
    ("headers", "ignored"),
    [
        ({}, []),
        ({"x_llm_d_inference_objective": "chat", "x_llm_d_slo_tpot_ms": "30"}, []),
        (
            {"x_llm_d_inference_objective": "no"},
            [("objective", "unknown", "x-llm-d-inference-objective", "no")],
        ),
        (
            {"x_gateway_inference_objective": "no"},
            [("objective", "unknown", "x-gateway-inference-objective", "no")],
        ),
        (
            {"x_llm_d_inference_objective": "No!", "x_gateway_inference_objective": "no"},
            [
                ("objective", "malformed", "x-llm-d-inference-objective", ""),
                ("objective", "unknown", "x-gateway-inference-objective", "no"),
            ],
        ),
        (
            {"x_llm_d_inference_fairness_id": "a b", "x_llm_d_model_name_rewrite": ""},
            [
                ("model", "malformed", "x-llm-d-model-name-rewrite", ""),
                ("fairness_id", "malformed", "x-llm-d-inference-fairness-id", ""),
            ],
        ),
        (
            {"x_llm_d_slo_ttft_ms": "soon", "x_slo_ttft_ms": "900", "x_slo_tpot_ms": "0"},
            [
                ("slo_ttft_ms", "malformed", "x-llm-d-slo-ttft-ms", ""),
                ("slo_tpot_ms", "malformed", "x-slo-tpot-ms", ""),
            ],
        ),
        ({"x_llm_d_slo_ttft_ms": "9", "x_slo_ttft_ms": "an alias that nobody looks at"}, []),
    ],
)
def test_what_says_nothing_is_told(headers: dict[str, str], ignored: list[tuple[str, ...]]) -> None:
    """Which header, why, and the name that is not known; no value that is malformed."""
    told = read_headers(request_of(**headers)).ignored
    assert [(each.control, each.flaw, each.header, each.unknown) for each in told] == ignored


def test_no_control_header_reaches_an_engine() -> None:
    """By none of its names; nor is any header of the request said again."""
    (message,) = answered(decision("10.0.0.1:80"), None, trailers=False)
    mutation = message.request_headers.response.header_mutation
    assert {
        *("x-llm-d-inference-objective", "x-gateway-inference-objective"),
        *("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id"),
        *("x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite"),
        *("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms", "x-llm-d-slo-tpot-ms", "x-slo-tpot-ms"),
        *("test-epp-endpoint-selection", "x-gateway-destination-endpoint-served"),
    } <= set(mutation.remove_headers)
    assert [option.header.key for option in mutation.set_headers] == [DESTINATION]


def test_headers_of_an_answer_are_left_alone() -> None:
    """Hop-by-hop ones above all; but for the length of an answer that is edited."""
    message = pb.ProcessingRequest(response_headers=pb.HttpHeaders())
    message.response_headers.headers.headers.add(key="transfer-encoding", raw_value=b"chunked")
    plain = pb.ProcessingResponse.FromString(dialect().answer_begins(message, is_renamed=False))
    assert plain == pb.ProcessingResponse(response_headers=pb.HeadersResponse())
    edited = pb.ProcessingResponse.FromString(dialect().answer_begins(message, is_renamed=True))
    mutation = edited.response_headers.response.header_mutation
    assert (list(mutation.remove_headers), len(mutation.set_headers)) == (["content-length"], 0)


@pytest.mark.parametrize("obeys", [False, True])
def test_the_conformance_suite_chooses_only_where_it_may(obeys: bool) -> None:
    """Above the hint of a subset; and is told who served."""
    message = request_of(test_epp_endpoint_selection="10.0.0.1:8000, 10.0.0.2")
    message.metadata_context.filter_metadata["envoy.lb.subset_hint"].update(
        {"x-gateway-destination-endpoint-subset": "10.0.0.9:8000"}
    )
    within = read_headers(message, obeys_tests=obeys).within
    assert within is not None
    members = {each for each in ("10.0.0.1:8000", "10.0.0.2:1", "10.0.0.9:8000") if within.has(each)}
    assert members == ({"10.0.0.1:8000", "10.0.0.2:1"} if obeys else {"10.0.0.9:8000"})
    made = PickerDialect(1, (), lambda: "id", obeys_tests=obeys)
    answer = pb.ProcessingRequest(response_headers=pb.HttpHeaders())
    answer.metadata_context.filter_metadata["envoy.lb"].update(
        {"x-gateway-destination-endpoint-served": "10.0.0.2:1"}
    )
    told = pb.ProcessingResponse.FromString(made.answer_begins(answer, is_renamed=False))
    said = {
        option.header.key: option.header.raw_value
        for option in told.response_headers.response.header_mutation.set_headers
    }
    assert said == ({"x-conformance-test-served-endpoint": b"10.0.0.2:1"} if obeys else {})


Mode = processing_mode_pb2.ProcessingMode


@pytest.mark.parametrize(
    ("told", "mode"),
    [
        (None, AnswerMode.ECHOED),
        (Mode.FULL_DUPLEX_STREAMED, AnswerMode.ECHOED),
        (Mode.STREAMED, AnswerMode.SHOWN),
        (Mode.BUFFERED, AnswerMode.SHOWN),
        (Mode.NONE, AnswerMode.UNSEEN),
    ],
)
def test_what_becomes_of_an_answer(told: int | None, mode: AnswerMode) -> None:
    """As the gateway says; one that says nothing wants it back."""
    message = pb.ProcessingRequest(request_headers=pb.HttpHeaders())
    if told is not None:
        message.protocol_config.request_body_mode = Mode.FULL_DUPLEX_STREAMED
        message.protocol_config.response_body_mode = told
    assert dialect().answer_mode(message) is mode


def test_a_gateway_of_another_protocol_is_refused() -> None:
    """With what is wrong; a request without a body is served all the same."""
    message = pb.ProcessingRequest(request_headers=pb.HttpHeaders())
    message.protocol_config.request_body_mode = Mode.BUFFERED
    with pytest.raises(WrongMode, match="FULL_DUPLEX_STREAMED"):
        dialect().answer_mode(message)
    message.request_headers.end_of_stream = True
    assert dialect().answer_mode(message) is AnswerMode.UNSEEN


def test_an_access_log_can_find_its_way_back() -> None:
    """Where it is to: the request's id and the worker's name are its headers, and not taken off."""
    made = PickerDialect(1, (), lambda: "id", owner="0.w")
    (raw,) = made.decision(decision("10.0.0.1:80"), None, trailers=False)
    message = pb.ProcessingResponse.FromString(raw)
    said = headers_set(message)
    assert said == {DESTINATION: "10.0.0.1:80", "x-tokenway-request-id": "id", "x-tokenway-owner": "0.w"}
    assert not said.keys() & set(message.request_headers.response.header_mutation.remove_headers)
    passed = pb.ProcessingResponse.FromString(made.pass_to(PassTo(decision("10.0.0.1:80").plan)))
    removed = set(passed.request_headers.response.header_mutation.remove_headers)
    assert removed >= {"x-tokenway-request-id", "x-tokenway-owner"}  # a client's: nothing was decided
    assert headers_set(passed) == {DESTINATION: "10.0.0.1:80"}


NAMES = Renamed('the "client\'s" ü', "engine")
SAID = (
    b'data: {"id":"1","model":"engine","choices":[{"delta":{"content":"\\"model\\":\\"engine\\""}}]}\n\n'
    b'data: {"response": {"model": "engine"}, "x": "model"}\n\n"model":"engin'
)
GIVEN = SAID.replace(b'"model":"engine"', b'"model":"the \\"client\'s\\" \\u00fc"').replace(
    b'"model": "engine"', b'"model": "the \\"client\'s\\" \\u00fc"'
)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11, 16, 40, 1_000])
def test_a_model_has_its_other_name_wherever_the_answer_is_cut(size: int) -> None:
    """What a text says of it is left alone, and the end is not lost."""
    renaming = Renaming(NAMES)
    chunks = [SAID[at : at + size] for at in range(0, len(SAID), size)]
    given = [renaming.feed(chunk, end=False) for chunk in chunks] + [renaming.feed(b"", end=True)]
    assert b"".join(given) == GIVEN


@pytest.mark.parametrize("seed", range(20))
def test_answers_that_name_no_model_pass_byte_for_byte(seed: int) -> None:
    """Whatever they are, and however they are cut; little is ever held back."""
    rng = random.Random(seed)
    renaming = Renaming(NAMES)
    alphabet = [b'"', b"model", b":", b" ", b"engine", b'"model":"', b"\\", b"x", b'"model":"other"']
    body = b"".join(rng.choice(alphabet) for _ in range(400)).replace(b'"engine"', b'"engin"')
    given, at = [], 0
    while at < len(body):
        size = rng.randrange(1, 30)
        given.append(renaming.feed(body[at : at + size], end=False))
        at += size
        assert at - sum(map(len, given)) < 30 + len('"model": "engine"')
    given.append(renaming.feed(b"", end=True))
    assert b"".join(given) == body
