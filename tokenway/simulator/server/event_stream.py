"""Streamed answers, and connections that break."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from aiohttp import web


class EventStream:
    """The body of one streamed answer.

    Chunks are framed here and handed to the transport directly: a step may have a hundred of them, and a
    coroutine per chunk would cost more than the chunk. The transport's buffer is bounded by the output.
    """

    def __init__(self, request: web.Request, keep_alive_s: float | None, reset_after: int | None) -> None:
        self._request = request
        self._keep_alive_s = keep_alive_s
        self._reset_after = reset_after
        self._tokens = 0
        self._response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})

    async def open(self, request_id: str | None) -> None:
        """Send the headers."""
        if request_id is not None:
            self._response.headers["X-Request-Id"] = request_id
        self._response.enable_chunked_encoding()
        await self._response.prepare(self._request)

    def write(self, data: bytes) -> None:
        """Send one chunk if there is anything in it and anybody to read it."""
        transport = self._request.transport
        if data and transport is not None and not transport.is_closing():
            transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def write_token(self, data: bytes) -> None:
        """Send one token's chunk, or reset the connection if a fault says so."""
        if self._tokens == self._reset_after:
            reset(self._request)
        else:
            self._tokens += 1
            self.write(data)

    async def finish(self, done: asyncio.Future[None]) -> web.StreamResponse:
        """Wait for the end, commenting until the first token if asked to, and end the body."""
        while self._keep_alive_s is not None and not self._tokens and not done.done():
            await asyncio.wait((done,), timeout=self._keep_alive_s)
            if not self._tokens:
                self.write(b": keep-alive\n\n")
        await done
        with suppress(ConnectionResetError):
            await self._response.write_eof()
        return self._response


def reset(request: web.Request) -> None:
    """Break the connection that a request came on."""
    if request.transport is not None:
        request.transport.abort()
