"""AIGW's own calls: load of clusters request by request, cached prefixes, replicated events.

Refreshes and token counts are further ones, for what AIGW's roadmap has.

Rules:
    1. Fields that are not asked for are ignored: AIGW's deletes carry an empty `cluster` and `ip`.
    2. An answer that changed nothing because the news was old (a duplicate add, a second delete) is a
       success: AIGW's client counts anything else against this server.

Source: AIGW's metadata center, `docs/en/api.md`, `pkg/server/router`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from metadata_center.load.kinds import KINDS
from metadata_center.service.calls import Code, Handler, RefusedError, ServiceRequest, ServiceResponse, ok
from metadata_center.service.cluster_caches import DEFAULT_TOP_K
from metadata_center.service.cluster_loads import BYTES_PER_TOKEN
from metadata_center.service.fields import MAX_HASH, MAX_HASHES, MAX_INT32, Body, query_name
from metadata_center.service.openapi import ADDRESS, COUNT, NAME, Operation, object_of
from metadata_center.service.state import ServiceState
from metadata_center.types import RequestId

_HASHES: Final = {
    "type": "array",
    "maxItems": MAX_HASHES,
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_HASH},
    "description": "Hashes of the prompt's pieces, in order; AIGW's are cumulative over steps of 512 bytes.",
}
_INPUT_TOKENS: Final = {
    **COUNT,
    "description": f"Tokens of the prompt; taken for prompt_length/{BYTES_PER_TOKEN} until it is known.",
}
_ADD_BODY: Final = object_of(
    "request_id cluster ip",
    request_id=NAME,
    cluster=NAME,
    ip=ADDRESS,
    prompt_length=COUNT,
    input_tokens=_INPUT_TOKENS,
)
_ID_BODY: Final = object_of("request_id", request_id=NAME)
_LOAD: Final = object_of(
    " ".join(("ip", "prompt_length", *(kind.aigw for kind in KINDS), "updated_time")),
    ip={"type": "string"},
    prompt_length={**COUNT, "description": "In the callers' unit; what exceeds an int32 is cut off."},
    **{kind.aigw: {**COUNT, "description": kind.meaning} for kind in KINDS},
    updated_time={"type": "integer", "description": "Unix nanoseconds of the last add or delete."},
)
_LOCATION: Final = object_of(
    "ip length",
    ip={"type": "string"},
    length={"type": "integer", "minimum": 1, "description": "Leading hashes held."},
)

LOADS: Final = Operation(
    "GET",
    "/v1/load/stats",
    "Load of a cluster's engines; null if none was heard of lately",
    data={"type": ["array", "null"], "items": _LOAD},
    parameters=({"name": "cluster", "in": "query", "required": True, "schema": NAME},),
    failures=(Code.INVALID_INPUT,),
)

ADD: Final = Operation(
    "POST",
    "/v1/load/stats",
    "Count a request on an engine; ignored if it is known already or was deleted before",
    body=_ADD_BODY,
    failures=(Code.TOO_MUCH,),
)

DELETE: Final = Operation(
    "DELETE", "/v1/load/stats", "The request is over, its prompt included", body=_ID_BODY
)

DELETE_PROMPT: Final = Operation(
    "DELETE", "/v1/load/prompt", "The request's prompt is computed", body=_ID_BODY
)

REFRESH: Final = Operation(
    "POST",
    "/v1/load/refresh",
    "The request still runs: its expiry starts anew; what is known of its tokens",
    body=object_of(
        "request_id",
        request_id=NAME,
        input_tokens=_INPUT_TOKENS,
        generated_tokens={**COUNT, "description": "So far; less than before is ignored."},
    ),
)

REPLICATED: Final = Operation(
    "POST",
    "/v1/replica/event",
    "One of the four changes above, from a replica of AIGW's metadata center",
    body={
        **_ID_BODY,
        "description": "That of the call: load.stats.set needs all that POST /v1/load/stats does.",
    },
    parameters=(
        {
            "name": "Event-Type",
            "in": "header",
            "required": True,
            "schema": {
                "type": "string",
                "enum": [
                    "load.stats.set",
                    "load.stats.delete",
                    "load.prompt.delete",
                    "load.stats.refresh",
                ],
            },
        },
    ),
    failures=(Code.TOO_MUCH,),
)

SAVE: Final = Operation(
    "POST",
    "/v1/cache/save",
    "An engine holds a prompt now",
    body=object_of("cluster prompt_hash ip", cluster=NAME, prompt_hash=_HASHES, ip=ADDRESS),
    failures=(Code.TOO_MUCH,),
)

QUERY: Final = Operation(
    "POST",
    "/v1/cache/query",
    "Engines that hold a prefix of a prompt, the longest first",
    data=object_of("locations", locations={"type": "array", "items": _LOCATION}),
    body=object_of(
        "cluster prompt_hash",
        cluster=NAME,
        prompt_hash=_HASHES,
        top_k={**COUNT, "description": f"Most engines to name; 0 or none: {DEFAULT_TOP_K}."},
        topk={**COUNT, "description": "The same, if top_k does not say."},
    ),
)

OPERATIONS: Final = (LOADS, ADD, DELETE, DELETE_PROMPT, REFRESH, REPLICATED, SAVE, QUERY)


class AigwCalls:
    """Answers AIGW.

    Args:
        state: What is remembered.
    """

    def __init__(self, state: ServiceState) -> None:
        self._state = state
        self._events: Mapping[str, Handler] = {
            "load.stats.set": self._add,
            "load.stats.delete": self._delete,
            "load.prompt.delete": self._delete_prompt,
            "load.stats.refresh": self._refresh,
        }

    @property
    def handlers(self) -> Mapping[Operation, Handler]:
        """The handler of each call."""
        return {
            LOADS: self._loads,
            ADD: self._add,
            DELETE: self._delete,
            DELETE_PROMPT: self._delete_prompt,
            REFRESH: self._refresh,
            REPLICATED: self._replicated,
            SAVE: self._save,
            QUERY: self._query,
        }

    def _add(self, request: ServiceRequest, now_s: float) -> ServiceResponse:
        body = Body(request)
        self._state.loads.add(
            RequestId(body.name("request_id")),
            body.name("cluster"),
            body.address("ip"),
            body.count("prompt_length"),
            now_s,
            input_tokens=body.known_count("input_tokens"),
        )
        return ok(request)

    def _refresh(self, request: ServiceRequest, now_s: float) -> ServiceResponse:
        body = Body(request)
        self._state.loads.refresh(
            RequestId(body.name("request_id")),
            now_s,
            input_tokens=body.known_count("input_tokens"),
            generated_tokens=body.known_count("generated_tokens"),
        )
        return ok(request)

    def _delete(self, request: ServiceRequest, now_s: float) -> ServiceResponse:
        self._state.loads.delete(RequestId(Body(request).name("request_id")), now_s)
        return ok(request)

    def _delete_prompt(self, request: ServiceRequest, now_s: float) -> ServiceResponse:
        self._state.loads.delete_prompt(RequestId(Body(request).name("request_id")), now_s)
        return ok(request)

    def _loads(self, request: ServiceRequest, now_s: float) -> ServiceResponse:
        loads = self._state.rendezvous.load_of(query_name(request.query, "cluster"), now_s)
        return ok(
            request,
            None
            if loads is None
            else [
                {
                    "ip": load.address,
                    "prompt_length": min(load.prompt_length, MAX_INT32),
                    **{
                        kind.aigw: min(amount, MAX_INT32)
                        for kind, amount in zip(KINDS, load.amounts, strict=True)
                    },
                    "updated_time": self._state.unix_ns(load.updated_s),
                }
                for load in loads
            ],
        )

    def _replicated(self, request: ServiceRequest, now_s: float) -> ServiceResponse:
        """What a replica of AIGW's metadata center received, passed on to this one."""
        if not request.event_type:
            raise RefusedError(Code.INVALID_INPUT, "missing Event-Type header")
        handler = self._events.get(request.event_type)
        if handler is None:
            raise RefusedError(Code.INVALID_INPUT, "Unsupported event type")
        try:
            return handler(request, now_s)
        except RefusedError as failure:
            raise RefusedError(failure.code, f"handler execute error: {failure.reason}") from failure

    def _save(self, request: ServiceRequest, now_s: float) -> ServiceResponse:
        body = Body(request)
        self._state.caches.save(body.name("cluster"), body.address("ip"), body.hashes("prompt_hash"), now_s)
        return ok(request)

    def _query(self, request: ServiceRequest, now_s: float) -> ServiceResponse:
        body = Body(request)
        top_k, topk = body.count("top_k"), body.count("topk")  # AIGW's client sends the latter
        held = self._state.caches.query(
            body.name("cluster"), body.hashes("prompt_hash"), top_k or topk, now_s
        )
        return ok(request, {"locations": [{"ip": ip, "length": length} for ip, length in held]})
