"""AIGW's metadata-center API over one `ServiceState`: a request as values in, an answer as values out.

Further calls are for Tokenway's gateways, and for what AIGW's roadmap has: tokens, refresh.

Rules:
    1. Every answer but `/metrics`, `/openapi.json` and shares is the envelope
       `{"status","error","data","trace_id"}`. Success is HTTP 200; a failure's HTTP status is its code
       divided by 100,000, rounded down.
    2. What a caller can do wrong is a 4xx; 500 is a fault of ours. A failure names the field and what is
       accepted, and never quotes what was sent.
    3. Fields that are not asked for are ignored: AIGW's deletes carry an empty `cluster` and `ip`.
    4. An answer that changed nothing because the news was old (a duplicate add, a second delete) is a
       success: AIGW's client counts anything else against this server.

Source: AIGW's metadata center, `docs/en/api.md`, `pkg/server/router`, `pkg/utils/errors`.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final, Protocol
from urllib.parse import parse_qs

import orjson

from metadata_center.errors import CapacityError, MetadataError
from metadata_center.service.cluster_caches import DEFAULT_TOP_K
from metadata_center.service.cluster_loads import BYTES_PER_TOKEN
from metadata_center.service.state import ServiceState
from metadata_center.sharing.http_messages import (
    EVENTS_PATH,
    FRAMES_TYPE,
    KEEP_ALIVE,
    MESSAGE_TYPE,
    RESERVE_PATH,
    RESERVE_TYPE,
    SHARES_PATH,
    decode_reserve,
    encode_frames,
)
from metadata_center.sharing.messages import MAX_AMOUNT, MAX_CANDIDATES, MessageError, decode
from metadata_center.types import RequestId

MAX_BODY_BYTES: Final = 1 << 20
"""Holds `MAX_HASHES` hashes of 20 digits and a comma each, and the rest of the body."""

MAX_HASHES: Final = 32_768
"""Prompt pieces of one call: 16 MiB of prompt text in AIGW's steps of 512 bytes."""

MAX_NAME_CHARS: Final = 256
"""Of a cluster, as AIGW's own configuration has it, and of a request id."""

MAX_INT32: Final = 2**31 - 1
"""AIGW's client reads `queued_req_num` and `prompt_length` as int32 and fails the whole answer on more."""

TRACE_HEADER: Final = "X-Trace-ID"

JSON_TYPE: Final = "application/json; charset=utf-8"

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

OTHER: Final = "other"
"""The route of a request that has none: what a caller makes up is no metric label."""

_OPEN: Final = frozenset({"/healthz", "/metrics"})  # without a token

_MAX_HASH: Final = 2**64 - 1
_MAX_ADDRESS_CHARS: Final = 64  # a bracketed IPv6 address with a port has 47
_MAX_QUERY_FIELDS: Final = 16  # one is asked for


class Code(IntEnum):
    """Failures on the wire. AIGW documents 40001400, 40101001 and 50001000; the others follow its rule."""

    INVALID_INPUT = 40001400
    UNAUTHENTICATED = 40101001
    FORBIDDEN = 40301400
    UNKNOWN_PATH = 40401400
    METHOD_NOT_ALLOWED = 40501400
    BODY_TOO_LARGE = 41301400
    TOO_MUCH = 42901400
    INTERNAL = 50001000

    @property
    def status(self) -> int:
        """HTTP status (Rule 1)."""
        return self // 100_000


_MESSAGES: Final[Mapping[Code, str]] = {
    Code.INVALID_INPUT: "Invalid input parameters",
    Code.UNAUTHENTICATED: "Authentication failed",
    Code.FORBIDDEN: "Not for web pages",
    Code.UNKNOWN_PATH: "Unknown path",
    Code.METHOD_NOT_ALLOWED: "Method not allowed",
    Code.BODY_TOO_LARGE: "Request body too large",
    Code.TOO_MUCH: "Capacity reached",
    Code.INTERNAL: "Internal server error",
}


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


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request.

    Attributes:
        method: As sent, upper case.
        path: Undecoded, without the query.
        trace_id: Printable ASCII without spaces; echoed.
        query: Undecoded, without the question mark.
        body: At most `MAX_BODY_BYTES`.
        authorization: That header, or None.
        event_type: The `Event-Type` header, or None.
    """

    method: str
    path: str
    trace_id: str
    query: str = ""
    body: bytes = b""
    authorization: str | None = None
    event_type: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP response.

    Attributes:
        status: HTTP status.
        body: Bytes of the body.
        headers: Content type included, length not.
        follows: The body goes on with every message that followers are told.
    """

    status: int
    body: bytes
    headers: Mapping[str, str]
    follows: bool = False


class RefusedError(MetadataError):
    """A request that is refused.

    Args:
        code: Fixes the HTTP status and the message.
        reason: For the caller; one clause, nothing of the request quoted.
        detail: Completes the message after a colon, or None.
        headers: Further ones that the status calls for.
    """

    def __init__(
        self,
        code: Code,
        reason: str,
        *,
        detail: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.detail = detail
        self.headers = headers or {}

    def answer(self, trace_id: str) -> Answer:
        """The envelope that says so."""
        message = _MESSAGES[self.code] + ("" if self.detail is None else f": {self.detail}")
        error = {"code": self.code, "message": message, "reason": self.reason}
        return _answer(self.code.status, "ERROR", error, None, trace_id, self.headers)


_Handler = Callable[[Request, float], Answer]


class Api:
    """The API.

    Args:
        state: What is remembered.
        host: The process that serves it.
        token: Required as bearer token, on all but `/healthz` and `/metrics`; None requires none.
    """

    def __init__(self, state: ServiceState, host: Host, *, token: str | None = None) -> None:
        self._state = state
        self._host = host
        self._token = None if token is None else token.encode()
        self._document = openapi_json()
        self._handlers: Mapping[tuple[str, str], _Handler] = {
            ("GET", "/v1/load/stats"): self._loads,
            ("POST", "/v1/load/stats"): self._add,
            ("DELETE", "/v1/load/stats"): self._delete,
            ("DELETE", "/v1/load/prompt"): self._delete_prompt,
            ("POST", "/v1/load/refresh"): self._refresh,
            ("POST", "/v1/replica/event"): self._replicated,
            ("POST", "/v1/cache/save"): self._save,
            ("POST", "/v1/cache/query"): self._query,
            ("GET", SHARES_PATH): self._shares,
            ("POST", SHARES_PATH): self._share,
            ("POST", RESERVE_PATH): self._reserve,
            ("GET", EVENTS_PATH): self._follow,
            ("POST", "/log/level"): self._set_log_level,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/healthz"): self._healthz,
            ("GET", "/openapi.json"): self._openapi,
        }
        self._events: Mapping[str, _Handler] = {
            "load.stats.set": self._add,
            "load.stats.delete": self._delete,
            "load.prompt.delete": self._delete_prompt,
            "load.stats.refresh": self._refresh,
        }

    def answer(self, request: Request, now_s: float) -> Answer:
        """Do what is asked, and answer; `now_s` is monotonic seconds."""
        try:
            self._authenticate(request)
            return self._handler(request)(request, now_s)
        except RefusedError as failure:
            return failure.answer(request.trace_id)
        except CapacityError as error:
            return RefusedError(Code.TOO_MUCH, str(error)).answer(request.trace_id)

    def _authenticate(self, request: Request) -> None:
        if self._token is None or request.path in _OPEN:
            return
        scheme, _, token = (request.authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            token.strip().encode(errors="replace"), self._token
        ):
            reason = "a bearer token is missing" if request.authorization is None else "not the bearer token"
            raise RefusedError(Code.UNAUTHENTICATED, reason, headers={"WWW-Authenticate": "Bearer"})

    def _handler(self, request: Request) -> _Handler:
        handler = self._handlers.get((request.method, request.path))
        if handler is not None:
            return handler
        allowed = ", ".join(method for method, path in self._handlers if path == request.path)
        if not allowed:
            raise RefusedError(Code.UNKNOWN_PATH, "no such path; /openapi.json lists them")
        raise RefusedError(Code.METHOD_NOT_ALLOWED, f"accepted here: {allowed}", headers={"Allow": allowed})

    def _add(self, request: Request, now_s: float) -> Answer:
        body = _Body(request)
        self._state.loads.add(
            RequestId(body.name("request_id")),
            body.name("cluster"),
            body.address("ip"),
            body.count("prompt_length"),
            now_s,
            input_tokens=body.known_count("input_tokens"),
        )
        return _ok(request)

    def _refresh(self, request: Request, now_s: float) -> Answer:
        body = _Body(request)
        self._state.loads.refresh(
            RequestId(body.name("request_id")),
            now_s,
            input_tokens=body.known_count("input_tokens"),
            generated_tokens=body.known_count("generated_tokens"),
        )
        return _ok(request)

    def _delete(self, request: Request, now_s: float) -> Answer:
        self._state.loads.delete(RequestId(_Body(request).name("request_id")), now_s)
        return _ok(request)

    def _delete_prompt(self, request: Request, now_s: float) -> Answer:
        self._state.loads.delete_prompt(RequestId(_Body(request).name("request_id")), now_s)
        return _ok(request)

    def _loads(self, request: Request, now_s: float) -> Answer:
        loads = self._state.rendezvous.load_of(_query_name(request.query, "cluster"), now_s)
        return _ok(
            request,
            None
            if loads is None
            else [
                {
                    "ip": load.address,
                    "queued_req_num": min(load.requests, MAX_INT32),
                    "prompt_length": min(load.prompt_length, MAX_INT32),
                    "prefill_req_num": min(load.prefill_requests, MAX_INT32),
                    "prefill_tokens": min(load.prefill_tokens, MAX_INT32),
                    "input_tokens": min(load.input_tokens, MAX_INT32),
                    "generated_tokens": min(load.generated_tokens, MAX_INT32),
                    "updated_time": self._state.unix_ns(load.updated_s),
                }
                for load in loads
            ],
        )

    def _replicated(self, request: Request, now_s: float) -> Answer:
        """What a replica of AIGW's metadata center was told, passed on to this one."""
        if not request.event_type:
            raise RefusedError(Code.INVALID_INPUT, "missing Event-Type header")
        handler = self._events.get(request.event_type)
        if handler is None:
            raise RefusedError(Code.INVALID_INPUT, "Unsupported event type")
        try:
            return handler(request, now_s)
        except RefusedError as failure:
            raise RefusedError(failure.code, f"handler execute error: {failure.reason}") from failure

    def _save(self, request: Request, now_s: float) -> Answer:
        body = _Body(request)
        self._state.caches.save(body.name("cluster"), body.address("ip"), body.hashes("prompt_hash"), now_s)
        return _ok(request)

    def _query(self, request: Request, now_s: float) -> Answer:
        body = _Body(request)
        top_k, topk = body.count("top_k"), body.count("topk")  # AIGW's client sends the latter
        held = self._state.caches.query(
            body.name("cluster"), body.hashes("prompt_hash"), top_k or topk, now_s
        )
        return _ok(request, {"locations": [{"ip": ip, "length": length} for ip, length in held]})

    def _shares(self, request: Request, now_s: float) -> Answer:
        return _frames(request, encode_frames(self._state.rendezvous.snapshot(now_s)))

    def _share(self, request: Request, now_s: float) -> Answer:
        try:
            self._state.rendezvous.publish(decode(request.body), request.body, now_s)
        except MessageError as error:
            raise _invalid(str(error)) from error
        return _ok(request)

    def _reserve(self, request: Request, now_s: float) -> Answer:
        try:
            places = self._state.rendezvous.reserve(*decode_reserve(request.body), now_s)
        except MessageError as error:
            raise _invalid(str(error)) from error
        return _ok(request, [{"index": place.index, "totals": place.totals} for place in places])

    def _follow(self, request: Request, _: float) -> Answer:
        return _frames(request, KEEP_ALIVE, follows=True)

    def _set_log_level(self, request: Request, _: float) -> Answer:
        name = _Body(request).name("LevelParam")
        if name not in LogLevel.__members__:
            raise RefusedError(Code.INVALID_INPUT, f"log LevelParam can only be [{' '.join(LogLevel)}]")
        self._host.set_log_level(LogLevel(name))
        return _ok(request, "log level updated successfully")

    def _healthz(self, request: Request, _: float) -> Answer:
        return _ok(request)

    def _metrics(self, request: Request, now_s: float) -> Answer:
        self._state.advance(now_s)
        headers = {"Content-Type": METRICS_TYPE, TRACE_HEADER: request.trace_id}
        return Answer(200, self._host.metrics_text(), headers)

    def _openapi(self, request: Request, _: float) -> Answer:
        headers = {"Content-Type": JSON_TYPE, TRACE_HEADER: request.trace_id}
        return Answer(200, self._document, headers)


def route(method: str, path: str) -> tuple[str, str]:
    """Method and path from a closed set, for metrics and logs: what the API does not have is `OTHER`."""
    methods = [operation.method for operation in _OPERATIONS if operation.path == path]
    return method if method in methods else OTHER, path if methods else OTHER


class _Body:
    """The JSON object in a request's body; each accessor raises `RefusedError` if its field will not do."""

    def __init__(self, request: Request) -> None:
        try:
            fields = orjson.loads(request.body)
        except orjson.JSONDecodeError as error:
            raise RefusedError(Code.INVALID_INPUT, error.msg, detail="invalid JSON format") from error
        if not isinstance(fields, dict):
            raise _invalid("the body should be an object")
        self._fields: dict[str, Any] = fields

    def name(self, field: str) -> str:
        """A string of 1..`MAX_NAME_CHARS` characters."""
        return _checked_name(field, self._fields.get(field))

    def count(self, field: str) -> int:
        """An integer 0..`MAX_INT32`; 0 if absent."""
        found = _integer(self._fields.get(field, 0))
        if found is None or not 0 <= found <= MAX_INT32:
            raise _invalid(f"field {field} should be an integer, 0..{MAX_INT32}")
        return found

    def known_count(self, field: str) -> int | None:
        """An integer 0..`MAX_INT32`; None if absent."""
        return self.count(field) if field in self._fields else None

    def hashes(self, field: str) -> list[int]:
        """A list of up to `MAX_HASHES` unsigned 64-bit integers."""
        found = self._fields.get(field)
        if found is None:
            raise _invalid(f"field {field} is required")
        if not isinstance(found, list) or len(found) > MAX_HASHES:
            raise _invalid(f"field {field} should be a list of at most {MAX_HASHES} integers")
        hashes: list[int] = found
        if not set(map(type, found)) <= {int}:
            hashes = [number for number in map(_integer, found) if number is not None]
        in_range = not hashes or 0 <= min(hashes) <= max(hashes) <= _MAX_HASH
        if len(hashes) != len(found) or not in_range:
            raise _invalid(f"field {field} should hold integers, 0..{_MAX_HASH}")
        return hashes

    def address(self, field: str) -> str:
        """`ip` or `ip:port`, an IPv6 address with a port in brackets; canonical."""
        found = self._fields.get(field)
        if found is None or found == "":
            raise _invalid(f"field {field} is required")
        try:
            return canonical_address(found)
        except ValueError:
            reason = f"field {field} should be an IPv4 or IPv6 address, with or without a port"
            raise _invalid(reason) from None


def _integer(found: object) -> int | None:
    """An integer as JSON Schema has it: 12.0 is one, true is none. Beyond 64 bits decoding makes floats."""
    if type(found) is float and found.is_integer():
        return int(found)
    return found if type(found) is int else None


def canonical_address(text: object) -> str:
    """One spelling per engine: IPv6 as in RFC 5952, ports without leading zeros.

    Raises:
        ValueError: Not `ip`, `ipv4:port` or `[ipv6]:port`; zones are refused, they mean nothing to others.
    """
    if not isinstance(text, str) or len(text) > _MAX_ADDRESS_CHARS or "%" in text:
        raise ValueError("not an address")
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not (bracketed or ("." in host and ":" not in host)):
        return str(ip_address(text))
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65_535):
        raise ValueError("not a port")
    return f"[{IPv6Address(host[1:-1])}]:{int(port)}" if bracketed else f"{IPv4Address(host)}:{int(port)}"


def _query_name(query: str, field: str) -> str:
    try:
        values = parse_qs(query, errors="strict", max_num_fields=_MAX_QUERY_FIELDS).get(field)
    except ValueError as error:  # too many fields, or not UTF-8
        raise _invalid("the query cannot be decoded") from error
    return _checked_name(field, values[0] if values else None)


def _checked_name(field: str, found: object) -> str:
    if found is None or found == "":
        raise _invalid(f"field {field} is required")
    if not isinstance(found, str) or len(found) > MAX_NAME_CHARS:
        raise _invalid(f"field {field} should be a string of 1..{MAX_NAME_CHARS} characters")
    return found


def _invalid(reason: str) -> RefusedError:
    return RefusedError(Code.INVALID_INPUT, reason, detail=reason)


def _frames(request: Request, frames: bytes, *, follows: bool = False) -> Answer:
    headers = {"Content-Type": FRAMES_TYPE, TRACE_HEADER: request.trace_id}
    return Answer(200, frames, headers, follows)


def _ok(request: Request, data: object = None) -> Answer:
    return _answer(200, "OK", None, data, request.trace_id, {})


def _answer(
    status: int,
    outcome: str,
    error: Mapping[str, object] | None,
    data: object,
    trace_id: str,
    headers: Mapping[str, str],
) -> Answer:
    body = orjson.dumps({"status": outcome, "error": error, "data": data, "trace_id": trace_id})
    return Answer(status, body, {"Content-Type": JSON_TYPE, TRACE_HEADER: trace_id, **headers})


def openapi_json() -> bytes:
    """The OpenAPI 3.1 document, as served and as kept in `etc/metadata-center.openapi.json`."""
    return orjson.dumps(openapi_document(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def openapi_document() -> dict[str, Any]:
    """What each call takes and answers.

    Schemas hold what the calls check; an `ip` may also be a compressed IPv6 address in brackets with a port,
    which no short pattern says.
    """
    paths: dict[str, dict[str, Any]] = {}
    for operation in _OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = operation.document()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tokenway metadata center",
            "version": "1",
            "description": "Load and cached prompt prefixes per engine, by AIGW's metadata-center API; "
            "shares of Tokenway's gateways.",
        },
        "paths": paths,
        "components": {
            "responses": {code.name: _failure_response(code) for code in Code},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _object(required: str, **properties: object) -> dict[str, Any]:
    return {"type": "object", "required": required.split(), "properties": properties}


_NULL: Final = {"type": "null"}
_NAME: Final = {"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS}
_COUNT: Final = {"type": "integer", "minimum": 0, "maximum": MAX_INT32}
_OCTET: Final = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_PORT: Final = "(:([1-9][0-9]{0,3}|[1-5][0-9]{4}))"
_ADDRESS: Final = {
    "type": "string",
    "description": "An IPv4 or IPv6 address, with or without a port: 10.0.0.1, 10.0.0.1:8000, fd00::1, "
    "[fd00::1]:8000. Answered in its canonical form.",
    "anyOf": [
        {"pattern": f"^({_OCTET}\\.){{3}}{_OCTET}{_PORT}?$"},
        {"pattern": "^([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}$"},
        {"pattern": f"^\\[([0-9a-f]{{1,4}}:){{7}}[0-9a-f]{{1,4}}\\]{_PORT}$"},
    ],
    "examples": ["10.0.0.1:8000"],
}
_HASHES: Final = {
    "type": "array",
    "maxItems": MAX_HASHES,
    "items": {"type": "integer", "minimum": 0, "maximum": _MAX_HASH},
    "description": "Hashes of the prompt's pieces, in order; AIGW's are cumulative over steps of 512 bytes.",
}
_INPUT_TOKENS: Final = {
    **_COUNT,
    "description": f"Tokens of the prompt; taken for prompt_length/{BYTES_PER_TOKEN} until it is told.",
}
_ADD_BODY: Final = _object(
    "request_id cluster ip",
    request_id=_NAME,
    cluster=_NAME,
    ip=_ADDRESS,
    prompt_length=_COUNT,
    input_tokens=_INPUT_TOKENS,
)
_ID_BODY: Final = _object("request_id", request_id=_NAME)
_LOAD: Final = _object(
    "ip queued_req_num prompt_length prefill_req_num prefill_tokens input_tokens generated_tokens "
    "updated_time",
    ip={"type": "string"},
    queued_req_num=_COUNT,
    prompt_length={**_COUNT, "description": "In the callers' unit; what exceeds an int32 is cut off."},
    prefill_req_num={**_COUNT, "description": "Requests whose prompt is not computed yet."},
    prefill_tokens={**_COUNT, "description": "Input tokens of those."},
    input_tokens={**_COUNT, "description": "Input tokens of all requests."},
    generated_tokens={**_COUNT, "description": "Output tokens so far, as far as callers tell."},
    updated_time={"type": "integer", "description": "Unix nanoseconds of the last add or delete."},
)
_LOCATION: Final = _object(
    "ip length",
    ip={"type": "string"},
    length={"type": "integer", "minimum": 1, "description": "Leading hashes held."},
)
_BINARY: Final = {"type": "string", "format": "binary"}
_PLACE: Final = _object(
    "index totals",
    index={"type": "integer", "minimum": 0, "maximum": MAX_CANDIDATES - 1},
    totals={
        "type": "array",
        "maxItems": MAX_CANDIDATES,
        "items": {"type": "integer", "minimum": 0, "maximum": MAX_AMOUNT},
        "description": "Requests in flight per candidate, over all gateways, before this one.",
    },
)
_TRACED: Final = {TRACE_HEADER: {"required": True, "schema": {"type": "string", "minLength": 1}}}


@dataclass(frozen=True, slots=True)
class _Operation:
    """One call of the API, as its document describes it."""

    method: str
    path: str
    summary: str
    data: Mapping[str, Any] = field(default_factory=lambda: _NULL)
    body: Mapping[str, Any] | None = None
    body_type: str = "application/json"
    parameters: tuple[Mapping[str, Any], ...] = ()
    failures: tuple[Code, ...] = ()
    content: Mapping[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        """An OpenAPI operation object."""
        envelope = {
            **_object(
                "status error data trace_id",
                status={"const": "OK"},
                error=_NULL,
                data=self.data,
                trace_id={"type": "string"},
            ),
            "additionalProperties": False,
        }
        content = self.content or {"application/json": {"schema": envelope}}
        responses: dict[str, Any] = {"200": {"description": "Done", "headers": _TRACED, "content": content}}
        failures = [*self.failures, Code.FORBIDDEN]
        if self.body is not None:
            failures += [Code.INVALID_INPUT, Code.BODY_TOO_LARGE]
        if self.path not in _OPEN:
            failures += [Code.UNAUTHENTICATED]
        for code in sorted(failures):
            responses[str(code.status)] = {"$ref": f"#/components/responses/{code.name}"}
        document: dict[str, Any] = {
            "summary": self.summary,
            "operationId": f"{self.method.lower()}{self.path.replace('/', '_').replace('.', '_')}",
            "security": [{}] if self.path in _OPEN else [{}, {"bearer": []}],
            "responses": responses,
        }
        if self.parameters:
            document["parameters"] = list(self.parameters)
        if self.body is not None:
            document["requestBody"] = {
                "required": True,
                "content": {self.body_type: {"schema": self.body}},
            }
        return document


def _failure_response(code: Code) -> dict[str, Any]:
    error = _object(
        "code message reason",
        code={"const": int(code)},
        message={"type": "string"},
        reason={"type": "string"},
    )
    envelope = {
        **_object(
            "status error data trace_id",
            status={"const": "ERROR"},
            error=error,
            data=_NULL,
            trace_id={"type": "string"},
        ),
        "additionalProperties": False,
    }
    return {
        "description": _MESSAGES[code],
        "headers": _TRACED,
        "content": {"application/json": {"schema": envelope}},
    }


_OPERATIONS: Final = (
    _Operation(
        "GET",
        "/v1/load/stats",
        "Load of a cluster's engines; null if none was heard of lately",
        data={"type": ["array", "null"], "items": _LOAD},
        parameters=({"name": "cluster", "in": "query", "required": True, "schema": _NAME},),
        failures=(Code.INVALID_INPUT,),
    ),
    _Operation(
        "POST",
        "/v1/load/stats",
        "Count a request on an engine; ignored if it is known already or was deleted before",
        body=_ADD_BODY,
        failures=(Code.TOO_MUCH,),
    ),
    _Operation("DELETE", "/v1/load/stats", "The request is over, its prompt included", body=_ID_BODY),
    _Operation("DELETE", "/v1/load/prompt", "The request's prompt is computed", body=_ID_BODY),
    _Operation(
        "POST",
        "/v1/load/refresh",
        "The request still runs: its expiry starts anew; what is known of its tokens",
        body=_object(
            "request_id",
            request_id=_NAME,
            input_tokens=_INPUT_TOKENS,
            generated_tokens={**_COUNT, "description": "So far; less than before is ignored."},
        ),
    ),
    _Operation(
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
    ),
    _Operation(
        "POST",
        "/v1/cache/save",
        "An engine holds a prompt now",
        body=_object("cluster prompt_hash ip", cluster=_NAME, prompt_hash=_HASHES, ip=_ADDRESS),
        failures=(Code.TOO_MUCH,),
    ),
    _Operation(
        "POST",
        "/v1/cache/query",
        "Engines that hold a prefix of a prompt, the longest first",
        data=_object("locations", locations={"type": "array", "items": _LOCATION}),
        body=_object(
            "cluster prompt_hash",
            cluster=_NAME,
            prompt_hash=_HASHES,
            top_k={**_COUNT, "description": f"Most engines to name; 0 or none: {DEFAULT_TOP_K}."},
            topk={**_COUNT, "description": "The same, if top_k does not say."},
        ),
    ),
    _Operation(
        "GET",
        SHARES_PATH,
        "What every gateway has in flight: frames of updates, to be applied in this order",
        content={FRAMES_TYPE: {"schema": _BINARY}},
    ),
    _Operation(
        "POST",
        SHARES_PATH,
        "What a gateway has in flight: an update, passed on to all followers",
        body=_BINARY,
        body_type=MESSAGE_TYPE,
        failures=(Code.TOO_MUCH,),
    ),
    _Operation(
        "POST",
        RESERVE_PATH,
        "The same, and places for requests: each is charged to its first candidate that has no more "
        "requests than believed, else to the one that has the fewest too many",
        data={"type": "array", "items": _PLACE},
        body=_BINARY,
        body_type=RESERVE_TYPE,
        failures=(Code.TOO_MUCH,),
    ),
    _Operation(
        "GET",
        EVENTS_PATH,
        "Frames of updates as gateways send them, without end; an empty frame at first, and when nothing "
        "is sent",
        content={FRAMES_TYPE: {"schema": _BINARY}},
        failures=(Code.TOO_MUCH,),
    ),
    _Operation(
        "POST",
        "/log/level",
        "Log from this level on",
        data={"type": "string"},
        body=_object("LevelParam", LevelParam={"type": "string", "enum": list(LogLevel)}),
    ),
    _Operation(
        "GET", "/metrics", "Prometheus metrics", content={"text/plain": {"schema": {"type": "string"}}}
    ),
    _Operation("GET", "/healthz", "Alive"),
    _Operation(
        "GET",
        "/openapi.json",
        "This document",
        content={"application/json": {"schema": {"type": "object"}}},
    ),
)
