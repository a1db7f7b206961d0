"""A protobuf message taken apart by hand, where to decode it whole copies too much or loses too much.

Source: https://protobuf.dev/programming-guides/encoding/. Groups, which no message here has, are none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

VARINT: Final = 0
LEN: Final = 2
_FIXED_BYTES: Final = {1: 8, 5: 4}
"""Bytes of the wire types of one size."""

_VARINT_BITS: Final = 64


class NoFieldError(ValueError):
    """Bytes that are no field; says what is wrong."""


def varint(message: bytes | bytearray | memoryview, at: int) -> tuple[int, int]:
    """A number, and where it ends.

    Raises:
        NoFieldError: It has no end within `message` or its 64 bits.
    """
    value = shift = 0
    while shift < _VARINT_BITS and at < len(message):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise NoFieldError("a number has no end")


def fields(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message: tag, where it begins, where its content does, and where it ends.

    Raises:
        NoFieldError: At what is none; the fields before it were given.
    """
    at = 0
    while at < len(message):
        tag, content = varint(message, at)
        kind = tag & 7
        if kind == VARINT:
            _, stop = varint(message, content)
        elif kind == LEN:
            size, content = varint(message, content)
            stop = content + size
        elif kind in _FIXED_BYTES:
            stop = content + _FIXED_BYTES[kind]
        else:
            raise NoFieldError(f"a field of kind {kind}")
        if stop > len(message):
            raise NoFieldError("a field has no end")
        yield tag, at, content, stop
        at = stop
