"""ext_proc messages on the wire: the only module of the request path that knows protobuf's `envoy.*`.

Rules:
    1. Answers are bytes. Whatever does not depend on the request is serialised once; a decision's answer
       depends only on its ordered endpoints and its cluster, so the router keeps and reuses it.
    2. What does depend on the request is a serialised message of its own, appended: protobuf merges
       concatenated messages field by field.
    3. Every routing answer mutates a header, or Envoy ignores `clear_route_cache` (Envoy 1.40).
    4. A new body comes with its `content-length` in the same answer, or Envoy answers 500.

Source: envoy/service/ext_proc/v3/external_processor.proto, Envoy 1.40.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from envoy.config.core.v3 import base_pb2
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from google.protobuf import struct_pb2

from extproc.errors import ACCEPTED_ENCODINGS, Reason, RouterError
from extproc.protocol.machine import Kind
from extproc.values.exchange import NO_OWNER, RequestHeaders
from extproc.values.headers import OWNER_HEADER, OWNER_TAG_HEADER

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"

CONTENT_ENCODING = "content-encoding"

LB_NAMESPACE = "envoy.lb"
DESTINATION_KEY = "x-gateway-destination-endpoint"
ROUTE_NAMESPACE = "tokenway.route"
DECISION_NAMESPACE = "tokenway"
DEBUG_KEY = "debug"

ProcessingRequest = pb.ProcessingRequest

LARGE_BYTES = 2 * 1024 * 1024
"""Messages beyond this are not copied twice more to be understood; each copy of 32 MiB takes 20 ms."""

_LEN = 2  # protobuf's wire type of bytes and messages


def _tag(message: Any, field: str) -> bytes:
    return bytes([message.DESCRIPTOR.fields_by_name[field].number << 3 | _LEN])


_REQUEST_BODY = _tag(pb.ProcessingRequest, "request_body")
_BODY = _tag(pb.HttpBody, "body")


class LargeBody:
    """A body message that is large: the body is a view of the message.

    Attributes:
        body: All of it.
    """

    __slots__ = ("body",)

    def __init__(self, body: memoryview) -> None:
        self.body = body

    @property
    def request_body(self) -> LargeBody:
        """As the message that it stands for."""
        return self

    def WhichOneof(self, _: str) -> str:  # noqa: N802 - protobuf's interface
        """As the message that it stands for."""
        return "request_body"


def parse(raw: bytes) -> Any:
    """What came: a `ProcessingRequest`, or what looks like one."""
    if len(raw) <= LARGE_BYTES or raw[:1] != _REQUEST_BODY:
        return pb.ProcessingRequest.FromString(raw)
    length, at = _varint(raw, 1)
    if at + length > len(raw) or raw[at : at + 1] != _BODY:
        return pb.ProcessingRequest.FromString(raw)
    of_body, begins = _varint(raw, at + 1)
    if begins + of_body > at + length:
        return pb.ProcessingRequest.FromString(raw)
    return LargeBody(memoryview(raw)[begins : begins + of_body])


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends; a large one if it ends nowhere."""
    value = shift = 0
    for byte in raw[at : at + 10]:
        value |= (byte & 0x7F) << shift
        shift += 7
        at += 1
        if byte < 0x80:
            return value, at
    return len(raw) + 1, at


def _framed(tag: bytes, num_bytes: int) -> bytes:
    """What precedes a field of so many bytes."""
    head = bytearray(tag)
    while num_bytes >= 0x80:
        head.append(num_bytes & 0x7F | 0x80)
        num_bytes >>= 7
    head.append(num_bytes)
    return bytes(head)


_Mode = processing_mode_pb2.ProcessingMode


def request_headers(message: pb.ProcessingRequest) -> RequestHeaders:
    """Translate the headers message.

    A repeated header keeps its last value, but for `content-encoding`, whose values are one list.
    """
    http = message.request_headers
    headers = {
        header.key: str(raw, "utf-8", "replace") if (raw := header.raw_value) else header.value
        for header in http.headers.headers
    }
    if CONTENT_ENCODING in headers:
        headers[CONTENT_ENCODING] = ",".join(
            str(header.raw_value or header.value.encode(), "utf-8", "replace")
            for header in http.headers.headers
            if header.key == CONTENT_ENCODING
        )
    return RequestHeaders(
        method=headers.get(":method", ""),
        path=headers.get(":path", ""),
        headers=headers,
        end_of_stream=http.end_of_stream,
    )


def _await_body(*, first_chunk: bool) -> bytes:
    mode = None
    if first_chunk:
        mode = _Mode(
            request_header_mode=_Mode.SEND,
            request_body_mode=_Mode.BUFFERED,
            request_trailer_mode=_Mode.SEND,
            response_header_mode=_Mode.SKIP,
            response_body_mode=_Mode.STREAMED,
            response_trailer_mode=_Mode.SKIP,
        )
    return bytes(
        pb.ProcessingResponse(request_headers=pb.HeadersResponse(), mode_override=mode).SerializeToString()
    )


AWAIT_BODY = _await_body(first_chunk=False)
AWAIT_BODY_AND_FIRST_CHUNK = _await_body(first_chunk=True)

CONTINUE: dict[Kind, bytes] = {
    Kind.REQUEST_TRAILERS: pb.ProcessingResponse(request_trailers=pb.TrailersResponse()).SerializeToString(),
    Kind.RESPONSE_HEADERS: pb.ProcessingResponse(response_headers=pb.HeadersResponse()).SerializeToString(),
    Kind.RESPONSE_BODY: pb.ProcessingResponse(response_body=pb.BodyResponse()).SerializeToString(),
    Kind.RESPONSE_TRAILERS: pb.ProcessingResponse(
        response_trailers=pb.TrailersResponse()
    ).SerializeToString(),
}


def _set(key: str, value: str) -> base_pb2.HeaderValueOption:
    return base_pb2.HeaderValueOption(
        header=base_pb2.HeaderValue(key=key, raw_value=value.encode()),
        append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )


def _routed(field: str, common: pb.CommonResponse) -> pb.ProcessingResponse:
    if field == "request_headers":
        return pb.ProcessingResponse(request_headers=pb.HeadersResponse(response=common))
    if field == "request_body":
        return pb.ProcessingResponse(request_body=pb.BodyResponse(response=common))
    mutation = common.header_mutation
    return pb.ProcessingResponse(request_trailers=pb.TrailersResponse(header_mutation=mutation))


_NEW_BODY = (
    _tag(pb.ProcessingResponse, "request_body"),
    _tag(pb.BodyResponse, "response"),
    _tag(pb.CommonResponse, "body_mutation"),
    _tag(pb.BodyMutation, "body"),
)
"""Where a new body is in an answer, from without."""


MAX_ROUTES = 1024
"""Serialised answers kept that lack but endpoints: one per cluster, kind of answer and number of attempts."""

_DESTINATION = tuple(
    (tag, _framed(_tag(struct_pb2.Struct.FieldsEntry, "key"), len(name)) + name)
    for tag, name in (
        (_tag(struct_pb2.Value, "string_value"), DESTINATION_KEY.encode()),
        (_tag(struct_pb2.Value, "struct_value"), LB_NAMESPACE.encode()),
    )
)
"""Where endpoints are in the metadata of an answer, from within: the tag of a value, and its key."""

_ENTRY = _tag(struct_pb2.Struct, "fields")
_ENTRY_VALUE = _tag(struct_pb2.Struct.FieldsEntry, "value")
_METADATA = _tag(pb.ProcessingResponse, "dynamic_metadata")


def _destination(endpoints: str) -> bytes:
    """The metadata that names the endpoints, by hand: protobuf's own way to make it takes 20 us."""
    value = endpoints.encode()
    for tag, key in _DESTINATION:
        value = _framed(tag, len(value)) + value
        entry = key + _framed(_ENTRY_VALUE, len(value)) + value
        value = _framed(_ENTRY, len(entry)) + entry
    return _framed(_METADATA, len(value)) + value


class Answers:
    """Routing answers of one worker.

    Args:
        owner: Value of `OWNER_HEADER` for every decision of this process.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._routes: dict[tuple[str, str, str, int, tuple[tuple[str, str], ...]], bytes] = {}

    def decision(
        self,
        field: str,
        endpoints: tuple[str, ...],
        cluster: str,
        headers: tuple[tuple[str, str], ...] = (),
        *,
        booked: bool = True,
    ) -> bytes:
        """The answer that sends a request to `endpoints`, in order, all in `cluster`; about 2 us.

        All but the endpoints is the same for many requests and serialised once.

        Args:
            field: The message answered: "request_body", "request_headers" or "request_trailers".
            endpoints: `ip:port`, best first; empty leaves the choice to Envoy's own policy, and the request
                to nobody's books.
            cluster: Envoy cluster, the same for each attempt.
            headers: Extra headers, (name, value).
            booked: False for a request that nobody was charged for: nobody is told what becomes of it.
        """
        owner = self._owner if endpoints and booked else NO_OWNER
        key = field, owner, cluster, max(1, len(endpoints)), headers
        route = self._routes.get(key)
        if route is None:
            if len(self._routes) >= MAX_ROUTES:
                self._routes.clear()
            route = self._routes[key] = self._route(*key)
        return route + _destination(",".join(endpoints)) if endpoints else route

    @staticmethod
    def _route(
        field: str, owner: str, cluster: str, attempts: int, headers: tuple[tuple[str, str], ...]
    ) -> bytes:
        """A decision but for its endpoints; arguments as for `decision`; about 35 us."""
        message = _routed(
            field,
            pb.CommonResponse(
                clear_route_cache=True,
                header_mutation=pb.HeaderMutation(
                    set_headers=[
                        _set(OWNER_HEADER, owner),
                        _set(OWNER_TAG_HEADER, owner),
                        *(_set(name, value) for name, value in headers),
                    ]
                ),
            ),
        )
        message.dynamic_metadata.update(
            {
                ROUTE_NAMESPACE: {
                    "priority_groups": [
                        {"name": str(i), "clusters": [{"cluster_name": cluster, "weight": 1}]}
                        for i in range(attempts)
                    ]
                }
            }
        )
        return bytes(message.SerializeToString())

    @staticmethod
    def new_body(pieces: Sequence[bytes | bytearray]) -> tuple[bytes | bytearray, ...]:
        """What to append to a body decision so that `pieces`, joined, replace the client's body.

        It is written by hand, so that a body of many megabytes is copied once and not five times.
        """
        num_bytes = sum(map(len, pieces))
        message = pb.ProcessingResponse(
            request_body=pb.BodyResponse(
                response=pb.CommonResponse(
                    header_mutation=pb.HeaderMutation(set_headers=[_set("content-length", str(num_bytes))])
                )
            )
        )
        head = b""
        for tag in reversed(_NEW_BODY):
            head = _framed(tag, len(head) + num_bytes) + head
        return (bytes(message.SerializeToString()), head, *pieces)

    @staticmethod
    def uncompressed(body: bytes | None) -> bytes:
        """What to put before a body decision so that the engine gets an uncompressed body.

        Args:
            body: Takes the place of the client's; a new body in the decision itself still wins, for it comes
                later. None if the client's is none but by name (`content-encoding: identity`).
        """
        response = pb.CommonResponse(header_mutation=pb.HeaderMutation(remove_headers=[CONTENT_ENCODING]))
        if body is not None:
            response.header_mutation.set_headers.append(_set("content-length", str(len(body))))
            response.body_mutation.body = body
        message = pb.ProcessingResponse(request_body=pb.BodyResponse(response=response))
        return bytes(message.SerializeToString())

    @staticmethod
    def debug(request_id: str) -> bytes:
        """What to append so that Envoy shows the decision id to the client."""
        message = pb.ProcessingResponse()
        message.dynamic_metadata.update({DECISION_NAMESPACE: {DEBUG_KEY: request_id}})
        return bytes(message.SerializeToString())


def patience(wait_s: float) -> bytes:
    """Tells Envoy to wait for the answer this much longer than it would; heard once per message.

    Args:
        wait_s: From now; Envoy ignores what exceeds its `max_message_timeout`.
    """
    message = pb.ProcessingResponse()
    message.override_message_timeout.FromNanoseconds(int(wait_s * 1e9))
    return bytes(message.SerializeToString())


def immediate(status: int, body: bytes, details: str, error: RouterError | None) -> bytes:
    """A complete response, sent by Envoy without any upstream.

    Args:
        status: HTTP status code.
        body: JSON.
        details: Becomes `response_code_details` in the access log.
        error: The refusal, for its `Retry-After`; None for an answer that is no refusal.
    """
    headers = [_set("content-type", "application/json")]
    if error is not None and error.reason is Reason.UNSUPPORTED_ENCODING:
        headers.append(
            _set("accept-encoding", ACCEPTED_ENCODINGS)
        )  # RFC 9110 section 12.5.3: what a request may have
    if error is not None and error.retry_after_s is not None:
        headers.append(_set("retry-after", str(error.retry_after_s)))
    message = pb.ProcessingResponse()
    message.immediate_response.status.code = status
    message.immediate_response.headers.set_headers.extend(headers)
    message.immediate_response.body = body
    message.immediate_response.details = details
    return bytes(message.SerializeToString())
