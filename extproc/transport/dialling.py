"""Calls that Tokenway makes: one stream of bytes in both directions, over a connection of its own.

Rules:
    1. A call is made anew for each attempt, with a connection that no other call shares, so that the waits
       between attempts are the caller's alone.
    2. A peer that says nothing at all is noticed by pings: `KEEPALIVE_S` after its last word, and
       `KEEPALIVE_TIMEOUT_S` for the answer. istiod takes a ping each 15 s for too many.
    3. The caller gets each message and, once, of the end; of nothing after `close`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from metadata_center.files import open_regular

_log = logging.getLogger("tokenway.dialling")

KEEPALIVE_S: Final = 20.0
KEEPALIVE_TIMEOUT_S: Final = 10.0

MAX_WAITING: Final = 1_024
"""Messages that wait to be sent; a peer that lets more of them wait takes none."""

_MAX_PEM_BYTES: Final = 1024 * 1024

_TOO_LARGE: Final = "larger than max"
"""In gRPC's words about a message over the limit; a peer's own RESOURCE_EXHAUSTED has others."""

_SILENT: Final = ("ping timeout", "keepalive watchdog")


@dataclass(frozen=True, slots=True)
class CertificatePair:
    """A certificate and its key, PEM each; never logged."""

    chain_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)


def certificate_pair(cert_file: str, key_file: str) -> CertificatePair:
    """What the files have now, if they belong together.

    Raises:
        OSError: One cannot be read; `ssl.SSLError`, which is one, if it is no certificate or no key without a
            passphrase, or the key is another certificate's.
    """
    pair = CertificatePair(content(cert_file, _MAX_PEM_BYTES), content(key_file, _MAX_PEM_BYTES))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(cert_file, key_file, password="")  # none, and no question for one
    return pair


def content(path: str, limit_bytes: int) -> bytes:
    """The beginning of a file.

    Raises:
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        return file.read(limit_bytes)


@dataclass(frozen=True, slots=True)
class Place:
    """Where to call, and how.

    Attributes:
        address: `host:port`.
        ca_pem: Speak TLS with a peer whose certificate this CA signed; None speaks clear text.
        pair: Show the peer this certificate.
        server_name: The name in the peer's certificate; None takes the host of the address.
        headers: Metadata of the call; never logged.
    """

    address: str
    ca_pem: bytes | None = None
    pair: CertificatePair | None = None
    server_name: str | None = None
    headers: Sequence[tuple[str, str]] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a call is over.

    Attributes:
        detail: Status and words, for the log.
        is_too_large: A message was larger than the limit.
        is_silent: The peer had not answered pings.
    """

    detail: str
    is_too_large: bool = False
    is_silent: bool = False


class DialledCall:
    """One call.

    Args:
        place: Where.
        method: `/service/Method`.
        limit_bytes: Of a message that comes.
        on_message: Called with each.
        on_end: Called once, unless it was closed before.
    """

    def __init__(
        self,
        place: Place,
        method: str,
        limit_bytes: int,
        on_message: Callable[[bytes], None],
        on_end: Callable[[Ending], None],
    ) -> None:
        self._place = place
        self._method = method
        self._limit_bytes = limit_bytes
        self._on_message = on_message
        self._on_end = on_end
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue(MAX_WAITING)
        self._task = asyncio.get_running_loop().create_task(self._run(), name="dialled call")
        self._is_closed = False

    def send(self, message: bytes) -> None:
        """Send this, after what was given before."""
        try:
            self._outgoing.put_nowait(message)
        except asyncio.QueueFull:
            self._end(Ending(f"{MAX_WAITING} messages wait to be sent"))

    async def close(self) -> None:
        """End it, without a word to the caller. Idempotent."""
        self._is_closed = True
        self._task.cancel()
        await asyncio.wait([self._task])

    def _end(self, ending: Ending) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._task.cancel()
            self._on_end(ending)

    async def _run(self) -> None:
        channel = _channel(self._place, self._limit_bytes)
        try:
            ending = await self._converse(channel)
        except grpc.aio.AioRpcError as error:
            ending = _ending(error.code(), error.details())
        except asyncio.CancelledError:
            if not self._is_closed:
                raise
            return
        except Exception as error:  # a bug of ours or of gRPC's: the caller tries again
            _log.exception("a call failed")
            ending = Ending(type(error).__name__)
        finally:
            await channel.close(grace=None)
        self._end(ending)

    async def _converse(self, channel: Any) -> Ending:
        call = channel.stream_stream(self._method)(metadata=tuple(self._place.headers) or None)
        writer = asyncio.create_task(self._write(call), name="dialled call: writing")
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                if self._is_closed:
                    break
                self._on_message(message)
            return _ending(await call.code(), await call.details())
        finally:
            writer.cancel()
            call.cancel()
            await asyncio.wait([writer])

    async def _write(self, call: Any) -> None:
        """Write until the call is over; how it ended, the reading side says."""
        with contextlib.suppress(Exception):
            while True:
                await call.write(await self._outgoing.get())


def _channel(place: Place, limit_bytes: int) -> Any:
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", limit_bytes),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1e3)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1e3)),
        ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1e3)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if place.ca_pem is None:
        return grpc.aio.insecure_channel(place.address, options)
    if place.server_name is not None:
        options.append(("grpc.ssl_target_name_override", place.server_name))
    pair = () if place.pair is None else (place.pair.key_pem, place.pair.chain_pem)
    credentials = grpc.ssl_channel_credentials(place.ca_pem, *pair)
    return grpc.aio.secure_channel(place.address, credentials, options)


def _ending(code: grpc.StatusCode, details: str | None) -> Ending:
    words = details or ""
    return Ending(
        f"{code.name}: {words}"[:1_000],
        code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in words,
        any(sign in words.lower() for sign in _SILENT),
    )
