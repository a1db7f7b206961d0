"""Bytes of the metadata-center service's calls for gateways: what client and server have to agree on.

Rules:
    1. A stream is frames: the length in 4 bytes, little-endian, then so many bytes, one message each. A
       frame of no bytes says that the service is alive.
    2. A reservation's body is one frame with the update, then a MessagePack array of the reservations.
    3. Whatever bytes come, decoding returns valid values or raises `MessageError`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import Struct
from typing import Annotated, Final

import msgspec

from metadata_center.sharing.messages import (
    MAX_MESSAGE_BYTES,
    MAX_RESERVATIONS,
    MessageError,
    Reservation,
    Update,
    decode,
    encode,
)

SHARES_PATH: Final = "/v1/shares"
RESERVE_PATH: Final = "/v1/shares/reserve"
EVENTS_PATH: Final = "/v1/shares/events"

MESSAGE_TYPE: Final = "application/vnd.tokenway.update"
"""Content type of one message."""

RESERVE_TYPE: Final = "application/vnd.tokenway.reserve"
"""Content type of what Rule 2 says."""

FRAMES_TYPE: Final = "application/vnd.tokenway.frames"
"""Content type of frames."""

KEEP_ALIVE_S: Final = 2.0
"""The service says that it is alive after this long without a message."""

KEEP_ALIVE: Final = bytes(4)

_LENGTH: Final = Struct("<I")


def frame(message: bytes) -> bytes:
    """One frame."""
    return _LENGTH.pack(len(message)) + message


class Deframer:
    """Frames out of bytes as they come; holds one frame and what came with it.

    Args:
        skip: Frames longer than any message are left out and counted, as far as they are there: for a whole
            body, whose end shows whether its frames were any. A stream cannot know, and ends.
    """

    def __init__(self, *, skip: bool = False) -> None:
        self._buffer = bytearray()
        self._at = 0
        self._skip = skip
        self.skipped = 0
        """Frames left out."""

    def feed(self, data: bytes) -> None:
        """Append what was received."""
        del self._buffer[: self._at]
        self._at = 0
        self._buffer += data

    def take(self) -> bytes | None:
        """The next message, empty for a keep-alive; None if it has not all come yet.

        Raises:
            MessageError: It would be longer than any message; the stream cannot be used any more.
        """
        buffer = self._buffer
        while len(buffer) - self._at >= _LENGTH.size:
            at = self._at
            (length,) = _LENGTH.unpack_from(buffer, at)
            end = at + _LENGTH.size + length
            if length > MAX_MESSAGE_BYTES and not (self._skip and end <= len(buffer)):
                raise MessageError(f"a frame of {length} bytes; accepted: {MAX_MESSAGE_BYTES}")
            if len(buffer) < end:
                return None
            self._at = end
            if length <= MAX_MESSAGE_BYTES:
                return bytes(memoryview(buffer)[at + _LENGTH.size : end])
            self.skipped += 1
        return None

    @property
    def is_empty(self) -> bool:
        """True if no part of a frame is left."""
        return self._at == len(self._buffer)


def encode_frames(updates: Iterable[Update]) -> bytes:
    """One frame per update."""
    return b"".join(frame(encode(update)) for update in updates)


def encode_reserve(update: Update, reservations: Sequence[Reservation]) -> bytes:
    """The body that asks for places (Rule 2)."""
    return frame(encode(update)) + _ENCODER.encode(reservations)


def decode_reserve(body: bytes) -> tuple[Update, list[Reservation]]:
    """What a member says, and what it asks for.

    Raises:
        MessageError: The body holds no such thing.
    """
    deframer = Deframer()
    deframer.feed(body)
    message = deframer.take()
    if message is None:
        raise MessageError("no frame")
    update = decode(message)
    if update.blocks or update.leaving:
        raise MessageError("a reservation's update has no blocks and does not leave")
    try:
        reservations = _DECODER.decode(memoryview(body)[_LENGTH.size + len(message) :])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise MessageError("no reservations") from exc
    for asked in reservations:
        if len({candidate.endpoint for candidate in asked.candidates}) != len(asked.candidates):
            raise MessageError("an endpoint is a candidate twice")
    return update, reservations


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(
    Annotated[list[Reservation], msgspec.Meta(min_length=1, max_length=MAX_RESERVATIONS)]
)
