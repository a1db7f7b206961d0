"""What the endpoint-picker protocol looks like on the wire: messages in, serialised answers out.

Rules:
    1. The destination is said twice and equal: as a header, for clusters of kind ORIGINAL_DST, and as
       metadata, which alone counts under Istio.
    2. What steers, and the protocol's own headers, are neither believed of a client nor sent to an engine.
    3. A chunk is answered with its own bytes. It is copied, never decoded.

Source: Gateway API inference extension, docs/proposals/004-endpoint-picker-protocol, version 1.0.0;
envoy/service/ext_proc/v3/external_processor.proto.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from google.protobuf import struct_pb2

from extproc.errors import Reason, RouterError
from extproc.protocol import wire
from extproc.protocol.machine import MessageKind
from extproc.request.sanitize import STEERING_HEADERS
from extproc.values.exchange import RequestHeaders
from extproc.values.headers import CONTENT_ENCODING, DEBUG_HEADER, OWNER_HEADER, REQUEST_ID_HEADER
from extproc.values.placements import Decision, Plan
from extproc.values.subsets import Subset

CHUNK_BYTES: Final = 62_000
"""Of a body that is sent back: some data planes take no more in one message, headroom included."""

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


class PickerDialect:
    """The endpoint-picker protocol.

    Args:
        fallbacks: Endpoints named after the first, to be tried in their order.
        withheld: Headers, lower case, that are not read: what clients prove themselves with.
        new_id: Makes a request's id. The gateway has none that is its own to make.
        allowed: Steering headers, lower case, that clients may use after all; never the protocol's own.
    """

    def __init__(
        self,
        fallbacks: int,
        withheld: Collection[str],
        new_id: Callable[[], str],
        allowed: Collection[str] = (),
    ) -> None:
        self._named = 1 + fallbacks
        steering = [name for name in STEERING_HEADERS if name not in allowed]
        self._unread = frozenset((*withheld, *steering, *_OWN))
        self._new_id = new_id
        self._removed = [name for name in dict.fromkeys((*steering, *_OWN)) if name != DESTINATION]

    def parse(self, raw: bytes) -> pb.ProcessingRequest:
        """What came."""
        return pb.ProcessingRequest.FromString(raw)

    def request_headers(self, message: pb.ProcessingRequest) -> RequestHeaders:
        """The request line and headers, with an id of our own and what may be chosen from."""
        sent = wire.request_headers(message)
        headers = {name: value for name, value in sent.headers.items() if name not in self._unread}
        headers[REQUEST_ID_HEADER] = self._new_id()
        return RequestHeaders(sent.method, sent.path, headers, sent.end_of_stream, _subset_of(message))

    def served(self, message: pb.ProcessingRequest) -> str | None:
        """With the headers of an answer: the address that gave it, if the gateway says so."""
        served = _metadata(message, LB_NAMESPACE, SERVED)
        return None if served is None else served.string_value or None

    def decision(self, decision: Decision, body: bytes | None, *, trailers: bool) -> Iterator[bytes]:
        """The request goes as was decided: its headers, body and trailers, in this order.

        Args:
            decision: Says so.
            body: As it came; None if the request has none.
            trailers: They came.
        """
        new = decision.new_body
        if new is not None:
            body = b"".join(new)
        num_bytes = len(body) if body is not None and not trailers else None
        yield self._headers(decision.plan, num_bytes, drops_encoding=decision.drops_encoding)
        if body is not None:
            yield from _pieces(body, ends=not trailers)
        if trailers:
            yield wire.CONTINUE[MessageKind.REQUEST_TRAILERS]

    def pass_to(self, plan: Plan) -> bytes:
        """To the headers: the request goes past us."""
        return self._headers(plan, None) if plan.endpoints else _GO_ON

    def echo(self, kind: MessageKind, body: bytes, *, end_of_stream: bool) -> bytes:
        """To a chunk of a request's or an answer's body: the same bytes."""
        return _chunk(
            _REQUEST_BODY if kind is MessageKind.REQUEST_BODY else _RESPONSE_BODY, body, ends=end_of_stream
        )

    def let_pass(self, kind: MessageKind) -> bytes:
        """To headers of an answer, or to trailers: nothing is changed."""
        return wire.CONTINUE[kind]

    def immediate(self, status: int, body: bytes, details: str, error: RouterError | None) -> bytes:
        """To any message: a whole response of our own, with the reason if it is a refusal that has one."""
        answer = wire.immediate(status, body, details, error)
        dropped = None if error is None else _DROPPED.get(error.reason)
        if dropped is None:
            return answer
        reason = pb.ProcessingResponse()
        reason.immediate_response.headers.set_headers.append(wire.set_header(DROPPED, dropped))
        return answer + bytes(reason.SerializeToString())

    def _headers(self, plan: Plan, num_bytes: int | None, *, drops_encoding: bool = False) -> bytes:
        # The same twice in a row is for a stale connection; a proxy that retries has its own rules.
        endpoints = ",".join(tuple(dict.fromkeys(plan.endpoints))[: self._named])
        mutation = pb.HeaderMutation(
            set_headers=[wire.set_header(DESTINATION, endpoints)],
            remove_headers=self._removed,
        )
        if num_bytes is not None:
            mutation.set_headers.append(wire.set_header("content-length", str(num_bytes)))
        if drops_encoding:
            mutation.remove_headers.append(CONTENT_ENCODING)
        message = pb.ProcessingResponse(
            request_headers=pb.HeadersResponse(response=pb.CommonResponse(header_mutation=mutation))
        )
        message.dynamic_metadata.update({LB_NAMESPACE: {DESTINATION: endpoints}})
        return bytes(message.SerializeToString())


def _pieces(body: bytes, *, ends: bool) -> Iterator[bytes]:
    """A request body in chunks; an empty one that ends is one empty chunk."""
    last = len(body) - CHUNK_BYTES
    view = memoryview(body)
    for at in range(0, len(body) or int(ends), CHUNK_BYTES):
        yield _chunk(_REQUEST_BODY, view[at : at + CHUNK_BYTES], ends=ends and at >= last)


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
    return Subset(hint.string_value.split(","))
