"""The metadata center's API over one `ServiceState`: a request as values in, an answer as values out.

AIGW's calls are in `aigw_calls.py`, those of Tokenway's gateways in `member_calls.py`, those for operators in
`operator_calls.py`; `calls.py` has what all answers have in common.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any, Final

import orjson

from metadata_center.errors import CapacityError
from metadata_center.service import aigw_calls, member_calls, operator_calls
from metadata_center.service.aigw_calls import AigwCalls
from metadata_center.service.calls import Code, Handler, RefusedError, ServiceRequest, ServiceResponse
from metadata_center.service.member_calls import MemberCalls
from metadata_center.service.openapi import document_of
from metadata_center.service.operator_calls import Host, OperatorCalls
from metadata_center.service.state import ServiceState

OTHER: Final = "other"
"""The route of a request that has none: what a caller makes up is no metric label."""

_OPERATIONS: Final = (*aigw_calls.OPERATIONS, *member_calls.OPERATIONS, *operator_calls.OPERATIONS)

_OPEN: Final = frozenset(operation.path for operation in _OPERATIONS if operation.is_open)


class Api:
    """The API.

    Args:
        state: What is remembered.
        host: The process that serves it.
        token: Required as bearer token, on all but `/healthz` and `/metrics`; None requires none.
    """

    def __init__(self, state: ServiceState, host: Host, *, token: str | None = None) -> None:
        self._token = None if token is None else token.encode()
        families = (
            AigwCalls(state),
            MemberCalls(state.rendezvous),
            OperatorCalls(host, state.advance, openapi_json()),
        )
        self._handlers: Mapping[tuple[str, str], Handler] = {
            (operation.method, operation.path): handler
            for family in families
            for operation, handler in family.handlers.items()
        }

    def answer(self, request: ServiceRequest, now_s: float) -> ServiceResponse:
        """Do what is asked, and answer; `now_s` is monotonic seconds."""
        try:
            self._authenticate(request)
            return self._handler(request)(request, now_s)
        except RefusedError as failure:
            return failure.answer(request.trace_id)
        except CapacityError as error:
            return RefusedError(Code.TOO_MUCH, str(error)).answer(request.trace_id)

    def _authenticate(self, request: ServiceRequest) -> None:
        if self._token is None or request.path in _OPEN:
            return
        scheme, _, token = (request.authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            token.strip().encode(errors="replace"), self._token
        ):
            reason = "a bearer token is missing" if request.authorization is None else "not the bearer token"
            raise RefusedError(Code.UNAUTHENTICATED, reason, headers={"WWW-Authenticate": "Bearer"})

    def _handler(self, request: ServiceRequest) -> Handler:
        handler = self._handlers.get((request.method, request.path))
        if handler is not None:
            return handler
        allowed = ", ".join(method for method, path in self._handlers if path == request.path)
        if not allowed:
            raise RefusedError(Code.UNKNOWN_PATH, "no such path; /openapi.json lists them")
        raise RefusedError(Code.METHOD_NOT_ALLOWED, f"accepted here: {allowed}", headers={"Allow": allowed})


def route(method: str, path: str) -> tuple[str, str]:
    """Method and path from a closed set, for metrics and logs: what the API does not have is `OTHER`."""
    methods = [operation.method for operation in _OPERATIONS if operation.path == path]
    return method if method in methods else OTHER, path if methods else OTHER


def openapi_json() -> bytes:
    """The OpenAPI 3.1 document, as served and as kept in `etc/metadata-center.openapi.json`."""
    return orjson.dumps(openapi_document(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def openapi_document() -> dict[str, Any]:
    """What each call takes and answers."""
    return document_of(_OPERATIONS)
