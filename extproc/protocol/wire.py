"""ext_proc messages on the wire, as every dialect has them.

Rules:
    1. Answers are bytes; what does not depend on the request is serialised once.
    2. Parts of an answer are serialised messages, appended: protobuf merges concatenated messages field by
       field.
    3. A new body comes with its `content-length` in the same answer, or Envoy answers 500.

Source: envoy/service/ext_proc/v3/external_processor.proto, Envoy 1.40.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.errors import ACCEPTED_ENCODINGS, Reason, RouterError
from extproc.protobuf_fields import LEN, NoFieldError, varint
from extproc.protocol.machine import MessageKind
from extproc.transport.seam import Pieces, Received
from extproc.values.control import malformed_limits
from extproc.values.exchange import Body, RequestHeaders
from extproc.values.headers import CONTENT_ENCODING

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"

LARGE_BYTES = 2 * 1024 * 1024
"""Bodies beyond this are not copied at all to be understood; each copy of 32 MiB takes 20 ms."""

_BY_HAND_BYTES = 64 * 1024
"""Messages beyond this are read by hand: protobuf copies a body twice, 45 us for 0.8 MB."""


def tag(message: Any, field: str) -> bytes:
    """What a field of bytes or of a message begins with."""
    return bytes([message.DESCRIPTOR.fields_by_name[field].number << 3 | LEN])


_REQUEST_BODY = tag(pb.ProcessingRequest, "request_body")
_BODY = tag(pb.HttpBody, "body")


class LargeBody:
    """A body message that is large.

    Attributes:
        body: All of it, as a view of the message.
    """

    __slots__ = ("body",)

    def __init__(self, body: Body) -> None:
        self.body = body

    @property
    def request_body(self) -> LargeBody:
        """As the message that it stands for."""
        return self

    def WhichOneof(self, _: str) -> str:  # noqa: N802 - protobuf's interface
        """As the message that it stands for."""
        return "request_body"


def parse(raw: Received) -> Any:
    """What came: a `ProcessingRequest`, or what looks like one."""
    if len(raw) > _BY_HAND_BYTES and raw[:1] == _REQUEST_BODY:
        with suppress(NoFieldError):  # protobuf says what is wrong
            length, at = varint(raw, 1)
            if at + length <= len(raw) and raw[at : at + 1] == _BODY:
                of_body, begins = varint(raw, at + 1)
                if begins + of_body <= at + length:
                    return LargeBody(memoryview(raw)[begins : begins + of_body])
    return pb.ProcessingRequest.FromString(raw)


def framed(begins: bytes, num_bytes: int) -> bytes:
    """What precedes a field of so many bytes."""
    head = bytearray(begins)
    while num_bytes >= 0x80:
        head.append(num_bytes & 0x7F | 0x80)
        num_bytes >>= 7
    head.append(num_bytes)
    return bytes(head)


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
        ignored=malformed_limits(headers),
    )


CONTINUE: dict[MessageKind, bytes] = {
    MessageKind.REQUEST_TRAILERS: pb.ProcessingResponse(
        request_trailers=pb.TrailersResponse()
    ).SerializeToString(),
    MessageKind.RESPONSE_HEADERS: pb.ProcessingResponse(
        response_headers=pb.HeadersResponse()
    ).SerializeToString(),
    MessageKind.RESPONSE_BODY: pb.ProcessingResponse(response_body=pb.BodyResponse()).SerializeToString(),
    MessageKind.RESPONSE_TRAILERS: pb.ProcessingResponse(
        response_trailers=pb.TrailersResponse()
    ).SerializeToString(),
}


def set_header(key: str, value: str) -> base_pb2.HeaderValueOption:
    """One that replaces what was there."""
    return base_pb2.HeaderValueOption(
        header=base_pb2.HeaderValue(key=key, raw_value=value.encode()),
        append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )


def routed(field: str, common: pb.CommonResponse) -> pb.ProcessingResponse:
    """The answer to the message that is called `field`, with what `common` says of it."""
    if field == "request_headers":
        return pb.ProcessingResponse(request_headers=pb.HeadersResponse(response=common))
    if field == "request_body":
        return pb.ProcessingResponse(request_body=pb.BodyResponse(response=common))
    mutation = common.header_mutation
    return pb.ProcessingResponse(request_trailers=pb.TrailersResponse(header_mutation=mutation))


_NEW_BODY = (
    tag(pb.ProcessingResponse, "request_body"),
    tag(pb.BodyResponse, "response"),
    tag(pb.CommonResponse, "body_mutation"),
    tag(pb.BodyMutation, "body"),
)
"""Where a new body is in an answer, from without."""


def new_body(pieces: Pieces) -> Pieces:
    """What to append to an answer to a body so that `pieces`, joined, replace it.

    It is written by hand, so that a body of many megabytes is copied once and not five times.
    """
    num_bytes = sum(map(len, pieces))
    message = pb.ProcessingResponse(
        request_body=pb.BodyResponse(
            response=pb.CommonResponse(
                header_mutation=pb.HeaderMutation(set_headers=[set_header("content-length", str(num_bytes))])
            )
        )
    )
    head = b""
    for field in reversed(_NEW_BODY):
        head = framed(field, len(head) + num_bytes) + head
    return (bytes(message.SerializeToString()), head, *pieces)


def new_path(field: str, path: str) -> bytes:
    """What to append to an answer to the message that is called `field` so that the request has this path."""
    mutation = pb.HeaderMutation(set_headers=[set_header(":path", path)])
    return bytes(routed(field, pb.CommonResponse(header_mutation=mutation)).SerializeToString())


def _without_encoding() -> bytes:
    mutation = pb.HeaderMutation(remove_headers=[CONTENT_ENCODING])
    response = pb.CommonResponse(header_mutation=mutation)
    return bytes(pb.ProcessingResponse(request_body=pb.BodyResponse(response=response)).SerializeToString())


WITHOUT_ENCODING = _without_encoding()
"""What to put before an answer to a body so that its `content-encoding` goes."""


def patience(wait_s: float) -> bytes:
    """Has Envoy wait for the answer this much longer than it would; Envoy takes one per message.

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
        error: The refusal, for its `Retry-After` and `Allow`; None for an answer that is no refusal.
    """
    headers = [set_header("content-type", "application/json")]
    if error is not None and error.reason is Reason.UNSUPPORTED_ENCODING:
        headers.append(
            set_header("accept-encoding", ACCEPTED_ENCODINGS)
        )  # RFC 9110 section 12.5.3: what a request may have
    if error is not None and error.retry_after_s is not None:
        headers.append(set_header("retry-after", str(error.retry_after_s)))
    if error is not None and error.allow:
        headers.append(set_header("allow", ", ".join(error.allow)))
    message = pb.ProcessingResponse()
    message.immediate_response.status.code = status
    message.immediate_response.headers.set_headers.extend(headers)
    message.immediate_response.body = body
    message.immediate_response.details = details
    return bytes(message.SerializeToString())
