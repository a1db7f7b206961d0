"""JSON and errors as vLLM's server words them."""

from __future__ import annotations

import json
from typing import Any

import orjson
from aiohttp import web


class ApiError(Exception):
    """An answer in vLLM's error shape."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.param = param

    def response(self) -> web.Response:
        """The HTTP form."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        return json_response({"error": error}, self.status)


def json_response(value: Any, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def decode_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        ApiError: 400 in vLLM's words.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        try:
            json.loads(raw)
            message, position = "Invalid encoding", 0
        except json.JSONDecodeError as error:
            message, position = error.msg, error.pos
        except UnicodeDecodeError as error:
            message, position = error.reason, error.start
        detail = {
            "type": "json_invalid",
            "loc": f"body.{position}",
            "msg": "JSON decode error",
            "input": "<dict of 0 items>",
            "ctx": {"error": message},
        }
        raise ApiError(400, "Bad Request", f"1 validation error:\n  {detail}", f"body.{position}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "Bad Request", "1 validation error:\n  the body must be an object", "body")
    return value
