"""Calls of operators and their tools: metrics, health, the log level, the document of the API."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final, Protocol

from metadata_center.service.calls import (
    JSON_TYPE,
    TRACE_HEADER,
    Code,
    Handler,
    RefusedError,
    ServiceRequest,
    ServiceResponse,
    ok,
)
from metadata_center.service.fields import Body
from metadata_center.service.openapi import Operation, object_of

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class LogLevel(StrEnum):
    """What `/log/level` accepts."""

    TRACE = "TRACE"
    DEBUG = "DEBUG"
    INFO = "INFO"
    WARN = "WARN"
    ERROR = "ERROR"
    FATAL = "FATAL"


class Host(Protocol):
    """What the API asks of the process that serves it."""

    def metrics_text(self) -> bytes:
        """The Prometheus exposition."""
        ...

    def set_log_level(self, level: LogLevel) -> None:
        """Log from this level on."""
        ...


LOG_LEVEL: Final = Operation(
    "POST",
    "/log/level",
    "Log from this level on",
    data={"type": "string"},
    body=object_of("LevelParam", LevelParam={"type": "string", "enum": list(LogLevel)}),
)

METRICS: Final = Operation(
    "GET",
    "/metrics",
    "Prometheus metrics",
    content={"text/plain": {"schema": {"type": "string"}}},
    is_open=True,
)

HEALTHZ: Final = Operation("GET", "/healthz", "Alive", is_open=True)

OPENAPI: Final = Operation(
    "GET",
    "/openapi.json",
    "This document",
    content={"application/json": {"schema": {"type": "object"}}},
)

OPERATIONS: Final = (LOG_LEVEL, METRICS, HEALTHZ, OPENAPI)


class OperatorCalls:
    """Answers operators.

    Args:
        host: The process that serves the API.
        advance: Does what is due at a monotonic time, so that metrics show what is.
        document: The OpenAPI document.
    """

    def __init__(self, host: Host, advance: Callable[[float], None], document: bytes) -> None:
        self._host = host
        self._advance = advance
        self._document = document

    @property
    def handlers(self) -> Mapping[Operation, Handler]:
        """The handler of each call."""
        return {
            LOG_LEVEL: self._set_log_level,
            METRICS: self._metrics,
            HEALTHZ: self._healthz,
            OPENAPI: self._openapi,
        }

    def _set_log_level(self, request: ServiceRequest, _: float) -> ServiceResponse:
        name = Body(request).name("LevelParam")
        if name not in LogLevel.__members__:
            raise RefusedError(Code.INVALID_INPUT, f"log LevelParam can only be [{' '.join(LogLevel)}]")
        self._host.set_log_level(LogLevel(name))
        return ok(request, "log level updated successfully")

    def _healthz(self, request: ServiceRequest, _: float) -> ServiceResponse:
        return ok(request)

    def _metrics(self, request: ServiceRequest, now_s: float) -> ServiceResponse:
        self._advance(now_s)
        headers = {"Content-Type": METRICS_TYPE, TRACE_HEADER: request.trace_id}
        return ServiceResponse(200, self._host.metrics_text(), headers)

    def _openapi(self, request: ServiceRequest, _: float) -> ServiceResponse:
        headers = {"Content-Type": JSON_TYPE, TRACE_HEADER: request.trace_id}
        return ServiceResponse(200, self._document, headers)
