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

from envoy.config.core.v3 import base_pb2
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.errors import RouterError
from extproc.protocol.machine import REQUEST_ID_HEADER as REQUEST_ID_HEADER
from extproc.protocol.machine import Kind, RequestHeaders
from extproc.types import NO_OWNER

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"

OWNER_HEADER = "x-tokenway-owner"
"""Set by the worker that decided; tells which process holds the request's books."""

DEBUG_HEADER = "x-tokenway-debug"
"""An operator's token; asks for the decision id in the answer."""

LB_NAMESPACE = "envoy.lb"
DESTINATION_KEY = "x-gateway-destination-endpoint"
ROUTE_NAMESPACE = "tokenway.route"
DECISION_NAMESPACE = "tokenway"
DEBUG_KEY = "debug"

ProcessingRequest = pb.ProcessingRequest
parse = pb.ProcessingRequest.FromString

_Mode = processing_mode_pb2.ProcessingMode


def request_headers(message: pb.ProcessingRequest) -> RequestHeaders:
    """Translate the headers message. A repeated header keeps its last value."""
    http = message.request_headers
    headers = {
        header.key: str(raw, "utf-8", "replace") if (raw := header.raw_value) else header.value
        for header in http.headers.headers
    }
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


class Answers:
    """Routing answers of one worker.

    Args:
        owner: Value of `OWNER_HEADER` for every decision of this process.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner

    def decision(
        self,
        field: str,
        endpoints: tuple[str, ...],
        cluster: str,
        headers: tuple[tuple[str, str], ...] = (),
        *,
        booked: bool = True,
    ) -> bytes:
        """The answer that sends a request to `endpoints`, in order, all in `cluster`; about 35 us.

        Args:
            field: The message answered: "request_body", "request_headers" or "request_trailers".
            endpoints: `ip:port`, best first; empty leaves the choice to Envoy's own policy, and the request
                to nobody's books.
            cluster: Envoy cluster, the same for each attempt.
            headers: Extra headers, (name, value).
            booked: False for a request that nobody was charged for: nobody is told what becomes of it.
        """
        message = _routed(
            field,
            pb.CommonResponse(
                clear_route_cache=True,
                header_mutation=pb.HeaderMutation(
                    set_headers=[
                        _set(OWNER_HEADER, self._owner if endpoints and booked else NO_OWNER),
                        *(_set(name, value) for name, value in headers),
                    ]
                ),
            ),
        )
        attempts = max(1, len(endpoints))
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
        if endpoints:
            message.dynamic_metadata.update({LB_NAMESPACE: {DESTINATION_KEY: ",".join(endpoints)}})
        return bytes(message.SerializeToString())

    @staticmethod
    def new_body(body: bytes) -> bytes:
        """What to append to a body decision so that `body` replaces the client's.

        The body is copied once: protobuf would take 180 ms for 25 MB of audio, on the event loop.
        """
        message = pb.ProcessingResponse(
            request_body=pb.BodyResponse(
                response=pb.CommonResponse(
                    header_mutation=pb.HeaderMutation(set_headers=[_set("content-length", str(len(body)))])
                )
            )
        )
        head = b""
        num_bytes = len(body)
        for field in _BODY_FIELDS:  # outwards: each field's head tells the size of all that is inside
            head = _length_delimited(field, num_bytes + len(head)) + head
        return b"".join((message.SerializeToString(), head, body))

    @staticmethod
    def debug(request_id: str) -> bytes:
        """What to append so that Envoy shows the decision id to the client."""
        message = pb.ProcessingResponse()
        message.dynamic_metadata.update({DECISION_NAMESPACE: {DEBUG_KEY: request_id}})
        return bytes(message.SerializeToString())


_BODY_FIELDS = (
    pb.BodyMutation.DESCRIPTOR.fields_by_name["body"].number,
    pb.CommonResponse.DESCRIPTOR.fields_by_name["body_mutation"].number,
    pb.BodyResponse.DESCRIPTOR.fields_by_name["response"].number,
    pb.ProcessingResponse.DESCRIPTOR.fields_by_name["request_body"].number,
)
"""Field numbers from a new body outwards; all below 16, so that a tag is one byte."""


def _length_delimited(field: int, num_bytes: int) -> bytes:
    """What goes before `num_bytes` that are the content of a field: its tag, and the length as a varint."""
    head = bytearray((field << 3 | 2,))
    while num_bytes > 0x7F:
        head.append(num_bytes & 0x7F | 0x80)
        num_bytes >>= 7
    head.append(num_bytes)
    return bytes(head)


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
    if error is not None and error.retry_after_s is not None:
        headers.append(_set("retry-after", str(error.retry_after_s)))
    message = pb.ProcessingResponse()
    message.immediate_response.status.code = status
    message.immediate_response.headers.set_headers.extend(headers)
    message.immediate_response.body = body
    message.immediate_response.details = details
    return bytes(message.SerializeToString())
