"""gRPC messages in the DATA of a stream: cut out of it, and framed for it.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md, "Length-Prefixed-Message".
"""

from __future__ import annotations

import struct
from typing import Final

from extproc.transport.seam import Status

PREFIX: Final = struct.Struct(">BI")
"""Compressed or not; length."""

PREFIX_BYTES: Final = PREFIX.size


class MessageError(Exception):
    """A message that is not taken.

    Args:
        status: How its call ends.
        detail: For the peer.
    """

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class MessageReader:
    """Cuts messages out of one stream's DATA.

    Args:
        max_bytes: A longer message is refused as soon as its length is known.
    """

    __slots__ = ("_max_bytes", "_part", "_size")

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._part = bytearray()
        self._size: int | None = None

    @property
    def is_between(self) -> bool:
        """No part of a message is held."""
        return not self._part and self._size is None

    @property
    def size(self) -> int:
        """Bytes of the message that is being received, with its prefix; 0 if that is not known yet."""
        return 0 if self._size is None else self._size + PREFIX_BYTES

    @property
    def missing(self) -> int:
        """Bytes of it that have yet to come."""
        return 0 if self._size is None else self._size - len(self._part)

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are whole now.

        Raises:
            MessageError: A message is too long or compressed. Nothing more can be read.
        """
        part = self._part
        messages: list[bytes] = []
        part += data
        while True:
            if self._size is None:
                if len(part) < PREFIX_BYTES:
                    return messages
                flag, size = PREFIX.unpack_from(part)
                if flag:
                    raise MessageError(Status.INTERNAL, "a compressed message, and no encoding agreed on")
                if size > self._max_bytes:
                    raise MessageError(
                        Status.RESOURCE_EXHAUSTED,
                        f"a message of {size} bytes, and at most {self._max_bytes} are taken",
                    )
                self._size = size
                del part[:PREFIX_BYTES]
            if len(part) < self._size:
                return messages
            messages.append(bytes(memoryview(part)[: self._size]))
            del part[: self._size]
            self._size = None
