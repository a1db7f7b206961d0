"""Bodies that are read by hand: what protobuf would have said, byte for byte."""

from __future__ import annotations

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.protocol import wire


@pytest.mark.parametrize("size", [0, 10, 65_000, 65_536, 300_000, 2 * 1024 * 1024 - 20, 2 * 1024 * 1024 + 1])
@pytest.mark.parametrize("is_view", [False, True])
@pytest.mark.parametrize("end_of_stream", [False, True])
def test_a_body_is_what_protobuf_says(size: int, is_view: bool, end_of_stream: bool) -> None:
    """Of any size, whether the message came in one piece or was put together while it came."""
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    raw = pb.ProcessingRequest(
        request_body=pb.HttpBody(body=body, end_of_stream=end_of_stream)
    ).SerializeToString()
    message = wire.parse(memoryview(raw) if is_view else raw)
    assert message.WhichOneof("request") == "request_body"
    assert message.request_body.body == body
    assert isinstance(message.request_body.body, bytes) or size > 65_000


@pytest.mark.parametrize("cut", [1, 5, 100_000])
def test_a_message_that_is_cut_short_is_left_to_protobuf(cut: int) -> None:
    """It is refused there."""
    raw = pb.ProcessingRequest(request_body=pb.HttpBody(body=b"x" * 200_000)).SerializeToString()
    with pytest.raises(Exception, match="parsing"):
        wire.parse(raw[:-cut])
