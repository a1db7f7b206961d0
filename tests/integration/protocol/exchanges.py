"""Messages of one ext_proc exchange."""

from __future__ import annotations

from typing import Any

from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.values.headers import REQUEST_ID_HEADER
from tests.conftest import CHAT


def headers(request_id: str, path: str = CHAT, method: str = "POST", **fields: Any) -> pb.ProcessingRequest:
    """The request headers message."""
    message = pb.ProcessingRequest(request_headers=pb.HttpHeaders(**fields))
    values = {":method": method, ":path": path, REQUEST_ID_HEADER: request_id}
    for name, value in values.items():
        message.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    return message


def body(text: bytes) -> pb.ProcessingRequest:
    """The request body message."""
    return pb.ProcessingRequest(request_body=pb.HttpBody(body=text, end_of_stream=True))


def chunk(text: bytes) -> pb.ProcessingRequest:
    """A response body message."""
    return pb.ProcessingRequest(response_body=pb.HttpBody(body=text))
