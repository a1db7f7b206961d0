"""What a header block asks for."""

from __future__ import annotations

import pytest
from hpack import Decoder

from extproc.transport.http2.faults import StreamFault
from extproc.transport.http2.requests import opening, refused, trailers
from extproc.transport.seam import Status
from tests.http2_peers import CALL_FIELDS, PATH


def fields(**changes: bytes | None) -> list[tuple[bytes, bytes]]:
    """Those of a call, with some changed by name or (None) left out."""
    values: dict[bytes, bytes | None] = dict(CALL_FIELDS)
    values.update({name.replace("_", "-").encode(): value for name, value in changes.items()})
    return [(name, value) for name, value in values.items() if value is not None]


def decoded(block: bytes) -> dict[str, str]:
    """A block of ours."""
    return {str(name): str(value) for name, value in Decoder().decode(block)}


@pytest.mark.parametrize(
    "content_type", [b"application/grpc", b"application/grpc+proto", b"application/grpc;a=b"]
)
def test_a_call(content_type: bytes) -> None:
    """Its path, and no deadline."""
    asked = opening(fields(content_type=content_type))
    assert (asked.path, asked.timeout_s, asked.refusal) == (PATH, None, None)


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [
        (b"1H", 3600.0),
        (b"2M", 120.0),
        (b"3S", 3.0),
        (b"4m", 0.004),
        (b"5u", 5e-6),
        (b"99999999n", 0.099999999),
    ],
)
def test_deadlines(timeout: bytes, seconds: float) -> None:
    """Digits and a unit."""
    asked = opening(fields(grpc_timeout=timeout))
    assert asked.timeout_s == pytest.approx(seconds)
    assert asked.refusal is None


@pytest.mark.parametrize("timeout", [b"", b"S", b"1", b"1s", b"-1S", b"123456789S", b"1.5S", "١S".encode()])
def test_deadlines_that_are_none(timeout: bytes) -> None:
    """They are said to be, rather than guessed at."""
    asked = opening(fields(grpc_timeout=timeout))
    assert asked.refusal is not None
    assert decoded(asked.refusal)["grpc-status"] == "13"


def test_compression_is_refused_with_what_is_taken() -> None:
    """As gRPC's compression document asks for."""
    asked = opening(fields(grpc_encoding=b"gzip"))
    assert asked.refusal is not None
    answer = decoded(asked.refusal)
    assert (answer["grpc-status"], answer["grpc-accept-encoding"]) == ("12", "identity")
    assert opening(fields(grpc_encoding=b"identity")).refusal is None


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        (b"application/json", "415"),
        (b"application/grpcx", "415"),
        (None, "415"),
        (b"application/grpc-web", "415"),
    ],
)
def test_other_content_is_refused_by_http(content_type: bytes | None, status: str) -> None:
    """It is no gRPC, so its peer would not read a gRPC status."""
    asked = opening(fields(content_type=content_type))
    assert asked.refusal is not None
    assert decoded(asked.refusal) == {":status": status}


def test_other_methods_are_refused_by_http() -> None:
    """A call is a POST."""
    values = [(name, b"GET" if name == b":method" else value) for name, value in fields()]
    asked = opening(values)
    assert asked.refusal is not None
    assert decoded(asked.refusal) == {":status": "405"}


@pytest.mark.parametrize(
    "malformed",
    [
        [],
        [(b":method", b"POST")],
        [*CALL_FIELDS, (b":path", b"/")],
        [*CALL_FIELDS, (b":path2", b"/")],
        [(b":method", b"POST"), *CALL_FIELDS],
        [(b"a", b""), *CALL_FIELDS],
        [*CALL_FIELDS, (b"Upper", b"")],
        [*CALL_FIELDS, (b"", b"")],
        [*CALL_FIELDS, (b"connection", b"close")],
        [*CALL_FIELDS, (b"transfer-encoding", b"chunked")],
        [*CALL_FIELDS[:4], (b"te", b"gzip")],
        [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"")],
        [(b":status", b"200"), *CALL_FIELDS],
    ],
)
def test_malformed_requests(malformed: list[tuple[bytes, bytes]]) -> None:
    """RFC 9113, 8.1.1: the stream is reset."""
    with pytest.raises(StreamFault):
        opening(malformed)


def test_details_are_encoded_and_bounded() -> None:
    """What `grpc-message` cannot carry is percent-encoded."""
    assert decoded(trailers(Status.INTERNAL, "a b%ü\n"))["grpc-message"] == "a b%25%C3%BC%0A"
    assert len(trailers(Status.INTERNAL, "x" * 100_000)) < 2_000
    assert decoded(refused(Status.UNIMPLEMENTED, "no"))[":status"] == "200"
