"""Protobuf's encoding of the few messages that this package makes by hand.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import struct


def embedded(field: int, *parts: bytes) -> bytes:
    """A message, made of its encoded fields, as a field of another."""
    message = b"".join(parts)
    return varint(field << 3 | 2) + varint(len(message)) + message


def text(field: int, value: str) -> bytes:
    """A string, which is never left out."""
    return embedded(field, value.encode())


def number(field: int, value: int) -> bytes:
    """An integer or enum, >= 0, or a bool."""
    return varint(field << 3) + varint(value)


def wrapped(field: int, value: int) -> bytes:
    """`google.protobuf.UInt32Value` and its kin: 0 is a message without fields, not an absent one."""
    return embedded(field, number(1, value) if value else b"")


def duration(field: int, seconds: int, nanoseconds: int = 0) -> bytes:
    """`google.protobuf.Duration`."""
    return embedded(
        field, number(1, seconds) if seconds else b"", number(2, nanoseconds) if nanoseconds else b""
    )


def double(field: int, value: float) -> bytes:
    """A double."""
    return varint(field << 3 | 1) + struct.pack("<d", value)


def varint(value: int) -> bytes:
    """An integer >= 0."""
    if value < 128:
        return bytes((value,))
    found = bytearray()
    while value >= 128:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)
