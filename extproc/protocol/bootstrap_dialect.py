"""The dialect of our own envoy/bootstrap.yaml: routes matched by owner, priority groups by metadata.

Rules:
    1. The body comes whole (BUFFERED), and the beginning of an answer only where it was asked for.
    2. Every routing answer mutates a header, or Envoy ignores `clear_route_cache` (Envoy 1.40).
    3. Attempt i takes endpoint i of the list and priority group i: they are in lock step.
    4. What a plan looks like depends on nothing else: it is serialised once and kept with the plan. All but
       its endpoints is the same for many plans, and kept as well. What differs by request is a serialised
       message of its own, appended: protobuf merges concatenated messages field by field.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from google.protobuf import struct_pb2

from extproc.protocol import wire
from extproc.protocol.machine import MessageKind
from extproc.transport.seam import Message
from extproc.values.exchange import NO_OWNER, PassTo
from extproc.values.headers import OWNER_HEADER, OWNER_TAG_HEADER
from extproc.values.placements import Decision, Plan

LB_NAMESPACE: Final = "envoy.lb"
DESTINATION_KEY: Final = "x-gateway-destination-endpoint"
ROUTE_NAMESPACE: Final = "tokenway.route"
DECISION_NAMESPACE: Final = "tokenway"
DEBUG_KEY: Final = "debug"

_RQ_TIMEOUT: Final = "x-envoy-upstream-rq-timeout-ms"
_TRY_TIMEOUT: Final = "x-envoy-upstream-rq-per-try-timeout-ms"
_MAX_RETRIES: Final = "x-envoy-max-retries"

_RETRY_ON: Final = "x-envoy-retry-on", "connect-failure,reset,refused-stream"
"""For what one endpoint alone can answer: it is tried twice, for its connection may have been stale. Another
is asked only where that one is gone, so that the client hears an engine's own 404; what the one says is never
overruled by one that does not know. The header, which clients cannot send, selects the route `pinned` of
envoy/bootstrap.yaml."""

MAX_ROUTES: Final = 1024
"""Serialised answers kept that lack but endpoints: one per cluster, kind of answer and number of attempts."""

_DESTINATION: Final = tuple(
    (field, wire.framed(wire.tag(struct_pb2.Struct.FieldsEntry, "key"), len(name)) + name.encode())
    for field, name in (
        (wire.tag(struct_pb2.Value, "string_value"), DESTINATION_KEY),
        (wire.tag(struct_pb2.Value, "struct_value"), LB_NAMESPACE),
    )
)
"""Where endpoints are in the metadata of an answer, from within: the tag of a value, and its key."""

_ENTRY: Final = wire.tag(struct_pb2.Struct, "fields")
_ENTRY_VALUE: Final = wire.tag(struct_pb2.Struct.FieldsEntry, "value")
_METADATA: Final = wire.tag(pb.ProcessingResponse, "dynamic_metadata")

_Mode = processing_mode_pb2.ProcessingMode


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


AWAIT_BODY: Final = _await_body(first_chunk=False)
AWAIT_BODY_AND_FIRST_CHUNK: Final = _await_body(first_chunk=True)


_RouteKey = tuple[str, str, str, int, tuple[tuple[str, str], ...]]
"""Field answered, owner, cluster, attempts, headers of the router."""


class BootstrapDialect:
    """See `extproc.protocol.dialect.Dialect`.

    Args:
        owner: This worker's name, by which its access-log entries find it.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._routes: dict[_RouteKey, bytes] = {}
        self.parse = wire.parse
        self.request_headers = wire.request_headers
        self.patience = wire.patience
        self.immediate = wire.immediate

    def await_body(self, *, first_chunk: bool) -> bytes:
        """See `Dialect`."""
        return AWAIT_BODY_AND_FIRST_CHUNK if first_chunk else AWAIT_BODY

    def let_pass(self, kind: MessageKind) -> bytes:
        """See `Dialect`."""
        return wire.CONTINUE[kind]

    def pass_to(self, passes: PassTo) -> bytes:
        """See `Dialect`."""
        answer = self._plan(passes.plan, "request_headers")
        return (
            answer if passes.new_path is None else answer + wire.new_path("request_headers", passes.new_path)
        )

    def decision(self, decision: Decision, *, to_trailers: bool) -> Message:
        """See `Dialect`."""
        if to_trailers:
            return self._plan(decision.plan, "request_trailers")
        answer = self._plan(decision.plan, "request_body")
        if decision.drops_encoding:
            answer = wire.WITHOUT_ENCODING + answer
        if decision.shows_id:
            answer += _debug(decision.request_id)
        if decision.new_path is not None:
            answer += wire.new_path("request_body", decision.new_path)
        new = decision.new_body
        if new is None:
            return answer
        pieces = (answer, *wire.new_body(new))
        return pieces if sum(map(len, new)) > wire.LARGE_BYTES else b"".join(pieces)

    def _plan(self, plan: Plan, field: str) -> bytes:
        rendered = plan.rendered.get(field)
        if rendered is None:
            rendered = plan.rendered[field] = self._render(plan, field)
        return rendered

    def _render(self, plan: Plan, field: str) -> bytes:
        """The answer to the message called `field` that has Envoy go by the plan; about 2 us."""
        owner = self._owner if plan.endpoints and plan.charged else NO_OWNER
        key = field, owner, plan.cluster, max(1, len(plan.endpoints)), _policy(plan)
        route = self._routes.get(key)
        if route is None:
            if len(self._routes) >= MAX_ROUTES:
                self._routes.clear()
            route = self._routes[key] = self.route(*key)
        return route + _destination(",".join(plan.endpoints)) if plan.endpoints else route

    def route(
        self, field: str, owner: str, cluster: str, attempts: int, policy: tuple[tuple[str, str], ...]
    ) -> bytes:
        """An answer but for its endpoints; arguments as in `_RouteKey`; about 35 us."""
        message = routed(field, owner, policy)
        groups: list[dict[str, Any]] = [
            {"name": str(i), "clusters": [{"cluster_name": cluster, "weight": 1}]} for i in range(attempts)
        ]
        message.dynamic_metadata.update({ROUTE_NAMESPACE: {"priority_groups": groups}})
        return bytes(message.SerializeToString())


def routed(field: str, owner: str, headers: Iterable[tuple[str, str]]) -> pb.ProcessingResponse:
    """An answer that has the route chosen anew, by the owner's headers and these."""
    values = [(OWNER_HEADER, owner), (OWNER_TAG_HEADER, owner), *headers]
    mutation = pb.HeaderMutation(set_headers=[wire.set_header(name, value) for name, value in values])
    return wire.routed(field, pb.CommonResponse(clear_route_cache=True, header_mutation=mutation))


def _destination(endpoints: str) -> bytes:
    """The metadata that names the endpoints, by hand: protobuf's own way to make it takes 20 us."""
    value = endpoints.encode()
    for begins, key in _DESTINATION:
        value = wire.framed(begins, len(value)) + value
        entry = key + wire.framed(_ENTRY_VALUE, len(value)) + value
        value = wire.framed(_ENTRY, len(entry)) + entry
    return wire.framed(_METADATA, len(value)) + value


def _policy(plan: Plan) -> tuple[tuple[str, str], ...]:
    """Time-outs and retries as headers of Envoy's router, which takes them off."""
    headers = []
    if plan.first_byte_timeout_s is not None:
        headers.append((_TRY_TIMEOUT, _ms(plan.first_byte_timeout_s)))
    if plan.timeout_s is not None:
        headers.append((_RQ_TIMEOUT, _ms(plan.timeout_s)))
    if plan.retries is not None:
        headers.append((_MAX_RETRIES, str(plan.retries)))
    if plan.pinned:
        headers.append(_RETRY_ON)
    return tuple(headers)


def _ms(seconds: float) -> str:
    return str(math.ceil(seconds * 1000))


def _debug(request_id: str) -> bytes:
    """What to append so that Envoy shows the decision id to the client."""
    message = pb.ProcessingResponse()
    message.dynamic_metadata.update({DECISION_NAMESPACE: {DEBUG_KEY: request_id}})
    return bytes(message.SerializeToString())
