"""gRPC messages in the DATA of a stream: cut out of it, and framed for it.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md, "Length-Prefixed-Message".
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

import numpy as np

from extproc.transport.seam import Received, Status

PREFIX: Final = struct.Struct(">BI")
"""Compressed or not; length."""

PREFIX_BYTES: Final = PREFIX.size

_SMALL_BYTES: Final = 1_024

LARGE_BYTES: Final = 64 * 1024
"""Messages from here on are put together while they come: two copies less, and no end that takes long."""


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


def allocated(num_bytes: int) -> memoryview:
    """Memory that nobody clears before it is written; a bytearray is cleared at once."""
    return np.empty(num_bytes, np.uint8).data


class MessageReader:
    """Cuts messages out of one stream's DATA.

    Args:
        max_bytes: A longer message is refused as soon as its length is known.
        allocate: Memory for a large one.
    """

    __slots__ = ("_allocate", "_large", "_max_bytes", "_num_bytes", "_parts", "_size")

    def __init__(self, max_bytes: int, allocate: Callable[[int], memoryview] = allocated) -> None:
        self._max_bytes = max_bytes
        self._allocate = allocate
        self._large: memoryview | None = None
        self._parts: list[bytes | bytearray] = []
        self._num_bytes = 0
        self._size: int | None = None

    @property
    def is_between(self) -> bool:
        """No part of a message is held."""
        return not self._num_bytes and self._size is None

    @property
    def size(self) -> int:
        """Bytes of the message that is being received, with its prefix; 0 if that is not known yet."""
        return 0 if self._size is None else self._size + PREFIX_BYTES

    @property
    def missing(self) -> int:
        """Bytes of it that have yet to come."""
        return 0 if self._size is None else self._size - self._num_bytes

    @property
    def is_large(self) -> bool:
        """A large message is being put together."""
        return self._large is not None

    def place(self, num_bytes: int) -> memoryview | None:
        """Memory for so many bytes more, which count as written; None if they are not within a large message.

        That is, if there is none, or if they end it.
        """
        large = self._large
        if large is None:
            return None
        at = self._num_bytes
        end = at + num_bytes
        if end >= len(large):
            return None
        self._num_bytes = end
        return large[at:end]

    def feed(self, data: bytes) -> list[Received]:
        """The messages that are whole now; a large one is a memoryview.

        Raises:
            MessageError: A message is too long or compressed. Nothing more can be read.
        """
        if self._large is not None:
            return self._feed_large(self._large, data)
        self._hold(data)
        if self._num_bytes < (PREFIX_BYTES if self._size is None else self._size):
            return []
        whole, at, messages = b"".join(self._parts), 0, list[Received]()
        while True:
            if self._size is None:
                if len(whole) - at < PREFIX_BYTES:
                    break
                self._size = self._read_prefix(whole, at)
                at += PREFIX_BYTES
            size = self._size
            if len(whole) - at < size:
                break
            messages.append(whole[at : at + size])
            at += size
            self._size = None
        rest = whole[at:]
        self._num_bytes = len(rest)
        if self._size is not None and self._size >= LARGE_BYTES:
            self._parts, self._large = [], self._allocate(self._size)
            self._large[: len(rest)] = rest
        else:
            self._parts = [rest] if rest else []
        return messages

    def _feed_large(self, large: memoryview, data: bytes) -> list[Received]:
        at = self._num_bytes
        end = min(at + len(data), len(large))
        large[at:end] = data[: end - at]
        self._num_bytes = end
        if end < len(large):
            return []
        self._large, self._size, self._num_bytes = None, None, 0
        rest = data[end - at :]
        return [large, *(self.feed(rest) if rest else ())]

    def _hold(self, data: bytes) -> None:
        """Keep a part as it is, but small ones together: an object for each byte weighs forty times it."""
        parts = self._parts
        self._num_bytes += len(data)
        if len(data) >= _SMALL_BYTES:
            parts.append(data)
        elif parts and isinstance(last := parts[-1], bytearray):
            last += data
        else:
            parts.append(bytearray(data))

    def _read_prefix(self, data: bytes, at: int) -> int:
        flag, size = PREFIX.unpack_from(data, at)
        if flag:
            raise MessageError(Status.INTERNAL, "a compressed message, and no encoding agreed on")
        if size > self._max_bytes:
            raise MessageError(
                Status.RESOURCE_EXHAUSTED,
                f"a message of {size} bytes, and at most {self._max_bytes} are taken",
            )
        return int(size)
