"""The OpenAPI document of the metadata center, made of what each route family says of its calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from metadata_center.service.calls import MESSAGES, TRACE_HEADER, Code
from metadata_center.service.fields import MAX_INT32, MAX_NAME_CHARS


def object_of(required: str, **properties: object) -> dict[str, Any]:
    """The schema of an object; `required` names properties, separated by spaces."""
    return {"type": "object", "required": required.split(), "properties": properties}


NULL: Final = {"type": "null"}
NAME: Final = {"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS}
COUNT: Final = {"type": "integer", "minimum": 0, "maximum": MAX_INT32}
_OCTET: Final = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_PORT: Final = "(:([1-9][0-9]{0,3}|[1-5][0-9]{4}))"
ADDRESS: Final = {
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
BINARY: Final = {"type": "string", "format": "binary"}
_TRACED: Final = {TRACE_HEADER: {"required": True, "schema": {"type": "string", "minLength": 1}}}


def document_of(operations: Iterable[Operation]) -> dict[str, Any]:
    """The OpenAPI 3.1 document: what each call takes and answers.

    Schemas hold what the calls check; an `ip` may also be a compressed IPv6 address in brackets with a port,
    which no short pattern says.
    """
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
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


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One call of the API, as its document describes it.

    Attributes:
        method: Of HTTP.
        path: Likewise.
        summary: One sentence.
        data: Schema of the envelope's `data`.
        body: Schema of the request's body; None if it has none.
        body_type: Its content type.
        parameters: OpenAPI parameter objects.
        failures: Beyond those that every call may have.
        content: OpenAPI content object of an answer that is no envelope.
        is_open: Answered without a token.
    """

    method: str
    path: str
    summary: str
    data: Mapping[str, Any] = field(default_factory=lambda: NULL)
    body: Mapping[str, Any] | None = None
    body_type: str = "application/json"
    parameters: tuple[Mapping[str, Any], ...] = ()
    failures: tuple[Code, ...] = ()
    content: Mapping[str, Any] | None = None
    is_open: bool = False

    def document(self) -> dict[str, Any]:
        """An OpenAPI operation object."""
        envelope = {
            **object_of(
                "status error data trace_id",
                status={"const": "OK"},
                error=NULL,
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
        if not self.is_open:
            failures += [Code.UNAUTHENTICATED]
        for code in sorted(failures):
            responses[str(code.status)] = {"$ref": f"#/components/responses/{code.name}"}
        document: dict[str, Any] = {
            "summary": self.summary,
            "operationId": f"{self.method.lower()}{self.path.replace('/', '_').replace('.', '_')}",
            "security": [{}] if self.is_open else [{}, {"bearer": []}],
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
    error = object_of(
        "code message reason",
        code={"const": int(code)},
        message={"type": "string"},
        reason={"type": "string"},
    )
    envelope = {
        **object_of(
            "status error data trace_id",
            status={"const": "ERROR"},
            error=error,
            data=NULL,
            trace_id={"type": "string"},
        ),
        "additionalProperties": False,
    }
    return {
        "description": MESSAGES[code],
        "headers": _TRACED,
        "content": {"application/json": {"schema": envelope}},
    }
