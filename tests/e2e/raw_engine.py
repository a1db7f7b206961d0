"""An engine whose answers are written byte by byte, as no HTTP library writes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

_HEALTHY = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


async def posts(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Each POST of a connection, once it is read, until the connection ends; probes are answered."""
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            _, _, length = head.partition("content-length: ")
            await reader.readexactly(int(length.split()[0]) if length else 0)
            if head.startswith("post"):
                yield
            else:
                writer.write(_HEALTHY)
