"""Members meet at a `tokenway metadata-center`, over HTTP.

A share is published by a call of its own on a kept connection; what all publish comes on one response that
does not end. The service's one event loop makes the order, the same for all members.

Rules:
    1. Nothing is tried again here: the caller's next update says all that a failed one did.
    2. A stream on which nothing comes for `_SILENCE_S`, not even a keep-alive, is lost.
    3. Answers are bounded before they are held.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import aiohttp
import msgspec

from metadata_center.sharing.http_messages import (
    EVENTS_PATH,
    FRAMES_TYPE,
    KEEP_ALIVE_S,
    MESSAGE_TYPE,
    RESERVE_PATH,
    RESERVE_TYPE,
    SHARES_PATH,
    Deframer,
    encode_reserve,
)
from metadata_center.sharing.http_url import checked_http_url
from metadata_center.sharing.messages import (
    MAX_CANDIDATES,
    MAX_RESERVATIONS,
    MessageError,
    Reservation,
    Reserved,
    Update,
    decode,
    encode,
)
from metadata_center.sharing.transport import TransportError

TIMEOUT_S: Final = 2.0
"""Of a call, connecting included: the service answers in about a millisecond."""

MAX_CONNECTIONS: Final = 16
"""Besides the stream: members publish one update at a time, and reserve in parallel."""

MAX_SNAPSHOT_BYTES: Final = 64 << 20
"""500,000 rows: 500 members with 1,000 endpoints each."""

_MAX_ANSWER_BYTES: Final = 64 + MAX_RESERVATIONS * (32 + 17 * MAX_CANDIDATES)
"""An envelope with the most places, each total of 16 digits and a comma; a refusal is shorter."""

_SILENCE_S: Final = 3 * KEEP_ALIVE_S

_KEPT_S: Final = 30.0  # an idle connection; the service keeps it for 75


class _Place(msgspec.Struct):
    index: int
    totals: tuple[int, ...]


class _Envelope(msgspec.Struct):
    data: list[_Place]


_PLACES: Final = msgspec.json.Decoder(_Envelope)


class HttpTransport:
    """A `Transport` over the metadata-center service.

    Args:
        url: `http://host:port` or `https://host:port`, with or without a path that a proxy takes off.
        token: Sent as bearer token; None sends none.
        timeout_s: Of every call, > 0.

    Raises:
        TransportError: The URL has another form; the text does not quote it.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._url = checked_http_url(url)
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self.refused = 0
        """Messages received that were none, and skipped."""
        self.had_share = True
        """A service that lost what it knew was restarted, and its streams have ended."""

    async def publish(self, update: Update) -> None:
        """See `Transport.publish`."""
        try:
            body = encode(update)
        except MessageError as exc:
            raise TransportError(str(exc)) from exc
        await self._call("POST", SHARES_PATH, _MAX_ANSWER_BYTES, body, MESSAGE_TYPE)

    async def reserve(self, update: Update, reservations: Sequence[Reservation]) -> list[Reserved]:
        """See `Transport.reserve`."""
        try:
            body = encode_reserve(update, reservations)
        except MessageError as exc:
            raise TransportError(str(exc)) from exc
        answer = await self._call("POST", RESERVE_PATH, _MAX_ANSWER_BYTES, body, RESERVE_TYPE)
        try:
            places = _PLACES.decode(answer).data
        except (msgspec.DecodeError, RecursionError) as exc:
            raise TransportError("the metadata center answered with no places") from exc
        if len(places) != len(reservations) or not all(
            0 <= place.index < len(asked.candidates) == len(place.totals)
            for place, asked in zip(places, reservations, strict=True)
        ):
            raise TransportError("the metadata center answered with other places than asked for")
        return [Reserved(place.index, place.totals) for place in places]

    async def snapshot(self) -> list[Update]:
        """See `Transport.snapshot`."""
        deframer = Deframer(skip=True)
        deframer.feed(await self._call("GET", SHARES_PATH, MAX_SNAPSHOT_BYTES))
        updates, refused = _taken(deframer)
        self.refused += refused + deframer.skipped
        if not deframer.is_empty:
            raise TransportError("the snapshot is cut short")
        return updates

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[AsyncIterator[Update]]:
        """See `Transport.subscribe`."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout.total, sock_read=_SILENCE_S)
        try:
            async with asyncio.timeout(self._timeout.total):
                response = await self._open().get(self._url + EVENTS_PATH, timeout=timeout)
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            raise _failure(exc) from exc
        try:
            _check(response, FRAMES_TYPE)
            stream = _Stream(self, response)
            try:
                async with asyncio.timeout(self._timeout.total):
                    await stream.fill()  # the first keep-alive: the service sends us all from here on
            except TimeoutError as exc:
                raise _failure(exc) from exc
            yield stream
        finally:
            response.close()

    async def close(self) -> None:
        """Close all connections; the next call opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                # The stream holds one of these, so that many calls may be under way besides it.
                connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS + 1, keepalive_timeout=_KEPT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
            )
        return self._session

    async def _call(
        self, method: str, path: str, max_bytes: int, body: bytes | None = None, content_type: str = ""
    ) -> bytes:
        headers = {"Accept-Encoding": "identity"}
        if body is not None:
            headers["Content-Type"] = content_type
        try:
            async with self._open().request(
                method,
                self._url + path,
                data=body,
                headers=headers,
                timeout=self._timeout,
                allow_redirects=False,
            ) as response:
                _check(response, None)
                found = bytearray()
                async for piece in response.content.iter_any():
                    found += piece
                    if len(found) > max_bytes:
                        raise TransportError(f"the metadata center answered with over {max_bytes} bytes")
                return bytes(found)
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            raise _failure(exc) from exc


class _Stream:
    """Messages of one response, in order. A wait for one may be cancelled without losing any."""

    def __init__(self, transport: HttpTransport, response: aiohttp.ClientResponse) -> None:
        self._transport = transport
        self._response = response
        self._deframer = Deframer()
        self._updates: deque[Update] = deque()

    def __aiter__(self) -> AsyncIterator[Update]:
        return self

    async def __anext__(self) -> Update:
        while not self._updates:
            await self.fill()
        return self._updates.popleft()

    async def fill(self) -> None:
        """Wait for bytes, and take the whole messages in them."""
        try:
            data = await self._response.content.readany()
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            raise _failure(exc) from exc
        if not data:
            raise TransportError("the metadata center ended the stream")
        self._deframer.feed(data)
        updates, refused = _taken(self._deframer)
        self._updates.extend(updates)
        self._transport.refused += refused


def _taken(deframer: Deframer) -> tuple[list[Update], int]:
    """Whole messages that have come, and how many of them were none."""
    updates, refused = [], 0
    try:
        while (message := deframer.take()) is not None:
            try:
                if message:
                    updates.append(decode(message))
            except MessageError:
                refused += 1
    except MessageError as exc:
        raise TransportError("the metadata center sent no frames") from exc
    return updates, refused


def _check(response: aiohttp.ClientResponse, content_type: str | None) -> None:
    if response.status != 200:
        raise TransportError(f"the metadata center refused with HTTP {response.status}")
    if content_type is not None and response.content_type != content_type:
        raise TransportError("that URL is no metadata center")


def _failure(exc: BaseException) -> TransportError:
    """Names the kind of failure alone: aiohttp's texts may have the URL and what was sent."""
    return TransportError(f"the metadata center cannot be reached: {type(exc).__name__}")
