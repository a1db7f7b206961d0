"""One question to an endpoint picker, as a gateway asks it: headers and a body, and whom it is sent to."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

DESTINATION = "x-gateway-destination-endpoint"
_METHOD = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
_DEADLINE_S = 30.0


async def pick(
    channel: grpc.aio.Channel,
    body: Any = None,
    path: str = "/v1/chat/completions",
    headers: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """What `asked` says of a request that ends at once."""
    async with asked(channel, body, path, headers) as answer:
        return answer


@asynccontextmanager
async def asked(
    channel: grpc.aio.Channel,
    body: Any = None,
    path: str = "/v1/chat/completions",
    headers: Mapping[str, str] | None = None,
) -> AsyncIterator[tuple[int, str]]:
    """A request that runs: status of a refusal, else 0, and the endpoint that is named first.

    Args:
        channel: To the picker.
        body: JSON of the request; None asks without one, by GET.
        path: Of the request.
        headers: Further ones.
    """
    call = channel.stream_stream(
        _METHOD,
        request_serializer=pb.ProcessingRequest.SerializeToString,
        response_deserializer=pb.ProcessingResponse.FromString,
    )(timeout=_DEADLINE_S)
    first = pb.ProcessingRequest()
    first.request_headers.end_of_stream = body is None
    said = {
        ":method": "GET" if body is None else "POST",
        ":path": path,
        ":authority": "x",
        "content-type": "application/json",
        **(headers or {}),
    }
    for name, value in said.items():
        first.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    await call.write(first)
    if body is not None:
        second = pb.ProcessingRequest()
        second.request_body.body = json.dumps(body).encode()
        second.request_body.end_of_stream = True
        await call.write(second)
    answer = await call.read()
    try:
        if answer.WhichOneof("response") == "immediate_response":
            yield answer.immediate_response.status.code, ""
        else:
            changed = answer.request_headers.response.header_mutation.set_headers
            named = {option.header.key: option.header.raw_value.decode() for option in changed}
            yield 0, named[DESTINATION].split(",")[0]
    finally:
        call.cancel()
