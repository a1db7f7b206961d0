"""What a call asks for, by its header fields, and the fields of every answer.

Source: RFC 9113, 8.2 and 8.3; https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from extproc.transport.http2.faults import ErrorCode, FaultReason, StreamFault
from extproc.transport.http2.headers import Field, encode
from extproc.transport.seam import Status

_CONTENT_TYPE: Final = b"application/grpc"

_CONNECTION_FIELDS: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
)
"""Of HTTP/1 alone: a block that has one is malformed."""

_PSEUDO: Final = frozenset((b":method", b":scheme", b":path", b":authority"))
_UPPER_CASE: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ")

_UNITS_S: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_MAX_TIMEOUT_DIGITS: Final = 8

_NO_MESSAGE_CHARACTERS: Final = " !\"#$&'()*+,/:;<=>?@[\\]^`{|}~"
"""What `grpc-message` has as it is, beside letters and digits: printable ASCII but `%`."""

_MAX_DETAIL_CHARS: Final = 1_024

RESPONSE_BLOCK: Final = b"\x88" + encode(
    ((b"content-type", _CONTENT_TYPE), (b"grpc-accept-encoding", b"identity"))
)
"""Header block before the first message: `:status 200`. Source of `88`: RFC 7541, appendix A."""

OK_BLOCK: Final = encode(((b"grpc-status", b"0"),))
"""Trailers of a call that ended well."""

TABLE_SIZE_0: Final = b"\x20"
"""Begins our first block: we use no table, whatever size the peer allows. Source: RFC 7541, 6.3."""


@dataclass(frozen=True, slots=True)
class Opening:
    """The header block of a call, understood.

    Attributes:
        path: `/service/method`.
        timeout_s: The peer waits so long; None for as long as it takes.
        refusal: The block of the answer that says why this call is none; None if it is one.
    """

    path: str
    timeout_s: float | None = None
    refusal: bytes | None = None


def opening(fields: Sequence[Field]) -> Opening:
    """What a call asks for.

    Raises:
        StreamFault: The fields are no HTTP/2 request.
    """
    values = _checked(fields)
    if values.get(b":method") != b"POST":
        return Opening("", refusal=http_block(405))
    content_type = values.get(b"content-type", b"")
    if not content_type.startswith(_CONTENT_TYPE) or content_type[len(_CONTENT_TYPE) :][:1] not in b"+;":
        return Opening("", refusal=http_block(415))
    path = values[b":path"].decode("ascii", "replace")
    encoding = values.get(b"grpc-encoding", b"identity")
    if encoding != b"identity":
        return Opening(path, refusal=refused(Status.UNIMPLEMENTED, "messages may not be compressed"))
    timeout = values.get(b"grpc-timeout")
    if timeout is None:
        return Opening(path)
    timeout_s = _seconds(timeout.decode("ascii", "replace"))
    if timeout_s is None:
        return Opening(path, refusal=refused(Status.INTERNAL, "grpc-timeout cannot be read"))
    return Opening(path, timeout_s)


def _checked(fields: Sequence[Field]) -> dict[bytes, bytes]:
    """The fields by name, once each of those that may come once."""
    values: dict[bytes, bytes] = {}
    is_regular = False
    for name, value in fields:
        if name[:1] == b":":
            if is_regular or name not in _PSEUDO or name in values:
                raise _malformed("pseudo-header fields are unknown, repeated or late")
        else:
            is_regular = True
            if not name or not _UPPER_CASE.isdisjoint(name):
                raise _malformed("a field name is empty or in upper case")
            if name in _CONNECTION_FIELDS or (name == b"te" and value != b"trailers"):
                raise _malformed("a field belongs to HTTP/1 connections")
        values[name] = value
    if not values.get(b":path") or b":method" not in values or b":scheme" not in values:
        raise _malformed("pseudo-header fields are missing")
    return values


def _malformed(detail: str) -> StreamFault:
    return StreamFault(FaultReason.REQUEST, ErrorCode.PROTOCOL_ERROR, detail)


def _seconds(timeout: str) -> float | None:
    """A `grpc-timeout` in seconds; None if it is not one."""
    digits, unit = timeout[:-1], timeout[-1:]
    if not (digits.isascii() and digits.isdigit() and len(digits) <= _MAX_TIMEOUT_DIGITS):
        return None
    scale_s = _UNITS_S.get(unit)
    return None if scale_s is None else int(digits) * scale_s


def http_block(status: int) -> bytes:
    """The only block of an answer to what is no call at all."""
    return encode(((b":status", str(status).encode()),))


def refused(status: Status, detail: str) -> bytes:
    """The only block of a call's answer: headers and trailers in one."""
    return RESPONSE_BLOCK + trailers(status, detail)


def trailers(status: Status, detail: str) -> bytes:
    """The block that ends a call with an error.

    Args:
        status: Any.
        detail: Cut at 1,024 characters.
    """
    message = quote(detail[:_MAX_DETAIL_CHARS], safe=_NO_MESSAGE_CHARACTERS)
    return encode(((b"grpc-status", str(int(status)).encode()), (b"grpc-message", message.encode())))
