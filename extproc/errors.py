"""Every way a request can be refused, and the one table that says how it looks to the client.

Rules:
    1. Core modules raise `RouterError`; only `extproc.protocol` turns one into bytes on the wire.
    2. `Reason` is closed: it is the OpenAI `code`, the metric label and the explain field at once.
    3. A message never quotes prompt text, header values or secrets; it may quote names and positions.
    4. The shape of an error is that of the API it was asked by: `Shape.of` its path. Envoy's own answers are
       shaped alike by `local_reply_config` of envoy/bootstrap.yaml; before it has read a path, they have both
       shapes.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Final

import orjson


class Reason(StrEnum):
    """Why a request was refused. The value is the OpenAI `error.code`."""

    INVALID_JSON = "invalid_json"
    INVALID_REQUEST = "invalid_request"
    MISSING_MODEL = "missing_model"
    EMPTY_MESSAGES = "empty_messages"
    MODEL_NOT_FOUND = "model_not_found"
    ROUTE_NOT_FOUND = "route_not_found"
    UNKNOWN_PATH = "unknown_path"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    BODY_TOO_LARGE = "body_too_large"
    BODY_TIMEOUT = "body_timeout"
    UNSUPPORTED_ENCODING = "unsupported_encoding"
    OVERLOADED = "overloaded"
    NO_HEALTHY_ENDPOINT = "no_healthy_endpoint"
    CLUSTER_NOT_LISTED = "cluster_not_listed"
    READERS_BUSY = "readers_busy"
    SHUTTING_DOWN = "shutting_down"
    INTERNAL = "internal_error"


ACCEPTED_ENCODINGS = "gzip, deflate, zstd, br"
"""Codings of request bodies that `extproc.request.compression` decodes, as `Accept-Encoding` names them."""

_STATUS: dict[Reason, tuple[int, str]] = {
    Reason.INVALID_JSON: (400, "invalid_request_error"),
    Reason.INVALID_REQUEST: (400, "invalid_request_error"),
    Reason.MISSING_MODEL: (400, "invalid_request_error"),
    Reason.EMPTY_MESSAGES: (400, "invalid_request_error"),
    Reason.MODEL_NOT_FOUND: (404, "invalid_request_error"),
    Reason.ROUTE_NOT_FOUND: (404, "invalid_request_error"),
    Reason.UNKNOWN_PATH: (404, "invalid_request_error"),
    Reason.METHOD_NOT_ALLOWED: (405, "invalid_request_error"),
    Reason.BODY_TIMEOUT: (408, "invalid_request_error"),
    Reason.BODY_TOO_LARGE: (413, "invalid_request_error"),
    Reason.UNSUPPORTED_ENCODING: (415, "invalid_request_error"),
    Reason.OVERLOADED: (429, "overloaded_error"),
    Reason.NO_HEALTHY_ENDPOINT: (503, "overloaded_error"),
    Reason.CLUSTER_NOT_LISTED: (503, "overloaded_error"),
    Reason.READERS_BUSY: (503, "overloaded_error"),
    Reason.SHUTTING_DOWN: (503, "overloaded_error"),
    Reason.INTERNAL: (500, "api_error"),
}


class Shape(StrEnum):
    """Whose error object the clients of an API parse."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"

    @classmethod
    def of(cls, path: str) -> Shape:
        """The shape of errors at a request path: `/v1/messages` and all below it is Anthropic's API."""
        if path.startswith(_MESSAGES_PATH) and path[len(_MESSAGES_PATH) :][:1] in ("", "/", "?"):
            return cls.ANTHROPIC
        return cls.OPENAI


_MESSAGES_PATH = "/v1/messages"

_ANTHROPIC_TYPE: dict[int, str] = {
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",  # Anthropic's own service says it with 529, which proxies do not know
}
"""`error.type` by status; any other status here is an `invalid_request_error`.

Source: https://docs.anthropic.com/en/api/errors.
"""


MAX_RETRY_AFTER_S: Final = 120.0
"""The official `openai` client heeds no longer one, and comes again within seconds instead."""


def whole_retry_s(foreseen_s: float) -> int:
    """What `Retry-After` of any refusal says: whole seconds, rounded up, 1 to `MAX_RETRY_AFTER_S`."""
    return math.ceil(min(MAX_RETRY_AFTER_S, max(1.0, foreseen_s)))


class RouterError(Exception):
    """A request that cannot be served, with everything its answer needs.

    Args:
        reason: Closed code; fixes HTTP status and OpenAI `type`.
        message: For the client; one sentence, no prompt text.
        param: The offending request field (`messages`, `model`, `body.17`), or None.
        retry_after_s: When to come again, for `Retry-After`; None for no such header.
        held_s: How long the request waited for an endpoint before it was refused.
        allow: Methods that the path takes, for `Allow` (405 must have it); empty for no such header.

    Attributes:
        retry_after_s: As `Retry-After` says it, see `whole_retry_s`.
        model: As the routing table has it, of a request that was understood; empty for any other.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        held_s: float = 0.0,
        allow: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.param = param
        self.retry_after_s = None if retry_after_s is None else whole_retry_s(retry_after_s)
        self.held_s = held_s
        self.allow = allow
        self.model = ""

    def untraced(self) -> RouterError:
        """This, as a value: without the frames it was raised in, which hold the request and its caller."""
        self.__traceback__ = self.__cause__ = self.__context__ = None
        return self

    @property
    def status(self) -> int:
        """HTTP status code of the answer."""
        return _STATUS[self.reason][0]

    def body(self, shape: Shape = Shape.OPENAI, request_id: str = "") -> bytes:
        """The answer: `{"error":{"message","type","param","code"}}`, or what Anthropic's clients parse.

        Args:
            shape: Of the API the request came by.
            request_id: Given where the shape has a place for it; empty is null there.
        """
        if shape is Shape.ANTHROPIC:
            kind = _ANTHROPIC_TYPE.get(self.status, "invalid_request_error")
            return orjson.dumps(
                {
                    "type": "error",
                    "error": {"type": kind, "message": self.message},
                    "request_id": request_id or None,
                }
            )
        return orjson.dumps(
            {
                "error": {
                    "message": self.message,
                    "type": _STATUS[self.reason][1],
                    "param": self.param,
                    "code": self.reason.value,
                }
            }
        )


class ConfigError(Exception):
    """A configuration file that cannot be used.

    Args:
        path: The file.
        problems: One line each, "line N: key: what is wrong; accepted: ...".
    """

    def __init__(self, path: str, problems: list[str]) -> None:
        super().__init__(f"{path}: " + "; ".join(problems))
        self.path = path
        self.problems = problems
