"""Members that follow the shares: each gets every message, in order, on a response that does not end.

Rules:
    1. A follower gets what was sent after its response began.
    2. What one has not taken yet is bounded; beyond that, or if it takes nothing for `WRITE_TIMEOUT_S`, its
       connection is cut. It comes back, and catches up by a snapshot.
    3. Sending never waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from aiohttp import web

from metadata_center.service.calls import ServiceResponse
from metadata_center.sharing.http_messages import KEEP_ALIVE, KEEP_ALIVE_S, frame

MAX_FOLLOWERS: Final = 1024
"""As many as there can be members."""

MAX_PENDING_BYTES: Final = 4 << 20
"""Per follower: four of the largest messages, or 20,000 updates of a busy gateway."""

WRITE_TIMEOUT_S: Final = 5.0
"""With the socket's buffers full for so long, a follower is as good as gone."""


class _Follower:
    """One, on its way to its connection."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._woken = asyncio.Event()
        self.is_over = False

    def send(self, data: bytes) -> bool:
        """Queue frames; False if it is too slow and was cut off."""
        self._pending_bytes += len(data)
        if self._pending_bytes > MAX_PENDING_BYTES:
            self._transport.abort()
            self.end()
            return False
        self._pending.append(data)
        self._woken.set()
        return True

    def end(self) -> None:
        """Nothing more will come."""
        self.is_over = True
        self._pending.clear()
        self._woken.set()

    async def take(self) -> bytes:
        """What is pending, as soon as there is any; a keep-alive if that takes long."""
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):
                await self._woken.wait()
        except TimeoutError:
            return KEEP_ALIVE
        self._woken.clear()
        data = b"".join(self._pending)
        self._pending.clear()
        self._pending_bytes = 0
        return data


class Followers:
    """All of them."""

    def __init__(self) -> None:
        self._followers: set[_Follower] = set()
        self.cut_off = 0
        """Followers that were too slow so far."""

    def __len__(self) -> int:
        return len(self._followers)

    def send(self, messages: Iterable[bytes]) -> None:
        """Send messages to every follower."""
        if not self._followers:
            return
        data = b"".join(map(frame, messages))
        if data:
            slow = [follower for follower in self._followers if not follower.send(data)]
            self._followers.difference_update(slow)
            self.cut_off += len(slow)

    def end(self) -> None:
        """Let every response end."""
        for follower in self._followers:
            follower.end()

    async def follow(self, http: web.Request, answer: ServiceResponse) -> web.StreamResponse:
        """Answer, and go on until the caller leaves, is too slow, or all are ended."""
        response = web.StreamResponse(status=answer.status, headers=answer.headers)
        transport = http.transport
        if transport is None:
            return response
        follower = _Follower(transport)
        self._followers.add(follower)
        try:
            await response.prepare(http)
            data = answer.body
            while not follower.is_over:
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await response.write(data)
                data = await follower.take()
        except TimeoutError:
            transport.abort()
            self.cut_off += 1
        except ConnectionError:
            pass  # it left
        finally:
            self._followers.discard(follower)
        return response
