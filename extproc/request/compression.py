"""Compressed request bodies: what the client compressed, decoded within bounds.

Rules:
    1. Any bytes give the decoded body or a `RouterError`; nothing else escapes.
    2. Memory and time have bounds that the client does not choose: the result is at most `max_bytes`, and at
       most `MAX_RATIO` times what was sent (`ALWAYS_BYTES` are allowed to any body). A decoder is stopped
       when it goes beyond, not measured afterwards. Codings, and streams in a row, are counted.
    3. A body that ends too early, goes on behind its end or is damaged is refused: the engine would see other
       text than the client wrote.
    4. Pure, and free of state: a large body can be decoded anywhere, in a process of its own as well.

Sources: RFC 9110 section 8.4 (codings, their order, `identity`, `x-gzip`), RFC 9659 (zstd windows to 8 MiB).
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import brotli  # type: ignore[import-untyped]

from extproc.errors import ACCEPTED_ENCODINGS, Reason, RouterError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAX_RATIO: Final = 100
"""Decoded bytes for each that was sent. Conversations compress 3 to 20 times; deflate makes up to 1,032 bytes
of one, zstd and brotli many thousands."""

ALWAYS_BYTES: Final = 1024 * 1024
"""So much any body may become, however small: 1 to 5 ms of work."""

MAX_CODINGS: Final = 2
"""No client compresses twice but by accident."""

MAX_STREAMS: Final = 64
"""gzip members or zstd frames one after another, as parallel compressors write them. Each costs a decoder of
its own (up to 50 us), and 18 bytes are enough for one."""

_STEP: Final = 64 * 1024
"""Bytes given to a decoder at once: it copies what it did not come to."""

_ZSTD_WINDOW_LOG_MAX: Final = 23


class _Decoder(Protocol):
    """One compressed stream; the interface that zlib and zstd share."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def codings_of(header: str) -> tuple[str, ...]:
    """The codings a `Content-Encoding` names, in the order they were applied; `identity` is none.

    Raises:
        RouterError: UNSUPPORTED_ENCODING: one is not decoded here, or they are too many.
    """
    codings = []
    for name in header.lower().split(","):
        coding = _ALIASES.get(name.strip(), name.strip())
        if coding in ("", "identity"):
            continue
        if coding not in _DECODERS:
            raise RouterError(
                Reason.UNSUPPORTED_ENCODING,
                f"content-encoding {_shown(coding)} is not supported; accepted: {ACCEPTED_ENCODINGS}",
                param="body",
            )
        codings.append(coding)
    if len(codings) > MAX_CODINGS:
        raise RouterError(
            Reason.UNSUPPORTED_ENCODING,
            f"the body was compressed {len(codings)} times; accepted: at most {MAX_CODINGS}",
            param="body",
        )
    return tuple(codings)


def decode(body: bytes, codings: Sequence[str], max_bytes: int) -> bytes:
    """The body as it was before `codings` were applied.

    Takes up to some 20 ms per MiB of result (base64 in gzip; on a busy core), text about 5 ms. The decoders
    give up the interpreter's lock, so it may as well happen in a thread.

    Args:
        body: As it came.
        codings: From `codings_of`.
        max_bytes: Largest result, > 0.

    Raises:
        RouterError: INVALID_REQUEST: it is not what the header says. BODY_TOO_LARGE: it becomes too large.
    """
    if len(body) > max_bytes:
        raise _too_large(max_bytes)
    limit = min(max_bytes, max(ALWAYS_BYTES, MAX_RATIO * len(body)))
    for coding in reversed(codings):
        if not body:
            raise _broken(coding, "is empty")
        try:
            body = _DECODERS[coding](coding, body, limit)
        except (zlib.error, zstd.ZstdError, brotli.error):
            # Not chained: what a decoder complains of may quote the body.
            raise _broken(coding, "is damaged") from None
    return body


def _streams(make: Callable[[bytes], _Decoder], *, many: bool) -> Callable[[str, bytes, int], bytes]:
    def run(coding: str, body: bytes, limit: int) -> bytes:
        view = memoryview(body)
        pieces: list[bytes] = []
        room, at, count = limit, 0, 1
        decoder = make(body[:2])
        while True:
            if decoder.eof:
                at -= len(decoder.unused_data)
                if at == len(body):
                    return b"".join(pieces)
                if not many:
                    raise _broken(coding, "goes on behind its end")
                count += 1
                if count > MAX_STREAMS:
                    raise _broken(coding, f"has more than {MAX_STREAMS} streams")
                decoder = make(body[at : at + 2])
            if at == len(body):
                raise _broken(coding, "ends too early")
            step = bytes(view[at : at + _STEP])
            at += len(step)
            piece = decoder.decompress(step, room + 1)
            room -= len(piece)
            if room < 0:
                raise _too_large(limit)
            pieces.append(piece)

    return run


def _brotli(coding: str, body: bytes, limit: int) -> bytes:
    decoder = brotli.Decompressor()
    view = memoryview(body)
    pieces: list[bytes] = []
    room = limit
    for at in range(0, len(body), _STEP):
        step = bytes(view[at : at + _STEP])
        while True:
            piece = decoder.process(step, output_buffer_limit=room + 1)
            room -= len(piece)
            if room < 0:
                raise _too_large(limit)
            pieces.append(piece)
            if decoder.is_finished() or decoder.can_accept_more_data():
                break
            step = b""  # it holds what it did not come to
    if not decoder.is_finished():
        raise _broken(coding, "ends too early")
    return b"".join(pieces)


def _gzip(_: bytes) -> Any:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


def _deflate(begins: bytes) -> Any:
    """In zlib's wrapping, as the RFC has it, or without, as some send it."""
    is_wrapped = len(begins) == 2 and begins[0] & 0x0F == zlib.DEFLATED and not int.from_bytes(begins) % 31
    return zlib.decompressobj(wbits=zlib.MAX_WBITS if is_wrapped else -zlib.MAX_WBITS)


def _zstd(_: bytes) -> Any:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG_MAX})


_DECODERS: Final[dict[str, Callable[[str, bytes, int], bytes]]] = {
    "gzip": _streams(_gzip, many=True),
    "deflate": _streams(_deflate, many=False),
    "zstd": _streams(_zstd, many=True),
    "br": _brotli,
}
_ALIASES: Final = {"x-gzip": "gzip", "x-deflate": "deflate", "x-zstd": "zstd", "x-br": "br"}


def _shown(coding: str) -> str:
    """A client's own word, short and printable."""
    text = coding[:40].encode("ascii", "replace").decode()
    return f"`{text}`" if text.isprintable() else "given"


def _broken(coding: str, what: str) -> RouterError:
    return RouterError(
        Reason.INVALID_REQUEST, f"the request body is said to be {coding} and {what}", param="body"
    )


def _too_large(limit: int) -> RouterError:
    return RouterError(
        Reason.BODY_TOO_LARGE,
        f"the request body is larger than {limit} bytes when decompressed",
        param="body",
    )
