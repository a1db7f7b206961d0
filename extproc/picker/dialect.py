"""What the endpoint-picker protocol looks like on the wire: messages in, serialised answers out.

Rules:
    1. The destination is said twice and equal: as a header, for clusters of kind ORIGINAL_DST, and as
       metadata, which alone counts under Istio.
    2. What steers, and the protocol's own headers, are neither believed of a client nor sent to an engine.
    3. A chunk is answered with its own bytes. It is copied, never decoded.
    4. No header of a request or an answer is said again: what is of one connection stays there.
    5. A request that ends with trailers is given back to Envoy in one piece. By chunks, a route that retries
       would send them to the engine twice: once as they come, and as the copy for a retry with the trailers.

Source: Gateway API inference extension, docs/proposals/004-endpoint-picker-protocol, version 1.0.0;
envoy/service/ext_proc/v3/external_processor.proto.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from google.protobuf import struct_pb2
from google.protobuf.message import DecodeError

from extproc.errors import Reason, RouterError
from extproc.picker.control_headers import CONTROL_HEADERS, said_by
from extproc.picker.machine import AnswerMode
from extproc.protocol import wire
from extproc.protocol.machine import MessageKind
from extproc.request.sanitize import STEERING_HEADERS
from extproc.transport.seam import Received
from extproc.values.exchange import PassTo, RequestHeaders
from extproc.values.headers import CONTENT_ENCODING, DEBUG_HEADER, OWNER_HEADER, REQUEST_ID_HEADER
from extproc.values.placements import Decision, Plan
from extproc.values.subsets import MAX_ENTRIES, Subset

CHUNK_BYTES: Final = 62_000
"""Of a body that is sent back: some data planes take no more in one message, headroom included."""

REPLACED_BYTES: Final = 1 << 20
"""What Envoy buffers of a request (`per_connection_buffer_limit_bytes`, by default). It takes a body in the
answer to the headers up to there, and keeps no copy of a chunk that is larger."""

LB_NAMESPACE: Final = "envoy.lb"
DESTINATION: Final = "x-gateway-destination-endpoint"
SERVED: Final = "x-gateway-destination-endpoint-served"
SUBSET_NAMESPACE: Final = "envoy.lb.subset_hint"
SUBSET: Final = "x-gateway-destination-endpoint-subset"
DROPPED: Final = "x-llm-d-request-dropped-reason"

_DROPPED: Final = {
    Reason.OVERLOADED: "rejected-saturated",
    Reason.READERS_BUSY: "rejected-saturated",
    Reason.NO_HEALTHY_ENDPOINT: "rejected-no-endpoints",
    Reason.CLUSTER_NOT_LISTED: "rejected-no-endpoints",
    Reason.SHUTTING_DOWN: "rejected-shutting-down",
}
"""The protocol's word for a refusal, where it has one."""

TEST_SELECTION: Final = "test-epp-endpoint-selection"
TEST_SERVED: Final = "x-conformance-test-served-endpoint"
"""Of the Gateway API's conformance suite: who may be chosen, above the subset, and who served."""

_OWN: Final = (
    *(DESTINATION, SERVED, SUBSET, DROPPED),
    *(REQUEST_ID_HEADER, OWNER_HEADER, DEBUG_HEADER),
)
"""What the protocol and Tokenway say to each other."""

_STREAMED: Final = (
    wire.tag(pb.BodyResponse, "response"),
    wire.tag(pb.CommonResponse, "body_mutation"),
    wire.tag(pb.BodyMutation, "streamed_response"),
)
"""Where a chunk is in the answer to a body, from without."""

_REQUEST_BODY: Final = wire.tag(pb.ProcessingResponse, "request_body")
_RESPONSE_BODY: Final = wire.tag(pb.ProcessingResponse, "response_body")
_BODY: Final = wire.tag(pb.StreamedBodyResponse, "body")
_END: Final = bytes(pb.StreamedBodyResponse(end_of_stream=True).SerializeToString())
_GO_ON: Final = bytes(pb.ProcessingResponse(request_headers=pb.HeadersResponse()).SerializeToString())


_Mode = processing_mode_pb2.ProcessingMode
_ANSWER_MODES: Final = {
    _Mode.FULL_DUPLEX_STREAMED: AnswerMode.ECHOED,
    _Mode.STREAMED: AnswerMode.SHOWN,
    _Mode.BUFFERED: AnswerMode.SHOWN,
    _Mode.BUFFERED_PARTIAL: AnswerMode.SHOWN,
    _Mode.NONE: AnswerMode.UNSEEN,
}


class WrongMode(Exception):  # noqa: N818 - the gateway's, not ours
    """The gateway is not configured for an endpoint picker, or does not speak it; says what is wrong."""


class PickerDialect:
    """The endpoint-picker protocol.

    Args:
        fallbacks: Endpoints named after the first, to be tried in their order.
        withheld: Headers, lower case, that are not read: what clients prove themselves with.
        new_id: Makes a request's id. The gateway has none that is its own to make.
        allowed: Steering headers, lower case, that clients may use after all; never the protocol's own.
        priority_of: Of an objective; None of one that nobody knows.
        owner: This worker's name, sent with the request's id in its headers, where the gateway's access log
            is to find its way back; None sends neither.
        obeys_tests: The conformance suite's headers are obeyed.
    """

    def __init__(
        self,
        fallbacks: int,
        withheld: Collection[str],
        new_id: Callable[[], str],
        allowed: Collection[str] = (),
        priority_of: Callable[[str], int | None] = lambda _objective: None,
        owner: str | None = None,
        *,
        obeys_tests: bool = False,
    ) -> None:
        self._named = 1 + fallbacks
        steering = [name for name in STEERING_HEADERS if name not in allowed]
        self._unread = frozenset((*withheld, *steering, *_OWN))
        self._new_id = new_id
        self._priority_of = priority_of
        self._owner = owner
        self._obeys_tests = obeys_tests
        said = () if owner is None else (REQUEST_ID_HEADER, OWNER_HEADER)
        removed = dict.fromkeys((*steering, *_OWN, *CONTROL_HEADERS, TEST_SELECTION))
        self._removed_passing = [name for name in removed if name != DESTINATION]
        self._removed = [name for name in self._removed_passing if name not in said]

    def parse(self, raw: Received) -> pb.ProcessingRequest:
        """What came.

        Raises:
            WrongMode: It is no message of the protocol.
        """
        try:
            return pb.ProcessingRequest.FromString(raw)
        except DecodeError as error:
            raise WrongMode("no ProcessingRequest, or one that is nested too deep") from error

    def request_headers(self, message: pb.ProcessingRequest, mode: AnswerMode) -> RequestHeaders:
        """The request line and headers, with an id of our own and what may be chosen from."""
        sent = wire.request_headers(message)
        headers = {name: value for name, value in sent.headers.items() if name not in self._unread}
        headers[REQUEST_ID_HEADER] = self._new_id()
        said = said_by(headers, self._priority_of)
        headers.update(said.limits)
        selected = headers.get(TEST_SELECTION) if self._obeys_tests else None
        return RequestHeaders(
            sent.method,
            sent.path,
            headers,
            sent.end_of_stream,
            _subset_of(message) if selected is None else _subset_in(selected),
            said.model,
            said.standing,
            shows_answer=mode is not AnswerMode.UNSEEN,
            ignored=said.ignored,
        )

    def answer_mode(self, message: pb.ProcessingRequest) -> AnswerMode:
        """With the headers of a request: what becomes of its answer. Gateways that do not say want it back.

        Raises:
            WrongMode: The body of the request does not come as the protocol has it.
        """
        if not message.HasField("protocol_config"):
            return AnswerMode.ECHOED
        modes = message.protocol_config
        if (
            not message.request_headers.end_of_stream
            and modes.request_body_mode != _Mode.FULL_DUPLEX_STREAMED
        ):
            raise WrongMode("request_body_mode must be FULL_DUPLEX_STREAMED")
        return _ANSWER_MODES.get(modes.response_body_mode, AnswerMode.ECHOED)

    def is_envoy(self, message: pb.ProcessingRequest) -> bool:
        """With the headers of a request: the gateway says its modes, as only Envoy (1.34 and later) does."""
        return bool(message.HasField("protocol_config"))

    def served(self, message: pb.ProcessingRequest) -> str | None:
        """With the headers of an answer: the address that gave it, if the gateway says so."""
        served = _metadata(message, LB_NAMESPACE, SERVED)
        return None if served is None else served.string_value or None

    def decision(
        self, decision: Decision, body: bytes | None, *, trailers: bool, is_envoy: bool = False
    ) -> Iterator[bytes]:
        """The request goes as was decided: its headers, body and trailers, in this order.

        Args:
            decision: Says so.
            body: As it came; None if the request has none.
            trailers: They came.
            is_envoy: The gateway is Envoy: with trailers, what goes is in one piece; a path may be changed.
        """
        new = decision.new_body
        if new is not None:
            body = b"".join(new)
        num_bytes = len(body) if body is not None and not trailers else None
        removed = [*self._removed, CONTENT_ENCODING] if decision.drops_encoding else self._removed
        headers = self._headers(decision.plan, num_bytes, removed)
        if is_envoy and decision.new_path is not None:
            headers += wire.new_path("request_headers", decision.new_path)
        if self._owner is not None:
            headers += _told_to_log(decision.request_id, self._owner)
        if body and trailers and is_envoy and len(body) <= REPLACED_BYTES:
            yield headers + _replacing(
                body
            )  # and the trailers with it: their own answer would be one too many
            return
        yield headers
        if body and trailers and is_envoy:
            yield _chunk(_REQUEST_BODY, body, ends=False)
        elif body is not None:
            yield from _pieces(_REQUEST_BODY, body, ends=not trailers)
        if trailers:
            yield wire.CONTINUE[MessageKind.REQUEST_TRAILERS]

    def pass_to(self, passes: PassTo, *, is_envoy: bool = False) -> bytes:
        """To the headers: the request goes past us; `is_envoy` as in `decision`."""
        if not passes.plan.endpoints:
            return _GO_ON
        headers = self._headers(passes.plan, None, self._removed_passing)
        if is_envoy and passes.new_path is not None:
            headers += wire.new_path("request_headers", passes.new_path)
        return headers

    def echo(self, kind: MessageKind, body: bytes, *, end_of_stream: bool) -> Iterator[bytes]:
        """To a chunk of a request's or an answer's body: the same bytes, in as many chunks as they need."""
        field = _REQUEST_BODY if kind is MessageKind.REQUEST_BODY else _RESPONSE_BODY
        if len(body) <= CHUNK_BYTES:
            yield _chunk(field, body, ends=end_of_stream)
        else:
            yield from _pieces(field, body, ends=end_of_stream)

    def let_pass(self, kind: MessageKind) -> bytes:
        """To headers of an answer, or to trailers: nothing is changed."""
        return wire.CONTINUE[kind]

    def answer_begins(self, message: pb.ProcessingRequest, *, is_renamed: bool) -> bytes:
        """To headers of an answer: nothing is changed, but for the length of one that is."""
        mutation = pb.HeaderMutation(remove_headers=["content-length"] if is_renamed else [])
        if self._obeys_tests and (served := self.served(message)) is not None:
            mutation.set_headers.append(wire.set_header(TEST_SERVED, served))
        if not mutation.ListFields():
            return wire.CONTINUE[MessageKind.RESPONSE_HEADERS]
        common = pb.CommonResponse(header_mutation=mutation)
        answer = pb.ProcessingResponse(response_headers=pb.HeadersResponse(response=common))
        return bytes(answer.SerializeToString())

    def immediate(self, status: int, body: bytes, details: str, error: RouterError | None) -> bytes:
        """To any message: a whole response of our own, with the reason if it is a refusal that has one."""
        answer = wire.immediate(status, body, details, error)
        dropped = None if error is None else _DROPPED.get(error.reason)
        if dropped is None:
            return answer
        reason = pb.ProcessingResponse()
        reason.immediate_response.headers.set_headers.append(wire.set_header(DROPPED, dropped))
        return answer + bytes(reason.SerializeToString())

    def _headers(self, plan: Plan, num_bytes: int | None, removed: Collection[str]) -> bytes:
        # The same twice in a row is for a stale connection; a proxy that retries has its own rules.
        endpoints = ",".join(tuple(dict.fromkeys(plan.endpoints))[: self._named])
        mutation = pb.HeaderMutation(
            set_headers=[wire.set_header(DESTINATION, endpoints)],
            remove_headers=removed,
        )
        if num_bytes is not None:
            mutation.set_headers.append(wire.set_header("content-length", str(num_bytes)))
        message = pb.ProcessingResponse(
            request_headers=pb.HeadersResponse(response=pb.CommonResponse(header_mutation=mutation))
        )
        message.dynamic_metadata.update({LB_NAMESPACE: {DESTINATION: endpoints}})
        return bytes(message.SerializeToString())


def _told_to_log(request_id: str, owner: str) -> bytes:
    """What to append to an answer to headers, so that the gateway's access log can say both."""
    pairs = ((REQUEST_ID_HEADER, request_id), (OWNER_HEADER, owner))
    mutation = pb.HeaderMutation(set_headers=[wire.set_header(name, value) for name, value in pairs])
    common = pb.CommonResponse(header_mutation=mutation)
    message = pb.ProcessingResponse(request_headers=pb.HeadersResponse(response=common))
    return bytes(message.SerializeToString())


def _replacing(body: bytes) -> bytes:
    """What to append to an answer to headers, so that the request goes on with this body at once."""
    common = pb.CommonResponse(
        status=pb.CommonResponse.CONTINUE_AND_REPLACE, body_mutation=pb.BodyMutation(body=body)
    )
    message = pb.ProcessingResponse(request_headers=pb.HeadersResponse(response=common))
    return bytes(message.SerializeToString())


def _pieces(field: bytes, body: bytes, *, ends: bool) -> Iterator[bytes]:
    """A body in chunks; an empty one that ends is one empty chunk."""
    last = len(body) - CHUNK_BYTES
    view = memoryview(body)
    for at in range(0, len(body) or int(ends), CHUNK_BYTES):
        yield _chunk(field, view[at : at + CHUNK_BYTES], ends=ends and at >= last)


def _chunk(field: bytes, body: bytes | memoryview, *, ends: bool) -> bytes:
    """An answer with a chunk, by hand: protobuf's own way copies it four times."""
    head = wire.framed(_BODY, len(body)) if body else b""
    tail = _END if ends else b""
    num_bytes = len(head) + len(body) + len(tail)
    for begins in reversed(_STREAMED):
        head = wire.framed(begins, num_bytes) + head
        num_bytes = len(head) + len(body) + len(tail)
    return b"".join((wire.framed(field, num_bytes), head, body, tail))


def _metadata(message: pb.ProcessingRequest, namespace: str, key: str) -> struct_pb2.Value | None:
    metadata: Any = message.metadata_context.filter_metadata
    if namespace not in metadata or key not in metadata[namespace].fields:
        return None
    value: struct_pb2.Value = metadata[namespace].fields[key]
    return value


def _subset_of(message: pb.ProcessingRequest) -> Subset | None:
    hint = _metadata(message, SUBSET_NAMESPACE, SUBSET)
    if hint is None:
        return None
    if hint.WhichOneof("kind") == "list_value":
        return Subset(entry.string_value for entry in hint.list_value.values)
    return _subset_in(hint.string_value)


def _subset_in(text: str) -> Subset:
    return Subset(text.split(",", MAX_ENTRIES))
